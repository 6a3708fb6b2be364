"""A job as another program does it, in the environment that benchmarks.job has made for it: a file
of its own that imports nothing of rotq.

    python job_peer.py gptq|rotated|builder --model DIR --text FILE --rows N --seqlen N -o FOLDER
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

BLOCK = 64
"""Input features that share a weight scale."""


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["gptq", "rotated", "builder"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seqlen", type=int, required=True)
    parser.add_argument("-o", "--output", required=True)
    given = parser.parse_args()
    if given.job == "builder":
        build(given)
    else:
        compress(given)


def compress(given: argparse.Namespace) -> None:
    """llm-compressor's oneshot; GPTQ alone, or random Hadamard R1, R2 and R4 with static int8."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    if given.job == "gptq":
        recipe: list[Any] = [
            GPTQModifier(config_groups=_groups(weight=_int4()), ignore=["lm_head"])
        ]
    else:
        groups = _groups(weight=_int8(), entering={**_int8(), "strategy": "tensor"})
        recipe = [
            SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"),
            QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
        ]
    oneshot(
        model=model,
        dataset=_rows(tokenizer, given),
        recipe=recipe,
        max_seq_length=given.seqlen,
        num_calibration_samples=given.rows,
    )
    model.save_pretrained(given.output, save_compressed=True)
    tokenizer.save_pretrained(given.output)


def build(given: argparse.Namespace) -> None:
    """onnxruntime-genai's builder: int4 by rounding to nearest."""
    options = {"-m": given.model, "-o": given.output, "-c": f"{given.output}-cache"}
    words = [word for option in options.items() for word in option]
    sys.argv[1:] = [*words, "-p", "int4", "-e", "cpu"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def _rows(tokenizer: Any, given: argparse.Namespace) -> Any:
    """Windows of the text: a data set of ``rows`` times ``seqlen`` tokens."""
    from datasets import Dataset

    ids = tokenizer(given.text.read_text(encoding="utf-8")).input_ids
    windows = [
        ids[start : start + given.seqlen]
        for start in range(0, given.rows * given.seqlen, given.seqlen)
    ]
    return Dataset.from_dict(
        {"input_ids": windows, "attention_mask": [[1] * len(each) for each in windows]}
    )


def _groups(weight: dict[str, Any], entering: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": weight, "input_activations": entering}}


def _int4() -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": BLOCK,
    }


def _int8() -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


if __name__ == "__main__":
    main()
