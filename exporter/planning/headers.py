"""What a checkpoint says about itself without its weights being read: ``config.json`` and the
safetensors headers.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header
(JSON: dtype, shape and byte range of every tensor), so a 70B checkpoint is described by a few
hundred kilobytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from calib.architectures import supported_model_types, wiring_of
from calib.architectures.lookup import refuse_config
from calib.architectures.stored import uncalled_names
from calib.artifact.side_files import SIDE_FILES, side_files
from calib.errors import CheckpointError
from calib.files.reading import MALFORMED, is_file_in, parse_json, read_json, reason_of
from calib.network.contents import (
    layers_of,
    refuse_files,
    refuse_layers,
    refuse_quantized,
    refuse_unused,
)
from calib.network.quantized import Header, quantization_of
from calib.schemes import LinearScheme, TensorScheme, tensor_scheme_from_dict
from exporter.recipe import EMBEDDED

EMBEDDED_FOLDER = "data/llama-5m"

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of dtypes in torch, by that in a safetensors header."""
_NO_MODEL = "give a Hugging Face model folder or a hub id to -m/--model"
_NO_ARTIFACT = "give what 'rotq calibrate' wrote to --from-artifact"
_AGAIN = "run 'rotq calibrate' again"
_BITS = 8
"""Elements of one byte at most."""
_MAX_HEADER = 100_000_000
"""The format's own limit; a larger number means that the file is not safetensors."""


@dataclass(frozen=True)
class TensorHeader:
    """Name, dtype (in safetensors' spelling, ``BF16``), shape and size of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CheckpointHeaders:
    """A checkpoint, described."""

    source: str
    config: dict[str, Any]
    tensors: tuple[TensorHeader, ...]
    side_files: tuple[str, ...] = ()
    """Files that every output carries along."""
    beside: tuple[str, ...] = ()
    """Names of all files beside the weights."""
    quantized: str | None = None
    """How the stored weights are quantized that are read as floats, in words."""

    @property
    def dtype(self) -> str:
        """What the weights are stored in: the dtype of the largest tensor that is not quantized."""
        floats = [tensor for tensor in self.tensors if tensor.dtype in _FLOATS]
        return (
            _FLOATS[max(floats, key=lambda tensor: tensor.elements).dtype] if floats else "float32"
        )


def read_headers(model: str, revision: str | None = None) -> CheckpointHeaders:
    """Describe a checkpoint folder, a hub id, or the embedded model.

    Raises:
        CheckpointError: it does not exist, is incomplete or corrupt, or the hub cannot be reached.
    """
    if model == EMBEDDED:
        return read_folder(Path(str(resources.files("exporter") / EMBEDDED_FOLDER)), EMBEDDED)
    if Path(model).is_dir():
        return read_folder(Path(model), model)
    if Path(model).exists():
        raise CheckpointError(
            f"the model '{model}' is a file", hint="give the folder that holds config.json"
        )
    if model.count("/") > 1 or model.startswith((".", "/", "~", "\\")):
        raise CheckpointError(
            f"the model folder '{model}' does not exist", hint="check the path given to -m/--model"
        )
    return _read_hub(model, revision)


def read_folder(folder: Path, source: str) -> CheckpointHeaders:
    """Describe a local folder whose weights are ``model.safetensors`` or shards with an index."""
    beside = tuple(path.name for path in folder.iterdir())
    config = _read_json(folder / "config.json") if "config.json" in beside else {}
    quantized = quantization_of(config) is not None
    # of adapters, check_headers decides
    refuse_files(beside, source, ignore_unused=True, quantized=quantized)
    return _as_floats(
        CheckpointHeaders(
            source,
            config or _read_json(folder / "config.json"),
            _tensors(folder, "model"),
            tuple(side_files(folder)),
            beside,
        )
    )


def _as_floats(checkpoint: CheckpointHeaders) -> CheckpointHeaders:
    """What :func:`calib.network.open_checkpoint` makes of a quantized checkpoint; bytes are those
    of what is stored.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is None:
        return checkpoint
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    decoded = quantization.decoded(
        {name: Header(tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    )
    kept = [stored[name] for name in decoded.kept]
    floats = [tensor for tensor in kept if tensor.dtype in _FLOATS]
    dtype = max(floats, key=lambda tensor: tensor.elements).dtype if floats else "F32"
    weights = [
        TensorHeader(
            weight.name,
            dtype,
            weight.shape,
            sum(stored[each].nbytes for each in weight.parts.values()),
        )
        for weight in decoded.weights.values()
    ]
    config = {
        key: value for key, value in checkpoint.config.items() if key != "quantization_config"
    }
    return replace(
        checkpoint, config=config, tensors=(*kept, *weights), quantized=quantization.words
    )


def check_headers(checkpoint: CheckpointHeaders, *, ignore_unused: bool) -> None:
    """Refuse what the run would refuse at its start (:func:`calib.fusing.check_contents`), as far
    as names tell.

    Args:
        checkpoint: the float model.
        ignore_unused: go on without tensors that the config does not call for.

    Raises:
        CheckpointError, UnsupportedModelError: with the reason.
    """
    source, config = checkpoint.source, checkpoint.config
    refuse_config(config)
    quantized = checkpoint.quantized is not None
    refuse_files(checkpoint.beside, source, ignore_unused=ignore_unused, quantized=quantized)
    stored = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in checkpoint.tensors}
    refuse_quantized(stored, source)
    refuse_layers(layers_of(config), len(stored), source)
    if not ignore_unused:
        refuse_unused(_uncalled(checkpoint), source)


def _uncalled(checkpoint: CheckpointHeaders) -> list[str]:
    """Names of tensors that the model of the config has no use for."""
    config = checkpoint.config
    if str(config.get("model_type")) in supported_model_types():
        return uncalled_names([tensor.name for tensor in checkpoint.tensors], config)
    from calib.fusing.contents import source_tensors
    from calib.network.published import meta
    from calib.network.skeleton import expected_tensors

    wiring = wiring_of(config)
    stored = {tensor.name: meta(tensor.shape) for tensor in checkpoint.tensors}
    return source_tensors(stored, wiring, expected_tensors(wiring.config)).unused()


def _tensors(folder: Path, stem: str) -> tuple[TensorHeader, ...]:
    """Headers of ``<stem>.safetensors``, or of the shards that its index names."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(
                f"'{index}' has no weight_map", hint="download the checkpoint again"
            )
        shards = sorted(set(map(str, weight_map.values())))
    else:
        shards = [f"{stem}.safetensors"]

    for shard in shards:
        if not is_file_in(folder, shard):
            raise CheckpointError(
                f"'{folder}' lacks the weight file '{shard}'",
                hint="download the checkpoint again, as safetensors",
            )
    return tuple(tensor for shard in shards for tensor in _read_header(folder / shard))


@dataclass(frozen=True)
class ArtifactHeaders:
    """What ``rotq calibrate`` wrote, described."""

    checkpoint: CheckpointHeaders
    linears: dict[str, LinearScheme]
    """How each linear is quantized."""
    cache: TensorScheme | None
    """How the KV cache is, if it is."""
    rotations: tuple[str, ...]
    """Kinds of its rotations."""


def read_artifact(folder: Path) -> ArtifactHeaders:
    """Describe what ``rotq calibrate`` wrote.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    path = folder / "quantized_model.json"
    manifest, rotations = (
        _read_json(each, _NO_ARTIFACT, _AGAIN) for each in (path, folder / "rotations.json")
    )

    try:
        if not isinstance(manifest["config"], dict):
            raise TypeError("'config' is no object")
        linears = {
            name: LinearScheme(
                tensor_scheme_from_dict(entry["weight"]),
                None if entry["input"] is None else tensor_scheme_from_dict(entry["input"]),
            )
            for name, entry in manifest["linears"].items()
        }
        cache = manifest["cache"]
        return ArtifactHeaders(
            CheckpointHeaders(
                str(folder),
                manifest["config"],
                _tensors(folder, "quantized_model"),
                tuple(side_files(folder)),
            ),
            linears,
            None if cache is None else tensor_scheme_from_dict(cache["scheme"]),
            tuple(sorted({rotation["kind"] for rotation in rotations["rotations"]})),
        )
    except MALFORMED as error:
        raise CheckpointError(f"'{path}' is damaged: {reason_of(error)}", hint=_AGAIN) from error


def _read_json(
    path: Path, absent: str = _NO_MODEL, damaged: str = "download the checkpoint again"
) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path.parent}' has no {path.name}", hint=absent) from error
    except ValueError as error:
        raise CheckpointError(f"cannot read '{path}': {error}", hint=damaged) from error


