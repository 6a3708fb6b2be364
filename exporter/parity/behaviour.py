"""Rung 3, beside perplexity: what the export writes when it is left to itself.

A perplexity is measured on texts of others. A model may keep it and still fall into a loop after
thirty tokens of its own, and so may a runtime whose cache is wrong. So both models continue the
same prompts, each always with its most likely token: the float model in transformers with its
cache, the export in the session that a user gets, with its cache.

* Tokens until they part: how long both write the same. Where two tokens are about as likely, any
  rounding parts them, so it is reported and not judged.
* Repetition: the share of 4-grams of a continuation that were in it before. Judged is what the
  export has more of it than the float model, where that has learned something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backends.base import RuntimeModel
from backends.torch_model import cached_pass
from calib.data.chat import has_chat_template, templated
from exporter.parity.rows import ran, row
from exporter.parity.subject import Subject
from exporter.parity.walks import original_logits
from exporter.reporting.evidence import Continuation, Evidence
from exporter.reporting.report import ParityRow

if TYPE_CHECKING:
    from exporter.source import Source

_NAME = "greedy continuations, original float vs exported"
STEPS = 32
"""Tokens that each prompt is continued by."""
NGRAM = 4
REPETITION_BOUND = 0.25
"""What the share of repeated 4-grams may be above the float model's. A continuation that loops from
its start on has 0.7 to 0.97 (32 tokens that repeat with a period of up to 8): of four prompts a
single one that does so is within the bound, and two are beyond it."""
_LEAST_PROMPTS = 4
"""From how many on it is judged."""
_KNOWS = 0.1
"""A model whose perplexity is beyond this share of its vocabulary has learned next to nothing. What
it writes hangs on the last bits of its logits, loops included, and is reported only."""
_PROMPT_TOKENS = 16
_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "How do I boil an egg?",
    "What is the difference between a list and a tuple in Python?",
    "Name three animals that live in the sea and describe one of them.",
    "Give me some advice on how to sleep better.",
    "What happened to the dinosaurs?",
)

Forward = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor] | None], tuple[Tensor, list[Tensor]]]
"""As :meth:`backends.base.RuntimeModel.forward`."""


@dataclass(frozen=True)
class _Prompts:
    """Token ids ``[tokens]`` that are continued, and where they are from, in words."""

    ids: list[Tensor]
    origin: str


def behaviour_rows(
    subject: Subject, original: nn.Module, perplexity: float, runtime: RuntimeModel
) -> list[ParityRow]:
    """The figures of what both write; none where there is no cache, or no room for a continuation.

    Args:
        subject: what is compared; its source is at hand.
        original: the float model of its source.
        perplexity: of the float model on the rows of ``subject``.
        runtime: the export, as a user runs it.
    """
    assert subject.source is not None  # by the caller
    prompts = _prompts(subject.source, subject.rows)
    steps = _room(subject.source.config, prompts.ids, subject.quantized.prefix_length)
    if steps < NGRAM:
        return []
    ours = _continued(runtime.forward, prompts.ids, steps)
    if ours is None:
        return []
    theirs = _continued(forward_of(original), prompts.ids, steps)
    assert theirs is not None  # transformers has a cache

    tokenizer = subject.source.tokenizer
    stop = tokenizer.eos_token_id
    pairs = [
        (_until(stop, a), _until(stop, b))
        for a, b in zip(theirs.tolist(), ours.tolist(), strict=True)
    ]
    together = [common_length(a, b) for a, b in pairs]
    same = sum(a == b for a, b in pairs)
    parted = (
        f"{len(pairs)} prompts {prompts.origin}, continued by {steps} tokens; {same} of them the"
        " same to the end"
    )
    float_rate, rate = (
        sum(map(repetition, side)) / len(pairs) for side in zip(*pairs, strict=True)
    )
    repeated = f"{float_rate:.3f} -> {rate:.3f}"
    texts = [tokenizer.decode(ids.tolist()) for ids in prompts.ids]
    seen = Evidence(
        continuations=[
            Continuation(
                prompt=text,
                original=tokenizer.decode(one),
                exported=tokenizer.decode(other),
                together=length,
            )
            for text, (one, other), length in zip(texts, pairs, together, strict=True)
        ]
    )
    mean = sum(together) / len(pairs)
    knows = perplexity <= _KNOWS * subject.source.config.vocab_size
    judged = knows and len(pairs) >= _LEAST_PROMPTS
    figure = row(3, _NAME, "tokens until they part", mean, None, parted, **ran(runtime))
    return [
        figure.model_copy(update={"evidence": seen}),
        row(
            3,
            _NAME,
            f"repeated {NGRAM}-grams, difference",
            rate - float_rate,
            REPETITION_BOUND if judged else None,
            repeated,
            **ran(runtime),
        ),
    ]


def followed_rows(subject: Subject, runtime: RuntimeModel) -> list[ParityRow]:
    """How long a float model that is never whole in memory would have written what the export
    writes: it reads the export's continuations in one walk, and up to the first token that it
    would not have chosen it would have written the same.

    Arguments as for :func:`behaviour_rows`. How much the float model repeats itself cannot be seen
    so, and is not judged.
    """
    assert subject.source is not None  # by the caller
    prompts = _prompts(subject.source, subject.rows)
    steps = _room(subject.source.config, prompts.ids, subject.quantized.prefix_length)
    ours = None if steps < NGRAM else _continued(runtime.forward, prompts.ids, steps)
    if ours is None:
        return []
    written = [
        torch.cat([ids, own[:-1]]) for ids, own in zip(prompts.ids, ours.to("cpu"), strict=True)
    ]
    tokenizer = subject.source.tokenizer
    stop = tokenizer.eos_token_id
    together, same, seen = [], 0, []
    with original_logits(subject, written) as logits:
        for ids, own in zip(written, ours.tolist(), strict=True):
            chosen = logits(ids.unsqueeze(0))[0, -steps:].argmax(-1).tolist()
            text = _until(stop, own)
            together.append(common_length(chosen, text))
            same += together[-1] == len(text)
            prompt = ids[: ids.numel() - steps + 1].tolist()
            seen.append(
                Continuation(
                    prompt=tokenizer.decode(prompt),
                    original=None,
                    exported=tokenizer.decode(text),
                    together=together[-1],
                )
            )
    note = (
        f"{len(written)} prompts {prompts.origin}, continued by {steps} tokens; {same} of them the"
        " same to the end; the float model is never whole in memory, and reads what the export"
        " wrote"
    )
    mean = sum(together) / len(together)
    figure = row(3, _NAME, "tokens until they part", mean, None, note, **ran(runtime))
    return [figure.model_copy(update={"evidence": Evidence(continuations=seen)})]


def repetition(tokens: Sequence[int]) -> float:
    """The share of 4-grams of ``tokens`` that stand in them before, 0 to 1; 0 where there are
    none.
    """
    grams = list(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _prompts(source: Source, rows: Sequence[Tensor]) -> _Prompts:
    """Questions, as the tokenizer puts them to a chat model; else the beginnings of held-out
    rows.
    """
    tokenizer: Any = source.tokenizer
    if has_chat_template(tokenizer):
        asked = [
            templated(
                tokenizer,
                [{"role": "user", "content": question}],
                where="a prompt of the parity check",
                add_generation_prompt=True,
                return_dict=True,
            )["input_ids"]
            for question in _QUESTIONS
        ]
        return _Prompts([torch.tensor(ids) for ids in asked], "through the chat template")

    beginnings = [ids[: min(_PROMPT_TOKENS, ids.numel())] for ids in rows[: len(_QUESTIONS)]]
    return _Prompts(beginnings, "of held-out text")


def _room(config: Any, prompts: Sequence[Tensor], taken: int) -> int:
    """How many tokens can follow every prompt, behind a prefix of ``taken`` tokens."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(ids.numel() for ids in prompts)
    return STEPS if positions is None else min(STEPS, positions - taken - longest)


