"""The :class:`Architecture`: everything rotq knows about a model family, as data, and the questions
asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from calib.architectures.spec import (
    KINDS,
    Dimensions,
    EmbeddingSpec,
    Kind,
    LinearSpec,
    NormSpec,
    Site,
    Space,
)
from calib.errors import RotationError


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
    final_norm: NormSpec
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
    rotations_refused: Mapping[str, str] = field(default_factory=dict)
    """Why a rotation is not offered for this family, by kind."""
    refusals: tuple[Refusal, ...] = ()
    rope: Callable[[Any, int], bool] = lambda config, layer: True
    """Whether a layer applies rotary embeddings to queries and keys."""
    sparse: Callable[[Any, int], bool] = lambda config, layer: False
    """Whether a layer has experts instead of a plain MLP."""
    experts: str | None = None
    """Module that holds the 3-D expert parameters."""

    def dimensions(self, config: Any) -> Dimensions:
        """The sizes of the model that ``config`` describes; ``head_dim`` is not always ``hidden /
        heads``.
        """
        heads = int(config.num_attention_heads)
        hidden = int(config.hidden_size)
        return Dimensions(
            hidden=hidden,
            layers=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        )

    def layer_linears(self, config: Any, layer: int) -> list[LinearSpec]:
        """The linears of decoder layer ``layer``, templates filled, in topological order."""
        kind = "sparse" if self.sparse(config, layer) else "dense"
        return [spec.at(layer) for spec in self.linears if spec.layers in ("all", kind)]

    def all_linears(self, config: Any) -> Iterator[LinearSpec]:
        """Every linear, templates filled, in topological order; the head is the last."""
        for layer in range(self.dimensions(config).layers):
            yield from self.layer_linears(config, layer)
        yield self.head

    def all_norms(self, config: Any) -> Iterator[NormSpec]:
        """Every norm whose gain folds into linears, templates filled; the final norm is the
        last.
        """
        for layer in range(self.dimensions(config).layers):
            yield from (norm.at(layer) for norm in self.norms)
        yield self.final_norm

    def linear_names(self, config: Any) -> list[str]:
        """Module names of the decoder linears that may be quantized, in topological order.

        Experts that transformers 5 keeps as 3-D parameters are no modules: see
        :meth:`expert_parameters`.
        """
        return [
            spec.name
            for spec in self.all_linears(config)
            if spec.quantizable and spec.layout != "experts"
        ]

    def expert_parameters(self, config: Any) -> list[str]:
        """Names of the 3-D expert parameters ``[experts, out, in]``; empty for dense models."""
        return [spec.name for spec in self.all_linears(config) if spec.layout == "experts"]

    def norm_names(self, config: Any) -> list[str]:
        """Module names of the norms whose gain :func:`calib.fusing.fuse` folds away, the final norm
        last.
        """
        return [norm.name for norm in self.all_norms(config)]

    def readers(self, norm: str, config: Any) -> list[LinearSpec]:
        """The linears that read the output of the norm named ``norm``, head included."""
        return [spec for spec in self.all_linears(config) if spec.norm == norm]

    def capture_sites(self, config: Any) -> list[Site]:
        """The activations that R1 and R2 are trained on, in topological order; none for a rotation
        that is refused.

        R1 acts on the outputs of the norms (the inputs of the query and up projections), R2 on the
        inputs of the attention output projection. A site's module may flatten batch and sequence
        into one dimension (OPT).
        """
        sites: list[Site] = []
        for spec in self.all_linears(config):
            if spec.captured_at is None or spec.layer is None:
                continue
            if spec.reads is Space.RESIDUAL and self.refusal("r1", config) is None:
                sites.append(Site(spec.captured_at, Space.RESIDUAL, spec.layer, "r1"))
            elif spec.reads is Space.VALUE and self.refusal("r2", config) is None:
                sites.append(Site(spec.captured_at, Space.VALUE, spec.layer, "r2"))
        return sites

    def refusal(self, rotation: str, config: Any) -> str | None:
        """Why the rotation ``"r1"``, ``"r2"``, ``"r3"`` or ``"r4"`` is not offered for this model;
        ``None`` if it is.

        Raises:
            RotationError: there is no rotation of that name.
        """
        if rotation not in KINDS:
            raise RotationError(
                f"there is no rotation {rotation!r}", hint=f"choose from {', '.join(KINDS)}"
            )
        return self.rotations_refused.get(rotation)

    @property
    def offered(self) -> tuple[Kind, ...]:
        """The kinds of rotations that are not refused for this family."""
        return tuple(kind for kind in KINDS if kind not in self.rotations_refused)

    def ffn_width(self, spec: LinearSpec, config: Any) -> int:
        """Width of the ``ffn`` space that ``spec`` reads."""
        # GPT-2 leaves n_inner unset for four times the hidden size (transformers, GPT2Block).
        return int(getattr(config, spec.width) or 4 * self.dimensions(config).hidden)

    def ffn_readers(self, config: Any, layer: int) -> list[LinearSpec]:
        """The down projections of decoder layer ``layer``: one, or one per branch where there are
        shared experts.
        """
        return [spec for spec in self.layer_linears(config, layer) if spec.reads is Space.FFN]
