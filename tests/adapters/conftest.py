"""Leaves out what needs torch where there is none, and says so."""

from __future__ import annotations

import importlib.util

NEED_TORCH = ["reference", "trtllm"]

HAS_TORCH = importlib.util.find_spec("torch") is not None

collect_ignore = [] if HAS_TORCH else NEED_TORCH


def pytest_report_header() -> str:
    """Say what is left out."""
    if HAS_TORCH:
        return ""
    return f"no torch here: tests/adapters/{{{','.join(NEED_TORCH)}}} are left out"
