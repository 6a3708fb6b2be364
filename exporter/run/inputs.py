"""What a run from a float model starts from, opened once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from backends.cpu import cpu_words
from calib.architectures import Kind
from calib.artifact import Provenance
from calib.data.rows import RowSplits
from calib.data.tokens import token_hash
from calib.errors import QuantizationError
from calib.fusing import FusedModel
from calib.network.skeleton import oriented_shapes, portable_config
from calib.quantizing.plan import Quantization
from calib.rotations.rotation_set import RotationSet, idle_rotations
from calib.schemes import FLOAT, Scheme
from exporter.recipe import EMBEDDED, Recipe
from exporter.reporting.describe import package_versions
from exporter.run.blocks import with_blocks
from exporter.run.calibration_text import check_text, warn_of_embedded_text
from exporter.run.destination import Destination
from exporter.run.quantizing import check_layerwise, customised_scheme, quantization_of
from exporter.run.stopwatch import Stopwatch
from exporter.run.tables import Tables, with_tables
from exporter.source import Source, Texts, open_source, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """A recipe and what it names, opened and resolved."""

    recipe: Recipe
    scheme: Scheme
    """The recipe's, with its finer controls."""
    source: Source
    texts: Texts
    device: torch.device
    dtype: torch.dtype
    """What the run computes in."""
    online_block: int | None = None
    """See :func:`calib.rotations.rotation_set.online_rotations`."""

    @property
    def quantizes(self) -> bool:
        """Whether the scheme quantizes anything."""
        return self.recipe.scheme != FLOAT

    @property
    def offered(self) -> tuple[Kind, ...]:
        """Kinds of rotations that the architecture takes, and that do something in this model."""
        wiring = self.source.wiring
        idle = idle_rotations(wiring)
        return tuple(kind for kind in wiring.architecture.offered if kind not in idle)

    def quantization(self) -> Quantization:
        """What is done to every linear.

        Raises:
            QuantizationError: as :func:`calib.quantizing.plan.resolve`.
        """
        return quantization_of(self.recipe, self.scheme, self.source.wiring)

    def with_tables(self, destination: Destination) -> Inputs:
        """These, with what the recipe leaves open settled: large embeddings and output heads are
        quantized (:func:`exporter.run.tables.with_tables`), and blocks may be smaller than the
        scheme's (:func:`exporter.run.blocks.with_blocks`).
        """
        wiring = self.source.wiring
        shapes = oriented_shapes(wiring)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        embedding = wiring.embeddings[0]
        tables = Tables(
            embedding.name,
            wiring.head.name,
            sizes[embedding.weight] + sizes[wiring.head.weight],
            sum(sizes.values()),
        )
        config = portable_config(self.source.config)
        recipe = with_blocks(
            with_tables(self.recipe, tables, destination, config),
            wiring.sizes.hidden,
            lambda each: quantization_of(each, customised_scheme(each), wiring).linears,
            destination,
            config,
        )
        return replace(self, recipe=recipe, scheme=customised_scheme(recipe))

    def stored_bytes(self, quantization: Quantization) -> int:
        """Of the quantized model, about: without scales."""
        floats, total = self.dtype.itemsize, 0.0
        for name, shape in oriented_shapes(self.source.wiring).items():
            linear = quantization.linears.get(name.removesuffix(".weight"))
            size = floats if linear is None else linear.weight.format.bits / 8
            total += math.prod(shape) * size
        return int(total)

    def rows(self, clock: Stopwatch) -> RowSplits:
        """Read the three splits of the text."""
        with clock.stage("data"):
            source = self.source
            return read_rows(self.recipe, source.tokenizer, source.config, self.texts)

    def fuse(
        self,
        rotations: RotationSet,
        clock: Stopwatch,
        *,
        fold_norms: bool = True,
        lazy: bool = False,
    ) -> FusedModel:
        """The source with ``rotations`` folded in, in the dtype of the run.

        Norms are folded with R1 or if ``fold_norms``. Tensors are computed now or (``lazy``) when
        they are asked for.
        """
        with clock.stage("fuse"):
            return self.source.fuse(
                rotations,
                dtype=self.dtype,
                fold_norms=fold_norms,
                device=self.device,
                lazy=lazy,
                progress=clock.progress,
            )

    def provenance(self, rows: RowSplits) -> Provenance:
        """Where a model that is quantized from these inputs comes from."""
        return Provenance(
            source=self.source.name,
            fingerprint=self.source.fingerprint,
            recipe=self.recipe.model_dump(mode="json"),
            parameters=self.source.parameters(),
            nbytes=self.source.nbytes(),
            calibration_rows=len(rows.train),
            calibration_tokens=sum(row.numel() for row in rows.train),
            calibration_sha256=token_hash(rows.train),
            versions=package_versions(),
            cpu=cpu_words(),
            threads=torch.get_num_threads(),
            quantized=self.source.quantized,
        )


def open_inputs(
    recipe: Recipe,
    destination: Destination,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Inputs:
    """Open what a recipe names.

    Args:
        recipe: what to do.
        destination: what it is for, which may decide the dtype, and the size of blocks.
        model: a Hugging Face causal LM to use instead of ``recipe.model``.
        tokenizer: its tokenizer, where the model's folder is not at hand.

    Raises:
        RotqError: the recipe makes no sense, or names something that cannot be opened.
    """
    check_layerwise(recipe)
    check_text(recipe)
    scheme = customised_scheme(recipe)
    device = resolve_device(recipe.device)
    source = open_source(recipe, model, tokenizer)
    if model is not None or recipe.model != EMBEDDED:
        warn_of_embedded_text(recipe)
    name = destination.common_dtype(recipe.dtype, lambda: source.dtype)
    block = destination.online_block()
    texts = Texts(recipe, source.tokenizer)
    return Inputs(recipe, scheme, source, texts, device, getattr(torch, name), block)


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
