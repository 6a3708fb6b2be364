"""Opening a bundle: checked against its manifest before a tensor is touched, memory-mapped
after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backends.safetensors.differences import differences
from backends.safetensors.file_names import INDEX_FILE, PREFIX_FILES
from backends.safetensors.layout import Layout
from backends.safetensors.manifest import Manifest
from backends.safetensors.tensor_file import DTYPES
from calib.artifact import (
    Prefix,
    Provenance,
    QuantizedCache,
    QuantizedLinear,
    QuantizedModel,
    load_prefix,
)
from calib.artifact.files import check_named_rotations
from calib.errors import BackendError, RotqError
from calib.files.reading import MALFORMED, is_file_in, read_json, reason_of
from calib.files.sealed import digest
from calib.rotations.files import load_rotations
from calib.rotations.rotation_set import RotationSet
from calib.schemes import scheme_named

_HINT = "export the model again, or copy the folder again"
_T = TypeVar("_T")

Form = tuple[torch.dtype, Sequence[int]]
"""Dtype and shape of a tensor."""


@dataclass(frozen=True)
class Bundle:
    """An open bundle."""

    folder: Path
    manifest: Manifest
    tensors: Mapping[str, Tensor]
    """By key; memory-mapped, made anew on every access."""

    def check(self, expected: Mapping[str, Form], what: str) -> None:
        """Compare the keys, dtypes and shapes of this bundle with those of the model it shall fill.

        Args:
            expected: dtype and shape of every tensor that the model takes, by key.
            what: the model, as the error calls it.

        Raises:
            BackendError: naming everything that is missing, too much, of another dtype, rank or
                shape.
        """
        actual = {
            key: (entry.torch_dtype, entry.shape) for key, entry in self.manifest.tensors.items()
        }
        problems = differences(actual, expected)
        if problems:
            raise BackendError(
                f"the bundle '{self.folder}' of a '{self.manifest.model_type}' model for target "
                f"'{self.manifest.target}' does not fit {what}: {problems}",
                hint=(
                    "build the model from the config in the bundle's manifest, in the bundle's"
                    " dtype, or export the model that you have"
                ),
            )


def open_bundle(
    folder: str | PathLike[str], *, target: str | None = None, verify: bool = False
) -> Bundle:
    """Open the bundle in ``folder``.

    Args:
        folder: what ``rotq export --backend safetensors`` wrote.
        target: what it must have been written for; ``None`` for whatever it was.
        verify: also compare the checksum of every file, which reads all of them.

    Raises:
        BackendError: it is no bundle, written for another target or by another version; or a file
            of it is missing, truncated, edited or does not hold what the manifest says.
    """
    path = Path(folder)
    manifest = Manifest.load(path)
    if target is not None and manifest.target != target:
        raise BackendError(
            f"the bundle '{path}' was written for target '{manifest.target}', not for '{target}'",
            hint=(
                f"export it again with --target {target}; --from-artifact needs no new calibration"
            ),
        )

    # files as a whole first, then what their headers say, then tensors when they are used
    _check_files(path, manifest, verify=verify)
    _check_index(path, manifest)
    tensors = _MappedTensors(path, manifest)
    bundle = Bundle(path, manifest, tensors)
    expected = {key: (entry.torch_dtype, entry.shape) for key, entry in manifest.tensors.items()}
    problems = _undamaged(bundle, lambda: differences(tensors.forms(), expected))

    if problems:
        raise BackendError(
            f"the bundle '{path}' does not hold what its manifest says: {problems}", hint=_HINT
        )

    return bundle


def read_linears(bundle: Bundle, layout: Layout) -> Mapping[str, QuantizedLinear]:
    """The quantized linears of ``bundle``, in the order of the source model.

    Raises:
        BackendError: they are not what their descriptions say.
    """
    manifest = bundle.manifest
    linears = _undamaged(
        bundle, lambda: layout.linears(bundle.tensors, manifest.linears, manifest.config)
    )
    return _undamaged(bundle, lambda: {name: linears[name] for name in manifest.linears})


def read_cache(bundle: Bundle, layout: Layout) -> QuantizedCache | None:
    """The quantized KV cache of ``bundle``, if it has one; errors as for :func:`read_linears`."""
    manifest = bundle.manifest
    if manifest.cache is None:
        return None
    described = manifest.cache.model_dump()
    return _undamaged(bundle, lambda: layout.cache(bundle.tensors, described, manifest.config))


def read_prefix(bundle: Bundle) -> Prefix | None:
    """The prefix of ``bundle`` as the artifact had it, keys after R3, if it has one.

    Raises:
        BackendError: it is not sound.
    """
    # only what the manifest lists is under a checksum
    if not bundle.manifest.files.keys() & set(PREFIX_FILES):
        return None
    return _sound(bundle, lambda: load_prefix(bundle.folder))


def read_rotations(bundle: Bundle) -> RotationSet:
    """The rotations of ``bundle``, folded ones too.

    Raises:
        BackendError: they are not sound.
    """
    return _sound(bundle, lambda: load_rotations(bundle.folder))


def read_floats(bundle: Bundle, layout: Layout) -> Mapping[str, Tensor]:
    """The float tensors of ``bundle`` as the artifact had them; errors as for
    :func:`read_linears`.
    """
    manifest = bundle.manifest
    return _undamaged(
        bundle, lambda: layout.floats(bundle.tensors, manifest.linears, manifest.config)
    )


def read_model(bundle: Bundle, layout: Layout) -> QuantizedModel:
    """The quantized model as ``bundle`` holds it; errors as for :func:`read_linears`."""
    manifest, rotations = bundle.manifest, read_rotations(bundle)
    _undamaged(bundle, lambda: check_named_rotations(manifest.linears, rotations))
    return QuantizedModel(
        config=manifest.config,
        scheme=_sound(bundle, lambda: scheme_named(manifest.scheme)),
        dtype=getattr(torch, manifest.dtype),
        linears=read_linears(bundle, layout),
        floats=read_floats(bundle, layout),
        kept=manifest.kept,
        rotations=rotations,
        provenance=_provenance(bundle),
        cache=read_cache(bundle, layout),
        prefix=read_prefix(bundle),
    )


class _MappedTensors(Mapping[str, Tensor]):
    """Tensors of the weight files of a bundle, in the order in which its manifest has them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        file_of: dict[str, Any] = {}
        for name in sorted({entry.file for entry in manifest.tensors.values()}):
            try:
                file: Any = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BackendError(
                    f"'{folder / name}' is damaged or truncated: {reason_of(error)}", hint=_HINT
                ) from error
            # a handle is no mapping
            file_of.update((key, file) for key in file.keys())  # noqa: SIM118
        order = [key for key in manifest.tensors if key in file_of]
        self._files = {key: file_of[key] for key in [*order, *file_of]}

    def forms(self) -> dict[str, Form]:
        """Dtype and shape of every tensor, from the headers alone.

        Raises:
            KeyError: a dtype that no bundle has.
        """
        slices = {key: file.get_slice(key) for key, file in self._files.items()}
        return {key: (DTYPES[part.get_dtype()], part.get_shape()) for key, part in slices.items()}

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _check_files(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """Every file that the manifest lists is there, of its size, and with ``verify`` of its
    checksum.
    """
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not is_file_in(folder, name):
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry.bytes}")
        elif verify and digest(path) != entry.sha256:
            problems.append(f"{name} was changed: its checksum does not fit")

    listed = {entry.file for entry in manifest.tensors.values()}
    problems += [
        f"{name} is not listed with a checksum" for name in sorted(listed - manifest.files.keys())
    ]
    if problems:
        raise BackendError(f"the bundle '{folder}' is damaged: {'; '.join(problems)}", hint=_HINT)


