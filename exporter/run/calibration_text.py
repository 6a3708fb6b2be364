"""How much text the statistics see, against what they estimate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calib.data.documents import check_source
from calib.smoothing.methods import smoothing_named
from calib.weights.algorithms import algorithm_named
from exporter.recipe import EMBEDDED, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from calib.data.rows import RowSplits
    from exporter.source import Source

logger = logging.getLogger(__name__)

LEAST_TOKENS_PER_CHANNEL = 10
"""A second moment of ``n`` input channels has ``n (n + 1) / 2`` entries, and below ``n`` tokens it
is not even of full rank. GPTQ gains little over rounding to nearest on other text with fewer than
about ten times ``n``."""


def check_text(recipe: Recipe) -> None:
    """Refuse text that cannot be read, before the model is opened.

    Raises:
        DataError: as :func:`calib.data.documents.check_source`.
    """
    for data in (recipe.calibration, recipe.evaluation):
        if data.dataset not in (None, EMBEDDED):
            check_source(data.dataset, data.column)


def warn_of_embedded_text(recipe: Recipe) -> None:
    """Log that a model which is not the embedded one is calibrated on the embedded text, if so."""
    if recipe.calibration.dataset == EMBEDDED:
        logger.warning(
            "the calibration text is the embedded one, which is written for the example model: give"
            " text like that which the model will see (--calib-dataset)"
        )


def widest_input(source: Source) -> int:
    """Input channels of the widest linear that may be quantized. Tensors that are missing are
    passed over: fusing names them.
    """
    stored = (
        (spec, source.checkpoint[spec.weight])
        for spec in source.wiring.linears
        if spec.quantizable and spec.weight in source.checkpoint
    )
    return max(
        (weight.shape[-2 if spec.layout == "conv1d" else -1] for spec, weight in stored), default=0
    )


def few_tokens(weights: str, smoothing: str, tokens: int, channels: int) -> str | None:
    """Why ``tokens`` are few for what a run takes from them; None where they are enough.

    Args:
        weights: algorithm that rounds weights, as a recipe names it.
        smoothing: smoothing method, as a recipe names it.
        tokens: of calibration.
        channels: input channels of the widest linear.
    """
    method = smoothing_named(smoothing)
    users = [weights] if algorithm_named(weights).needs_moment else []
    users += [smoothing] if method is not None and method.needs_moment else []
    if not users or tokens >= LEAST_TOKENS_PER_CHANNEL * channels:
        return None
    return (
        f"{tokens:,} calibration tokens are {tokens / channels:.1f} for each of the {channels:,}"
        f" input channels of the widest linear, and {' and '.join(users)} estimates second moments"
        f" of them: give at least {LEAST_TOKENS_PER_CHANNEL} (--nsamples, --seqlen, a longer text)"
    )


def warn_of_few_rows(recipe: Recipe, rows: RowSplits) -> None:
    """Log which splits have fewer rows than the recipe asks for: their figures say less."""
    wanted = {
        "calibration": (recipe.calibration.nsamples, rows.train),
        "gate": (recipe.gate.nsamples, rows.gate),
        "evaluation": (recipe.evaluation.nsamples, rows.evaluation),
    }
    few = [
        f"{len(found)} of {asked} {name}"
        for name, (asked, found) in wanted.items()
        if len(found) < asked
    ]
    if few and recipe.calibration.dataset != EMBEDDED:
        logger.warning("the text has fewer rows than asked for: %s", ", ".join(few))


def warn_of_few_tokens(recipe: Recipe, source: Source, rows: Sequence[Tensor]) -> None:
    """Log :func:`few_tokens` of the calibration ``rows`` [tokens]."""
    tokens = sum(row.numel() for row in rows)
    found = few_tokens(recipe.weights.algorithm, recipe.smoothing, tokens, widest_input(source))
    if found is not None:
        logger.warning("%s", found)
