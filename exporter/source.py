"""What a run starts from: the float checkpoint, its tokenizer, and the three splits of token
rows.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import tempfile
import weakref
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from calib.architectures import Wiring, wiring_for
from calib.artifact.side_files import side_files
from calib.data.corpus import Corpus, read_corpus
from calib.data.rows import RowCounts, RowCutter, RowSplits
from calib.data.sources import HubDataset, resolve_source
from calib.data.tokens import clamp_seqlen
from calib.errors import CheckpointError, DataError
from calib.files.reading import is_failure, reason_of
from calib.fusing import FusedModel, check_contents, fuse
from calib.network.checkpoint import Checkpoint, load_config, open_checkpoint
from calib.network.given import check_given, unwrapped
from calib.network.original import load_network
from calib.process.progress import Progress, silent
from calib.rotations.rotation_set import RotationSet
from exporter.recipe import EMBEDDED, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """A float model: everything that a run reads of it."""

    name: str
    """As given: a folder, a hub id, or ``embedded``."""
    wiring: Wiring
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    files: dict[str, Path]
    """Files that every output carries along (tokenizer, generation config); not ``config.json``,
    which changes.
    """
    model: nn.Module | None = None
    """The model object, where one was given instead of a folder."""
    trust_remote_code: bool = False

    def original(self, device: torch.device | str) -> nn.Module:
        """The unchanged model in float32 and eval mode, whatever dtype it is stored in: parity's
        yardstick.
        """
        if self.model is not None:
            return deepcopy(self.model).to(device, torch.float32).eval().requires_grad_(False)
        assert self.checkpoint.folder is not None  # it was opened from files
        floats = None if self.checkpoint.quantization is None else self.checkpoint
        return load_network(self.checkpoint.folder, self.config, device=device, floats=floats)

    def fuse(
        self,
        rotations: RotationSet,
        *,
        dtype: torch.dtype,
        fold_norms: bool = True,
        device: torch.device | str = "cpu",
        lazy: bool = False,
        progress: Progress = silent,
    ) -> FusedModel:
        """The model with ``rotations`` and, as wanted, its norms folded in; arguments as for
        :func:`calib.fusing.fuse`.
        """
        return fuse(
            self.checkpoint,
            self.wiring,
            rotations,
            dtype=dtype,
            fold_norms=fold_norms,
            device=device,
            lazy=lazy,
            progress=progress,
        )

    @property
    def config(self) -> PreTrainedConfig:
        """Its transformers config."""
        return self.wiring.config

    @property
    def dtype(self) -> str:
        """What the weights are stored in, by the name of the embedding's dtype."""
        key = f"{self.wiring.embeddings[0].name}.weight"
        stored = self.checkpoint[key if key in self.checkpoint else next(iter(self.checkpoint))]
        return str(stored.dtype).removeprefix("torch.")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of all tensors, in the order of their
        names.
        """
        digest = hashlib.sha256()
        for name in sorted(self.checkpoint):
            tensor = self.checkpoint[name].detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def quantized(self) -> str | None:
        """How the checkpoint was quantized that the float weights were read from, in words."""
        quantization = self.checkpoint.quantization
        return None if quantization is None else quantization.words

    def parameters(self) -> int:
        """Elements of all tensors in the checkpoint; none of them is read."""
        return sum(math.prod(self.checkpoint.shape(name)) for name in self.checkpoint)

    def nbytes(self) -> int:
        """Bytes of all tensors in the checkpoint, as they are stored."""
        return sum(map(self.checkpoint.stored_bytes, self.checkpoint))


def embedded_folder() -> Path:
    """Folder of the example model and its texts, which ship with rotq."""
    return Path(str(resources.files("exporter") / "data" / "llama-5m"))


def open_source(
    recipe: Recipe,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Source:
    """Open the float model of a recipe, or wrap a model object.

    Raises:
        CheckpointError: missing, incomplete or damaged files; weights that are quantized already;
            tensors that the config does not call for.
        UnsupportedModelError: an architecture that rotq refuses.
    """
    if model is not None:
        return _wrap(model, tokenizer, ignore_unused=recipe.ignore_unused)
    path = embedded_folder() if recipe.model == EMBEDDED else recipe.model
    config = load_config(path, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision)
    wiring = wiring_for(config)
    checkpoint = open_checkpoint(path, revision=recipe.revision)
    check_contents(checkpoint, wiring, recipe.model, ignore_unused=recipe.ignore_unused)

    folder = checkpoint.folder
    assert folder is not None  # it was opened from files
    files = side_files(folder)
    files.pop(_CONFIG, None)
    return Source(
        name=recipe.model,
        wiring=wiring,
        checkpoint=checkpoint,
        tokenizer=tokenizer or load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code),
        files=files,
        trust_remote_code=recipe.trust_remote_code,
    )


def text_sources(recipe: Recipe) -> tuple[str, str | None]:
    """The calibration text of a recipe and its evaluation text, as
    :func:`calib.data.sources.resolve_source` takes them; ``None``: evaluation keeps rows of the
    calibration text apart.
    """
    text, own = recipe.calibration.dataset, recipe.evaluation.dataset
    if text == EMBEDDED:
        text = str(embedded_folder() / "calibration.txt")
        own = EMBEDDED if own is None else own
    return text, str(embedded_folder() / "evaluation.txt") if own == EMBEDDED else own


class Texts:
    """The calibration text of a recipe and its evaluation text, read when they are asked for.

    What the hub holds under a name may be another text the next time. So a data set of it is read
    once and kept: its fingerprint is that of what is calibrated on.

    Args:
        recipe: names them.
        tokenizer: the model's, whose chat template writes conversations out.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        calibration, evaluation = text_sources(recipe)
        self._calibration = (calibration, recipe.calibration.column)
        self._evaluation = (evaluation, recipe.evaluation.column)
        self._tokenizer = tokenizer
        self._kept: dict[tuple[str, str | None], Corpus] = {}

    def calibration(self) -> Corpus:
        """What is calibrated on.

        Raises:
            DataError: as :func:`calib.data.corpus.read_corpus`.
        """
        return self._read(*self._calibration)

    def evaluation(self) -> Corpus | None:
        """What is evaluated on; ``None``: rows of the other, kept apart. Raises as that."""
        name, column = self._evaluation
        return None if name is None else self._read(name, column)

    def _read(self, name: str, column: str | None) -> Corpus:
        kept = self._kept.get((name, column))
        if kept is not None:
            return kept
        read = read_corpus(name, self._tokenizer, column=column)
        if isinstance(resolve_source(name), HubDataset):
            self._kept[name, column] = read
        return read


