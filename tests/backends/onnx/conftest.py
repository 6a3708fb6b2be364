"""Exports of tiny models. Tracing one takes seconds, so each is made once and shared by all tests
that only look.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

from backends.base import WriteOptions
from backends.onnx.backend import OnnxBackend
from backends.onnx.file_names import DATA_FILE, MODEL_FILE
from backends.onnx.names import members
from backends.onnx.runner import OnnxModel
from backends.onnx.targets import TARGETS
from calib.architectures import Kind
from calib.artifact import QuantizedLinear, QuantizedModel
from calib.fusing import fuse
from calib.measure.reference import build_reference
from calib.rotations.rotation_set import RotationSet, hadamard_rotation
from calib.schemes import LinearScheme
from tests.tiny import CONFIGS, SIZES, fuse_tiny, make_tiny, quantize_fused

ALL: tuple[Kind, ...] = ("r1", "r2", "r4")
WIDE = SIZES | {"intermediate_size": 150}
"""Of a model whose blocks of 128 are 128 + 22, and whose R4 is of order 2, 75 times."""


@dataclass(frozen=True)
class Exported:
    """A tiny model as artifact, as the torch model it must equal, and as the folder that was
    written.
    """

    quantized: QuantizedModel
    reference: nn.Module
    folder: Path

    @property
    def graph(self) -> onnx.GraphProto:
        """The written graph, without its external data."""
        return onnx.load(self.folder / MODEL_FILE, load_external_data=False).graph

    @property
    def products(self) -> dict[str, list[QuantizedLinear]]:
        """The quantized linears by the name of the MatMul that computes them; those of a pack share
        one.
        """
        weights = [node.name for node in self.graph.node if node.name.endswith("/DequantizeWeight")]
        names = [name.removesuffix("/DequantizeWeight") for name in weights]
        found = {
            name: [self.quantized.linears[member] for member in members(name)] for name in names
        }
        assert sorted(linear.name for pack in found.values() for linear in pack) == sorted(
            self.quantized.linears
        )
        return found

    @staticmethod
    def stored_as(linear: QuantizedLinear) -> str:
        """ONNX's name of the type that the weight of ``linear`` has on this machine."""
        form = TARGETS["ort"].form(LinearScheme(linear.weight_scheme, linear.input_scheme))
        return "uint8" if form.unsigned_weights else linear.weight_scheme.format.name

    def runtime(self) -> OnnxModel:
        """In ONNX Runtime, with arithmetic as written."""
        return OnnxBackend().load(self.folder, "ort", exact=True)

    def logits(
        self, ids: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Of the torch reference."""
        with torch.no_grad():
            found: Tensor = self.reference(
                input_ids=ids, attention_mask=mask, position_ids=positions
            ).logits
        return found


def _quantize(name: str) -> QuantizedModel:
    config, scheme, kinds = CASES[name]
    tiny = make_tiny(config())
    if name == "signs":  # as foreign files and older artifacts have them
        width = tiny.config.intermediate_size
        rotations = RotationSet(
            hadamard_rotation("r4", width, layer=layer, seed=5) for layer in range(2)
        )
        fused = fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float32)
        return quantize_fused(fused, scheme)
    if name == "head-bias":
        tiny.state["transformer.ln_f.weight"][7] = 1e-9
    return quantize_fused(fuse_tiny(tiny, kinds), scheme)


CASES: dict[str, tuple[Callable[[], object], str, Sequence[Kind]]] = {
    "llama": (CONFIGS["llama"], "int8", ALL),  # GQA; R4 of order 88 = 44 x 2
    "bias-tied": (CONFIGS["llama-bias-tied-headdim"], "int8", ()),
    "block-diagonal": (lambda: transformers.LlamaConfig(**WIDE), "int8-weight-only", ALL),
    "signs": (CONFIGS["llama-bias-tied-headdim"], "int8-weight-only", ("r4",)),
    "odd": (CONFIGS["llama-odd"], "int4-weight-only", ALL),  # R4 of order 99, blocks of 45 and 99
    "short-block": (lambda: transformers.LlamaConfig(**WIDE), "int4-weight-only", ()),
    "mistral": (CONFIGS["mistral"], "int8-weight-only", ALL),  # sliding window
    "qwen2": (CONFIGS["qwen2"], "int4-weight-only", ALL),
    "qwen3": (CONFIGS["qwen3"], "int8", (*ALL, "r3")),
    "gpt2": (CONFIGS["gpt2"], "int8", ALL),  # Conv1D, LayerNorm, learned positions
    "opt": (CONFIGS["opt"], "int8", ALL),  # an MLP over flattened tokens
    "head-bias": (CONFIGS["gpt2"], "int8-weight-only", ("r1",)),
}


@pytest.fixture(scope="session")
def export_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """An export by its name in :data:`CASES`; made on first use."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            torch.set_num_threads(1)  # matrices of 48 rows only lose time to threads
            quantized = _quantize(name)
            folder = tmp_path_factory.mktemp(name)
            OnnxBackend().write(quantized, folder, WriteOptions("ort"))
            made[name] = Exported(quantized, build_reference(quantized), folder)
        return made[name]

    return get


@pytest.fixture(params=CASES)
def exported(request: pytest.FixtureRequest, export_of: Callable[[str], Exported]) -> Exported:
    """Every export in turn. Tests that write must copy it."""
    return export_of(request.param)


@pytest.fixture
def llama(export_of: Callable[[str], Exported]) -> Exported:
    """The static int8 Llama with all rotations."""
    return export_of("llama")


@pytest.fixture
def copied(llama: Exported, tmp_path: Path) -> Path:
    """A copy of its folder, to damage."""
    for name in (MODEL_FILE, DATA_FILE):
        shutil.copyfile(llama.folder / name, tmp_path / name)
    return tmp_path
