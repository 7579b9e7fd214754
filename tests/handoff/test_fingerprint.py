"""Which weights are taken for the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg_plugins.handoff import fingerprint
from disagg_plugins.handoff.fingerprint import weights_identity

TENSORS = 40
TENSOR_BYTES = 50_000


def write_model(folder: Path, *, changed: int | None = None, config: object = None) -> str:
    """Write a safetensors file of 40 tensors, one of them zeroed, and return its identity."""
    folder.mkdir()
    header, data = {}, b""
    for i in range(TENSORS):
        start = len(data)
        data += bytes(TENSOR_BYTES) if i == changed else bytes([i + 1]) * TENSOR_BYTES
        header[f"layer.{i}"] = {
            "dtype": "U8",
            "shape": [TENSOR_BYTES],
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config or {"rope_theta": 1}))
    return weights_identity(str(folder))


@pytest.mark.parametrize("whole", [True, False])
def test_a_change_of_any_tensor_changes_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    same = {write_model(tmp_path / "a"), write_model(tmp_path / "b")}
    assert len(same) == 1
    others = {write_model(tmp_path / str(i), changed=i) for i in range(TENSORS)}
    assert len(others) == TENSORS
    assert not others & same


def test_the_configuration_counts_but_not_its_dtype_or_path(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "a", config={"rope_theta": 1})
    other = write_model(tmp_path / "b", config={"rope_theta": 2})
    named = write_model(
        tmp_path / "c", config={"rope_theta": 1, "_name_or_path": "x", "dtype": "f"}
    )
    assert plain == named
    assert plain != other


def test_one_weight_file_is_read_not_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"a" * 100)
    first = weights_identity(str(file))
    file.write_bytes(b"b" * 100)
    assert first.startswith("weights:")
    assert weights_identity(str(file)) != first


def test_what_is_not_on_this_disk_stands_for_itself() -> None:
    assert weights_identity("org/model@main") == "name:org/model@main"
