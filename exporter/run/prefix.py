"""Which prefix a run takes: tokens whose keys and values stand before every sequence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from calib.data.rows import RowSplits
from calib.data.tokens import encode
from calib.errors import RecipeError
from calib.layerwise.massive import massive_inputs_blockwise
from calib.quantizing.plan import Quantization
from calib.rotations.rotation_set import RotationSet
from calib.stats.massive import MASSIVE, PrefixChoice, choose_prefix
from exporter.parity.passes import steady_length
from exporter.run.destination import Destination
from exporter.run.inputs import Inputs
from exporter.run.stopwatch import Stopwatch
from exporter.run.widening import fixes_limits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST = 4
"""Tokens that ``auto`` takes at most; one to three were enough for every model of PrefixQuant."""
_MARKS = ("\n", ".", ",")
"""Besides what begins and ends a text: tokens that say nothing by themselves make good sinks."""


_MOVING = (
    "its RoPE takes other frequencies for long texts (longrope, dynamic), and the keys of a prefix,"
    " which are constants, would keep those of short ones"
)


def chosen_prefix(
    inputs: Inputs,
    quantization: Quantization,
    rows: RowSplits,
    destination: Destination | None,
    clock: Stopwatch,
) -> PrefixChoice | None:
    """The prefix of a run, and what was looked at to choose it; ``None`` where nothing was.

    Args:
        inputs: the model, and what is asked for.
        quantization: what is done to its linears; only limits that are fixed beforehand suffer from
            massive tokens.
        rows: calibrates on ``train``; all others, int64 ``[tokens]``, must have room behind it as
            well.
        destination: what must be able to have one, if anything.
        clock: times the choice.

    Raises:
        RecipeError: the prefix that was asked for leaves no room for the rows in the positions that
            the model has.
    """
    asked = inputs.recipe.prefix
    if asked == "none" or inputs.source.wiring.generic:
        return None
    every = [row for part in (rows.train, rows.gate, rows.evaluation) for row in part]
    room = _room(inputs.source.config, every)
    moving = _MOVING if steady_length(inputs.source.wiring.config) is not None else None
    exactly = None if asked == "auto" else asked
    if exactly is None:
        if not fixes_limits(quantization) or inputs.recipe.layerwise.enabled or room < 1:
            return None
        refused = moving or (None if destination is None else destination.refused_prefix())
    elif exactly > room:
        raise RecipeError(
            f"a prefix of {exactly} tokens does not fit: the longest row leaves"
            f" {max(room, 0)} of the model's {inputs.source.config.max_position_embeddings}"
            " positions free",
            hint="take a shorter prefix, or shorter rows: --seqlen",
        )
    elif moving is not None:
        raise RecipeError(
            f"a prefix cannot stand before this model: {moving}",
            hint="leave --prefix out, or --prefix none",
        )
    else:
        refused = None

    blocks = inputs.recipe.layerwise.enabled
    fused = inputs.fuse(RotationSet(), clock, lazy=blocks)
    walked = partial(massive_inputs_blockwise, fused, device=inputs.device)
    with clock.stage("prefix"):
        choice = choose_prefix(
            fused,
            rows.train,
            sinks(inputs.source.tokenizer),
            limit=min(MOST, room) if refused is None else 0,
            exactly=exactly,
            device=inputs.device,
            measure=walked if blocks else None,
            progress=clock.progress,
        )
    if refused is not None and choice.massive:
        logger.warning(
            "%s is %.0f times its median because of massive tokens, which a prefix would take away,"
            " and %s",
            choice.before[0].name,
            choice.before[0].ratio,
            refused,
        )
    return choice


def massive_rows(choice: PrefixChoice | None) -> tuple[dict[str, Any], ...]:
    """What the report says of the inputs that have massive tokens."""
    if choice is None:
        return ()
    after = {each.name: each.ratio for each in choice.after if choice.tokens}
    return tuple(
        {"name": each.name, "ratio": each.ratio, "with_prefix": after.get(each.name)}
        for each in choice.before
        if each.ratio > MASSIVE
    )


def sinks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that are tried first: what begins and what ends a text, and marks that are one token.

    Raises:
        DataError: the tokenizer fails on them.
    """
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for mark in _MARKS:
        encoded = encode(mark, tokenizer, special=False).tolist()
        ids += encoded if len(encoded) == 1 else []
    return [token for token in dict.fromkeys(ids) if isinstance(token, int)]


def _room(config: Any, rows: Sequence[Tensor]) -> int:
    """Positions that the longest of ``rows`` leaves free."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(row.numel() for row in rows)
    return MOST if positions is None else int(positions) - longest