def _check_index(folder: Path, manifest: Manifest) -> None:
    """The index, which other readers go by, finds every tensor where the manifest does: in a file
    of this folder, under a checksum.
    """
    try:
        places = dict(read_json(folder / INDEX_FILE)["weight_map"])
    except (OSError, *MALFORMED) as error:
        raise BackendError(
            f"the bundle '{folder}' is damaged: {INDEX_FILE} cannot be read: {reason_of(error)}",
            hint=_HINT,
        ) from error
    listed = {key: entry.file for key, entry in manifest.tensors.items()}
    wrong = [key for key in {**listed, **places} if places.get(key) != listed.get(key)]
    if wrong:
        raise BackendError(
            f"the bundle '{folder}' is damaged: by {INDEX_FILE} '{wrong[0]}' is in"
            f" '{places.get(wrong[0])}', by its manifest in '{listed.get(wrong[0])}'",
            hint=_HINT,
        )


def _undamaged(bundle: Bundle, read: Callable[[], _T]) -> _T:
    """``read()``, whose complaints about tensors become an error that names the bundle."""
    try:
        return read()
    except (SafetensorError, *MALFORMED) as error:
        raise BackendError(
            f"the bundle '{bundle.folder}' does not hold what its manifest says:"
            f" {reason_of(error)}",
            hint=_HINT,
        ) from error


def _sound(bundle: Bundle, read: Callable[[], _T]) -> _T:
    """``read()``, whose errors name the bundle."""
    try:
        return read()
    except RotqError as error:
        raise BackendError(
            f"the bundle '{bundle.folder}' is damaged: {error.message}", hint=error.hint
        ) from error


def _provenance(bundle: Bundle) -> Provenance:
    """What a bundle knows of where it came from; the report beside it knows the rest."""
    manifest = bundle.manifest
    return Provenance(
        source=str(bundle.folder),
        fingerprint=manifest.fingerprint,
        recipe={},
        parameters=0,
        nbytes=0,
        calibration_rows=0,
        calibration_tokens=0,
        calibration_sha256="",
        versions={"rotq": manifest.rotq},
    )
