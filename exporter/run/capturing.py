"""The statistics that rotations are trained on: captured, or from a folder that holds them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calib.capture.storage import Capture
from calib.data.batches import length_batches
from calib.data.rows import at_most
from calib.errors import CheckpointError
from calib.fusing import FusedModel
from calib.layerwise import Flow
from calib.layerwise.capture import capture_blockwise, fused_fingerprint
from calib.layerwise.prefix import with_prefix_blockwise
from calib.rotations.rotation_set import RotationSet
from exporter.recipe import parse_size
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions
from exporter.run.quantizing import capture_config, captured_tokens
from exporter.run.stopwatch import Stopwatch
from exporter.run.workdir import CAPTURE, WorkDir


def captured(
    inputs: Inputs,
    rows: Sequence[Tensor],
    options: RunOptions,
    work: WorkDir,
    clock: Stopwatch,
    prefix: Sequence[int] = (),
) -> Capture:
    """Statistics of the norm-folded model, of which a block at a time is in memory.

    Args:
        inputs: the model, and how much to keep.
        rows: calibration rows ``[tokens]``; see :func:`~exporter.run.quantizing.captured_tokens`.
        options: may name folders that hold them; they are checked to be of this model.
        work: may hold them, and keeps them.
        clock: times the capture.
        prefix: ids of the tokens before every row.

    Raises:
        CheckpointError: a folder is damaged, or holds the statistics of another model, or the one
            that was given those of another prefix.
    """
    folded = inputs.fuse(RotationSet(), clock, lazy=True)
    kept = _kept(folded, tuple(prefix), options, work)
    if kept is not None:
        return kept

    recipe = inputs.recipe
    fused = with_prefix_blockwise(folded, prefix, device=inputs.device)
    batches = length_batches(at_most(rows, captured_tokens(recipe)), recipe.calibration.batch_size)
    with clock.stage("capture"), work.passing() as folder:
        flow = Flow(
            fused,
            batches,
            folder,
            device=inputs.device,
            max_memory=parse_size(recipe.layerwise.max_memory),
        )
        statistics = capture_blockwise(
            fused, flow, config=capture_config(recipe), progress=clock.progress
        )
    work.keep(CAPTURE, statistics.write)
    if options.shared_capture is not None and not options.shared_capture.exists():
        statistics.save(options.shared_capture)
    return statistics


def _kept(
    folded: FusedModel, prefix: tuple[int, ...], options: RunOptions, work: WorkDir
) -> Capture | None:
    """Statistics of ``folded`` behind ``prefix`` that are there already; ``None``: there are none.

    The model's fingerprint knows no prefix, which its provenance does.
    """
    given = options.from_capture
    ready = given or work.finished(CAPTURE) or options.shared_capture
    if ready is None or not (given or ready.is_dir()):
        return None
    statistics = Capture.load(ready, model=fused_fingerprint(folded))
    own = statistics.provenance.prefix
    if own == prefix:
        return statistics
    if given is not None:
        raise CheckpointError(
            f"the capture in '{given}' has {_tokens(own)} before every row, and this run has"
            f" {_tokens(prefix)}",
            hint="capture again with the --scheme, --target and --prefix of this run, or give"
            " --prefix none to both",
        )
    if ready != options.shared_capture:
        work.remove(CAPTURE)  # of a target that takes no prefix, or of one that does
    return None


def _tokens(prefix: tuple[int, ...]) -> str:
    return f"the tokens {list(prefix)}" if prefix else "no prefix"
