"""Models that ModelOpt has quantized, exported as they stand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rotq
from backends.onnx.backend import OnnxBackend
from calib.errors import QuantizationError, RecipeError, RotqError
from exporter.run.taken import quantized_by_modelopt
from tests.checkpoints import write_checkpoint
from tests.tiny import relative_l2

mtq: Any = pytest.importorskip("modelopt.torch.quantization")

ON_CPU = {
    "INT8_DEFAULT_CFG": "int8",
    "INT8_WEIGHT_ONLY_CFG": "int8-weight-only",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "int4-weight-only",
    "FP8_DEFAULT_CFG": "float8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "float8-dynamic",
}
"""Configurations whose quantizers run on a CPU, and rotq's name for what they do."""
FEW: dict[str, Any] = {"eval_nsamples": 2, "eval_dataset": "embedded", "seqlen": 64}
ROUNDED = 1e-5
"""Relative L2 where no activation is rounded: sums of floats in another order."""
FLIPS = 0.05
"""Where activations are: values on a boundary between two integers fall to either side, in ModelOpt
by x (b / a) and here by x / (a / b). Parity holds the same graph to a floor of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the embedded tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("float") / "model")


@pytest.fixture
def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 2000, (1, 24), generator=generator) for _ in range(4)]


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibrated(
    folder: Path, rows: list[Tensor], config: str, change: Callable[[Any], None] | None = None
) -> Any:
    """The model in ``folder`` after ``mtq.quantize``."""
    model, chosen = loaded(folder), copy.deepcopy(getattr(mtq, config))
    if change is not None:
        change(chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt warns of what these models do not have
        mtq.quantize(model, chosen, lambda given: [given(row) for row in rows])
    return model


@pytest.mark.parametrize("config", [name for name in ON_CPU if "TOKEN" not in name])
def test_the_graph_is_modelopts_model(
    folder: Path, rows: list[Tensor], config: str, tmp_path: Path
) -> None:
    model = calibrated(folder, rows, config)
    assert quantized_by_modelopt(model)
    done = rotq.export(model, output=tmp_path / "out", **FEW)
    report = done.report
    assert (done.recipe.scheme, done.recipe.rotate.certain) == (ON_CPU[config], ())
    # A random model is no model: what its perplexity does says nothing.
    assert not [row for row in report.parity if row.passed is False and row.rung < 3]
    assert {row.rung for row in report.parity} >= {0, 1, 2}

    runtime = OnnxBackend().load(done.output, "ort", exact=True)
    ids = rows[0]
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    found, _ = runtime.forward(ids, torch.ones_like(ids), positions)
    with torch.no_grad():
        expected = model(ids).logits
        original = loaded(folder)(ids).logits
    apart = relative_l2(found, expected)
    assert apart <= (ROUNDED if "WEIGHT_ONLY" in config else FLIPS)
    assert apart < relative_l2(expected, original) / 2  # it is the quantized one


@pytest.mark.parametrize("config", ON_CPU)
def test_weights_and_scales_are_modelopts_own(
    folder: Path, rows: list[Tensor], config: str
) -> None:
    from calib.modelopt.taken import take

    model = calibrated(folder, rows, config)
    taken = take(model)
    assert len(taken.linears) == 2 * 7
    for name, linear in taken.linears.items():
        module = model.get_submodule(name)
        with torch.no_grad():
            expected = module.weight_quantizer(module.weight)
        # one float32 scale is multiplied by and divided by
        assert torch.allclose(linear.values(), expected, rtol=1e-6, atol=1e-7)
        if linear.input_scale is not None:
            bound = module.input_quantizer.maxbound
            assert linear.input_scale == module.input_quantizer.amax / bound
    assert taken.cache is None
    ids = rows[0]
    with torch.no_grad():
        assert torch.equal(taken.model(ids).logits, loaded(folder)(ids).logits)


def _attention(num_bits: object) -> Callable[[Any], None]:
    """Adds quantizers of keys and values to a configuration."""

    def change(config: Any) -> None:
        config["quant_cfg"] = [
            *config["quant_cfg"],
            {
                "quantizer_name": "*[kv]_bmm_quantizer",
                "cfg": {"num_bits": num_bits, "axis": None},
                "enable": True,
            },
        ]

    return change


def test_a_cache_is_taken_along(folder: Path, rows: list[Tensor], tmp_path: Path) -> None:
    model = calibrated(folder, rows, "INT8_WEIGHT_ONLY_CFG", _attention(8))
    done = rotq.export(model, output=tmp_path / "out", **FEW)
    assert done.recipe.kv == "int8"
    assert not [row for row in done.report.parity if row.passed is False and row.rung < 3]
    ids = rows[0]
    runtime = OnnxBackend().load(done.output, "ort", exact=True)
    found, _ = runtime.forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).unsqueeze(0))
    with torch.no_grad():
        assert relative_l2(found, model(ids).logits) <= FLIPS


def test_a_linear_that_modelopt_leaves_alone_stays_in_float(
    folder: Path, rows: list[Tensor], tmp_path: Path
) -> None:
    def without(config: Any) -> None:
        off = {"quantizer_name": "*layers.1.mlp.down_proj*", "enable": False}
        config["quant_cfg"] = [*config["quant_cfg"], off]

    model = calibrated(folder, rows, "INT8_DEFAULT_CFG", without)
    done = rotq.export(model, output=tmp_path / "out", verify=False, **FEW)
    assert done.recipe.overrides == {"model.layers.1.mlp.down_proj": "float"}
    found = rotq.inspect(done.output)
    assert found.kept["model.layers.1.mlp.down_proj"] == "left in float by ModelOpt"
    assert len(found.linears) == 13


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("INT8_SMOOTHQUANT_CFG", None, r"q_proj.input_quantizer' multiplies by a pre_quant_scale"),
        ("INT4_AWQ_CFG", None, r"q_proj.input_quantizer' multiplies by a pre_quant_scale"),
        ("W4A8_AWQ_BETA_CFG", None, r"pre_quant_scale|several times over"),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", None, r"q_proj.weight in a way that rotq has no word"),
        ("FP8_DEFAULT_CFG", _attention((4, 3)), "ONNX Runtime concatenates no float8"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", None, "cannot express"),
    ],
)
def test_what_rotq_has_no_word_for_is_refused_by_name_and_nothing_is_written(
    folder: Path,
    rows: list[Tensor],
    config: str,
    change: Callable[[Any], None] | None,
    message: str,
    tmp_path: Path,
) -> None:
    model = calibrated(folder, rows, config, change)
    with pytest.raises(RotqError, match=message):
        rotq.export(model, output=tmp_path / "out", **FEW)
    assert not (tmp_path / "out").exists()


def test_one_that_was_never_calibrated_is_refused(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder)
    mtq.quantize(model, copy.deepcopy(mtq.INT8_DEFAULT_CFG), None)
    with pytest.raises(QuantizationError, match=r"no amax for .*q_proj's input"):
        rotq.export(model, output=tmp_path / "out", **FEW)


def test_settings_that_come_too_late_are_refused(
    folder: Path, rows: list[Tensor], tmp_path: Path
) -> None:
    model = calibrated(folder, rows, "INT8_WEIGHT_ONLY_CFG")
    for setting in ({"rotate": "r1"}, {"scheme": "w4a8"}, {"smoothing": "awq"}):
        with pytest.raises(RecipeError, match="ModelOpt has quantized the model already"):
            rotq.export(model, output=tmp_path / "out", **FEW, **setting)
    with pytest.raises(RecipeError, match="work_dir has no effect"):
        rotq.export(model, output=tmp_path / "out", work_dir=tmp_path / "work", **FEW)
    assert not quantized_by_modelopt(nn.Linear(2, 2))
