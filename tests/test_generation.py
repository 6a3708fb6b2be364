"""An exported folder in the libraries that people generate text with, from text to text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from backends.onnx.backend import OnnxBackend
from tests.install_runtimes import OPTIMUM

PROMPT = "Once upon a time"
STEPS = 32
FLOATS = 1e-6
"""Two sessions of the same runtime over the same file differ by nothing; this is a hair for the way
through JSON.
"""


@pytest.fixture(scope="module")
def prompt(exported: Path) -> list[int]:
    found: list[int] = AutoTokenizer.from_pretrained(exported)(PROMPT)["input_ids"]
    return found


@pytest.fixture(scope="module")
def story(exported: Path, prompt: list[int]) -> list[int]:
    """What the token of the largest logit, over and over, makes of the prompt in rotq's own
    runner.
    """
    runtime = OnnxBackend().load(exported, "ort", exact=False)
    ids, past = torch.tensor([prompt]), None
    entering = ids
    for _ in range(STEPS):
        length = ids.shape[1]
        positions = torch.arange(length - entering.shape[1], length)[None]
        logits, past = runtime.forward(
            entering, torch.ones(1, length, dtype=torch.long), positions, past
        )
        entering = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, entering], dim=1)
    found: list[int] = ids[0].tolist()
    return found


@pytest.mark.runtimes
def test_onnxruntime_genai_tells_the_story(
    exported: Path, prompt: list[int], story: list[int]
) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(exported))
    tokenizer = og.Tokenizer(model)
    # Its own tokenizer applies no normaliser, which would make small letters, and no template,
    # which adds <s>.
    assert tokenizer.encode(PROMPT.lower()).tolist() == prompt[1:]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(story))
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(token) for token in generator.get_sequence(0)] == story
    assert tokenizer.decode(story) == AutoTokenizer.from_pretrained(exported).decode(
        story, skip_special_tokens=True
    )


_IN_OPTIMUM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from optimum.onnxruntime import ORTModelForCausalLM
folder, prompt, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([prompt])
mask = torch.ones_like(ids)
story = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)
logits = model(input_ids=ids, attention_mask=mask).logits
print(json.dumps({"story": story[0].tolist(), "logits": logits[0, -1].tolist()}))
"""


@pytest.mark.runtimes
def test_optimum_tells_the_story(exported: Path, prompt: list[int], story: list[int]) -> None:
    """In a process of its own, which alone sees the transformers that Optimum takes."""
    if not OPTIMUM.is_dir():
        pytest.skip("Optimum is not installed (make test-runtimes)")
    environment = os.environ | {"PYTHONPATH": str(OPTIMUM), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _IN_OPTIMUM, str(exported), json.dumps(prompt), str(STEPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["story"] == story
    ids = torch.tensor([prompt])
    logits, _ = (
        OnnxBackend()
        .load(exported, "ort", exact=False)
        .forward(ids, torch.ones_like(ids), torch.arange(len(prompt))[None])
    )
    assert torch.allclose(torch.tensor(found["logits"]), logits[0, -1], rtol=FLOATS, atol=FLOATS)
