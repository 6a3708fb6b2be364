"""Reading a Hugging Face checkpoint: its config, and its tensors as a lazy mapping over
memory-mapped safetensors.

Only safetensors files are read. A pickle (``pytorch_model.bin``) can run code when it is loaded, so
it is refused.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calib.architectures.spec import MOST_LAYERS
from calib.errors import CheckpointError, UnsupportedModelError
from calib.files.reading import MALFORMED, is_file_in, read_json, reason_of, regular_file
from calib.network.contents import layers_of, refuse_files, too_many_layers
from calib.network.quantized import Computed, Quantization, quantization_of, with_floats

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a snapshot needs: weights, configs and tokenizer files. Code is fetched by transformers, if
# it is trusted.
_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# Second copies of the weights that some repositories hold: subfolders, and Mistral's own layout.
_IGNORED = ["*/*", "consolidated*"]


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name. A tensor is read from its file when it is asked for and is not kept."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        *,
        folder: Path | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        """
        Args:
            tensors: by name, either a tensor or the open safetensors file that holds it.
            folder: where the checkpoint lies, if it lies anywhere.
            quantization: how the files are quantized, which are read as floats.
        """
        self._tensors = dict(tensors)
        if quantization is not None:
            self._tensors = with_floats(self._tensors, quantization)
        self.folder = folder
        self.quantization = quantization

    @classmethod
    def from_module(cls, module: Any) -> Checkpoint:
        """The state dict of an ``nn.Module`` as a checkpoint; it shares the module's memory."""
        return cls({name: tensor.detach() for name, tensor in module.state_dict().items()})

    def __getitem__(self, name: str) -> Tensor:
        held = self._tensors[name]
        if isinstance(held, Tensor):
            return held
        try:
            tensor: Tensor = held.get_tensor(name)
        # a dtype that torch has not
        except (SafetensorError, *MALFORMED) as error:
            raise CheckpointError(
                f"tensor {name} of {self.folder} cannot be read: {reason_of(error)}",
                hint="download or copy it again",
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        held = self._tensors[name]
        return tuple(held.shape if isinstance(held, Tensor) else held.get_slice(name).get_shape())

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in its file; of a quantized one, its scales among them."""
        held = self._tensors[name]
        if isinstance(held, Computed):
            return held.stored_bytes()
        return self[name].nbytes

    def stored_dtypes(self) -> dict[str, tuple[str, int]]:
        """Of each tensor in a file, its dtype as safetensors spells it (``BF16``) and how many
        dimensions it has, without reading it.
        """
        slices = {
            name: held.get_slice(name)
            for name, held in self._tensors.items()
            if not isinstance(held, Tensor)
        }
        return {
            name: (str(part.get_dtype()), len(part.get_shape())) for name, part in slices.items()
        }


def load_config(
    path_or_id: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """The transformers config of a model folder or hub id; that of the float model where the
    checkpoint is quantized in a way that :func:`open_checkpoint` reads.

    Args:
        path_or_id: a folder with a ``config.json``, or the id of a model on the Hugging Face hub.
        trust_remote_code: run configuration code that comes with the model.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the folder or its config.json is missing or unreadable, or the hub cannot
            be reached.
        UnsupportedModelError: transformers does not know the ``model_type``.
    """
    from transformers import AutoConfig  # here, because it takes seconds to import

    folder = _local_folder(path_or_id)
    if folder is not None:
        _check_config_json(folder)
    try:
        config = AutoConfig.from_pretrained(
            str(folder or path_or_id), trust_remote_code=trust_remote_code, revision=revision
        )
        _check_dtypes(config.to_dict())
    except Exception as error:
        # transformers raises OSError for anything from a missing file to no network, ValueError for
        # an unknown model.
        raise _config_error(str(path_or_id), error) from error
    if quantization_of(vars(config)) is not None:
        del config.quantization_config
    return config


def _check_dtypes(values: Mapping[str, Any]) -> None:
    """Transformers believes any word for a dtype, and stumbles over it later.

    Raises:
        ValueError: one is none of torch's.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_dtypes(value)
        elif key in ("dtype", "torch_dtype") and value is not None:
            name = str(value).removeprefix("torch.")
            if not isinstance(getattr(torch, name, None), torch.dtype):
                raise ValueError(f"'{key}' is {name!r:.40}, which is no dtype")


def open_checkpoint(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None
) -> Checkpoint:
    """Open the safetensors weights of a model folder or hub id; a hub id is downloaded to the
    Hugging Face cache first. Quantized weights that rotq reads are floats in it
    (:mod:`calib.network.quantized`).

    Nothing is read but the headers. Shards are listed by ``model.safetensors.index.json``, or there
    is a single ``model.safetensors``.

    Raises:
        CheckpointError: the folder is missing or empty, has no config.json, holds only pickles, or
            a shard is missing, truncated or lacks a tensor that the index promises; a quantized
            weight lacks a part; or the hub cannot be reached.
    """
    folder = _local_folder(path_or_id) or _download(str(path_or_id), revision)
    quantization = quantization_of(_check_config_json(folder))
    # of adapters, the run decides
    refuse_files(folder, str(folder), ignore_unused=True, quantized=quantization is not None)
    if (folder / _INDEX).is_file():
        tensors = _open_sharded(folder)
        return Checkpoint(tensors, folder=folder, quantization=quantization)
    if (folder / _SINGLE).is_file():
        shard = _open(folder / _SINGLE)
        tensors = dict.fromkeys(shard.keys(), shard)
        return Checkpoint(tensors, folder=folder, quantization=quantization)
    raise _no_weights(folder)


def _local_folder(path_or_id: str | os.PathLike[str]) -> Path | None:
    """The folder, or ``None`` for what can only be a hub id (``name`` or ``owner/name``).

    Raises:
        CheckpointError: it is a path, and there is no such folder, or it is empty.
    """
    text = os.fspath(path_or_id)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise CheckpointError(
                f"model folder {text} is empty", hint="pass the folder of a saved model"
            )
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{text} is a file, not a model folder", hint="pass the folder that holds it"
        )
    looks_like_path = (
        text.startswith((".", "~")) or folder.is_absolute() or text.count("/") > 1 or "\\" in text
    )
    if isinstance(path_or_id, os.PathLike) or looks_like_path:
        raise CheckpointError(
            f"there is no model folder {text}", hint="check the path, or pass a hub id: owner/name"
        )

    return None


