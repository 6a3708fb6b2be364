"""``rotq chat``: the exported model says what it says without a cache, turn by turn."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calib.errors import DataError
from exporter.cli import main
from exporter.commands.chat import Conversation, Sampling, open_conversation
from exporter.commands.continuing import Continuing

pytestmark = pytest.mark.usefixtures("clean_logging")  # the command line sets levels

GREEDY = Sampling()
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def opened(exported: Path) -> Conversation:
    return open_conversation(exported)


@pytest.fixture
def talk(opened: Conversation) -> Conversation:
    """With nothing said and nothing cached."""
    running = Continuing(opened.running.forward)
    return Conversation(running, opened.tokenizer, opened.positions, opened.stops, opened.words)


def say(talk: Conversation, text: str, most: int = 12, sampling: Sampling = GREEDY) -> str:
    return "".join(talk.answer(text, sampling, sampling.chooser(), most=most))


def without_cache(talk: Conversation, ids: Sequence[int], steps: int) -> list[int]:
    """The most likely continuation, each token from the whole text."""
    found = list(ids)
    for _ in range(steps):
        row = torch.tensor([found])
        positions = torch.arange(row.shape[1]).unsqueeze(0)
        logits, _ = talk.running.forward(row, torch.ones_like(row), positions, None)
        found.append(int(logits[0, -1].argmax()))
    return found[len(ids) :]


def test_an_answer_is_the_most_likely_continuation(talk: Conversation) -> None:
    ids = talk.tokenizer("once upon a time")["input_ids"]
    whole = [*ids, *without_cache(talk, ids, 12)]
    expected = talk.tokenizer.decode(whole, skip_special_tokens=True)
    assert "once upon a time" + say(talk, "once upon a time") == expected
    assert (talk.speed.read, talk.speed.written) == (len(ids), 12)
    assert talk.speed.rate is not None


def test_a_second_turn_reads_only_what_is_new_and_answers_the_same(talk: Conversation) -> None:
    first = say(talk, "once upon a time")
    second = say(talk, " and then")
    cached, whole = talk.speed.read, talk.tokenizer(f"once upon a time{first} and then")
    assert cached < len(whole["input_ids"]) / 2

    running = Continuing(talk.running.forward)
    fresh = Conversation(running, talk.tokenizer, None, talk.stops, talk.words)
    assert say(fresh, f"once upon a time{first} and then") == second
    assert fresh.speed.read == len(whole["input_ids"])

    talk.reset()
    assert say(talk, "once upon a time") == first


def test_messages_go_through_the_chat_template(talk: Conversation) -> None:
    asked: list[str] = []

    @dataclass
    class Templated:
        """The tokenizer, with a template."""

        inner: PreTrainedTokenizerBase
        chat_template: str = TEMPLATE

        def apply_chat_template(
            self, messages: list[dict[str, str]], **options: bool
        ) -> dict[str, list[int]]:
            text = str(
                self.inner.apply_chat_template(
                    messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
                )
            )
            asked.append(text)
            return {"input_ids": list(self.inner(text)["input_ids"])}

        def decode(self, ids: list[int], **options: bool) -> str:
            return str(self.inner.decode(ids, **options))

    talk.tokenizer = Templated(talk.tokenizer)  # type: ignore[assignment]
    talk.system = "be brief"
    first = say(talk, "hello", most=4)
    say(talk, "go on", most=4)
    turns = f"system: be brief\nuser: hello\nassistant: {first}\nuser: go on\nassistant: "
    assert asked[1] == turns


@dataclass
class Scripted:
    """A runtime that says given ids, and keeps no cache."""

    says: list[int]
    runtime: str = "script"
    note: str = ""
    seen: list[Tensor] = field(default_factory=list)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        self.seen.append(input_ids)
        logits = torch.zeros(*input_ids.shape, 300)
        logits[0, -1, self.says[len(self.seen) - 1]] = 1
        return logits, []


class Bytes:
    """A tokenizer of bytes."""

    chat_template = None
    eos_token_id = 299

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **options: bool) -> str:
        return bytes(ids).decode(errors="replace")


def scripted(
    says: list[int], positions: int | None = None, runtime: Scripted | None = None
) -> Conversation:
    tokenizer = cast(PreTrainedTokenizerBase, Bytes())
    running = Continuing((runtime or Scripted(says)).forward)
    return Conversation(running, tokenizer, positions, frozenset({299}), "script")


def test_characters_come_whole_and_the_end_is_not_said() -> None:
    says = [*"aé\N{SNOWMAN}".encode(), 299, *b"never"]
    runtime = Scripted(says)
    talk = scripted(says, runtime=runtime)
    pieces = list(talk.answer("x", GREEDY, GREEDY.chooser(), most=50))
    assert pieces == ["a", "é", "\N{SNOWMAN}"]
    # without a cache each token is chosen from all before it
    assert [each.shape[1] for each in runtime.seen] == list(range(1, 8))

    cut = scripted(list("a\N{SNOWMAN}".encode()))
    assert say(cut, "x", most=2) == "a\N{REPLACEMENT CHARACTER}"


def test_what_was_said_before_an_interruption_is_kept() -> None:
    talk = scripted([*b"abcdef", 299])
    pieces = talk.answer("x", GREEDY, GREEDY.chooser(), most=50)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    pieces.close()  # type: ignore[attr-defined]
    assert talk._ids([]) == []
    assert [message["content"] for message in talk._messages] == ["x", "ab"]


def test_a_conversation_has_to_fit_the_model() -> None:
    assert say(scripted([97] * 9, positions=5), "xyz", most=9) == "aa"
    with pytest.raises(DataError, match="5 tokens, and the model takes 5"):
        say(scripted([97], positions=5), "xyzxy")
    with pytest.raises(DataError, match="no token to begin with"):
        say(scripted([97]), "")


def test_draws_follow_the_chances_within_the_nucleus() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = {1.0: torch.zeros(4), 0.6: torch.zeros(4)}
    for top_p, count in counts.items():
        sampling = Sampling(temperature=1.0, top_p=top_p, seed=3)
        generator = sampling.chooser()
        for _ in range(4000):
            count[sampling.choose(chances.log(), generator)] += 1
    # four standard deviations of a share of 4000 draws are at most 0.032
    assert torch.allclose(counts[1.0] / 4000, chances, atol=0.032)
    assert torch.allclose(counts[0.6] / 4000, torch.tensor([0.625, 0.375, 0, 0]), atol=0.032)
    assert Sampling(1.0, 1e-9).choose(chances.log(), Sampling().chooser()) == 0


def test_one_answer_goes_to_stdout_and_its_speed_to_stderr(
    exported: Path, talk: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = say(talk, "once upon a time", most=6)
    arguments = ["chat", str(exported), "--prompt", "once upon a time", "--max-new-tokens", "6"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{expected}\n"
    assert "6 written; the first after" in captured.err

    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == expected
    assert told["runtime"].startswith("ONNX Runtime")


def test_lines_of_a_pipe_are_answered_until_exit(
    exported: Path,
    talk: Conversation,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = "once upon a time\n\n/reset\nonce upon a time\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(exported), "--max-new-tokens", "6", "-q"]) == 0
    answer = say(talk, "once upon a time", most=6)
    assert capsys.readouterr().out == f"{answer}\n{answer}\n"


def test_a_system_message_needs_a_template(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(exported), "--system", "be brief", "-q"]) == 1
    assert "has no chat template" in capsys.readouterr().err
