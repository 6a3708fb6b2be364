"""The run, from a float checkpoint to a folder that a runtime loads:

fold norms, capture, train R1 and R2, fuse, ModelOpt calibration, scales, QuantizedModel, backend, parity.

Each step is a function elsewhere; this module only puts them in order, times them, and keeps what can be resumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from backends.base import Backend, WriteOptions
from backends.registry import check_target, get_backend
from calib.artifact import Provenance, QuantizedModel, copy_side_files
from calib.capture.session import capture
from calib.capture.sites import CaptureConfig
from calib.capture.storage import Capture
from calib.data.batches import length_batches
from calib.data.tokens import token_hash
from calib.errors import QuantizationError, RotqError
from calib.forward_loop import forward_loop_over
from calib.fusing import FusedModel, fuse, materialize
from calib.perplexity import model_logits
from calib.progress import Progress, silent
from calib.quantize import quantize_model
from calib.rotations.from_capture import online_rotations, train_rotations
from calib.rotations.objectives import ActivationScheme
from calib.rotations.rotation_set import RotationSet
from calib.rotations.train import TrainConfig
from calib.schemes import PerTensor, Scheme, scheme_named
from exporter.card import write_card
from exporter.gate import CANDIDATES, Candidate, choose
from exporter.output import atomic_folder, sha256_tree
from exporter.output import check_target as check_output
from exporter.parity import Subject, check_parity
from exporter.recipe import RECIPE_FILE, Recipe, Training
from exporter.report import (
    CalibrationSummary,
    GateRow,
    KeptLayer,
    LayerSummary,
    ModelSummary,
    ParityRow,
    Report,
    RotationSummary,
    parity_status,
)
from exporter.run_options import RunOptions
from exporter.source import Rows, Source, load_tokenizer, open_source, read_rows
from exporter.workdir import ARTIFACT, CAPTURE, WorkDir

_PACKAGES = ("rotq", "torch", "transformers", "nvidia-modelopt", "onnx", "onnxscript", "onnxruntime", "safetensors")


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` made."""

    output: Path
    recipe: Recipe
    report: Report


@dataclass(frozen=True)
class CalibrateResult:
    """What :func:`calibrate` made."""

    output: Path
    recipe: Recipe
    quantized: QuantizedModel


def export(
    recipe: Recipe, options: RunOptions, *, model: Any = None, tokenizer: Any = None, progress: Progress = silent
) -> ExportResult:
    """Run everything and write the folder of a backend.

    Args:
        recipe: what to do.
        options: where, and what to reuse.
        model: a Hugging Face causal LM to use instead of ``recipe.model``.
        tokenizer: its tokenizer, where the model's folder is not at hand.
        progress: called after every unit of work.

    Returns:
        The result; its report's status is ``failed`` where a parity figure missed its bound; the folder is kept.

    Raises:
        RotqError: a known failure; nothing was written then.
    """
    check_output(options.output, options.overwrite)
    run = _Run(recipe, options, model, tokenizer, progress)
    quantized = run.quantize()
    with atomic_folder(options.output, overwrite=options.overwrite) as folder:
        report = run.write(quantized, folder)
    return ExportResult(options.output, run.recipe, report)


def calibrate(
    recipe: Recipe, options: RunOptions, *, model: Any = None, tokenizer: Any = None, progress: Progress = silent
) -> CalibrateResult:
    """Stop at the saved :class:`~calib.artifact.QuantizedModel`; arguments and errors as for :func:`export`."""
    check_output(options.output, options.overwrite)
    run = _Run(recipe, options, model, tokenizer, progress)
    quantized = run.quantize()
    with atomic_folder(options.output, overwrite=options.overwrite) as folder, run.stage("save"):
        quantized.save(folder)
        (folder / RECIPE_FILE).write_text(run.recipe.to_yaml(), encoding="utf-8")
    return CalibrateResult(options.output, run.recipe, quantized)


def run_capture(
    recipe: Recipe, options: RunOptions, *, model: Any = None, tokenizer: Any = None, progress: Progress = silent
) -> Path:
    """Only capture the statistics that rotations are trained on; arguments and errors as for :func:`export`."""
    check_output(options.output, options.overwrite)
    run = _Run(recipe, options, model, tokenizer, progress)
    statistics = run.captured()
    with atomic_folder(options.output, overwrite=options.overwrite) as folder:
        statistics.save(folder / "statistics")
        for path in (folder / "statistics").iterdir():
            path.rename(folder / path.name)
        (folder / "statistics").rmdir()
        (folder / RECIPE_FILE).write_text(run.recipe.to_yaml(), encoding="utf-8")
    return options.output


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        QuantizationError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise QuantizationError(
            f"cannot use the device '{name}': {reason}", hint="--device cpu always works"
        ) from error
    return device


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {name: version(name) for name in _PACKAGES}