def read_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    texts: Texts | None = None,
) -> RowSplits:
    """Read and tokenize the text of a recipe into three splits that share no document.

    Args:
        recipe: names the text and how much of it.
        tokenizer: the model's tokenizer.
        config: the model's config, which bounds ``seqlen``.
        texts: those of ``recipe``, where they may have been read already.

    Raises:
        DataError: text that is missing, empty or too short.
    """
    data = recipe.calibration
    texts = Texts(recipe, tokenizer) if texts is None else texts
    cutter = RowCutter(
        tokenizer, clamp_seqlen(data.seqlen, config), layout=data.layout, seed=recipe.seed
    )
    return cutter.split(
        texts.calibration(),
        texts.evaluation(),
        RowCounts(data.nsamples, recipe.gate.nsamples, recipe.evaluation.nsamples),
    )


def _wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, ignore_unused: bool
) -> Source:
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if config is None:
        raise CheckpointError(
            f"a {type(model).__name__} is no Hugging Face model: it has no config"
        )

    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    wiring, checkpoint = wiring_for(config), Checkpoint.from_module(model)
    check_given(model)
    check_contents(checkpoint, wiring, name, ignore_unused=ignore_unused)
    if tokenizer is None:
        if not Path(name).is_dir():
            raise DataError(
                "a model object needs its tokenizer to read calibration text",
                hint="pass tokenizer=AutoTokenizer...",
            )
        tokenizer = load_tokenizer(Path(name))

    # The files that every output carries along; removed with the source.
    scratch = Path(tempfile.mkdtemp(prefix="rotq-"))
    tokenizer.save_pretrained(scratch)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(scratch)

    source = Source(
        name=name,
        wiring=wiring,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        files=side_files(scratch),
        model=model,
    )
    weakref.finalize(source, shutil.rmtree, scratch, ignore_errors=True)
    return source


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        return tokenizer
    # transformers raises OSError, ValueError or a tokenizers exception of its own
    except BaseException as error:
        if not is_failure(error):
            raise
        reason = reason_of(error)
        raise CheckpointError(
            f"cannot load the tokenizer in '{folder}': {reason}",
            hint="copy tokenizer.json of the model into the folder",
        ) from error
