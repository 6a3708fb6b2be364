"""Options of ONNX Runtime's sessions. Torch-free."""

from __future__ import annotations

import os

import onnxruntime as ort

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
EXACT = {ACCURACY_LEVEL: "1"}
"""Arithmetic as written: inputs of weight-only linears stay floats. ``session.x64quantprecision``
would keep CPUs without VNNI from clipping sums, but turns weights that no kernel takes into such as
do not run (seen in 1.31.1 and 1.32.0); and whoever loads the graph would have to set it too. So
weights are stored unsigned instead where sums are clipped (:mod:`backends.onnx.weights`)."""


def session_options(*, exact: bool, as_written: bool = False) -> ort.SessionOptions:
    """Options of a quiet CPU session.

    Args:
        exact: arithmetic as written, or ONNX Runtime's default.
        as_written: leave all quantizers where they are, and multiply floats: for graphs that would
            fail to load otherwise, and where kernels of integers are not exact.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # what torch takes as well; ONNX Runtime does not ask for it
        options.intra_op_num_threads = int(threads)
    for name, value in EXACT.items() if exact else ():
        options.add_session_config_entry(name, value)
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
