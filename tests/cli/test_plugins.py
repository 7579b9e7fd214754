from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECRET = {"DISAGG_SECRET": "0123456789abcdef-for-tests"}


def test_plugins_are_listed_with_their_hooks(disagg: Any) -> None:
    done = disagg("plugins")
    assert done.returncode == 0, done.stdout
    assert "threshold" in done.stdout
    assert "disagg_select_split" in done.stdout


def test_disabled_plugin_is_listed_as_such(disagg: Any, write_policy: Callable[..., Path]) -> None:
    path = write_policy(plugins={"disabled": ["threshold"]})
    done = disagg("plugins", path, "--json", env=SECRET)
    assert done.returncode == 0, done.stderr
    (found,) = [p for p in json.loads(done.stdout)["plugins"] if p["name"] == "threshold"]
    assert found["state"] == "disabled"
