"""The folders that fuzzing starts from: everything that rotq reads, written by rotq."""

from __future__ import annotations

import gzip
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from backends.base import WriteOptions
from backends.safetensors.backend import SafetensorsBackend
from backends.testing.models import tiny_model
from backends.user_cache import cache_folder
from calib.artifact import Prefix
from calib.artifact.prefix import save_prefix
from calib.files.sealed import sealed_text
from calib.layerwise.shards import ShardStore
from calib.rotations.files import load_rotations
from calib.rotations.foreign import export_dartquant
from calib.schemes import scheme_named
from exporter.commands.export import export
from exporter.output import write_list
from exporter.recipe import load_recipe
from exporter.run.options import RunOptions
from tests.checkpoints import write_checkpoint
from tests.plugins import install_plugins

BUNDLES = {
    "tripy": "int8-weight-only",
    "tensorrt": "int8",
    "modelopt": "float8",
    "vllm": "int8",
    "transformers": "int8-weight-only",
    "compressed-tensors": "int8-weight-only",
}
"""Each layout of a bundle, and a scheme that it takes."""
RECIPE = {
    "calibration.nsamples": 4,
    "calibration.seqlen": 32,
    "evaluation.nsamples": 2,
    "gate.nsamples": 2,
    "scheme": "int8-weight-only",
    "kv": "int8",
    "rotate": "r1,r2",
    "rotation.select": False,
    "rotation.r1_tokens": 64,
    "rotation.r2_tokens": 32,
    "rotation.r1.epochs": 1,
    "rotation.r2.epochs": 1,
}
TEXT = "once upon a time there was a fox who liked to read about numbers\n"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def build(root: Path) -> None:
    """Write every pristine folder below ``root``."""
    _models(root)
    _run(root)
    _rotations(root)
    _bundles(root)
    _texts(root / "text")
    _work(root / "layerwise")
    _cache(root)
    _plugins(root / "plugins")
    _all(root)


def _models(root: Path) -> None:
    folder = write_checkpoint(root / "model")
    GenerationConfig(eos_token_id=1, bos_token_id=0).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    sharded = shutil.copytree(folder, root / "sharded")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="100KB")
    (sharded / "model.safetensors").unlink()


def _run(root: Path) -> None:
    """An export for ONNX Runtime, and what its work folder kept."""
    recipe = load_recipe(None, {**RECIPE, "model": str(root / "model")})
    export(recipe, RunOptions(root / "export", verify=False, work_dir=root / "work"))
    shutil.copytree(root / "work" / "capture", root / "capture")
    shutil.copytree(root / "work" / "artifact", root / "artifact")
    (root / "recipe").mkdir()
    (root / "recipe" / "recipe.yaml").write_text(recipe.to_yaml())


def _rotations(root: Path) -> None:
    for name in ("rotations", "pickles", "prefix"):
        (root / name).mkdir()
    for file in ("rotations.json", "rotations.safetensors"):
        shutil.copyfile(root / "artifact" / file, root / "rotations" / file)
    export_dartquant(load_rotations(root / "rotations"), root / "pickles")
    # a few of SpinQuant's size, one R2 a layer
    r2 = {f"model.layers.{layer}.self_attn.R2": torch.eye(8) for layer in range(2)}
    torch.save({"R1": torch.eye(32), **r2}, root / "pickles" / "R.bin")
    keys, values = ({layer: torch.randn(2, 3, 8) for layer in range(2)} for _ in "kv")
    save_prefix(Prefix((0, 5, 7), keys, values, "massive tokens"), root / "prefix")


def _bundles(root: Path) -> None:
    for target, scheme in BUNDLES.items():
        folder = root / f"bundle-{target}"
        folder.mkdir()
        quantized = tiny_model("llama", scheme_named(scheme), rotate=("r1", "r2"))
        SafetensorsBackend().write(quantized, folder, WriteOptions(target))


def _texts(folder: Path) -> None:
    folder.mkdir()
    lines = [f"{number} {TEXT}" for number in range(40)]
    (folder / "text.txt").write_text("".join(lines))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": line, "id": 1}) + "\n" for line in lines)
    )
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20)
    (folder / "text.json").write_text(json.dumps([{"text": line} for line in lines]))
    (folder / "text.csv").write_text("text\n" + "".join(lines))
    (folder / "text.txt.gz").write_bytes(gzip.compress("".join(lines).encode()))
    if find_spec("pyarrow") is not None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": lines}), folder / "text.parquet")


def _work(folder: Path) -> None:
    """A layer-wise run of two blocks, and an output that rotq wrote."""
    store = ShardStore(folder)
    store.bind({"model": "m", "seed": "0"})
    for layer in range(2):
        tensors = {f"model.layers.{layer}.weight": torch.ones(4, 4)}
        store.write(f"block-{layer:05}", tensors, next_inputs={"0": "0" * 64})
    (folder / "rotq.yaml").write_text(load_recipe(None).to_yaml())
    (folder / "inputs.json").write_text(sealed_text({"format_version": 1, "contents": {}}))
    write_list(folder)


def _cache(root: Path) -> None:
    """What the export left in the user's cache."""
    (root / "cache").mkdir()
    for path in cache_folder().rglob("*"):
        if path.suffix in (".trace", ".json"):
            shutil.copyfile(path, root / "cache" / path.name)


def _plugins(folder: Path) -> None:
    folder.mkdir()
    install_plugins(folder)


def _all(root: Path) -> None:
    """What a command is given, in one folder."""
    for name in ("model", "export", "artifact", "recipe", "pickles", "text"):
        shutil.copytree(root / name, root / "all" / name)
