"""The :class:`Wiring` of one model: its table entry bound to its config.

A table entry holds templates; a config says how often they repeat and how wide they are. Whoever
asks "which linear of layer 3 reads the residual stream?" asks the wiring, which answers for one
model and remembers the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from calib.architectures.architecture import Architecture
from calib.architectures.lookup import architecture_for, architecture_named, supported_model_types
from calib.architectures.spec import (
    KINDS,
    MOST_LAYERS,
    Dimensions,
    EmbeddingSpec,
    LinearSpec,
    NormSpec,
    Site,
    Space,
)
from calib.errors import CheckpointError, RotationError
from calib.files.reading import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, eq=False)
class Wiring:
    """How the weights of one model are wired: which reads and writes which space, by their names.

    Attributes:
        architecture: the table entry of the family, templates unfilled.
        config: the model's transformers config. It is read, never written to.
    """

    architecture: Architecture
    config: PreTrainedConfig

    @property
    def family(self) -> str:
        """What the family is called, for messages."""
        return self.architecture.name

    @property
    def layer_norm(self) -> bool:
        """Whether the norms subtract the mean, so that an R1 has to fix the all-ones vector."""
        return self.architecture.norm_kind == "layer"

    @property
    def head(self) -> LinearSpec:
        """The output head."""
        return self.architecture.head

    @property
    def embeddings(self) -> tuple[EmbeddingSpec, ...]:
        """The tables that write the residual stream; the first is that of the tokens."""
        return self.architecture.embeddings

    @cached_property
    def sizes(self) -> Dimensions:
        """The sizes of the model; ``head_dim`` is not always ``hidden / heads``."""
        config = self.config
        if self.architecture.dimensions is not None:
            return self.architecture.dimensions(config)
        try:
            heads = int(config.num_attention_heads)
            hidden = int(config.hidden_size)
            return Dimensions(
                hidden=hidden,
                layers=int(config.num_hidden_layers),
                heads=heads,
                kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
                head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            )
        except (TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"the config of this {self.family} model holds a size that is none: {error}",
                hint="check config.json",
            ) from error

    @property
    def layers(self) -> range:
        """The indices of the decoder layers.

        Raises:
            CheckpointError: there are more than any model has.
        """
        if self.sizes.layers > MOST_LAYERS:
            raise CheckpointError(
                f"the config of this {self.family} model calls for {self.sizes.layers} layers",
                hint="check num_hidden_layers in config.json",
            )
        return range(self.sizes.layers)

    @cached_property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear, templates filled, in topological order; the head is the last."""
        layers = [spec for layer in self.layers for spec in self.layer_linears(layer)]
        return (*layers, self.head)

    @cached_property
    def norms(self) -> tuple[NormSpec, ...]:
        """Every norm whose gain folds into linears, templates filled; the final norm is the
        last.
        """
        layers = [norm.at(layer) for layer in self.layers for norm in self.architecture.norms]
        final = self.architecture.final_norm
        return tuple(layers) if final is None else (*layers, final)

    @cached_property
    def quantizable(self) -> Mapping[str, LinearSpec]:
        """Every linear of the decoder that may be quantized, by name, in topological order; the
        entry of a 3-D parameter once for every expert (:mod:`calib.architectures.experts`).
        """
        return {
            name: spec for spec in self.linears if spec.quantizable for name in self._names(spec)
        }

    @cached_property
    def by_name(self) -> Mapping[str, LinearSpec]:
        """Table entries by module name; those of a 3-D parameter by its own name and by that of
        every expert.
        """
        return {spec.name: spec for spec in self.linears} | dict(self.quantizable)

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """Module names of the decoder linears that may be quantized, in topological order.

        Experts that transformers 5 keeps as 3-D parameters are no modules: see
        :attr:`expert_parameters`.
        """
        return tuple(
            spec.name for spec in self.linears if spec.quantizable and spec.layout != "experts"
        )

    @cached_property
    def expert_parameters(self) -> tuple[str, ...]:
        """Names of the 3-D expert parameters ``[experts, out, in]``; empty for dense models."""
        return tuple(spec.name for spec in self.linears if spec.layout == "experts")

    @cached_property
    def turned_weights(self) -> frozenset[str]:
        """Keys of the weights that the module tree stores ``[in, out]`` (GPT-2's Conv1D).

        Everywhere else a weight is ``[out, in]``; see :mod:`calib.network.layout`.
        """
        return frozenset(spec.weight for spec in self.linears if spec.layout == "conv1d")

    @cached_property
    def norm_names(self) -> tuple[str, ...]:
        """Module names of the norms whose gain :func:`calib.fusing.fuse` folds away, the final norm
        last.
        """
        return tuple(norm.name for norm in self.norms)

    @cached_property
    def untouched(self) -> frozenset[str]:
        """Parameters that no rotation reaches, templates filled."""
        return frozenset(
            name.replace("{i}", str(layer))
            for name in self.architecture.untouched
            for layer in self.layers
        )

    @cached_property
    def capture_sites(self) -> tuple[Site, ...]:
        """The activations that R1 and R2 are trained on, in topological order; none for a rotation
        that is refused.

        R1 acts on the outputs of the norms (the inputs of the query and up projections), R2 on the
        inputs of the attention output projection. A site's module may flatten batch and sequence
        into one dimension (OPT).
        """
        sites: list[Site] = []

        for spec in self.linears:
            if spec.captured_at is None or spec.layer is None:
                continue
            if spec.reads is Space.RESIDUAL and self.refusal("r1") is None:
                sites.append(Site(spec.captured_at, Space.RESIDUAL, spec.layer, "r1"))
            elif spec.reads is Space.VALUE and self.refusal("r2") is None:
                sites.append(Site(spec.captured_at, Space.VALUE, spec.layer, "r2"))

        return tuple(sites)

    @property
    def experts(self) -> int:
        """How many experts a sparse layer has."""
        return self.architecture.expert_count(self.config)

    @property
    def generic(self) -> bool:
        """Whether the family is not in the table: its linears are known, and how they are wired is
        not.
        """
        return self.architecture.how == "generic"

    def layer_linears(self, layer: int) -> list[LinearSpec]:
        """The linears of decoder layer ``layer``, templates filled, in topological order."""
        entry = self.architecture
        kind = "sparse" if entry.sparse(self.config, layer) else "dense"
        return [
            spec.at(layer)
            for spec in entry.linears
            if (
                layer in spec.layers
                if isinstance(spec.layers, frozenset)
                else spec.layers in ("all", kind)
            )
        ]

    def attention(self, layer: int) -> str:
        """The attention module of decoder layer ``layer``, where R3 is applied."""
        return self.architecture.attention.replace("{i}", str(layer))

    @cached_property
    def block_prefix(self) -> str:
        """What the names of all decoder layers begin with, up to the index."""
        return self.architecture.attention.partition("{i}")[0]

    def block(self, layer: int) -> str:
        """Dotted path of decoder layer ``layer``."""
        return f"{self.block_prefix}{layer}"

    def uses_rope(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` applies rotary embeddings to queries and keys."""
        return self.architecture.rope(self.config, layer)

    def query_key_norms(self, layer: int) -> list[str]:
        """Modules that normalise queries and keys of decoder layer ``layer``, as far as R3 has to
        stand behind them.
        """
        return [name.replace("{i}", str(layer)) for name in self.architecture.query_key_norms]

    def readers(self, norm: str) -> list[LinearSpec]:
        """The linears that read the output of the norm named ``norm``, head included."""
        return [spec for spec in self.linears if spec.norm == norm]

    def ffn_readers(self, layer: int) -> list[LinearSpec]:
        """The down projections of decoder layer ``layer``: one, or one per branch where there are
        shared experts.
        """
        return [spec for spec in self.layer_linears(layer) if spec.reads is Space.FFN]

    def ffn_width(self, spec: LinearSpec) -> int:
        """Width of the ``ffn`` space that ``spec`` reads."""
        # GPT-2 leaves n_inner unset for four times the hidden size (transformers, GPT2Block).
        return int(getattr(self.config, spec.width) or 4 * self.sizes.hidden)

    def refusal(self, rotation: str) -> str | None:
        """Why the rotation ``"r1"``, ``"r2"``, ``"r3"`` or ``"r4"`` is not offered for this model;
        ``None`` if it is.

        Raises:
            RotationError: there is no rotation of that name.
        """
        if rotation not in KINDS:
            raise RotationError(
                f"there is no rotation {rotation!r}", hint=f"choose from {', '.join(KINDS)}"
            )
        return self.architecture.rotations_refused.get(rotation)

    def _names(self, spec: LinearSpec) -> list[str]:
        if spec.layout != "experts":
            return [spec.name]
        return [f"{spec.name}.{expert}" for expert in range(self.experts)]


def wiring_for(config: PreTrainedConfig) -> Wiring:
    """The wiring of the model that ``config`` describes.

    Raises:
        UnsupportedModelError: as for :func:`~calib.architectures.lookup.architecture_for`.
    """
    return Wiring(architecture_for(config), config)


def wiring_of(config: Mapping[str, Any]) -> Wiring:
    """The wiring of a config that was saved as a dictionary, such as an artifact holds; the same
    object for the same config.

    Raises:
        CheckpointError: transformers does not take the config.
        UnsupportedModelError: as for :func:`~calib.architectures.lookup.architecture_for`.
    """
    return _wiring_of_json(json.dumps(config, sort_keys=True))


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json asks for. Of a family in the table it imports no torch,
    and does not look at what of the config can be folded.

    Raises:
        CheckpointError: as for :func:`wiring_of`.
        UnsupportedModelError: as for :func:`~calib.architectures.lookup.architecture_for`.
    """
    model_type = str(config.get("model_type", "unknown"))
    if model_type in supported_model_types():
        return architecture_named(model_type)
    return wiring_of(config).architecture


@lru_cache(maxsize=8)
def _wiring_of_json(config: str) -> Wiring:
    from transformers import AutoConfig  # here, because it takes seconds to import

    try:
        loaded = AutoConfig.for_model(**json.loads(config))
    except Exception as error:  # checks of its own, which share no base class
        raise CheckpointError(
            f"transformers does not take the config of this model: {reason_of(error)}",
            hint="check config.json",
        ) from error
    return wiring_for(loaded)
