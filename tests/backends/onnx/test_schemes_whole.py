"""Whole models in schemes that are not uniform: head and embedding quantized, linears in float, a
quantized cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import MODEL_FILE
from backends.onnx.runner import OnnxModel
from calib.artifact import QuantizedModel
from calib.data.batches import length_batches
from calib.data.forward_loop import forward_loop_over
from calib.measure.reference import ReferenceLinear, build_reference
from calib.quantizing.calibrator import quantize_model
from calib.quantizing.plan import resolve
from calib.schemes import scheme_named
from tests.tiny import CONFIGS, PROVENANCE, fuse_tiny, make_tiny, relative_l2, token_rows
from tests.tolerances import FLIPS, FLOAT16_STEPS, LINEAR, WEIGHT_ONLY

BACKEND = OnnxBackend()
INTEGER, BLOCKS = "MatMulIntegerToFloat", "MatMulNBits"


@dataclass(frozen=True)
class Case:
    """What is asked for, and how many products ONNX Runtime then computes by which kernel; all
    others are in float.

    Query, key and value are one product, and where inputs are not rounded gate and up as well: four
    or five in a layer.
    """

    scheme: str
    kernels: Mapping[str, int]
    overrides: Mapping[str, str] = field(default_factory=dict)
    kv: str | None = None
    unfused: int = 0

    @property
    def bound(self) -> float:
        """Integers of activations flip; nothing else does."""
        names = (self.scheme, *(name for name in self.overrides.values() if name != "float"))
        rounds = self.kv is not None or any(
            scheme_named(name).activation is not None for name in names
        )
        return FLIPS if rounds else WEIGHT_ONLY


CASES = {
    "float": Case("float", {}),
    "w4a8": Case("w4a8", {BLOCKS: 10}),
    "float8": Case("float8", {}, unfused=14),
    "one linear": Case("float", {BLOCKS: 1}, {"*.1.mlp.down_proj": "int8-weight-only"}),
    "int8 head": Case("int8", {INTEGER: 11}, {"lm_head": "int8"}),
    "int8 weight-only head": Case(
        "int8", {INTEGER: 10, BLOCKS: 1}, {"lm_head": "int8-weight-only"}
    ),
    "int4 head": Case("int8-weight-only", {BLOCKS: 9}, {"lm_head": "int4-weight-only"}),
    "embedding": Case("int4-weight-only", {BLOCKS: 8}, {"model.embed_tokens": "int8-weight-only"}),
    "mixed": Case(
        "float8",
        {INTEGER: 6, BLOCKS: 2},
        {"*.mlp.*": "int8", "*.0.self_attn.q_proj": "float", "*.1.self_attn.*": "int4-weight-only"},
        unfused=3,
    ),
    "cache": Case("int8", {INTEGER: 10}, kv="int8"),
}


@dataclass(frozen=True)
class Written:
    """An artifact and the folder that was written of it."""

    quantized: QuantizedModel
    folder: Path
    target: str

    @property
    def reference(self) -> torch.nn.Module:
        """The torch model that the folder must equal."""
        return build_reference(self.quantized)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """A case written for a target; made on first use."""
    made: dict[tuple[str, str], Written] = {}
    fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), ["r1", "r2", "r3", "r4"])

    def get(name: str, target: str) -> Written:
        if (name, target) not in made:
            case = CASES[name]
            scheme = scheme_named(case.scheme)
            how = resolve(scheme, fused.wiring, overrides=case.overrides, kv=case.kv)
            loop = forward_loop_over(length_batches(token_rows(), 4))
            quantized = quantize_model(fused, how, loop, PROVENANCE)
            folder = tmp_path_factory.mktemp("written")
            BACKEND.write(quantized, folder, WriteOptions(target))
            made[name, target] = Written(quantized, folder, target)
        return made[name, target]

    return get


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack(token_rows((12, 12), seed=4))
    return ids, torch.ones_like(ids), torch.arange(12).expand_as(ids)


def check(case: Case, found: Written) -> None:
    """End to end, linear by linear on the same inputs, and as it is read back."""
    with torch.no_grad():
        wanted = found.reference(input_ids=inputs()[0]).logits
    logits, _ = BACKEND.load(found.folder, found.target, exact=True).forward(*inputs())
    assert relative_l2(logits, wanted) <= case.bound
    reference, read = found.reference, BACKEND.read_linears(found.folder, found.target)
    assert list(read) == list(found.quantized.linears)
    modules = {name: reference.get_submodule(name) for name in read}
    linears = {
        name: module for name, module in modules.items() if isinstance(module, ReferenceLinear)
    }
    assert set(read) - set(linears) <= {"model.embed_tokens"}
    for name, linear in found.quantized.linears.items():
        assert torch.equal(read[name].values(), linear.values()), name
    if linears:
        probed = BACKEND.load_probed(found.folder, found.target).probe(
            inputs()[0][:1], list(linears)
        )
        for name, (entering, leaving) in probed.items():
            module = linears[name]
            assert relative_l2(leaving, module.matmul(module.quantize(entering))) <= LINEAR, name


@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_computes_what_the_artifact_says(
    name: str, written: Callable[[str, str], Written]
) -> None:
    check(CASES[name], written(name, "ort"))


@pytest.mark.runtimes
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("float8", "mixed")])
def test_openvino_computes_the_same(name: str, written: Callable[[str, str], Written]) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    found = written(name, "openvino")
    check(CASES[name], found)
    first, _ = BACKEND.load(found.folder, "openvino", exact=True).forward(*inputs())
    second, _ = OnnxModel(found.folder / MODEL_FILE, exact=True).forward(*inputs())
    assert relative_l2(first, second) <= CASES[name].bound


@pytest.mark.parametrize("name", CASES)
def test_each_linear_runs_in_the_kernel_it_is_meant_for(
    name: str, written: Callable[[str, str], Written]
) -> None:
    case = CASES[name]
    found = BACKEND.fusion(written(name, "ort").folder, "ort")
    assert found is not None
    assert {
        kernel: found.kernels[kernel] for kernel in (INTEGER, BLOCKS) if kernel in found.kernels
    } == case.kernels
    assert len(found.unfused) == case.unfused


def test_the_cache_is_read_back(written: Callable[[str, str], Written]) -> None:
    found = written("cache", "ort")
    read, cache = BACKEND.read_cache(found.folder, "ort"), found.quantized.cache
    assert read is not None
    assert cache is not None
    assert read.scheme == cache.scheme
    for part in ("key_scale", "value_scale"):
        before, after = getattr(cache, part), getattr(read, part)
        assert list(after) == list(before)
        assert all(
            torch.equal(after[layer], scale) and after[layer].dtype == scale.dtype
            for layer, scale in before.items()
        )
    assert BACKEND.read_cache(written("w4a8", "ort").folder, "ort") is None


def test_online_rotations_act_on_their_input_in_float16(tmp_path: Path) -> None:
    """Neither R3 nor R4 is folded into a constant: what leaves them is the rotation of whatever
    comes in.
    """
    down, found = "model.layers.0.mlp.down_proj", []
    for kinds in (("r3", "r4"), ()):
        fused = fuse_tiny(make_tiny(CONFIGS["llama"]()), kinds, dtype=torch.float16)
        how = resolve(scheme_named("int8-weight-only"), fused.wiring)
        quantized = quantize_model(
            fused, how, forward_loop_over(length_batches(token_rows(), 4)), PROVENANCE
        )
        folder = tmp_path / "-".join(("folder", *kinds))
        folder.mkdir()
        BACKEND.write(quantized, folder, WriteOptions("tensorrt"))
        _, (keys, *_) = BACKEND.load(folder, "tensorrt", exact=True).forward(*inputs())
        entering, _ = BACKEND.load_probed(folder, "tensorrt").probe(inputs()[0], [down])[down]
        found.append((quantized.rotations, keys, entering))
    (rotations, *rotated), (_, *plain) = found
    for name, after, before in zip(("R3.0", "R4.0"), rotated, plain, strict=True):
        assert after.dtype == torch.float16
        assert relative_l2(after, rotations[name].apply(before.float())) <= FLOAT16_STEPS, name
        assert relative_l2(after, before) > 0.5, name  # another vector altogether
        assert relative_l2(after[0], after[1]) > 0.1, name  # of another row