def _read_header(path: Path) -> Iterator[TensorHeader]:
    corrupt = CheckpointError(
        f"'{path}' is not a complete safetensors file", hint="download the checkpoint again"
    )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise corrupt
        (length,) = struct.unpack("<Q", start)
        if length > min(_MAX_HEADER, size - 8):
            raise corrupt
        header = file.read(length)

    try:
        entries = parse_json(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            whole = all(isinstance(each, int) and each >= 0 for each in (*shape, begin, end))
            if not whole or not begin <= end <= size - 8 - length:
                raise corrupt
            if math.prod(shape) > _BITS * (end - begin):
                raise corrupt
            yield TensorHeader(name, str(entry["dtype"]), shape, end - begin)
    except MALFORMED as error:
        raise corrupt from error


def _read_hub(repo: str, revision: str | None) -> CheckpointHeaders:
    # Importing huggingface_hub's client costs a quarter of a second that local folders need not
    # pay.
    from huggingface_hub import hf_hub_download, list_repo_files, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    hint = "check the spelling; a folder needs a path that exists; a private model needs HF_TOKEN"
    try:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        if isinstance(cached, str) and _weights_beside(Path(cached).parent):
            return read_folder(Path(cached).parent, repo)
        config = _read_json(Path(hf_hub_download(repo, "config.json", revision=revision)))
        there = list_repo_files(repo, revision=revision)
        side = tuple(name for name in SIDE_FILES if name in there)
        return _as_floats(
            CheckpointHeaders(repo, config, _hub_tensors(repo, revision), side, tuple(there))
        )
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError) as error:
        # HfHubHTTPError is an OSError too: the hub answered, and said no.
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            first = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"the hub does not give '{repo}': {first}", hint=hint) from error
        raise CheckpointError(
            f"'{repo}' is no folder here, is not in the hub cache, and the hub cannot be reached",
            hint="check the path or the network; unset HF_HUB_OFFLINE if it is set",
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' is neither a folder nor a hub id", hint=hint) from error


def _weights_beside(folder: Path) -> bool:
    return any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def _hub_tensors(repo: str, revision: str | None) -> tuple[TensorHeader, ...]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(repo, revision=revision).files_metadata.values()
    except NotASafetensorsRepoError as error:
        raise CheckpointError(
            f"'{repo}' has no safetensors weights",
            hint="choose a revision that has them, or convert the checkpoint",
        ) from error
    return tuple(
        TensorHeader(
            name, tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0]
        )
        for file in files
        for name, tensor in file.tensors.items()
    )
