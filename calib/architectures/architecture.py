"""The :class:`Architecture`: everything rotq knows about a model family, as data.

Questions are asked of a :class:`~calib.architectures.wiring.Wiring`, which binds it to a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from calib.architectures.spec import (
    KINDS,
    Dimensions,
    EmbeddingSpec,
    Kind,
    LinearSpec,
    NormSpec,
)

How = Literal["table", "generic"]
"""Where an :class:`Architecture` is from: the reviewed table, or the module tree of a config."""


@dataclass(frozen=True)
class Refusal:
    """A feature of a config under which rotq cannot keep the model's function, and why."""

    when: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True)
class Architecture:
    """One model family. Names are those of the transformers 5 module tree; ``{i}`` stands for the
    decoder layer.
    """

    name: str
    model_types: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    """The linears of one decoder layer, in topological order."""
    norms: tuple[NormSpec, ...]
    """The norms of one decoder layer that feed linears."""
    final_norm: NormSpec | None
    """``None`` where it is not known what the norms feed: none is folded then."""
    embeddings: tuple[EmbeddingSpec, ...]
    """The first one is the token embedding, which the head may be tied to."""
    head: LinearSpec
    attention: str
    """Attention module, where R3 is applied."""
    base_prefix: str = "model"
    """Prefix that tensors lack in checkpoints saved from the bare decoder."""
    norm_kind: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0
    """What the norm adds to its stored gain: 1 for Gemma."""
    untouched: tuple[str, ...] = ()
    """Parameters that no rotation reaches: norms of queries and keys, and norms after attention or
    MLP.
    """
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions from names in published checkpoints to names in the module tree."""
    published: tuple[tuple[str, str], ...] = ()
    """Parts of names, one after the other, from the module tree to published checkpoints."""
    biases: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    """Which linears have a bias, as a pattern of their last names, and the key of the config that
    says so with its default.
    """
    rotations_refused: Mapping[str, str] = field(default_factory=dict)
    """Why a rotation is not offered for this family, by kind."""
    refusals: tuple[Refusal, ...] = ()
    rope: Callable[[Any, int], bool] = lambda config, layer: True
    """Whether a layer applies rotary embeddings to queries and keys."""
    query_key_norms: tuple[str, ...] = ()
    """Norms of queries and keys, which R3 stands behind in layers without rotary embeddings."""
    sparse: Callable[[Any, int], bool] = lambda config, layer: False
    """Whether a layer has experts instead of a plain MLP."""
    experts: str | None = None
    """Module that holds the 3-D expert parameters."""
    expert_count: Callable[[Any], int] = lambda config: int(config.num_experts)
    """How many experts a sparse layer has. Mixtral's num_local_experts has the name num_experts as
    well, through the config's attribute_map.
    """
    dimensions: Callable[[Any], Dimensions] | None = None
    """The sizes of a model; ``None``: the config has them under the names that all have in common.
    """
    how: How = "table"
    kept: Mapping[str, str] = field(default_factory=dict)
    """Linears and experts that stay in float whatever is asked for, and why, by name; names are
    filled in.
    """

    @property
    def offered(self) -> tuple[Kind, ...]:
        """The kinds of rotations that are not refused for this family."""
        return tuple(kind for kind in KINDS if kind not in self.rotations_refused)