@torch.no_grad()
def _continued(forward: Forward, prompts: Sequence[Tensor], steps: int) -> Tensor | None:
    """The most likely continuation ``[prompts, steps]``, all prompts in one left-padded batch;
    ``None`` where ``forward`` keeps no cache.
    """
    longest = max(ids.numel() for ids in prompts)
    padding = [longest - ids.numel() for ids in prompts]
    entering = torch.stack(
        [nn.functional.pad(ids, (pad, 0)) for ids, pad in zip(prompts, padding, strict=True)]
    )
    mask = torch.stack([(torch.arange(longest) >= pad).long() for pad in padding])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past: Sequence[Tensor] | None = None
    chosen: list[Tensor] = []
    while True:
        logits, past = forward(entering, mask, positions, past)
        if not past:
            return None
        entering = logits[:, -1].argmax(-1, keepdim=True).cpu()
        chosen.append(entering)
        if len(chosen) == steps:
            return torch.cat(chosen, dim=1)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1


def forward_of(network: Any) -> Forward:
    """A transformers model as :class:`~backends.base.RuntimeModel` has it, with its own cache."""
    device = next(network.parameters()).device

    def forward(
        ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        return cached_pass(
            network, ids.to(device), mask.to(device), positions.to(device), past or ()
        )

    return forward


def _until(stop: int | None, tokens: list[int]) -> list[int]:
    """``tokens`` up to the first ``stop``, which is the last thing that a reader sees."""
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
