"""The statistics that rotations are trained on: captured, or from a folder that holds them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from calib.capture.fingerprint import model_fingerprint
from calib.capture.session import capture
from calib.capture.storage import Capture
from calib.data.batches import length_batches
from calib.data.rows import at_most
from calib.fusing import materialize, with_prefix
from calib.rotations.rotation_set import RotationSet
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
    """Statistics of the norm-folded model.

    Args:
        inputs: the model, and how much to keep.
        rows: calibration rows ``[tokens]``; see :func:`~exporter.run.quantizing.captured_tokens`.
        options: may name a folder that holds them; it is checked to be of this model.
        work: may hold them, and keeps them.
        clock: times the capture.
        prefix: ids of the tokens before every row.

    Raises:
        CheckpointError: the folder is damaged, or holds the statistics of another model.
    """
    ready = options.from_capture or work.finished(CAPTURE)
    fused = with_prefix(inputs.fuse(RotationSet(), clock), prefix, device=inputs.device)
    folded = materialize(fused, device=inputs.device)
    if ready is not None:
        return Capture.load(ready, model=model_fingerprint(folded))

    source = inputs.source
    sizes = source.wiring.sizes
    with clock.stage("capture"):
        statistics = capture(
            folded,
            source.wiring.capture_sites,
            length_batches(
                at_most(rows, captured_tokens(inputs.recipe)),
                inputs.recipe.calibration.batch_size,
            ),
            num_kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            config=capture_config(inputs.recipe),
            progress=clock.progress,
        )
    work.keep(CAPTURE, statistics.write)
    return statistics
