"""``rotq inspect``: what a folder holds, read from the folder itself and not from what the run said
of it.

How each linear is quantized and what is stored are read back by the backend; how the runtime
executes them it is asked. Only where the model came from, and the size of its float checkpoint,
stand in the report alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from backends.base import Backend, Fusion, RuntimeMissing, StoredTensor
from backends.registry import get_backend
from calib.artifact import PARTS, QuantizedCache, QuantizedLinear, QuantizedModel, load_artifact
from calib.errors import RotqError
from calib.schemes import LinearScheme, linear_words
from exporter.reporting.describe import rotation_summaries
from exporter.reporting.exported import edited_files, is_export, read_export
from exporter.reporting.html import page
from exporter.reporting.report import Report, RotationSummary
from exporter.reporting.stored import StoredBytes, stored_bytes


@dataclass(frozen=True)
class LinearEntry:
    """One quantized linear."""

    name: str
    scheme: str
    """In words."""
    online_rotation: str | None
    """Rotation of its input that is computed at run time."""
    fused: bool | None
    """Whether an integer kernel reads its weight; ``None``: the runtime does not tell."""


@dataclass(frozen=True, repr=False)
class Inspection:
    """What ``rotq inspect`` shows. Sizes in bytes."""

    folder: str
    what: str
    """``exported`` or ``calibrated``."""
    model: str
    model_type: str
    parameters: int
    scheme: str
    dtype: str
    """What the target computes in."""
    linears: tuple[LinearEntry, ...]
    kept: Mapping[str, str]
    """Linears in float, with the reason."""
    rotations: list[RotationSummary]
    cache: str | None
    """Number format of the KV cache; ``None``: float."""
    contents: tuple[StoredBytes, ...]
    bytes_before: int
    """Of the float checkpoint."""
    backend: str | None = None
    target: str | None = None
    status: str | None = None
    """Of the parity check."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Operators that the runtime executes, by how often they occur in its graph."""
    fusion_note: str = ""
    """Why nothing is known of how the runtime executes the linears."""
    export_sha256: str | None = None
    """See :attr:`~exporter.reporting.report.Report.export_sha256`; that of what was exported, also
    where the folder was edited since."""
    edited: Mapping[str, list[str]] = field(default_factory=dict)
    """Files that are ``missing``, ``changed`` or ``added`` since the export."""
    unreadable: str = ""
    """Why an edited folder could not be read any further."""

    @property
    def schemes(self) -> dict[str, int]:
        """How many linears are quantized how."""
        return dict(Counter(linear.scheme for linear in self.linears))

    @property
    def unfused(self) -> list[str]:
        """Linears whose weights are turned into floats on every run."""
        return [linear.name for linear in self.linears if linear.fused is False]

    @property
    def nbytes(self) -> int:
        """Of everything that is stored."""
        return sum(part.nbytes for part in self.contents)

    def __repr__(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"Inspection('{self.folder}': {words})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return page(self.folder, {**self._facts(), **self.schemes})

    def _facts(self) -> dict[str, object]:
        return {
            "what": self.what,
            "model": self.model,
            "scheme": self.scheme,
            "linears": len(self.linears),
            "kept in float": len(self.kept),
            "bytes": self.nbytes,
        }


def inspect_folder(folder: Path) -> Inspection:
    """Look into what ``rotq export`` or ``rotq calibrate`` wrote.

    Raises:
        CheckpointError, BackendError: the folder is incomplete or damaged; where its files are not
            those that were exported, that is a finding instead.
    """
    return _exported(folder) if is_export(folder) else _calibrated(folder)


def _exported(folder: Path) -> Inspection:
    report, _ = read_export(folder)
    edited = edited_files(folder, report)
    backend = get_backend(report.backend)
    linears: tuple[LinearEntry, ...] = ()
    contents: tuple[StoredBytes, ...] = ()
    cache: QuantizedCache | None = None
    fusion, note, unreadable = None, "", ""

    try:
        contents = stored_bytes(backend.contents(folder, report.target))
        cache = backend.read_cache(folder, report.target)
        fusion, note = _fusion(backend, report, folder)
        linears = _entries(backend.read_linears(folder, report.target), fusion)
    except RotqError as error:
        if not edited:
            raise
        unreadable = error.message

    return Inspection(
        folder=str(folder),
        what="exported",
        model=report.model.source,
        model_type=report.model.model_type,
        parameters=report.model.parameters,
        scheme=report.scheme,
        dtype=report.dtype,
        linears=linears,
        kept={layer.name: layer.reason for layer in report.layers.kept},
        rotations=report.rotations,
        cache=None if cache is None else cache.scheme.format.name,
        contents=contents,
        bytes_before=report.layers.bytes_before,
        backend=report.backend,
        target=report.target,
        status=report.status,
        kernels={} if fusion is None else fusion.kernels,
        fusion_note=note,
        export_sha256=report.export_sha256,
        edited=edited,
        unreadable=unreadable,
    )


def _calibrated(folder: Path) -> Inspection:
    model = load_artifact(folder)
    return Inspection(
        folder=str(folder),
        what="calibrated",
        model=model.provenance.source,
        model_type=model.config["model_type"],
        parameters=model.provenance.parameters,
        scheme=model.scheme.name,
        dtype=str(model.dtype).removeprefix("torch."),
        linears=_entries(model.linears, None),
        kept=model.kept,
        rotations=rotation_summaries(model.rotations),
        cache=None if model.cache is None else model.cache.scheme.format.name,
        contents=stored_bytes(_tensors(model)),
        bytes_before=model.provenance.nbytes,
        fusion_note="no runtime has shaped it yet",
    )


def _fusion(backend: Backend, report: Report, folder: Path) -> tuple[Fusion | None, str]:
    try:
        fusion = backend.fusion(folder, report.target)
    except RuntimeMissing as error:
        return None, error.message
    return fusion, "the runtime does not tell how it executes them" if fusion is None else ""


def _entries(
    linears: Mapping[str, QuantizedLinear], fusion: Fusion | None
) -> tuple[LinearEntry, ...]:
    slow = set() if fusion is None else set(fusion.unfused)
    return tuple(
        LinearEntry(
            name,
            linear_words(LinearScheme(linear.weight_scheme, linear.input_scheme)),
            linear.online_rotation,
            None if fusion is None else name not in slow,
        )
        for name, linear in linears.items()
    )


def _tensors(model: QuantizedModel) -> Iterable[StoredTensor]:
    """What an artifact stores: integers unpacked, a byte each."""
    for key, tensor in model.floats.items():
        yield StoredTensor(key, "float weight", _dtype(tensor), tuple(tensor.shape), tensor.nbytes)
    for linear in model.linears.values():
        for key, tensor in linear.tensors().items():
            kind = PARTS[key.rpartition(".")[2]].kind
            yield StoredTensor(key, kind, _dtype(tensor), tuple(tensor.shape), tensor.nbytes)


def _dtype(tensor: object) -> str:
    return str(getattr(tensor, "dtype", "")).removeprefix("torch.")
