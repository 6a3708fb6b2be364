"""Helpers of the front door's tests: running ``rotq`` as a user does, and building small inputs for
it.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from exporter.reporting.report import (
    CalibrationSummary,
    GateRow,
    KeptLayer,
    LayerSummary,
    ModelSummary,
    ParityRow,
    Report,
    RotationSummary,
    Status,
)

ROOT = Path(__file__).parents[2]

LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 100,
}


def rotq(
    *arguments: object, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, offline."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [variables.pop("path", ""), str(ROOT)])),
        "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
        **variables,
    }
    command = [sys.executable, "-m", "exporter.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False
    )


def llama_shapes(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model that :data:`LLAMA_CONFIG` describes, untied."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, 64),
        "lm_head.weight": (100, 64),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (64, 64),
            f"{prefix}.self_attn.k_proj.weight": (32, 64),
            f"{prefix}.self_attn.v_proj.weight": (32, 64),
            f"{prefix}.self_attn.o_proj.weight": (64, 64),
            f"{prefix}.mlp.gate_proj.weight": (128, 64),
            f"{prefix}.mlp.up_proj.weight": (128, 64),
            f"{prefix}.mlp.down_proj.weight": (64, 128),
            f"{prefix}.input_layernorm.weight": (64,),
            f"{prefix}.post_attention_layernorm.weight": (64,),
        }
    return shapes | {"model.norm.weight": (64,)}


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Write bf16 zeros by hand, straight from the format's definition; returns the bytes of the
    tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    return offset


def write_llama(folder: Path, *, shards: int = 1, **config: object) -> Path:
    """A checkpoint folder of zeros, in one file or sharded with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | config))
    shapes = llama_shapes()
    if shards == 1:
        write_safetensors(folder / "model.safetensors", shapes)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(shapes.items())[shard::shards])
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def gate_row(
    rotate: str, kl: float, top1: float, perplexity: float, margin: tuple[float, float, float]
) -> GateRow:
    """A row of the gate's table, on two rows of 100 and 120 tokens, with a margin and its ends."""
    value, low, high = margin
    return GateRow(
        rotate=rotate,
        kl=kl,
        top1=top1,
        perplexity=perplexity,
        row_kls=[kl, kl],
        row_tokens=[100, 120],
        margin=value,
        margin_low=low,
        margin_high=high,
    )


def sample_report(status: Status = "passed", **changes: object) -> Report:
    """A report with every kind of content."""
    failed = status == "failed"
    report = Report(
        status=status,
        backend="onnx",
        target="ort",
        scheme="int8",
        rotate="r1,r2,r4",
        model=ModelSummary(
            source="embedded", model_type="llama", parameters=5_478_656, fingerprint="f" * 64
        ),
        layers=LayerSummary(
            quantized=42,
            kept=[KeptLayer(name="lm_head", reason="the scheme keeps the output head in float")],
            bytes_before=10_957_312,
            bytes_after=8_650_000,
        ),
        calibration=CalibrationSummary(
            dataset="embedded", rows=128, tokens=60_000, channels=704, sha256="c" * 64
        ),
        rotations=[
            RotationSummary(name="r1", space="residual", order=256, online=False, origin="trained"),
            *(
                RotationSummary(
                    name=f"r2[{i}]", space=f"value[{i}]", order=32, online=False, origin="trained"
                )
                for i in range(6)
            ),
            RotationSummary(name="r4", space="ffn", order=704, online=True, origin="hadamard"),
        ],
        gate=[
            gate_row("none", 0.16, 0.81, 16.98, (0.156, 0.15, 0.162)),
            gate_row("r1,r2", 0.17, 0.80, 17.10, (0.166, 0.16, 0.172)),
            gate_row("r1,r2,r4", 0.004, 0.97, 14.46, (0.0, 0.0, 0.0)).model_copy(
                update={"chosen": True}
            ),
        ],
        parity=[
            ParityRow(
                rung=1, name="rotated", metric="relative L2", measured=2e-7, bound=1e-5, passed=True
            ),
            ParityRow(
                rung=2,
                name="end to end",
                metric="relative L2",
                measured=0.02 if failed else 4e-3,
                bound=9e-3,
                passed=not failed,
            ),
            ParityRow(rung=3, name="a|b", metric="KL", measured=0.004, bound=None, passed=None),
            ParityRow(
                rung=3,
                name="decode",
                metric="KL",
                measured=None,
                bound=None,
                passed=None,
                note="no cache outputs",
            ),
        ],
        seconds={"capture": 4.2, "calibrate": 75.0},
        versions={"rotq": "0.1.0"},
    )
    return report.model_copy(update=changes)
