"""``rotq chat``: an exported folder answers, in its runtime.

A conversation is the text that the chat template makes of all its messages, or, where the tokenizer
has none, of what was typed and answered so far. Keys and values of the tokens that the cache holds
are kept between turns (:mod:`exporter.commands.continuing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.data.chat import has_chat_template, templated
from calib.errors import DataError
from exporter.commands.continuing import Continuing, Speed
from exporter.commands.opened import opened_export
from exporter.source import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes to while the bytes of a character are not all there."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Logits are divided by it; 0: always the most likely token."""
    top_p: float = 1.0
    """Of the tokens, the most likely first, those are drawn from whose predecessors together have
    less than this probability (nucleus sampling, Holtzman et al., arXiv 1904.09751)."""
    seed: int = 0

    def chooser(self) -> torch.Generator:
        """What it draws with, from the beginning."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token id.

        Args:
            logits: float ``[vocabulary]``.
            generator: what it draws with.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        chances, order = (logits.double() / self.temperature).softmax(-1).sort(descending=True)
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= self.top_p, 0)  # the first has nothing before it
        return int(order[torch.multinomial(chances, 1, generator=generator)])


@dataclass
class Conversation:
    """Messages so far, and the cache of their tokens. Not for several threads."""

    running: Continuing
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    """How many tokens the model takes, a prefix of its own not counted; ``None``: not known."""
    stops: frozenset[int]
    """Ids that end an answer."""
    words: str
    """What runs it, for people."""
    system: str | None = None
    """A message before all others; only with a chat template."""
    _messages: list[dict[str, str]] = field(default_factory=list, init=False)

    @property
    def speed(self) -> Speed:
        """Of the last answer."""
        return self.running.speed

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return has_chat_template(self.tokenizer)

    def reset(self) -> None:
        """Forget everything that was said."""
        self._messages.clear()

    def answer(
        self, text: str, sampling: Sampling, generator: torch.Generator, *, most: int
    ) -> Iterator[str]:
        """What the model answers, piece by piece, as soon as whole characters are there.

        Ending the iteration early keeps what was answered so far.

        Args:
            text: the message.
            sampling: how tokens are chosen.
            generator: what it draws with.
            most: tokens of the answer.

        Raises:
            DataError: the conversation has become longer than the model takes, or is empty.
        """
        ids = self._ids([*self._messages, {"role": "user", "content": text}])
        room = most if self.positions is None else min(most, self.positions - len(ids))
        if not ids or room < 1:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model takes {self.positions}"
                if ids
                else "there is no token to begin with",
                hint="forget what was said (/reset), or ask for less" if ids else "type something",
            )

        def choose(logits: Tensor) -> int:
            return sampling.choose(logits, generator)

        written: list[int] = []
        shown = ""
        try:
            for token in self.running.tokens(ids, choose, room):
                if token in self.stops:
                    break
                written.append(token)
                whole = self._decoded(ids[-1], written)
                if not whole.endswith(_UNFINISHED):
                    yield whole[len(shown) :]
                    shown = whole
            whole = self._decoded(ids[-1], written)
            if whole != shown:  # cut off within a character
                yield whole[len(shown) :]
        finally:
            said = self._decoded(ids[-1], written)
            self._messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": said},
            ]

    def _ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        tokenizer: Any = self.tokenizer
        if not self.templated:
            whole = "".join(message["content"] for message in messages)
            return list(tokenizer(whole)["input_ids"])
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        found = templated(
            tokenizer,
            [*before, *messages],
            where="what was typed",
            add_generation_prompt=True,
            return_dict=True,
        )
        return list(found["input_ids"])

    def _decoded(self, before: int, ids: Sequence[int]) -> str:
        """The text of ``ids`` that follow the token ``before``: by themselves they may lose a
        leading space.
        """
        start, whole = (
            str(self.tokenizer.decode(part, skip_special_tokens=True))
            for part in ([before], [before, *ids])
        )
        return whole.removeprefix(start)


def open_conversation(folder: str | Path, *, system: str | None = None) -> Conversation:
    """The exported ``folder`` in its runtime, as a user gets it.

    Args:
        folder: what ``rotq export`` wrote.
        system: a message before all others.

    Raises:
        RotqError: the folder is none of rotq's, was edited, or has no runtime here; or ``system``
            is given and its tokenizer has no chat template.
    """
    folder = Path(folder)
    model, tokenizer = opened_export(folder), load_tokenizer(folder)
    conversation = Conversation(
        Continuing(model.forward),
        tokenizer,
        model.positions,
        _stops(folder, tokenizer),
        model.runtime,
        system,
    )
    if system is not None and not conversation.templated:
        raise DataError(
            f"the tokenizer of '{folder}' has no chat template, so that there is no place for a"
            " system message",
            hint="leave --system out",
        )
    return conversation


def _stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end tokens of the generation config and of the tokenizer."""
    from transformers import GenerationConfig

    found: list[int | None] = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        found += ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in found if token is not None)
