"""What benchmarks.runtime compares, and how each of them is made from one float checkpoint."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from backends.base import Fusion, WriteOptions
from backends.registry import get_backend
from calib.architectures import Wiring, wiring_for
from calib.artifact import Provenance
from calib.quantizing.plan import Quantization, customised, resolve
from calib.schemes import Scheme, scheme_named

T = TypeVar("T")
Maker = Literal["rotq", "dynamic", "static", "builder"]
UNKNOWN = Provenance("", "", {}, 0, 0, 0, 0, "", {})
"""Nothing that is made here is kept."""
MODEL = "model.onnx"


@dataclass(frozen=True)
class Candidate:
    """One way to make an ONNX graph of a checkpoint.

    Attributes:
        name: for tables and folders.
        maker: rotq, one of ONNX Runtime's two quantizers (of rotq's float graph), or
            onnxruntime-genai's model builder.
        scheme: of the decoder's linears, for rotq.
        head: scheme of the output head, for rotq; the others have what the name says.
        kv_buffer: whether past and present are one buffer, or every run makes a longer cache.
        prefix: tokens before every sequence, as constants of rotq's graph.
        graph: the name of the candidate whose graph it runs, where that is not its own.
    """

    name: str
    maker: Maker
    scheme: str = "float"
    head: str | None = None
    kv_buffer: Literal["grown", "shared"] = "grown"
    prefix: int = 0
    graph: str | None = None

    @property
    def folder(self) -> str:
        """Where its graph lies."""
        return (self.graph or self.name).replace(",", "").replace(" ", "-")


FLOAT = Candidate("float", "rotq")
INT8 = Candidate("int8", "rotq", "int8")
INT8_PREFIX = Candidate("int8, prefix", "rotq", "int8", prefix=1)
INT8_WEIGHTS = Candidate("int8-weight-only", "rotq", "int8-weight-only")
INT4 = Candidate("int4", "rotq", "int4-weight-only")
INT4_HEAD_INT4 = Candidate("int4, int4 head", "rotq", "int4-weight-only", "int4-weight-only")
DYNAMIC = Candidate("quantize_dynamic", "dynamic")
STATIC = Candidate("quantize_static", "static")
INT4_HEAD_INT8 = Candidate("int4, int8 head", "rotq", "int4-weight-only", "int8-weight-only")
INT4_SHARED = Candidate(
    "int4, int4 head, one buffer", "rotq", "int4-weight-only", "int4-weight-only", "shared"
)
BUILDER = Candidate("genai builder int4, int4 head, one buffer", "builder", kv_buffer="shared")
BUILDER_GROWN = Candidate("genai builder int4, int4 head", "builder", graph=BUILDER.name)
HAS_BUILDER = find_spec("onnxruntime_genai") is not None
GROUPS = (
    (FLOAT, INT8, DYNAMIC, STATIC),
    (FLOAT, INT8, INT8_PREFIX),
    (FLOAT, INT8_WEIGHTS, Candidate("int8, int8 head", "rotq", "int8", "int8-weight-only")),
    (FLOAT, INT4, INT4_HEAD_INT8),
    (FLOAT, INT4_HEAD_INT4, INT4_SHARED, *((BUILDER, BUILDER_GROWN) if HAS_BUILDER else ())),
)
"""What is measured in turns, the float graph in every group."""


@dataclass(frozen=True)
class Settings:
    """How candidates are made.

    Attributes:
        block_size: input features that share a scale of int4 weights, in rotq's graphs and in the
            builder's.
        rows: rows of random tokens that activations are calibrated with.
        tokens: in a row.
        seed: chooses them, and the weights of random checkpoints.
    """

    block_size: int
    rows: int
    tokens: int
    seed: int


def make_all(
    candidates: Sequence[Candidate], checkpoint: Path, folder: Path, settings: Settings
) -> Mapping[Candidate, Fusion]:
    """Make the candidates in ``folder``, those of one maker in a fresh process, so that no memory
    piles up.

    Returns:
        How ONNX Runtime executes the linears of rotq's quantized graphs.
    """
    made = [candidate for candidate in candidates if candidate.maker == "rotq"]
    fusions = _in_fresh_process(_write_all, made, checkpoint, folder, settings)
    for candidate in candidates:
        target = folder / candidate.folder
        if candidate.graph is not None:
            continue
        if candidate.maker == "builder":
            _run_builder(checkpoint, target, settings)
        elif candidate.maker != "rotq":
            target.mkdir()
            _in_fresh_process(_quantize, candidate.maker, folder / FLOAT.folder, target, settings)
    return fusions


def _in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(function, *arguments).result()


def _write_all(
    candidates: Sequence[Candidate], checkpoint: Path, folder: Path, settings: Settings
) -> dict[Candidate, Fusion]:
    """rotq's graphs: nothing rotated, weights rounded to nearest."""
    import torch

    from calib.data.batches import length_batches
    from calib.data.forward_loop import forward_loop_over
    from calib.fusing import fuse, with_prefix
    from calib.network.checkpoint import load_config, open_checkpoint
    from calib.quantizing.calibrator import quantize_model
    from calib.rotations.rotation_set import RotationSet

    config = load_config(checkpoint)
    wiring = wiring_for(config)
    fused = fuse(open_checkpoint(checkpoint), wiring, RotationSet(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randint(config.vocab_size, (settings.rows, settings.tokens), generator=generator)
    loop = forward_loop_over(length_batches(list(rows), 1))
    backend = get_backend("onnx")
    fusions: dict[Candidate, Fusion] = {}
    for candidate in candidates:
        quantization = _quantization(candidate, wiring, settings)
        prefixed = with_prefix(fused, range(candidate.prefix))
        with contextlib.redirect_stdout(sys.stderr):  # ModelOpt prints
            quantized = quantize_model(prefixed, quantization, loop, UNKNOWN)
        target = folder / candidate.folder
        target.mkdir(parents=True)
        backend.write(quantized, target, WriteOptions("ort", "last", kv_buffer=candidate.kv_buffer))
        if candidate != FLOAT and (fusion := backend.fusion(target, "ort")) is not None:
            fusions[candidate] = fusion
        del quantized
        gc.collect()  # a graph's nodes and values refer to each other, and its tensors to the model
    return fusions


def _quantization(candidate: Candidate, wiring: Wiring, settings: Settings) -> Quantization:
    def scheme(name: str) -> Scheme:
        return customised(
            scheme_named(name), block_size=settings.block_size if "int4" in name else None
        )

    quantization = resolve(scheme(candidate.scheme), wiring)
    head = None if candidate.head is None else scheme(candidate.head).linear
    if head is None:
        return quantization
    return replace(quantization, linears={**quantization.linears, wiring.head.name: head})


def _quantize(maker: Maker, source: Path, folder: Path, settings: Settings) -> None:
    """ONNX Runtime's quantizers, on the decoder's MatMuls of rotq's float graph; the head stays in
    float.

    The static one in its fastest form. By its defaults (int8 activations, outputs quantized as
    well) it writes a graph of opset 21 that ONNX Runtime refuses to load; and int8 activations that
    several linears share are not fused.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(source / MODEL, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    linears = [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and "head" not in node.name
    ]
    common: Mapping[str, Any] = {
        "nodes_to_quantize": linears,
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": True,
    }
    if maker == "dynamic":
        quantize_dynamic(source / MODEL, folder / MODEL, **common)
        return
    quantize_static(
        source / MODEL,
        folder / MODEL,
        _reader(source / MODEL, settings),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        **common,
    )


def _reader(model: Path, settings: Settings) -> Any:
    import numpy as np
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    graph = onnx.load(model, load_external_data=False).graph
    vocabulary = next(
        output for output in graph.output if output.name == "logits"
    ).type.tensor_type.shape.dim[-1]
    generator = np.random.default_rng(settings.seed)
    caches = {
        entry.name: np.zeros(
            (
                1,
                entry.type.tensor_type.shape.dim[1].dim_value,
                0,
                entry.type.tensor_type.shape.dim[3].dim_value,
            ),
            np.float32,
        )
        for entry in graph.input
        if entry.name.startswith("past_key_values.")
    }
    rows = iter(
        [
            {
                "input_ids": generator.integers(0, vocabulary.dim_value, (1, settings.tokens)),
                "attention_mask": np.ones((1, settings.tokens), np.int64),
                "position_ids": np.arange(settings.tokens)[None],
                **caches,
            }
            for _ in range(settings.rows)
        ]
    )

    class Rows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> dict[str, Any] | None:
            return next(rows, None)

    return Rows()


def _run_builder(checkpoint: Path, folder: Path, settings: Settings) -> None:
    """onnxruntime-genai's model builder; by default the head is quantized as the rest is.

    Raises:
        RuntimeError: it failed.
    """
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(checkpoint),
        "-o",
        str(folder),
    ]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options"]
    command += [f"block_size={settings.block_size}", "prune_lm_head=true"]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if ran.returncode:
        raise RuntimeError(
            f"onnxruntime-genai's model builder failed: {ran.stderr.strip()[-2000:]}"
        )


def make_checkpoint(folder: Path, layers: int, tokenizer: Path, seed: int) -> None:
    """Random bfloat16 weights in the shape of TinyLlama-1.1B; config.json comes last.

    Args:
        folder: is created.
        layers: 22 in the original.
        tokenizer: folder whose tokenizer goes along, without which the model builder makes nothing.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from benchmarks.layerwise import random_tensor
    from calib.network.skeleton import expected_tensors

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: random_tensor(shape, generator) for name, shape in expected_tensors(config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    config.save_pretrained(folder)
