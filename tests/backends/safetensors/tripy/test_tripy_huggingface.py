"""From a Hugging Face folder to a filled Tripy module in one call."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import backends
import calib
from calib.architectures import wiring_for
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.data.rows import calibration_rows
from calib.errors import BackendError, CheckpointError, RotqError
from tests.backends.safetensors.tripy.conftest import Run
from tests.backends.safetensors.tripy.test_tripy_modules import example
from tests.checkpoints import TINY, VOCABULARY, write_checkpoint
from tests.tiny import relative_l2
from tests.tolerances import FLIPS, WEIGHT_ONLY

pytestmark = pytest.mark.runtimes
TEXT = "The quick brown fox jumps over the lazy dog while rain falls on the far hills. "
ROWS = {"num_samples": 4, "seqlen": 24}
WIDTH = 128
"""ModelOpt's blocks must divide it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_head=4,
        n_layer=1,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    return write_checkpoint(tmp_path_factory.mktemp("gpt2") / "model", config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n\n".join(f"{TEXT} {number} {TEXT}" for number in range(40)), encoding="utf-8"
    )
    return path


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def fake_quantized(folder: Path, mode: str, text: Path) -> Any:
    """The Hugging Face model with ModelOpt's quantizers in it, calibrated on the same rows."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    rows = calibration_rows(str(text), tokenizer, seqlen=24, nsamples=4, seed=0)
    loop = forward_loop_over(length_batches(rows, 8))
    linears = wiring_for(model.config).linear_names
    return calib.modelopt_quantize(model, mode, forward_loop=loop, modules=linears)


@pytest.mark.parametrize("mode", ["int8-weight-only", "int4-weight-only", "float8"])
def test_a_module_computes_what_modelopt_calibrated(
    mode: str, tp: Any, run: Run, folder: Path, text: Path
) -> None:
    build = import_module("backends.safetensors.tripy.modules.build")
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    module = build.module_for_config(config, tp.float32, mode)
    filled = backends.load_quant_weights_from_hf(
        module, str(folder), tp.float32, mode, dataset_name=str(text), **ROWS
    )
    assert filled is module

    expected = fake_quantized(folder, mode, text)
    with torch.no_grad():
        error = relative_l2(run(module, ids()), expected(ids()).logits)
    assert error <= (WEIGHT_ONLY if mode.endswith("weight-only") else FLIPS)


def test_nvidias_example_with_its_quantized_head(
    tp: Any, run: Run, folder: Path, text: Path
) -> None:
    """In float8 mode the example quantizes the head; what is quantized follows the module."""
    nano = example()
    module = nano.GPT(nano.Sizes(vocabulary=VOCABULARY, width=WIDTH, layers=1, mode="float8"))
    backends.load_quant_weights_from_hf(
        module, str(folder), tp.float32, "float8", dataset_name=str(text), **ROWS
    )
    assert module.state_dict()["lm_head.input_scale"].shape == ()
    config = transformers.AutoConfig.from_pretrained(folder)
    config.activation_function = "gelu"  # the example's
    expected: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    with torch.no_grad():
        # all linears rounded to 3 bits of mantissa, 2^-4 each at most
        assert relative_l2(run(module, ids()), expected(ids()).logits) < 2**-3


def test_a_module_that_does_not_fit_stays_as_it_was(tp: Any, folder: Path, tmp_path: Path) -> None:
    nano = example()
    module = nano.GPT(nano.Sizes(vocabulary=VOCABULARY, width=64, mode="int8-weight-only"))
    before = module.state_dict()
    with pytest.raises(BackendError, match=r"shape \[2048, 128\] instead of \[2048, 64\]"):
        backends.load_quant_weights_from_hf(module, str(folder), tp.float32, "int8-weight-only")
    assert all(before[key] is value for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("mode", "dtype", "reason"),
    [
        ("int3", "float32", "unknown scheme 'int3'"),
        ("nvfp4", "float32", "cannot express nvfp4"),
        ("float", "float32", "quantizes nothing"),
        (
            "float8",
            "float32",
            r"has float8 weights: quantized otherwise are transformer\.h\.\{0-1\}\.attn\.c_attn",
        ),
        ("int8-weight-only", "int8", "cannot be 'int8'"),
        ("int8-weight-only", "float32", "nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(
    mode: str, dtype: str, reason: str, tp: Any, tmp_path: Path
) -> None:
    nano = example()
    module = nano.GPT(nano.Sizes(mode="int8-weight-only"))
    with pytest.raises(RotqError, match=reason) as caught:
        backends.load_quant_weights_from_hf(
            module, str(tmp_path / "nowhere"), getattr(tp, dtype), mode
        )
    assert caught.value.hint


def test_a_module_that_quantizes_nothing_is_not_filled_in_float(tp: Any, folder: Path) -> None:
    nano = example()
    module = nano.GPT(nano.Sizes(vocabulary=VOCABULARY, width=WIDTH, layers=1))
    with pytest.raises(BackendError, match="none of its linears is quantized"):
        backends.load_quant_weights_from_hf(module, str(folder), tp.float32, "int8-weight-only")


def test_a_model_that_cannot_be_reached(tp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    nano = example()
    module = nano.GPT(nano.Sizes(mode="int8-weight-only"))
    with pytest.raises(
        CheckpointError, match="the config of nobody/nothing cannot be read"
    ) as caught:
        backends.load_quant_weights_from_hf(
            module, "nobody/nothing", tp.float32, "int8-weight-only"
        )
    assert "hub id" in str(caught.value.hint)


def test_a_model_without_a_module_is_refused(tp: Any, tmp_path: Path) -> None:
    nano = example()
    folder = write_checkpoint(tmp_path / "qwen3", transformers.Qwen3Config(**TINY, head_dim=8))
    module = nano.GPT(nano.Sizes(mode="int8-weight-only"))
    with pytest.raises(BackendError, match="no Tripy module for qwen3"):
        backends.load_quant_weights_from_hf(module, str(folder), tp.float32, "int8-weight-only")
