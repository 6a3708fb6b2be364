"""Algorithms by name: what a spec means, what is refused, and that each does what its function
does.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from weights_support import correlated_moment, random_weight

from calib.errors import QuantizationError
from calib.schemes import INT4, PerBlock, TensorScheme
from calib.weights.adaround import adaround
from calib.weights.algorithms import (
    ALGORITHMS,
    AdaRound,
    Gptq,
    Mse,
    Rtn,
    WeightAlgorithm,
    algorithm_named,
)
from calib.weights.clip import mse, rtn
from calib.weights.gptq import gptq
from calib.weights.rounded import Rounded

SCHEME = TensorScheme(INT4, PerBlock(16))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("rtn", Rtn()),
        ("mse", Mse()),
        ("mse:weighted=true", Mse(weighted=True)),
        ("gptq", Gptq()),
        ("gptq:act_order=false,damping=0.1,block=64", Gptq(act_order=False, damping=0.1, block=64)),
        (" gptq: static_groups = False , clip=TRUE ", Gptq(static_groups=False, clip=True)),
        (
            "adaround:iterations=500,learning_rate=1e-3,regularisation=0",
            AdaRound(iterations=500, learning_rate=1e-3, regularisation=0),
        ),
    ],
)
def test_specs(spec: str, expected: WeightAlgorithm) -> None:
    assert algorithm_named(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("awq", "unknown weight algorithm 'awq'", "rtn, mse, gptq, adaround"),
        ("", "unknown weight algorithm ''", "rtn, mse, gptq, adaround"),
        (
            "gptq:damp=0.1",
            "'gptq' has no setting 'damp'",
            "act_order, static_groups, block, damping, clip",
        ),
        ("rtn:clip=true", "'rtn' has no setting 'clip'", "none"),
        ("gptq:", "'gptq' has no setting ''", "damping"),
        ("gptq:block=0", "'block' of weight algorithm 'gptq' must be at least 1, not 0", None),
        (
            "gptq:block=1.5",
            "'block' of weight algorithm 'gptq' must be a whole number, not '1.5'",
            None,
        ),
        (
            "gptq:damping=-1",
            "'damping' of weight algorithm 'gptq' must be at least 0, not -1.0",
            None,
        ),
        (
            "gptq:damping=nan",
            "'damping' of weight algorithm 'gptq' must be at least 0, not nan",
            None,
        ),
        (
            "gptq:act_order=1",
            "'act_order' of weight algorithm 'gptq' must be true or false, not '1'",
            None,
        ),
        ("gptq:clip=true,clip=false", "sets 'clip' twice", None),
        ("adaround:iterations=0", "must be at least 1, not 0", None),
        ("adaround:learning_rate=0", "must be above 0, not 0.0", None),
        ("adaround:regularisation=much", "must be a number, not 'much'", None),
    ],
)
def test_what_is_refused(spec: str, message: str, hint: str | None) -> None:
    with pytest.raises(QuantizationError) as caught:
        algorithm_named(spec)
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


def test_each_does_what_its_function_does() -> None:
    weight, moment = random_weight(8, 40), correlated_moment(40)
    options = {
        "act_order": False,
        "static_groups": False,
        "block": 32,
        "damping": 0.1,
        "clip": False,
    }
    learning = {"iterations": 20, "regularisation": 1.0, "learning_rate": 0.1, "clip": False}
    wanted: list[tuple[WeightAlgorithm, Rounded]] = [
        (Rtn(), rtn(weight, SCHEME, torch.float16)),
        (Mse(), mse(weight, SCHEME, torch.float16)),
        (Mse(weighted=True), mse(weight, SCHEME, torch.float16, moment=moment)),
        (Gptq(**options), gptq(weight, moment, SCHEME, torch.float16, **options)),
        (AdaRound(**learning), adaround(weight, moment, SCHEME, torch.float16, **learning)),
    ]
    assert {type(algorithm) for algorithm, _ in wanted} == set(ALGORITHMS.values())
    for algorithm, expected in wanted:
        found = algorithm.round(weight, moment, SCHEME, torch.float16)
        assert torch.equal(found.stored, expected.stored)
        assert torch.equal(found.grid.scale, expected.grid.scale)
        assert algorithm.round(weight, moment, SCHEME).grid.scale.dtype == torch.float32


@pytest.mark.parametrize(
    "spec", ["rtn", "mse", "mse:weighted=true", "gptq", "adaround:iterations=2"]
)
def test_a_missing_moment(spec: str) -> None:
    """Refused where it is needed, and no matter where it is not."""
    algorithm = algorithm_named(spec)
    assert algorithm.needs_moment == (spec not in ("rtn", "mse"))
    if algorithm.needs_moment:
        with pytest.raises(QuantizationError, match="needs the second moment"):
            algorithm.round(random_weight(4, 16), None, SCHEME)
    else:
        algorithm.round(random_weight(4, 16), None, SCHEME)


def test_a_spec_is_checked_without_torch() -> None:
    code = "from calib.weights.algorithms import algorithm_named; algorithm_named('gptq')"
    subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; assert 'torch' not in sys.modules"], check=True
    )