def _check_config_json(folder: Path) -> dict[str, Any]:
    """The content of config.json; refuse one that transformers would wait for, or fill the memory
    with.
    """
    path = folder / "config.json"
    if not path.exists():
        refuse_files(folder, str(folder))  # an adapter, or GGUF
        raise CheckpointError(
            f"model folder {folder} has no config.json",
            hint="pass the folder that the model was saved to",
        )
    try:
        config: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise CheckpointError(
            f"the config of {folder} cannot be read: config.json: {error}",
            hint="download or copy it again",
        ) from error
    layers = layers_of(config)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise too_many_layers(layers, folder)
    return config


def _config_error(source: str, error: Exception) -> CheckpointError | UnsupportedModelError:
    reason = reason_of(error)
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return UnsupportedModelError(
            f"{source} is a model with code of its own, which the installed transformers"
            f" ({version('transformers')}) does not have",
            hint=(
                "rotq takes models of transformers' own classes, and reads no wiring out of other"
                " code, trusted or not: --trust-remote-code is for tokenizers"
            ),
        )
    if isinstance(error, ValueError) and "model type" in str(error):
        return UnsupportedModelError(
            f"the installed transformers ({version('transformers')}) has no model of the type of"
            f" {source}: {reason}",
            hint=f"check model_type in config.json; {_known_versions()}",
        )
    return CheckpointError(
        f"the config of {source} cannot be read: {reason}",
        hint="check the folder or hub id; for a gated model log in with: hf auth login",
    )


def _known_versions() -> str:
    """Which versions of transformers rotq takes, in words."""
    try:
        wanted = next(each for each in requires("rotq") or () if each.startswith("transformers"))
    except (PackageNotFoundError, StopIteration):  # a tree that was not installed
        return "newer types come with newer versions of transformers"
    return f"a newer type needs a newer rotq: this one works with {wanted.partition(';')[0]}"


def _download(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED
            )
        )
    # the hub client raises a dozen kinds: HTTP, offline, validation, not found, disk
    except Exception as error:
        reason = reason_of(error)
        raise CheckpointError(
            f"{model_id} is no folder here and cannot be downloaded from the hub: {reason}",
            hint="check the id and the network; a gated model needs: hf auth login",
        ) from error


def _no_weights(folder: Path) -> CheckpointError:
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        return CheckpointError(
            f"model folder {folder} holds its weights as pickles only, which can run code when they"
            " are loaded",
            hint=f"if you trust them, convert once: {_conversion(folder)}",
        )
    return CheckpointError(
        f"model folder {folder} has neither {_SINGLE} nor {_INDEX}",
        hint="rotq reads safetensors only; save the model with save_pretrained",
    )


def _conversion(folder: Path) -> str:
    """A command that loads the pickles and writes the model with its tokenizer."""
    source, target = repr(str(folder)), repr(f"{folder}-safetensors")
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({source}).save_pretrained({target}); "
        f"T.from_pretrained({source}).save_pretrained({target})"
    )
    return f"python -c {shlex.quote(code)}"


def _open(path: Path) -> Any:
    try:
        return safe_open(regular_file(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} in {path.parent} is damaged or truncated: {reason_of(error)}",
            hint="download or copy it again",
        ) from error


def _open_sharded(folder: Path) -> dict[str, Any]:
    index = _read_index(folder)
    weight_map: dict[str, str] = index["weight_map"]
    shards: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        if not is_file_in(folder, name):
            raise CheckpointError(
                f"shard {name} is missing from {folder}, but {_INDEX} lists it",
                hint="download or copy it again",
            )
        shards[name] = _open(folder / name)
    held = {name: set(shard.keys()) for name, shard in shards.items()}
    for tensor, shard in weight_map.items():
        if tensor not in held[shard]:
            raise CheckpointError(
                f"tensor {tensor} is not in {shard} of {folder}, where {_INDEX} places it",
                hint=(
                    "the shards and the index belong to different saves; download or copy them"
                    " again"
                ),
            )

    if not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f"{_INDEX} in {folder} has no 'metadata', without which transformers does not load it",
            hint='add "metadata": {} to it',
        )
    return {tensor: shards[shard] for tensor, shard in weight_map.items()}


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a sharded checkpoint, whose ``weight_map`` has the shard of each tensor."""
    try:
        index: dict[str, Any] = read_json(folder / _INDEX)
        if not all(isinstance(shard, str) for shard in index["weight_map"].values()):
            raise TypeError("a shard is not given by its name")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{_INDEX} in {folder} is damaged: {reason_of(error)}", hint="download or copy it again"
        ) from error
    return index
