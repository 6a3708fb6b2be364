"""What the inputs of a run hold, as fingerprints by their names: a later run can tell whether it
starts from the same, whatever they are called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from calib.artifact.side_files import tokenizer_files
from calib.capture import storage
from calib.data.corpus import Corpus
from calib.data.sources import HubDataset, resolve_source
from calib.files.sealed import digest, seal_of
from calib.network.skeleton import portable_config
from calib.rotations.foreign import rotation_files
from calib.rotations.rotation_set import RotationSet
from exporter.reporting.describe import package_versions
from exporter.run.inputs import Inputs
from exporter.run.options import RunOptions
from exporter.source import Source, text_sources

_WRITERS = ("onnx", "onnxscript", "onnxruntime")
"""Libraries that write and run what is exported; nothing that is kept depends on them."""
_LONGEST = 60
"""Characters of a value that are shown."""


def contents_of(inputs: Inputs, options: RunOptions) -> dict[str, str]:
    """Everything that a kept step depends on beside the recipe: weights, config, tokenizer, texts,
    rotations, a capture, and the versions of the libraries.

    A file that cannot be read has no entry; whoever reads it says so. A data set of the hub is read
    here, for nothing else says what the hub holds under its name.

    Raises:
        DataError: that cannot be.
    """
    return dict(_all(inputs, options))


def rotations_digest(rotations: RotationSet) -> str:
    """The SHA-256 of a set of rotations, as hex: of all that they are, in whatever order."""
    own = hashlib.sha256()
    for name, each in sorted(rotations.items()):
        said = (name, each.order, each.seed, each.block, each.online, each.origin)
        own.update(repr(said).encode())
        if each.matrix is not None:
            own.update(each.matrix.cpu().numpy().astype("<f8").tobytes())
    return own.hexdigest()


def _all(inputs: Inputs, options: RunOptions) -> Iterator[tuple[str, str]]:
    yield from _model(inputs.source)
    yield from _texts(inputs)
    for given in inputs.recipe.rotation.files:
        for path in rotation_files(Path(given)):
            yield f"the rotations in {path.name}", digest(path)
    if options.from_capture is not None:
        path = options.from_capture / storage.MANIFEST  # it vouches for the rest
        if path.is_file():
            yield f"the capture given ({storage.MANIFEST})", digest(path)
    for name, version in package_versions().items():
        if name not in _WRITERS:
            yield f"the version of {name}", version


def _model(source: Source) -> Iterator[tuple[str, str]]:
    yield "the weights of the model", source.fingerprint
    for key, value in portable_config(source.config).items():
        if key != "transformers_version":
            yield f"{key} of config.json", _short(value)
    for name, path in tokenizer_files(source.files).items():
        yield f"the tokenizer's {name}", digest(path)


def _texts(inputs: Inputs) -> Iterator[tuple[str, str]]:
    texts, (calibration, evaluation) = inputs.texts, text_sources(inputs.recipe)
    yield from _text("calibration", calibration, texts.calibration)
    if evaluation is not None:
        yield from _text("evaluation", evaluation, texts.evaluation)


def _text(what: str, name: str, read: Callable[[], Corpus | None]) -> Iterator[tuple[str, str]]:
    source = resolve_source(name)
    if isinstance(source, HubDataset):
        corpus = read()
        assert corpus is not None  # it has a name
        yield f"the {what} text '{name}'", corpus.fingerprint()
    elif source.path.is_file():
        yield f"the {what} text '{source.path.name}'", digest(source.path)


def _short(value: object) -> str:
    """A value of a config as it is, or a digest where it is long."""
    text = str(value)
    return text if len(text) <= _LONGEST else seal_of({"value": text})
