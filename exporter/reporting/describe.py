"""What an exported folder holds besides the weights: the side files, the report and the card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.asking import warnings_of
from backends.base import Backend
from backends.cpu import cpu_words
from calib.architectures import architecture_of
from calib.artifact import Provenance, QuantizedModel
from calib.artifact.older_config import with_older_keys
from calib.artifact.side_files import copy_side_files
from calib.errors import CheckpointError
from calib.files.reading import reason_of
from calib.rotations.files import save_rotations
from calib.rotations.rotate import Rotate
from calib.rotations.rotation_set import RotationSet
from calib.schemes import linear_words
from exporter.output import sha256_tree
from exporter.recipe import RECIPE_FILE, Recipe
from exporter.reporting.card import write_card
from exporter.reporting.report import (
    SMOOTHING_FILE,
    CalibrationSummary,
    GateRow,
    KeptLayer,
    LayerSummary,
    MassiveSummary,
    ModelSummary,
    ParityRow,
    PrefixSummary,
    Report,
    RotationGateRow,
    RotationSummary,
    TrainingSummary,
    parity_status,
)
from exporter.source import Source

CONFIG_FILE = "config.json"
_TOKENIZER = "tokenizer.json"
_PACKAGES = (
    "rotq",
    "torch",
    "transformers",
    "nvidia-modelopt",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "scikit-learn",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {name: version(name) for name in _PACKAGES}


def describe(
    quantized: QuantizedModel,
    parity: list[ParityRow],
    folder: Path,
    backend: Backend,
    target: str,
) -> Report:
    """The report of a folder that ``backend`` wrote, but for its checksums and what it took."""
    origin = quantized.provenance
    return Report(
        status=parity_status(parity),
        backend=backend.name,
        target=target,
        scheme=quantized.scheme.name,
        rotate=str(Rotate.of(quantized.rotations.kinds())),
        dtype=str(quantized.dtype).removeprefix("torch."),
        norms_folded=quantized.norms_folded,
        warnings=warnings_of(backend, target, quantized.schemes(), quantized.rotations.kinds()),
        model=ModelSummary(
            source=origin.source,
            model_type=quantized.config["model_type"],
            how=architecture_of(quantized.config).how,
            parameters=origin.parameters,
            fingerprint=origin.fingerprint,
            quantized=origin.quantized,
        ),
        layers=LayerSummary(
            quantized=len(quantized.linears),
            schemes=dict(Counter(map(linear_words, quantized.schemes().values()))),
            cache=None if quantized.cache is None else quantized.cache.scheme.format.name,
            kept=[KeptLayer(name=name, reason=reason) for name, reason in quantized.kept.items()],
            bytes_before=origin.nbytes,
            bytes_after=sum(part.nbytes for part in backend.contents(folder, target)),
        ),
        calibration=CalibrationSummary(
            dataset=origin.recipe["calibration"]["dataset"],
            rows=origin.calibration_rows,
            tokens=origin.calibration_tokens,
            channels=max(
                (linear.weight.shape[-1] for linear in quantized.linears.values()), default=None
            ),
            observer=origin.recipe["activations"]["observer"],
            weights=origin.recipe["weights"]["algorithm"],
            smoothing=_smoothing(origin),
            sha256=origin.calibration_sha256,
            cpu=origin.cpu,
            threads=origin.threads,
        ),
        rotations=rotation_summaries(quantized.rotations),
        prefix=prefix_summary(quantized),
        massive=[MassiveSummary.model_validate(row) for row in origin.massive],
        gate=[GateRow.model_validate(row) for row in origin.gate],
        rotation_gate=[RotationGateRow.model_validate(row) for row in origin.rotation_gate],
        training=[TrainingSummary.model_validate(row) for row in origin.training],
        parity=parity,
        seconds={},
        versions=package_versions(),
        cpu=cpu_words() if parity else "",
    )


def _smoothing(origin: Provenance) -> str:
    """What smoothed: the gate's choice, or else the recipe's."""
    chosen = [row for row in map(GateRow.model_validate, origin.gate) if row.chosen]
    by_gate = next((row.smoothing for row in chosen if row.smoothing != "none"), None)
    recipe: str = origin.recipe["smoothing"]
    return by_gate or recipe


def prefix_summary(quantized: QuantizedModel) -> PrefixSummary | None:
    """What a report says of the prefix, in the words of the tokenizer that travels along."""
    prefix = quantized.prefix
    if prefix is None:
        return None
    words = _token_words(quantized.files, prefix.tokens)
    return PrefixSummary(tokens=list(prefix.tokens), words=words, reason=prefix.reason)


def _token_words(files: Mapping[str, Path], tokens: Sequence[int]) -> list[str]:
    """Each of ``tokens`` by itself, by the tokenizer among ``files``, if there is one that needs no
    code."""
    path = files.get(_TOKENIZER)
    if path is None:
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]


def rotation_summaries(rotations: RotationSet) -> list[RotationSummary]:
    """The rows of a report."""
    return [
        RotationSummary(
            name=rotation.name,
            space=(
                str(rotation.space)
                if rotation.layer is None
                else f"{rotation.space}[{rotation.layer}]"
            ),
            order=rotation.order or rotation.dense().shape[-1],
            online=rotation.online,
            origin=rotation.origin,
        )
        for rotation in rotations.values()
    ]


def source_summary(source: Source) -> ModelSummary:
    """What a report says of the model that a run started from."""
    return ModelSummary(
        source=source.name,
        model_type=source.config.model_type,
        how=source.wiring.architecture.how,
        parameters=source.parameters(),
        fingerprint=source.fingerprint,
        quantized=source.quantized,
    )


def write_side_files(quantized: QuantizedModel, recipe: Recipe, folder: Path) -> None:
    """Everything that travels with the weights: config, tokenizer, generation config, recipe and
    rotations.

    What the backend has written itself is kept: a runtime may want a config of its own.
    """
    files = {name: path for name, path in quantized.files.items() if name != CONFIG_FILE}
    copy_side_files(
        {name: path for name, path in files.items() if not (folder / name).exists()}, folder
    )
    if not (folder / CONFIG_FILE).exists():
        (folder / CONFIG_FILE).write_text(
            json.dumps(with_older_keys(quantized.config), indent=2) + "\n", encoding="utf-8"
        )
    (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    save_rotations(quantized.rotations, folder)
    if quantized.smoothing:
        save_file(dict(quantized.smoothing), folder / SMOOTHING_FILE)


def load_smoothing(folder: Path) -> dict[str, Tensor]:
    """The scales that smoothing folded into the weights of an exported folder, by group; empty if
    it did not.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = folder / SMOOTHING_FILE
    try:
        return load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path}' is damaged: {reason_of(error)}", hint="export the model again"
        ) from error


def finish(report: Report, recipe: Recipe, folder: Path) -> Report:
    """Write the card, take the checksums, and write the report, which therefore is in neither."""
    write_card(folder, recipe, report)
    report = report.model_copy(update={"checksums": sha256_tree(folder)})
    report.save(folder)
    return report
