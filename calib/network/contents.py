"""What a checkpoint is refused for before any tensor is read: by the names of its files and by the
headers of its tensors. Imports no torch.

The plan and the run ask the same questions; only the run knows the module tree, so that it finds
every unused tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from calib.architectures.lookup import FLOAT_CHECKPOINT
from calib.architectures.stored import is_buffer, listed
from calib.errors import CheckpointError

ADAPTER = "adapter_config.json"
"""What peft writes beside an adapter."""
_WEIGHTS = re.compile(r"model\.safetensors(\.index\.json)?|pytorch_model.*\.bin")
"""Names of files with weights of a model, those that are refused later as pickles among them."""
_SIDE_FILES = {
    "quantize_config.json": "AutoGPTQ",
    "quant_config.json": "AutoAWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files that a quantized checkpoint has, and whose they are."""
_KEYS = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.weight_packed$": "packed by compressed-tensors",
    r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.": "bitsandbytes",
    r"\.(W_q|W_q_linear)$": "HQQ",
    r"\.(weight|input|output|k|v)_(scale|scale_inv|scale_2|zero_point|global_scale)$": "scales",
    r"_proj_(blocks|scales)$": "MXFP4",
    r"\._amax$": "ModelOpt",
}
"""Names of tensors that only a quantized checkpoint has, and what they are."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of float weights, as safetensors spells them."""
_LORA = re.compile(r"\blora_|^base_model\.model\.|\.base_layer\.")
_MERGE = (
    "merge first: in Python, peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
    ".merge_and_unload().save_pretrained(OUT)"
)


def refuse_files(
    folder: Path | Collection[str],
    source: str,
    *,
    ignore_unused: bool = False,
    quantized: bool = False,
) -> None:
    """Refuse a folder that holds an adapter, or weights that are quantized already.

    Args:
        folder: the folder, or the names of the files in it.
        source: the model, for the message.
        ignore_unused: go on where an adapter lies beside weights.
        quantized: the weights are quantized in a way that is read; what their quantizer wrote
            beside them passes.

    Raises:
        CheckpointError: with the reason.
    """
    names = [path.name for path in folder.iterdir()] if isinstance(folder, Path) else folder
    weights = any(map(_WEIGHTS.fullmatch, names))
    if ADAPTER in names and not (weights and ignore_unused):
        beside = "beside its weights" if weights else "and no weights of a model"
        hint = _MERGE + (", or leave it out: --ignore-unused" if weights else "")
        raise CheckpointError(f"'{source}' holds an adapter ({ADAPTER}) {beside}", hint=hint)
    found = next((name for name in _SIDE_FILES if name in names), None)
    if found is not None and not quantized:
        raise _quantized(source, f"{_SIDE_FILES[found]}: it has a {found}")
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None and not weights:
        raise _quantized(source, f"GGUF: {gguf}")


def refuse_quantized(tensors: Mapping[str, tuple[str, int]], source: str) -> None:
    """Refuse weights that are quantized already.

    Args:
        tensors: of every stored tensor, its dtype as safetensors spells it and how many dimensions
            it has.
        source: the model, for the message.

    Raises:
        CheckpointError: with what they are, and one of them.
    """
    for pattern, what in _KEYS.items():
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name is not None:
            raise _quantized(source, f"{what}: it holds {name}")
    for name, (dtype, dimensions) in tensors.items():
        if dtype not in _FLOATS and dimensions >= 2 and not is_buffer(name):
            raise _quantized(source, f"{name} is stored in {dtype}")


def refuse_unused(names: list[str], source: str) -> None:
    """Refuse a checkpoint with tensors that its config does not call for: leaving out what was
    trained makes another model.

    Args:
        names: of tensors that the model has no use for. Buffers that follow from the config pass.
        source: the model, for the message.

    Raises:
        CheckpointError: it names them.
    """
    unused = [name for name in names if not is_buffer(name)]
    if not unused:
        return
    some, them = ("tensor", "it") if len(unused) == 1 else ("tensors", "them")
    config = f"use the config.json that belongs to {them}"
    raise CheckpointError(
        f"'{source}' holds {len(unused)} {some} that its config does not call for:"
        f" {listed(unused)}",
        hint=f"{_MERGE if any(map(_LORA.search, unused)) else config}, or leave {them} out:"
        " --ignore-unused",
    )


def layers_of(config: Mapping[str, object]) -> object:
    """How many decoder layers a config.json says there are."""
    return config.get("num_hidden_layers", config.get("n_layer"))


def refuse_layers(layers: object, tensors: int, source: str) -> None:
    """Refuse a config with more decoder layers than the checkpoint has tensors, before a module
    tree of that size is built.

    Args:
        layers: what the config says.
        tensors: how many tensors are stored.
        source: the model, for the message.

    Raises:
        CheckpointError: there cannot be that many.
    """
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= tensors:
        raise too_many_layers(layers, source)


def too_many_layers(layers: object, source: object) -> CheckpointError:
    """What is raised of a number of layers that cannot be."""
    return CheckpointError(
        f"the config of '{source}' calls for {layers} layers, which its weights cannot have",
        hint="check num_hidden_layers in config.json",
    )


def _quantized(source: str, how: str) -> CheckpointError:
    return CheckpointError(f"'{source}' is quantized already ({how})", hint=FLOAT_CHECKPOINT)
