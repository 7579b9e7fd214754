"""The per-request record and its file."""

from __future__ import annotations

import json
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.telemetry import records
from disagg_plugins.telemetry.records import (
    RECORD_KEYS,
    FailureRecord,
    HandoffRecord,
    RecordFile,
    RecordView,
    RequestRecord,
    summarise,
)


def record(name: str = "r", gaps_s: list[float] | None = None) -> RequestRecord:
    return RequestRecord(
        request_id=name,
        at_s=1.5,
        endpoint="/v1/completions",
        model=None,
        route="local",
        why="short",
        prefill=None,
        decode="d0",
        stream=True,
        prompt_tokens_estimate=3,
        gaps_s=gaps_s,
    )


def test_summary_of_gaps() -> None:
    gaps_s = sorted([0.1, 0.2, 0.3, 0.4, 1.0])
    summary = summarise(gaps_s)
    assert summary is not None
    assert (summary.count, summary.p50_s, summary.max_s) == (5, 0.3, 1.0)
    assert summary.std_s == pytest.approx(statistics.pstdev(gaps_s))
    assert summarise([]) is None


def test_file_holds_one_line_a_record_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    file = RecordFile(path)
    for i in range(3):
        assert file.add(record(f"r{i}", [0.1, 0.2]))
    file.flush()
    file.add(record("last"))
    file.close()
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["r0", "r1", "r2", "last"]
    assert lines[0]["itl"]["count"] == 2
    assert "gaps_s" not in lines[0]
    assert path.stat().st_mode & 0o777 == 0o600


def test_file_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        file = RecordFile(tmp_path / "records.jsonl")
        file.add(record())
        file.close()
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


def test_too_many_pending_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_PENDING", 2)
    file = RecordFile(tmp_path / "records.jsonl")
    assert [file.add(record()) for _ in range(3)] == [True, True, False]
    file.close()
    assert (file.written, file.dropped) == (2, 1)


def test_full_disk_loses_records_not_requests() -> None:
    file = RecordFile(Path("/dev/full"))
    file.add(record())
    file.close()
    assert (file.written, file.dropped) == (0, 1)


def test_closing_waits_for_a_flush_that_is_just_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, go_on = threading.Event(), threading.Event()

    class SlowToStart(threading.Thread):
        def start(self) -> None:
            starting.set()
            go_on.wait(10)
            super().start()

    file = RecordFile(tmp_path / "records.jsonl")
    file.add(record())
    monkeypatch.setattr(records, "threading", SimpleNamespace(Thread=SlowToStart))
    with ThreadPoolExecutor(2) as pool:
        flushed = pool.submit(file.flush_soon)
        assert starting.wait(10)
        closed = pool.submit(file.close, 10.0)
        go_on.set()
        assert flushed.result(10) is True
        assert closed.result(10) is True
    assert file.written == 1


def test_unwritable_path_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"telemetry\.records"):
        RecordFile(tmp_path)


def test_plain_values_may_be_taken_twice() -> None:
    taken = record(gaps_s=[0.5])
    plain = taken.as_dict()
    assert plain["itl"] == {"count": 1, "p50_s": 0.5, "p99_s": 0.5, "max_s": 0.5, "std_s": 0.0}
    assert plain == taken.as_dict()
    assert "gaps_s" not in plain


def test_line_is_the_dictionary_as_json() -> None:
    import msgspec

    for gaps_s in (None, [0.1, 0.2]):
        line = record(gaps_s=gaps_s).line()
        assert msgspec.json.decode(line) == record(gaps_s=gaps_s).as_dict()


def test_a_view_holds_what_the_dictionary_holds() -> None:
    told = record(gaps_s=[0.1, 0.3])
    told.handoff = HandoffRecord("h", bytes=7)
    told.failures.append(FailureRecord("d0", "decode", "closed", "gone"))
    view = RecordView(told)
    assert dict(view) == told.as_dict()
    assert list(view) == list(told.as_dict()) == list(RECORD_KEYS)
    assert len(view) == len(RECORD_KEYS)
    assert "decode" in view
    assert "gaps_s" not in view
    assert view.get("nothing", 3) == 3
    with pytest.raises(KeyError):
        view["as_dict"]


def test_nothing_can_be_changed_through_a_view() -> None:
    told = record()
    told.handoff = HandoffRecord("h")
    view = RecordView(told)
    with pytest.raises(TypeError):
        view["decode"] = "d1"  # type: ignore[index]
    view["handoff"]["id"] = "other"  # type: ignore[index]
    view["failures"].append("x")  # type: ignore[attr-defined]
    assert view["handoff"]["id"] == "h"  # type: ignore[index]
    assert view["failures"] == []


def test_a_line_and_a_view_may_be_made_in_any_order() -> None:
    for first in (lambda r: r.line(), lambda r: RecordView(r)["itl"]):
        told = record(gaps_s=[0.5])
        first(told)
        assert json.loads(told.line())["itl"]["count"] == 1
        assert RecordView(told)["itl"]["count"] == 1  # type: ignore[index]
