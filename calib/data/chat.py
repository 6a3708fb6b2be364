"""Conversations through a tokenizer's chat template, which is a program of somebody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib.errors import DataError
from calib.process.time_limit import TooLongError, time_limit

SECONDS = 5.0
"""That a template may take for one conversation; ordinary ones take milliseconds."""


def has_chat_template(tokenizer: object) -> bool:
    """Whether it writes out conversations."""
    render = getattr(tokenizer, "apply_chat_template", None)
    return render is not None and bool(getattr(tokenizer, "chat_template", None))


def templated(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, where: str, **options: bool
) -> Any:
    """What the template makes of ``messages``; ``options`` are those of transformers'
    ``apply_chat_template``.

    Args:
        tokenizer: has a template.
        messages: each with ``role`` and ``content``.
        where: what the conversation is called in an error.
        options: whether it is tokenized, for example.

    Raises:
        DataError: the template refuses the conversation, or takes too long for it.
    """
    try:
        with time_limit(SECONDS):
            return tokenizer.apply_chat_template(list(messages), **options)
    # a template may raise whatever it likes, and what jinja makes of what it does not know
    except (Exception, TooLongError) as error:
        raise DataError(
            f"{where}: the model's chat template refuses this conversation:"
            f" {' '.join(str(error).split())}",
            hint="Most templates want roles to alternate, beginning with the user's.",
        ) from error