@dataclass
class _Run:
    """One run: its inputs, opened when they are first needed, and how long its stages took."""

    recipe: Recipe
    options: RunOptions
    model: Any
    tokenizer: Any
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheme: Scheme = scheme_named(self.recipe.scheme)
        self.backend: Backend = get_backend(self.recipe.backend)
        self.target = check_target(self.backend, self.recipe.scheme, self.recipe.target)
        self.device = resolve_device(self.recipe.device)
        self.work = WorkDir(self.options.work_dir, self.recipe, resume=self.options.resume)
        self._fused: FusedModel | None = None
        self._artifact: QuantizedModel | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. One that is entered again (once per candidate) adds up."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @cached_property
    def source(self) -> Source:
        """The float model."""
        return open_source(self.recipe, self.model, self.tokenizer)

    @cached_property
    def rows(self) -> Rows:
        """The three splits."""
        with self.stage("data"):
            if self._artifact is not None:
                files = self._artifact.files
                tokenizer = load_tokenizer(next(iter(files.values())).parent if files else Path())
                return read_rows(self.recipe, tokenizer, SimpleNamespace(**self._artifact.config))
            return read_rows(self.recipe, self.source.tokenizer, self.source.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the target computes in."""
        name = self.recipe.dtype if self.recipe.dtype != "auto" else self.backend.compute_dtype(self.target)
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def fuse(self, rotations: RotationSet) -> FusedModel:
        """The source with ``rotations`` folded in."""
        with self.stage("fuse"):
            source = self.source
            return fuse(
                source.checkpoint,
                source.config,
                source.architecture,
                rotations,
                dtype=self.dtype,
                device=self.device,
                progress=self.progress,
            )

    def captured(self) -> Capture:
        """Statistics of the norm-folded model, from a folder where the run was given one."""
        given = self.options.from_capture or self.work.finished(CAPTURE)
        folded = materialize(self.fuse(RotationSet()), device=self.device)
        if given is not None:
            from calib.capture.fingerprint import model_fingerprint

            return Capture.load(given, model=model_fingerprint(folded))
        source, settings = self.source, self.recipe.rotation
        sizes = source.architecture.dimensions(source.config)
        batches = length_batches(self.rows.train, self.recipe.calibration.batch_size)
        with self.stage("capture"):
            found = capture(
                folded,
                source.architecture.capture_sites(source.config),
                batches,
                num_kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                config=CaptureConfig(
                    settings.r1_tokens, settings.r2_tokens, settings.massive_fraction, seed=self.recipe.seed
                ),
                progress=self.progress,
            )
        self.work.keep(CAPTURE, lambda folder: found.save(folder / CAPTURE))
        return found

    def rotations(self, kinds: list[str]) -> RotationSet:
        """Rotations of these kinds, trained where they are trainable."""
        source, settings = self.source, self.recipe.rotation
        if not {"r1", "r2"} & set(kinds):
            return RotationSet(online_rotations(source.config, source.architecture, kinds))
        statistics = self.captured()
        with self.stage("train"):
            return train_rotations(
                statistics,
                source.config,
                source.architecture,
                kinds,
                r1=self._training(settings.r1),
                r2=self._training(settings.r2),
                held_out=settings.held_out,
                device=self.device,
                progress=self.progress,
            )

    def _training(self, settings: Training) -> TrainConfig:
        return TrainConfig(**settings.model_dump(), scheme=activation_scheme(self.scheme), seed=self.recipe.seed)

    def quantize(self) -> QuantizedModel:
        """The quantized model; its provenance holds the gate's table where there was a choice."""
        given = self.options.from_artifact or self.work.finished(ARTIFACT)
        if given is not None:
            self._artifact = QuantizedModel.load(given)
            check_target(self.backend, self._artifact.scheme.name, self.target)
            return self._artifact
        candidates = self._candidates()
        kinds = sorted({kind for rotate in candidates for kind in _kinds(rotate)})
        trained = self.rotations(kinds)
        if len(candidates) == 1:
            candidate = self._candidate(candidates[0], trained=trained)
            quantized = candidate.quantized
        else:
            original = model_logits(self.source.original(self.device))
            make = partial(self._candidate, trained=trained)
            candidate, gate = choose(candidates, make, original, self.rows.gate, self.progress)
            table = tuple(row.model_dump() for row in gate)
            quantized = replace(candidate.quantized, provenance=replace(candidate.quantized.provenance, gate=table))
        self._fused = candidate.fused
        self.work.keep(ARTIFACT, quantized.save)
        return quantized

    def _candidates(self) -> list[str]:
        """What ``--rotate auto`` compares on this architecture; else the one set that was asked for."""
        if self.recipe.rotate != "auto":
            return [self.recipe.rotate]
        source = self.source
        offered = [
            ",".join(kind for kind in _kinds(rotate) if source.architecture.refusal(kind, source.config) is None)
            or "none"
            for rotate in CANDIDATES
        ]
        return list(dict.fromkeys(offered))

    def _candidate(self, rotate: str, *, trained: RotationSet) -> Candidate:
        kinds = _kinds(rotate)
        fused = self.fuse(RotationSet(rotation for rotation in trained.values() if rotation.kind in kinds))
        batches = length_batches(self.rows.train, self.recipe.calibration.batch_size)
        with self.stage("calibrate"):
            quantized = quantize_model(
                fused,
                self.scheme,
                forward_loop_over(batches, progress=self.progress),
                self._provenance(),
                files=self.source.files,
                device=self.device,
            )
        return Candidate(rotate, fused, quantized)

    def _provenance(self) -> Provenance:
        return Provenance(
            source=self.source.name,
            fingerprint=self.fingerprint,
            recipe=self.recipe.model_dump(mode="json"),
            parameters=self.source.parameters(),
            nbytes=self.source.nbytes(),
            calibration_rows=len(self.rows.train),
            calibration_tokens=sum(row.numel() for row in self.rows.train),
            calibration_sha256=token_hash(self.rows.train),
            versions=package_versions(),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Of the source weights."""
        return self.source.fingerprint()

    def write(self, quantized: QuantizedModel, folder: Path) -> Report:
        """Write, check and describe the output folder."""
        with self.stage("write"):
            self.backend.write(quantized, folder, WriteOptions(self.target, self.progress))
            write_side_files(quantized, self.recipe, folder)
        parity: list[ParityRow] = []
        if self.options.verify:
            with self.stage("parity"):
                parity = check_parity(self._subject(quantized, folder), self.progress)
        report = describe(quantized, parity, folder, self.backend.name, self.target, self.seconds)
        return finish(report, self.recipe, folder)

    def _subject(self, quantized: QuantizedModel, folder: Path) -> Subject:
        source, fused = self._original(quantized)
        return Subject(
            quantized, self.backend, folder, self.rows.evaluation, source=source, fused=fused, device=self.device
        )

    def _original(self, quantized: QuantizedModel) -> tuple[Source | None, FusedModel | None]:
        """The float model before and after rotation, where it is at hand: an artifact may have travelled without it."""
        try:
            return self.source, self._fused or self.fuse(quantized.rotations)
        except RotqError:
            if self.options.from_artifact is None:
                raise
            return None, None


def describe(
    quantized: QuantizedModel,
    parity: list[ParityRow],
    folder: Path,
    backend: str,
    target: str,
    seconds: dict[str, float],
) -> Report:
    """The report of a written folder, but for its checksums."""
    origin = quantized.provenance
    return Report(
        status=parity_status(parity),
        backend=backend,
        target=target,
        scheme=quantized.scheme.name,
        rotate=",".join(quantized.rotations.kinds()) or "none",
        model=ModelSummary(
            source=origin.source,
            model_type=quantized.config["model_type"],
            parameters=origin.parameters,
            fingerprint=origin.fingerprint,
        ),
        layers=LayerSummary(
            quantized=len(quantized.linears),
            kept=[KeptLayer(name=name, reason=reason) for name, reason in quantized.kept.items()],
            bytes_before=origin.nbytes,
            bytes_after=sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("model.")),
        ),
        calibration=CalibrationSummary(
            dataset=origin.recipe["calibration"]["dataset"],
            rows=origin.calibration_rows,
            tokens=origin.calibration_tokens,
            sha256=origin.calibration_sha256,
        ),
        rotations=[
            RotationSummary(
                name=rotation.name,
                space=str(rotation.space) if rotation.layer is None else f"{rotation.space}[{rotation.layer}]",
                order=rotation.order or rotation.dense().shape[-1],
                online=rotation.online,
                origin=rotation.origin,
            )
            for rotation in quantized.rotations.values()
        ],
        gate=[GateRow.model_validate(row) for row in origin.gate],
        parity=parity,
        seconds=seconds,
        versions=package_versions(),
    )


def write_side_files(quantized: QuantizedModel, recipe: Recipe, folder: Path) -> None:
    """Everything that travels with the weights: config, tokenizer, generation config, recipe and rotations."""
    copy_side_files(quantized.files, folder)
    (folder / "config.json").write_text(json.dumps(quantized.config, indent=2) + "\n", encoding="utf-8")
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    quantized.rotations.save(folder)


def finish(report: Report, recipe: Recipe, folder: Path) -> Report:
    """Write the card, take the checksums, and write the report, which therefore is in neither."""
    write_card(folder, recipe, report)
    report = report.model_copy(update={"checksums": sha256_tree(folder)})
    report.save(folder)
    return report


def activation_scheme(scheme: Scheme) -> ActivationScheme | None:
    """What the rotation trainer should know of how activations are quantized; ``None`` where they are not."""
    if scheme.activation is None or scheme.activation.format.kind != "integer":
        return None
    granularity = "tensor" if isinstance(scheme.activation.granularity, PerTensor) else "token"
    return ActivationScheme(bits=scheme.activation.format.bits, symmetric=True, granularity=granularity)  # type: ignore[arg-type]


def _kinds(rotate: str) -> list[str]:
    return [] if rotate == "none" else rotate.split(",")
