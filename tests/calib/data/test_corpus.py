"""What a source is read as, and which layout its rows ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calib.data.corpus import Corpus, choose_layout, read_corpus
from calib.errors import DataError
from tests.calib.data.test_tokens import characters


class ChatTokenizer:
    """Writes conversations out as ``role:content;``, and refuses those that a user does not
    begin.
    """

    chat_template = "of a model"

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return characters(text, **options)

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        if messages[0]["role"] != "user":
            raise ValueError("roles must\nalternate")
        return "".join(f"{message['role']}:{message['content']};" for message in messages)


def corpus(lengths: list[int]) -> Corpus:
    """Rows of so many characters, which are so many tokens and a BOS."""
    return Corpus(["x" * length for length in lengths], None, "\n")


@pytest.mark.parametrize(
    ("lengths", "seqlen", "layout"),
    [
        ([24, 24, 24, 24], 100, "documents"),
        ([23, 24, 24, 24], 100, "documents"),  # one in four may be shorter
        ([23, 23, 24, 24], 100, "windows"),
        ([99, 99, 99, 99], 100, "documents"),
        ([99, 99, 99, 99], 401, "windows"),
        ([3, 0, 0, 0, 0, 0], 16, "documents"),  # blank rows are none
        ([5, 80, 5, 80, 80], 100, "windows"),  # headings among paragraphs
    ],
)
def test_rows_are_documents_where_three_in_four_fill_a_quarter(
    lengths: list[int], seqlen: int, layout: str
) -> None:
    assert choose_layout(corpus(lengths), characters, seqlen=seqlen) == layout
    for wanted in ("documents", "windows"):
        assert choose_layout(corpus(lengths), characters, seqlen=seqlen, wanted=wanted) == wanted


def test_rows_of_a_large_source_are_looked_at_evenly() -> None:
    """The short rows stand at the end, and are a third."""
    many = corpus([50] * 4000 + [1] * 2000)
    assert choose_layout(many, characters, seqlen=100) == "windows"


def test_joined_lines_of_a_txt_are_the_file(tmp_path: Path) -> None:
    text = " = Title = \n \n A line of text . \n\nmore\n"
    file = tmp_path / "text.txt"
    file.write_text(text)
    found = read_corpus(str(file), characters)
    assert found.joiner.join(found.texts) + "\n" == text
    assert (found.layout, found.templated) == (None, False)


def write_jsonl(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = write_jsonl(tmp_path / "chat.jsonl", {"id": 1, "messages": chat}, {"messages": chat[:1]})
    found = read_corpus(file, ChatTokenizer())
    assert found.texts == ["user:hi;assistant:ho;", "user:hi;"]
    assert found.templated
    assert choose_layout(found, ChatTokenizer(), seqlen=1000) == "documents"


def test_text_comes_before_messages_and_a_column_before_both(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "t", "messages": chat, "body": "b"})
    assert read_corpus(file, ChatTokenizer()).texts == ["t"]
    assert read_corpus(file, ChatTokenizer(), column="messages").texts == ["user:hi;"]
    assert read_corpus(file, ChatTokenizer(), column="body").texts == ["b"]
    with pytest.raises(DataError, match=r"no field 'title' \(it has: text, messages, body\)"):
        read_corpus(file, ChatTokenizer(), column="title")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": [{"role": "system", "content": "x"}]}], "refuses this.*must alternate"),
        ([{"messages": []}], "line 1: 'messages' holds no conversation"),
        ([{"messages": ["hi"]}], "line 1: 'messages' holds no conversation"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}, {"messages": "text"}],
            "line 2: 'messages' holds no conversation",
        ),
        ([{"messages": {"a": 1}}], "'messages' holds dict, not text"),
    ],
)
def test_what_is_no_conversation_is_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_corpus(write_jsonl(tmp_path / "chat.jsonl", *rows), ChatTokenizer())
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_tokenizer_without_a_template_cannot_read_conversations(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(DataError, match="has no chat template") as caught:
        read_corpus(write_jsonl(tmp_path / "chat.jsonl", row), characters)
    assert "--calib-column" in str(caught.value.hint)


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x\n")
    with pytest.raises(DataError, match="has no column 'body'"):
        read_corpus(str(file), characters, column="body")
