"""Which linears share one smoothing scale, and what in front of them absorbs it.

    x <- x / s,  W <- W diag(s)         x W^T is unchanged for every s > 0

What makes ``x`` has to divide by ``s``, and everything that reads ``x`` has to multiply, quantized
or not:

======  ====================  ==============================================================
writer  x                     readers
======  ====================  ==============================================================
norm    its output            every linear behind it; routers and gates too
value   attention output,     the output projection; the query heads that share a KV head
        per head              share its factors, as they mix the same values
up      act(gate) * up        the down projection; ``up`` enters linearly
fc1     relu(fc1)             fc2: relu(x / s) = relu(x) / s
======  ====================  ==============================================================

An online R4 between the last two and their readers mixes the channels, so they are scaled in front
of it (SmoothRot, arXiv:2506.05413): the product of what is stored, ``W R4``, becomes
``W diag(s) R4``. The formula of SmoothQuant takes amax of the unrotated ``x`` and ``W``. A search
for a scale judges errors channel by channel, which R4 mixes, and leaves these pairs out.

Nothing absorbs the scale behind GELU or SiLU, or where a linear reads the residual stream itself.
Norms of queries and keys are never touched.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from calib.architectures import Dimensions, LinearSpec, NormSpec, Space, Wiring
from calib.rotations.rotation_set import Rotation, RotationSet

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_HEAD = "output head: the final norm is left as it is"
_EXPERTS = "fused expert parameters: each expert's down projection would need a scale of its own"
_SEARCH = "the online rotation R4 in front of it mixes the channels, and the scale is searched"
_NO_NORM = "it reads the residual stream itself: no norm in front of it can be scaled"


@dataclass(frozen=True)
class SmoothingGroup:
    """Linears that read the same activation through one scale vector ``s [width]``, and what writes
    it.
    """

    name: str
    """Module name of the writer; unique among the groups of a model."""
    writer: NormSpec | LinearSpec
    readers: tuple[LinearSpec, ...]
    """Everything that reads the activation, in topological order."""
    width: int
    """Channels that the writer makes."""
    rows: tuple[slice, ...] = ()
    """Where these lie among the output features of a linear; empty for a norm."""
    heads: tuple[int, int, int] | None = None
    """KV heads, query heads that share one, and head width, where readers see every channel once
    per query head.
    """
    rotation: Rotation | None = None
    """The R4 between writer and readers, which have its inverse in their weights."""

    @property
    def reader_names(self) -> tuple[str, ...]:
        """Names of the linears whose columns are multiplied."""
        return tuple(spec.name for spec in self.readers)

    @property
    def observed_at(self) -> str:
        """A module whose input is the activation; experts that are 3-D parameters are no
        modules.
        """
        return next(spec.name for spec in self.readers if spec.layout != "experts")

    def expanded(self, values: Tensor) -> Tensor:
        """``[width]`` to what the readers see ``[in]``: repeated for every query head of a KV
        head.
        """
        if self.heads is None:
            return values
        kv_heads, shared, head_dim = self.heads
        return values.reshape(kv_heads, 1, head_dim).expand(kv_heads, shared, head_dim).reshape(-1)

    def unrotated(self, weight: Tensor) -> Tensor:
        """The weight of a reader ``[out, in]`` as it would be without R4; float64 where there is
        one."""
        return weight if self.rotation is None else self.rotation.undo(weight.double())

    def largest(self, values: Tensor) -> Tensor:
        """``[in]`` to ``[width]``: the largest of the values that belong to one channel of the
        writer.
        """
        return values if self.heads is None else self._by_head(values).amax(dim=1).reshape(-1)

    def average(self, values: Tensor) -> Tensor:
        """``[in]`` to ``[width]``: the mean of the values that belong to one channel of the
        writer.
        """
        return values if self.heads is None else self._by_head(values).mean(dim=1).reshape(-1)

    def _by_head(self, values: Tensor) -> Tensor:
        assert self.heads is not None
        return values.reshape(self.heads)


def smoothing_groups(
    wiring: Wiring, rotations: RotationSet, layer: int | None = None, *, search: bool = False
) -> tuple[list[SmoothingGroup], dict[str, str]]:
    """The groups of a fused model, or of one decoder layer of it, and why the other linears are in
    none.

    Within a layer, groups whose writer is a linear come first: they change rows of linears that a
    norm's group then chooses its scale for.

    Args:
        wiring: that of the model.
        rotations: those of the model; the online ones run in front of some readers.
        layer: the decoder layer; ``None``: all of them, and the head.
        search: whether scales are searched by the errors of single channels, as no pair around R4
            can be.

    Returns:
        The groups, and the reason for every other linear that may be quantized, by name. A linear
        is a reader of exactly one group, or has a reason.
    """
    sizes = wiring.sizes
    groups: list[SmoothingGroup] = []
    reasons: dict[str, str] = {}
    for index in range(sizes.layers) if layer is None else [layer]:
        specs = wiring.layer_linears(index)
        for spec in specs:
            found = _behind_linear(spec, specs, wiring, rotations) if spec.norm is None else None
            if search and isinstance(found, SmoothingGroup) and found.rotation is not None:
                found = _SEARCH
            if isinstance(found, SmoothingGroup):
                groups.append(found)
            elif found is not None:
                reasons[spec.name] = found
        for norm in wiring.architecture.norms:
            readers = tuple(spec for spec in specs if spec.norm == norm.at(index).name)
            if not any(spec.quantizable for spec in readers):
                continue
            if _has_gain(wiring.config):
                groups.append(
                    SmoothingGroup(norm.at(index).name, norm.at(index), readers, sizes.hidden)
                )
            else:
                reasons |= {
                    spec.name: f"{norm.at(index).name} has no gain that could take a scale"
                    for spec in readers
                }
    if layer is None:
        reasons[wiring.head.name] = _HEAD

    return groups, reasons


def groups_of(
    wiring: Wiring,
    rotations: RotationSet,
    quantized: Collection[str],
    layer: int | None = None,
    *,
    search: bool = False,
) -> list[SmoothingGroup]:
    """The :func:`smoothing_groups` with a reader among ``quantized``, the names of linears: those
    worth smoothing.
    """
    groups, _ = smoothing_groups(wiring, rotations, layer, search=search)
    return [group for group in groups if any(name in quantized for name in group.reader_names)]


def _has_gain(config: PreTrainedConfig) -> bool:
    # OPT may have norms without parameters
    return bool(getattr(config, "layer_norm_elementwise_affine", True))


def _behind_linear(
    spec: LinearSpec,
    specs: Sequence[LinearSpec],
    wiring: Wiring,
    rotations: RotationSet,
) -> SmoothingGroup | str:
    """The group of a linear that reads no norm, or why there is none."""
    if spec.layout == "experts":
        return _EXPERTS
    if spec.reads is Space.VALUE:
        return _value_group(spec, specs, wiring.sizes)
    if spec.reads is Space.FFN:
        return _ffn_group(spec, specs, wiring.ffn_width(spec), wiring.config, rotations)
    return _NO_NORM


def _value_group(
    spec: LinearSpec, specs: Sequence[LinearSpec], sizes: Dimensions
) -> SmoothingGroup:
    writer = next(one for one in specs if _writes(one, Space.VALUE))
    width = sizes.kv_heads * sizes.head_dim
    rows = (
        (slice(0, width),) if writer.writes is Space.VALUE else tuple(writer.part("value", sizes))
    )
    heads = (sizes.kv_heads, sizes.group, sizes.head_dim)
    return SmoothingGroup(writer.name, writer, (spec,), width, rows, heads)


def _ffn_group(
    spec: LinearSpec,
    specs: Sequence[LinearSpec],
    width: int,
    config: PreTrainedConfig,
    rotations: RotationSet,
) -> SmoothingGroup | str:
    assert spec.layer is not None  # the head reads no ffn space
    parent = spec.name.rpartition(".")[0]
    writers = [
        one for one in specs if _writes(one, Space.FFN) and one.name.rpartition(".")[0] == parent
    ]
    # Of a gated MLP only ``up`` is linear in its output: act(gate) * up.
    writer = next((one for one in writers if one.name.endswith(".up_proj")), writers[0])
    first = 0
    if writer.parts:
        first = [part.role for part in writer.parts].index("up") * width
    elif len(writers) == 1:
        activation = getattr(config, "activation_function", None) or getattr(
            config, "hidden_act", None
        )
        if activation != "relu":
            return (
                f"the activation function {activation} between {writer.name} and it lets no scale"
                " through"
            )
    rows = (slice(first, first + width),)
    rotation = rotations.r4(spec.layer, spec.branch)
    return SmoothingGroup(writer.name, writer, (spec,), width, rows, rotation=rotation)


def _writes(spec: LinearSpec, space: Space) -> bool:
    return spec.writes is space or any(part.space is space for part in spec.parts)
