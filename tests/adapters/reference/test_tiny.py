"""The generated model is an ordinary folder, the same each time, and there at once or not."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from disagg_reference.config import read_config
from disagg_reference.text import Text
from disagg_reference.tiny import EOS, VOCAB, TinyShape, make_tiny


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_it_is_the_same_each_time_and_another_with_another_seed(
    model: Path, tmp_path: Path
) -> None:
    assert digest(make_tiny(tmp_path / "a")) == digest(model)
    assert digest(make_tiny(tmp_path / "b", TinyShape(seed=2))) != digest(model)


def test_a_folder_that_is_there_stays_as_it_is(model: Path) -> None:
    before = (model / "config.json").stat().st_mtime_ns
    assert make_tiny(model, TinyShape(seed=9)) == model
    assert (model / "config.json").stat().st_mtime_ns == before


def test_its_configuration_is_what_was_asked_for(tmp_path: Path) -> None:
    shape = TinyShape(hidden=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=4)
    config = read_config(make_tiny(tmp_path / "tiny", shape))
    assert (config.hidden, config.num_layers, config.num_heads) == (32, 3, 8)
    assert (config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 4, VOCAB)
    assert config.eos == {EOS}


@pytest.mark.parametrize("text", ["", "plain", "naïve — 漢字 🙂", " \n\t two  blanks "])
def test_its_tokens_are_bytes(model: Path, text: str) -> None:
    tokenizer = Text(model)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("disagg_reference.tiny._tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        make_tiny(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
