"""``rotq_bundle.json``: what a bundle holds, for whoever reads it back.

It names every tensor with its dtype and shape, every quantized linear with its scheme, and every
file with its checksum; the last field is the checksum of all the others. So each byte of a bundle
is under some checksum, and what is missing or too much is known before anything is loaded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from backends.base import ContentKind
from backends.safetensors.file_names import MANIFEST_FILE
from calib.errors import BackendError
from calib.files.reading import MALFORMED, read_json, reason_of
from calib.files.sealed import seal_of

FORMAT_VERSION = 1
_CHECKSUM = "sha256"
_SHOWN = 3
"""Problems that an error names."""
_HINT = "export the model again, or copy the folder again"


def _is_dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"torch has no dtype {name!r:.40}")
    return name


DtypeName = Annotated[str, AfterValidator(_is_dtype)]
"""A dtype as torch calls it: ``int8``, ``float8_e4m3fn``."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorEntry(_Entry):
    """One tensor of the bundle."""

    kind: ContentKind
    dtype: DtypeName
    shape: list[int]
    file: str
    """The file that holds it."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """:attr:`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


class FileEntry(_Entry):
    """One file of the bundle."""

    sha256: str
    bytes: int


class CacheEntry(_Entry):
    """How the KV cache is quantized."""

    scheme: dict[str, Any]
    """``tensor_scheme_to_dict`` of keys and values."""
    layers: list[int]


class Manifest(_Entry):
    """Everything about a bundle but its numbers."""

    format_version: int
    rotq: str
    """The version that wrote it."""
    target: str
    scheme: str
    """The preset that the linears were quantized with, but for overrides."""
    dtype: DtypeName
    """Of the float tensors and scales of the quantized model."""
    model_type: str
    fingerprint: str
    """SHA-256 of the source model's weights."""
    config: dict[str, Any]
    """Hugging Face config of the source model."""
    tensors: dict[str, TensorEntry]
    """By key."""
    linears: dict[str, dict[str, Any]]
    """:meth:`~calib.artifact.QuantizedLinear.description`, by the linear's name in the source
    model.
    """
    kept: dict[str, str]
    """Linears left in float, with the reason."""
    cache: CacheEntry | None
    files: dict[str, FileEntry]
    """By name: weights, their index, rotations, a prefix, and what the target wants besides."""

    def save(self, folder: Path) -> None:
        """Write it into ``folder``."""
        # twice through JSON: what is sealed must be what a reader parses, where keys that were
        # numbers are strings
        values = json.loads(json.dumps(self.model_dump(), allow_nan=False))
        values[_CHECKSUM] = seal_of(values)
        text = json.dumps(values, indent=1)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read what :meth:`save` wrote.

        Raises:
            BackendError: it is missing or damaged, or of another format version.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise BackendError(
                f"'{folder}' is not a bundle of rotq: it holds no {MANIFEST_FILE}",
                hint="`rotq export --backend safetensors -o DIR` writes one",
            )

        try:
            values = read_json(path)
            version = values["format_version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackendError(f"'{path}' is damaged: {error}", hint=_HINT) from error

        if version != FORMAT_VERSION:
            raise BackendError(
                f"'{path}' has format version {version}; this rotq reads version {FORMAT_VERSION}",
                hint="use the rotq that wrote it, or a newer one",
            )
        try:
            fits = values.pop(_CHECKSUM, None) == seal_of(values)
        except MALFORMED as error:  # NaN, or nested too deeply
            raise BackendError(f"'{path}' is damaged: {reason_of(error)}", hint=_HINT) from error
        if not fits:
            raise BackendError(
                f"'{path}' is damaged or was edited: its checksum does not fit", hint=_HINT
            )

        try:
            return cls.model_validate(values)
        except ValidationError as error:
            reasons = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
                for item in error.errors()[:_SHOWN]
            )
            raise BackendError(f"'{path}' is damaged: {reasons}", hint=_HINT) from error


def dtype_name(dtype: torch.dtype) -> str:
    """``int8`` for ``torch.int8``."""
    return str(dtype).removeprefix("torch.")
