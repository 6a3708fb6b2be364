"""An opened model as lm-evaluation-harness asks for one. Imports ``lm_eval``, so only what runs its
tasks imports this.

A continuation's log-likelihood is that of its tokens after its context, all in one pass:

    log p(y | x) = sum_i log softmax(f([x, y_<i]))[y_i],

in float64; of texts longer than the model takes, the last tokens are kept, as the harness itself
does. Requests that run the same tokens are run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from calib.errors import DataError
from calib.process.progress import Progress, silent
from exporter.commands.continuing import Continuing
from exporter.commands.opened import Opened

DEFAULT_LENGTH = 2048
DEFAULT_GENERATED = 256
"""Tokens that are generated where a task does not say how many."""


class OpenedLM(TemplateLM):  # type: ignore[misc]  # the harness is optional, and untyped
    """What :func:`lm_eval.simple_evaluate` takes as ``model``.

    Args:
        opened: the model.
        tokenizer: of it.
        max_length: tokens that it is run on at most; by default what it takes, 2048 at most.
        progress: called after every request.
    """

    def __init__(
        self,
        opened: Opened,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        self.opened, self.tokenizer = opened, tokenizer
        self.max_length = min(max_length or DEFAULT_LENGTH, opened.positions or DEFAULT_LENGTH)
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.opened.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: object
    ) -> list[int]:
        """Token ids, with what the tokenizer puts before a text unless that is there already."""
        if add_special_tokens is None:
            begins = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, begins)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as the text that the model was trained on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what the model would write."""
        runs: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            whole = [*context, *continuation][-(self.max_length + 1) :]
            runs.setdefault(tuple(whole[:-1]), []).append(index)

        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for ids, indices in runs.items():
            scores = self._scores(ids)
            for index in indices:
                _, _, continuation = requests[index]
                found[index] = _scored(scores, continuation)
            done += len(indices)
            self._progress("log-likelihoods", done, len(requests))
        return found

    def _scores(self, ids: Sequence[int]) -> Tensor:
        """Log-probabilities ``[tokens, vocabulary]`` in float64."""
        logits = self.opened.logits(torch.tensor([list(ids)]))[0]
        return logits.double().log_softmax(-1)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows."""
        totals = []
        for at, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(
                    text
                ),  # as the harness, what stands before it scored too
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                scores = self._scores([*context, *continuation][:-1])
                total += _scored(scores, continuation)[0]
            totals.append(total)
            self._progress("texts", at + 1, len(requests))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to a text that ends them."""
        running, texts = Continuing(self.opened.forward), []
        for at, request in enumerate(requests):
            context, options = request.args
            if options.get("do_sample") or options.get("temperature", 0) not in (0, 0.0, None):
                raise DataError(
                    "a task draws tokens at random, which rotq does not do for tasks",
                    hint="choose a task whose generation is greedy (do_sample: false)",
                )
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            most = options.get("max_gen_toks") or DEFAULT_GENERATED
            ids = self.tok_encode(context)[-max(1, self.max_length - most) :]
            texts.append(self._until(running, ids, stops, most))
            self._progress("texts", at + 1, len(requests))
        return texts

    def _until(self, running: Continuing, ids: list[int], stops: Sequence[str], most: int) -> str:
        written: list[int] = []
        text: str = ""
        for token in self._tokens(running, ids, most):
            written.append(token)
            text = str(self.tokenizer.decode(written, skip_special_tokens=True))
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _tokens(self, running: Continuing, ids: list[int], most: int) -> Iterator[int]:
        for token in running.tokens(ids, lambda logits: int(logits.argmax()), most):
            if token == self.eot_token_id:
                return
            yield token


def _scored(scores: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Of the last tokens of a text.

    Args:
        scores: log-probabilities ``[tokens, vocabulary]``, of which the last predict the
            continuation.
        continuation: token ids.
    """
    own = scores[-len(continuation) :]
    wanted = torch.tensor(list(continuation))[-own.shape[0] :].to(own.device)
    picked = own.gather(1, wanted.unsqueeze(1))
    return float(picked.sum()), bool((own.argmax(-1) == wanted).all())
