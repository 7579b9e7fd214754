"""Pieces of text come whole, and end before a stop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from disagg_plugins.errors import ConfigError
from disagg_reference.text import Pieces, Text
from disagg_reference.tiny import EOS


@pytest.fixture(scope="module")
def text(model: Path) -> Text:
    return Text(model)


def told(text: Text, said: bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], Pieces]:
    """Return the pieces of an answer whose tokens are bytes, up to a stop."""
    pieces, found = Pieces(text, stops), []
    for byte in said:
        found.append(pieces.add(text.encode(chr(byte))[0] if byte < 128 else _token(text, byte)))
        if pieces.stopped:
            break
    found.append(pieces.rest())
    return found, pieces


def _token(text: Text, byte: int) -> int:
    # the bytes of a two-byte character are tokens of their own
    for char in map(chr, range(0x80, 0x800)):
        encoded = char.encode()
        if byte in encoded:
            return text.encode(char)[encoded.index(byte)]
    # leading bytes of longer characters
    char = {0xF0: "\U0001f642", 0xE6: "\u6f22", 0xE2: "\u2014"}[byte]
    return text.encode(char)[0]


def test_a_character_comes_when_it_is_whole(text: Text) -> None:
    pieces, _ = told(text, "a\U0001f642b".encode())
    assert pieces == ["a", "", "", "", "\U0001f642", "b", ""]


def test_half_a_character_at_the_end_is_told_as_such(text: Text) -> None:
    pieces, _ = told(text, "a\U0001f642".encode()[:-1])
    assert "".join(pieces).startswith("a\ufffd")


def test_what_is_no_character_is_not_held_for_ever(text: Text) -> None:
    pieces, _ = told(text, b"\xc3" * 20)
    assert "".join(pieces[:-1]).count("\ufffd") >= 8


@pytest.mark.parametrize(
    ("said", "stops", "answer", "stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("three", "two"), "one ", True),
        ("one two three", ("four",), "one two three", False),
        ("one tw", ("two",), "one tw", False),
        ("aab", ("ab",), "a", True),
        ("ababac", ("abac",), "ab", True),
        ("two", ("two",), "", True),
    ],
)
def test_a_stop_ends_the_answer_and_is_not_part_of_it(
    text: Text, said: str, stops: tuple[str, ...], answer: str, stopped: bool
) -> None:
    pieces, state = told(text, said.encode(), stops)
    assert ("".join(pieces), state.stopped) == (answer, stopped)


def test_what_may_begin_a_stop_is_held_back(text: Text) -> None:
    pieces, state = told(text, b"at tv to", ("to",))
    assert pieces == ["a", "", "t ", "", "tv", " ", "", "", ""]
    assert state.stopped


def test_special_tokens_have_no_text_but_a_name(text: Text) -> None:
    assert text.decode([EOS]) == ""
    assert text.token(EOS) == "<|end|>"


def test_a_chat_is_what_the_models_template_makes_of_it(text: Text) -> None:
    ids = text.chat([{"role": "user", "content": "Hi"}])
    assert text.decode(ids) == "user: Hi\nassistant: "


def test_a_model_without_a_template_or_a_tokenizer_says_so(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        Text(tmp_path).chat([{"role": "user", "content": "Hi"}])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        Text(tmp_path)


def test_text_that_is_no_unicode_is_refused(text: Text) -> None:
    with pytest.raises(ValueError, match="no text"):
        text.encode("half \ud83d")
    with pytest.raises(ValueError, match="no text"):
        text.chat([{"role": "user", "content": "half \ud83d"}])
