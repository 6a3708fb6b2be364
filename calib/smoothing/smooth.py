"""Smoothing a fused model: choose a scale for every group and fold it.

ModelOpt's ``smoothquant`` and ``awq_lite`` choose a scale for each linear by itself and multiply
its input while running. A folded scale is shared by everything that reads the same activation, so
it has to be chosen for all of them together: by the largest column of any reader, or by the error
of all their outputs.

Rotate first, smooth then, and collect amax last: inputs and weights of every group change.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calib.architectures import Wiring
from calib.errors import QuantizationError
from calib.fusing import FusedModel
from calib.process.progress import Progress, silent, track
from calib.schemes import LinearScheme
from calib.smoothing.fold import fold_scales
from calib.smoothing.groups import SmoothingGroup, smoothing_groups
from calib.smoothing.methods import Smoothing, SmoothQuant
from calib.smoothing.observe import GroupInputs
from calib.smoothing.scales import (
    Chosen,
    awq_scales,
    column_amax,
    column_share,
    reader_weight,
    smoothquant_scales,
    smoothquant_search,
)


@dataclass(frozen=True)
class SmoothingRow:
    """What became of one group, or of one linear that is in none: a row of the report."""

    name: str
    """The writer that took the scale, or the linear that was left out."""
    readers: tuple[str, ...] = ()
    setting: float | None = None
    """SmoothQuant's alpha or AWQ's ratio; ``None`` where not smoothing was best, or the linear was
    left out.
    """
    smallest: float = 1.0
    """Least scale of a channel."""
    largest: float = 1.0
    """Greatest scale of a channel."""
    error_ratio: float | None = None
    """Error of the group's outputs over what it is without smoothing, where it was searched."""
    reason: str | None = None
    """Why the linear was left out."""
    scales: Tensor | None = field(default=None, compare=False, repr=False)
    """What was folded, float64 ``[width]``; ``None`` for a linear that was left out."""


def smooth(
    fused: FusedModel,
    method: Smoothing,
    statistics: Mapping[str, GroupInputs],
    schemes: Mapping[str, LinearScheme],
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> tuple[FusedModel, list[SmoothingRow]]:
    """Smooth every linear that will be quantized, as far as something in front of it can take the
    scale.

    Args:
        fused: the folded and rotated model; left unchanged.
        method: how scales are chosen.
        statistics: what :func:`~calib.smoothing.observe.observe_channels` saw in ``fused``, by
            group.
        schemes: how each linear that will be quantized is quantized; others do not count in the
            choice of a scale.
        device: where a search is computed.
        progress: called after every group.

    Returns:
        The smoothed model, which holds every tensor and shares unchanged ones with ``fused``, and
        what was done.

    Raises:
        QuantizationError: a group was not observed, or a folded weight overflows.
    """
    groups, reasons = smoothing_groups(fused.wiring, fused.rotations, search=method.needs_moment)
    state = dict(fused.state)
    rows = smooth_groups(
        state,
        groups,
        method,
        statistics,
        schemes,
        fused.wiring,
        device=device,
        progress=progress,
    )
    rows += [
        SmoothingRow(name, reason=reason) for name, reason in reasons.items() if name in schemes
    ]
    folded = {row.name: row.scales for row in rows if row.scales is not None}
    return replace(fused, state=state, smoothing=folded), rows


def fold_all(fused: FusedModel, scales: Mapping[str, Tensor]) -> FusedModel:
    """``fused`` with the scales of an earlier :func:`smooth` folded again: the same tensors, to the
    bit.

    Args:
        fused: the folded and rotated model that was smoothed; left unchanged.
        scales: :attr:`~calib.fusing.FusedModel.smoothing` of the result.
    """
    if not scales:
        return fused
    groups, _ = smoothing_groups(fused.wiring, fused.rotations)
    state = dict(fused.state)
    for group in groups:
        if group.name in scales:
            fold_scales(state, group, scales[group.name], fused.wiring)
    return replace(fused, state=state, smoothing=dict(scales))


def smooth_groups(
    state: MutableMapping[str, Tensor],
    groups: Sequence[SmoothingGroup],
    method: Smoothing,
    statistics: Mapping[str, GroupInputs],
    schemes: Mapping[str, LinearScheme],
    wiring: Wiring,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> list[SmoothingRow]:
    """The same for some groups, such as those of one decoder layer, in the tensors of ``state``."""
    wanted = [group for group in groups if any(name in schemes for name in group.reader_names)]
    missing = [group.name for group in wanted if group.name not in statistics]
    if missing:
        raise QuantizationError(
            f"there are no statistics to smooth {', '.join(missing)} by",
            hint="observe every group that is smoothed",
        )

    rows: list[SmoothingRow] = []
    for group in track(wanted, "smooth", len(wanted), progress):
        quantized = [spec for spec in group.readers if spec.name in schemes]
        weights = [
            group.unrotated(reader_weight(state[spec.weight]).to(device)) for spec in quantized
        ]
        linear_schemes = [schemes[spec.name] for spec in quantized]
        chosen = _choose(group, method, statistics[group.name], weights, linear_schemes)
        folded = fold_scales(state, group, group.largest(chosen.scales), wiring)
        rows.append(
            SmoothingRow(
                name=group.name,
                readers=group.reader_names,
                setting=chosen.setting,
                smallest=float(folded.min()),
                largest=float(folded.max()),
                error_ratio=chosen.error_ratio,
                scales=folded,
            )
        )
    return rows


def _choose(
    group: SmoothingGroup,
    method: Smoothing,
    inputs: GroupInputs,
    weights: Sequence[Tensor],
    schemes: Sequence[LinearScheme],
) -> Chosen:
    """The scale as the readers see it, ``[in]``: equal for the query heads that share a KV head."""
    device = weights[0].device
    amax_x = group.expanded(group.largest(inputs.amax)).to(device)
    amax_w = group.expanded(group.largest(column_amax(weights)))
    if isinstance(method, SmoothQuant) and method.alpha != "auto":
        return Chosen(smoothquant_scales(amax_x, amax_w, method.alpha), method.alpha)
    if inputs.moment is None:
        raise QuantizationError(
            f"a search for the scale of {group.name} needs the second moment of what it makes",
            hint="observe the groups with moments=True",
        )
    moment = inputs.moment.to(device)
    if isinstance(method, SmoothQuant):
        return smoothquant_search(amax_x, amax_w, moment, weights, schemes)
    mean_abs_x = group.expanded(group.average(inputs.mean_abs)).to(device)
    mean_w = group.expanded(group.average(column_share(weights, schemes)))
    return awq_scales(mean_abs_x, mean_w, moment, weights, schemes, grid=method.grid)
