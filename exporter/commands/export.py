"""The run, from a float checkpoint to a folder that a runtime loads:

fold norms, capture, train R1 and R2, fuse, ModelOpt calibration, scales, QuantizedModel, backend,
parity.

Each step is a function elsewhere; this module only puts them in order, times them, and keeps what
can be resumed.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from backends.asking import refused_rotations
from backends.base import Backend
from backends.registry import get_backend, target_of
from calib.architectures.experts import with_parameters
from calib.artifact import Provenance, QuantizedModel, load_artifact, save_artifact
from calib.capture.session import capture
from calib.capture.sites import CaptureConfig
from calib.capture.storage import Capture
from calib.data.batches import length_batches
from calib.data.forward_loop import ForwardLoop, forward_loop_over
from calib.data.rows import RowSplits
from calib.data.tokens import token_hash
from calib.fusing import FusedModel, fuse, materialize
from calib.measure.perplexity import model_logits
from calib.network.skeleton import portable_config
from calib.progress import Progress, silent
from calib.quantizing.calibrator import check_blocks, quantize_model
from calib.quantizing.plan import Quantization
from calib.rotations.from_capture import TrainedRotations
from calib.rotations.rotation_set import RotationSet, check_offered
from calib.schemes import FLOAT, Scheme
from calib.smoothing.groups import groups_of
from calib.smoothing.methods import smoothing_named
from calib.smoothing.observe import observe_channels
from calib.smoothing.smooth import smooth
from exporter.output import atomic_folder
from exporter.output import check_target as check_output
from exporter.recipe import RECIPE_FILE, ROTATIONS, Recipe, asked_for
from exporter.reporting.describe import package_versions
from exporter.reporting.report import GateRow
from exporter.run.artifacts import open_artifact
from exporter.run.calibration_text import warn_of_few_tokens
from exporter.run.device import resolve_device
from exporter.run.dtypes import common_dtype
from exporter.run.gate import CANDIDATES, Candidate, choose
from exporter.run.layerwise import check_layerwise, quantize_layerwise
from exporter.run.options import RunOptions
from exporter.run.quantizing import customised_scheme, quantization_of, warn_of_slow_choices
from exporter.run.results import ExportResult
from exporter.run.rotations import (
    candidate_sets,
    gate_sets,
    given_rotations,
    kinds_of,
    rotations_of,
    trainable,
)
from exporter.run.workdir import ARTIFACT, CAPTURE, WALK, WorkDir
from exporter.run.writing import check_writable, write_targets
from exporter.source import Source, load_tokenizer, open_source, read_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrateResult:
    """What :func:`calibrate` made."""

    output: Path
    recipe: Recipe
    quantized: QuantizedModel


def export(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> ExportResult:
    """Run everything and write the folder of a backend, or of several targets one folder each.

    Args:
        recipe: what to do.
        options: where, and what to reuse.
        model: a Hugging Face causal LM to use instead of ``recipe.model``.
        tokenizer: its tokenizer, where the model's folder is not at hand.
        progress: called after every unit of work.

    Returns:
        The result; a report's status is ``failed`` where a parity figure missed its bound; the
        folder is kept.

    Raises:
        RotqError: a known failure; nothing was written then.
    """
    check_output(options.output, options.overwrite)
    with closing(Run(recipe, options, model, tokenizer, progress)) as run:
        quantized = run.quantize()
        with atomic_folder(options.output, overwrite=options.overwrite) as folder:
            reports = write_targets(run, quantized, folder)
    return ExportResult(options.output, run.recipe, reports)


def calibrate(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> CalibrateResult:
    """Stop at the saved :class:`~calib.artifact.QuantizedModel`; arguments and errors as for
    :func:`export`.
    """
    check_output(options.output, options.overwrite)
    with closing(Run(recipe, options, model, tokenizer, progress)) as run:
        quantized = run.quantize(write=False)
        with (
            atomic_folder(options.output, overwrite=options.overwrite) as folder,
            run.stage("save"),
        ):
            save_artifact(quantized, folder)
            (folder / RECIPE_FILE).write_text(run.recipe.to_yaml(), encoding="utf-8")
    return CalibrateResult(options.output, run.recipe, quantized)


def run_capture(
    recipe: Recipe,
    options: RunOptions,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Path:
    """Only capture the statistics that rotations are trained on; arguments and errors as for
    :func:`export`.
    """
    check_output(options.output, options.overwrite)
    run = Run(recipe, options, model, tokenizer, progress)
    statistics = run.captured()
    with atomic_folder(options.output, overwrite=options.overwrite) as folder:
        statistics.write(folder)
        (folder / RECIPE_FILE).write_text(run.recipe.to_yaml(), encoding="utf-8")
    return options.output


@dataclass
class Run:
    """One run: its inputs, opened when they are first needed, and how long its stages took."""

    recipe: Recipe
    options: RunOptions
    model: Any
    tokenizer: Any
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_layerwise(self.recipe)
        warn_of_slow_choices(self.recipe)
        self.scheme: Scheme = customised_scheme(self.recipe)
        self.device = resolve_device(self.recipe.device)
        self.fused: FusedModel | None = None  # the chosen candidate
        self._temporary: TemporaryDirectory[str] | None = None
        self._artifact: QuantizedModel | None = None

    def close(self) -> None:
        """Remove what was only needed while it ran."""
        if self._temporary is not None:
            self._temporary.cleanup()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage. One that is entered again (once per candidate) adds up."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @cached_property
    def work(self) -> WorkDir:
        """Where finished steps are kept."""
        # What is kept was rounded to this dtype, whichever target decided it.
        recipe = self.recipe.model_copy(update={"dtype": str(self.dtype).removeprefix("torch.")})
        return WorkDir(self.options.work_dir, recipe, resume=self.options.resume)

    @cached_property
    def backend(self) -> Backend:
        """What writes the result."""
        return get_backend(self.recipe.backend)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The runtimes it is for."""
        return tuple(target_of(self.backend, target) for target in self.recipe.targets)

    @cached_property
    def quantization(self) -> Quantization:
        """What is done to every linear."""
        return quantization_of(self.recipe, self.source.wiring)

    @cached_property
    def source(self) -> Source:
        """The float model."""
        return open_source(self.recipe, self.model, self.tokenizer)

    @cached_property
    def rows(self) -> RowSplits:
        """The three splits."""
        with self.stage("data"):
            if self._artifact is not None:
                files = self._artifact.files
                tokenizer = load_tokenizer(next(iter(files.values())).parent if files else Path())
                return read_rows(self.recipe, tokenizer, SimpleNamespace(**self._artifact.config))
            return read_rows(self.recipe, self.source.tokenizer, self.source.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the run computes in: what its targets do."""
        name = common_dtype(self.recipe, self.backend, self.targets, lambda: self.source.dtype)
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def fuse(
        self, rotations: RotationSet, *, lazy: bool = False, dtype: torch.dtype | None = None
    ) -> FusedModel:
        """The source with ``rotations`` folded in, in ``dtype`` or that of the run.

        Its tensors are computed now or (``lazy``) when they are asked for.
        """
        with self.stage("fuse"):
            source = self.source
            return fuse(
                source.checkpoint,
                source.wiring,
                rotations,
                dtype=dtype or self.dtype,
                device=self.device,
                lazy=lazy,
                progress=self.progress,
            )

    def captured(self) -> Capture:
        """Statistics of the norm-folded model, from a folder where the run was given one."""
        given = self.options.from_capture or self.work.finished(CAPTURE)
        if given is None:
            _ = self.rows  # refused before the model is loaded
        folded = materialize(self.fuse(RotationSet()), device=self.device)
        if given is not None:
            from calib.capture.fingerprint import model_fingerprint

            return Capture.load(given, model=model_fingerprint(folded))
        source, settings = self.source, self.recipe.rotation
        sizes = source.wiring.sizes
        batches = length_batches(self.rows.train, self.recipe.calibration.batch_size)
        with self.stage("capture"):
            found = capture(
                folded,
                source.wiring.capture_sites,
                batches,
                num_kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                config=CaptureConfig(
                    settings.r1_tokens,
                    settings.r2_tokens,
                    settings.massive_fraction,
                    seed=self.recipe.seed,
                ),
                progress=self.progress,
            )
        self.work.keep(CAPTURE, found.write)
        return found

    def rotations(self, kinds: list[str]) -> TrainedRotations:
        """Rotations of these kinds: from files, trained where they are trainable, each behind its
        gate.
        """
        given = self.given
        statistics = folded = None
        if trainable(kinds, given, self.recipe.scheme):
            statistics = self.captured()
            folded = self.fuse(RotationSet(), lazy=True)
        with self.stage("train"):
            return rotations_of(
                kinds,
                self.recipe,
                self.source,
                given,
                statistics,
                folded,
                device=self.device,
                progress=self.progress,
            )

    @cached_property
    def given(self) -> RotationSet:
        """Rotations from the recipe's files."""
        return given_rotations(self.recipe, self.source)

    def quantize(self, *, write: bool = True) -> QuantizedModel:
        """The quantized model; its provenance holds the gate's table where there was a choice.

        Args:
            write: whether the backend will write it, and so must be able to express it.
        """
        given = self.options.from_artifact or self.work.finished(ARTIFACT)
        if given is not None:
            self._artifact = open_artifact(self, given, write=write)
            return self._artifact
        wanted = self.quantization  # refused here, before the long job
        check_blocks(wanted, self.source.wiring)
        if write:
            kinds = sorted({*asked_for(self.recipe.rotate), *self.given.kinds()})
            check_writable(
                self, portable_config(self.source.config), wanted.linears, wanted.cache, kinds
            )
        # text that cannot be used is refused before the long job, too
        warn_of_few_tokens(self.recipe, self.source, self.rows.train)
        if self.recipe.layerwise.enabled:
            return self._layerwise()
        candidates = candidate_sets(
            self.recipe, self.source, self.given, self._refused_kinds() if write else ()
        )
        trained = self.rotations(
            sorted({kind for rotate in candidates for kind in kinds_of(rotate)})
        )
        sets = gate_sets(candidates, self.recipe, self.source, self.given, trained.rotations)
        rows: list[GateRow] = []
        if len(sets) == 1:
            candidate = self._candidate(candidates[0], self.quantization, sets)
        else:
            quick = replace(self.quantization, weights="rtn")
            make = partial(self._candidate, quantization=quick, sets=sets)
            original = model_logits(self.source.original(self.device))
            candidate, rows = choose(list(sets), make, original, self.rows.gate, self.progress)
            if quick != self.quantization:  # the weight algorithm is run for the chosen set alone
                candidate = replace(
                    candidate, quantized=self._quantized(candidate.fused, self.quantization)
                )
        provenance = replace(
            candidate.quantized.provenance,
            gate=tuple(row.model_dump() for row in rows),
            rotation_gate=tuple(asdict(row) for row in trained.table),
        )
        quantized = replace(candidate.quantized, provenance=provenance)
        self.fused = candidate.fused
        self.work.keep(ARTIFACT, partial(save_artifact, quantized))
        return quantized

    def _refused_kinds(self) -> set[str]:
        """Rotations that a target cannot express; says so of those that ``--rotate auto`` would
        have compared.
        """
        found: dict[str, str] = {}
        for target in self.targets:
            for kind, reason in refused_rotations(self.backend, target, ROTATIONS).items():
                found.setdefault(kind, f"target '{target}' cannot express it: {reason}")
        compared = (
            kinds_of(CANDIDATES[-1])
            if self.recipe.rotate == "auto" and self.recipe.scheme != FLOAT
            else []
        )
        for kind in compared:
            if kind in found:
                logger.warning("--rotate auto leaves %s out: %s", kind.upper(), found[kind])
        return set(found)

    def _layerwise(self) -> QuantizedModel:
        """The quantized model, memory-mapped: from the work folder, or from a temporary one beside
        the output.
        """
        check_offered(kinds_of(self.recipe.rotate), self.source.wiring)
        if self.options.work_dir is not None:
            work = self.work.step(WALK)
            self.work.keep(ARTIFACT, partial(quantize_layerwise, self, work))
            shutil.rmtree(work)
            finished = self.work.finished(ARTIFACT)
            assert finished is not None  # it has just been kept
            return load_artifact(finished)
        parent = self.options.output.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        self._temporary = TemporaryDirectory(prefix=f".{self.options.output.name}.", dir=parent)
        work, folder = (Path(self._temporary.name) / name for name in (WALK, ARTIFACT))
        folder.mkdir()
        return quantize_layerwise(self, work, folder)

    def _candidate(
        self, rotate: str, quantization: Quantization, sets: Mapping[str, RotationSet]
    ) -> Candidate:
        fused = self._smoothed(self.fuse(sets[rotate]))
        return Candidate(rotate, fused, self._quantized(fused, quantization))

    def _smoothed(self, fused: FusedModel) -> FusedModel:
        method = smoothing_named(self.recipe.smoothing)
        if method is None:
            return fused
        schemes = with_parameters(self.quantization.linears, fused.wiring)
        with self.stage("smooth"):
            groups = groups_of(fused.wiring, fused.rotations, schemes)
            statistics = observe_channels(
                materialize(fused, device=self.device),
                groups,
                self._forward_loop(),
                moments=method.needs_moment,
            )
            return smooth(
                fused, method, statistics, schemes, device=self.device, progress=self.progress
            )[0]

    def _forward_loop(self) -> ForwardLoop:
        batches = length_batches(self.rows.train, self.recipe.calibration.batch_size)
        return forward_loop_over(batches, progress=self.progress)

    def _quantized(self, fused: FusedModel, quantization: Quantization) -> QuantizedModel:
        with self.stage("calibrate"):
            return quantize_model(
                fused,
                quantization,
                self._forward_loop(),
                self.provenance(),
                files=self.source.files,
                device=self.device,
                progress=self.progress,
            )

    def provenance(self) -> Provenance:
        """Where the quantized model comes from."""
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
