"""What the architecture table is made of: spaces, and the weights, norms and embeddings that read
and write them.

A rotation acts on a *space*, a stream of vectors that several weights write into and read from:

=============  =====================================================  ========
space          vectors                                                rotation
=============  =====================================================  ========
``residual``   the residual stream, width ``hidden_size``             R1
``value``      the values of one layer's attention, per KV head       R2
``query_key``  queries and keys after RoPE, per head                  R3
``ffn``        the input of the down projection                       R4
=============  =====================================================  ========

Names are templates: ``{i}`` stands for the decoder layer, ``{e}`` for the expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, NamedTuple

MOST_LAYERS = 10_000
"""Of any config that is looked at."""

Kind = Literal["r1", "r2", "r3", "r4"]
KINDS: tuple[Kind, ...] = ("r1", "r2", "r3", "r4")


class Space(StrEnum):
    """A stream of vectors that a rotation acts on."""

    RESIDUAL = "residual"
    VALUE = "value"
    QUERY_KEY = "query_key"
    FFN = "ffn"


SPACE_OF: dict[Kind, Space] = {
    "r1": Space.RESIDUAL,
    "r2": Space.VALUE,
    "r3": Space.QUERY_KEY,
    "r4": Space.FFN,
}


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that rotations depend on. Of a family that is not in the table, which
    has none, heads and their width are 0: its cache says them (:mod:`calib.network.cache_layout`).
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


class Part(NamedTuple):
    """One of the projections that a fused linear holds side by side along its output features."""

    role: Literal["query", "key", "value", "gate", "up"]
    space: Space


@dataclass(frozen=True)
class LinearSpec:
    """A linear map ``y = x W^T + b`` and the spaces of its ``x`` and ``y``."""

    name: str
    """Module name; for ``layout="experts"`` the name of the 3-D parameter itself."""
    reads: Space | None
    writes: Space | None = None
    """Space of all outputs; ``None`` where they leave the model (logits, router scores) or
    ``parts`` says more.
    """
    norm: str | None = None
    """Norm whose output this linear reads."""
    layout: Literal["linear", "conv1d", "experts"] = "linear"
    """How the module tree stores the weight: ``linear`` ``[out, in]``, ``conv1d`` ``[in, out]``,
    ``experts`` ``[experts, out, in]``.
    """
    parts: tuple[Part, ...] = ()
    """The projections of a fused linear, in the order of its output features."""
    interleaved: bool = False
    """The parts repeat for every head instead of following each other (GPT-NeoX)."""
    layers: Literal["all", "dense", "sparse"] | frozenset[int] = "all"
    """Which decoder layers have this linear: all, those with a plain MLP, those with experts, or
    those of these indices.
    """
    quantizable: bool = True
    """False for the output head, routers and gates, which stay in floating point."""
    captured_at: str | None = None
    """Module whose input is what this linear reads, where calibration captures that space."""
    width: str = "intermediate_size"
    """Config attribute with the width of the ``ffn`` space that this linear reads."""
    branch: str = ""
    """Names the ``ffn`` space where one layer has several of different width (shared experts)."""
    stacked_from: tuple[str, ...] = ()
    """Tensors of one expert in the checkpoint, whose rows follow each other in the 3-D parameter.
    """
    layer: int | None = None
    """The decoder layer, once :meth:`at` has filled the templates."""

    def at(self, layer: int) -> LinearSpec:
        """This linear in decoder layer ``layer``: ``{i}`` filled in everywhere."""
        return replace(
            self,
            name=self.name.replace("{i}", str(layer)),
            norm=self.norm and self.norm.replace("{i}", str(layer)),
            captured_at=self.captured_at and self.captured_at.replace("{i}", str(layer)),
            stacked_from=tuple(name.replace("{i}", str(layer)) for name in self.stacked_from),
            layer=layer,
        )

    @property
    def weight(self) -> str:
        """Name of the weight in the state dict."""
        return self.name if self.layout == "experts" else f"{self.name}.weight"

    @property
    def bias(self) -> str | None:
        """Name that the bias has in the state dict, if there is one; 3-D expert parameters have
        none.
        """
        return None if self.layout == "experts" else f"{self.name}.bias"

    def part(self, role: str, sizes: Dimensions) -> list[slice]:
        """Where the outputs of one part lie along the output features; several slices where parts
        are interleaved.

        Only attention parts (query, key, value) can be located.
        """
        widths = {"query": sizes.heads, "key": sizes.kv_heads, "value": sizes.kv_heads}
        if self.interleaved:
            position = [part.role for part in self.parts].index(role)  # type: ignore[arg-type]
            starts = [
                (len(self.parts) * head + position) * sizes.head_dim for head in range(sizes.heads)
            ]
            return [slice(start, start + sizes.head_dim) for start in starts]
        start = 0
        for part in self.parts:
            width = widths[part.role] * sizes.head_dim
            if part.role == role:
                return [slice(start, start + width)]
            start += width
        raise KeyError(f"{self.name} has no part {role!r}")


@dataclass(frozen=True)
class NormSpec:
    """A normalisation of the residual stream whose gain (and bias) folds into the linears that read
    it.
    """

    name: str

    def at(self, layer: int) -> NormSpec:
        """This norm in decoder layer ``layer``."""
        return NormSpec(self.name.replace("{i}", str(layer)))

    @property
    def weight(self) -> str:
        """Name of the gain in the state dict."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Name that the bias has in the state dict, if there is one."""
        return f"{self.name}.bias"


@dataclass(frozen=True)
class EmbeddingSpec:
    """A table of row vectors that are written into the residual stream: token or position
    embeddings.
    """

    name: str

    @property
    def weight(self) -> str:
        """Name of the table in the state dict."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Site:
    """One activation that calibration captures: the input of ``module``, vectors of ``space``."""

    module: str
    space: Space
    layer: int
    rotation: Literal["r1", "r2"]
