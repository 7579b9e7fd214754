"""The names of SGLang that the adapter hooks or extends, in the SGLang that is installed.

Run by SGLang's own interpreter. A release that fails here needs a look at ``patches.py``.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import warnings

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the interpreter that has SGLang", allow_module_level=True)

# Importing the engine warns about itself; what our tests do afterwards must not.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang
    from sglang.srt.disaggregation.base.conn import BaseKVManager, BaseKVReceiver, BaseKVSender
    from sglang.srt.disaggregation.utils import TransferBackend, get_kv_class
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import DISAGG_TRANSFER_BACKEND_CHOICES

    from disagg_sglang import patches
    from disagg_sglang.manager import DisaggKVManager
    from disagg_sglang.receiver import DisaggKVReceiver
    from disagg_sglang.sender import DisaggKVSender


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    load_plugins()


@pytest.mark.parametrize("target", patches.HOOKED)
def test_every_hooked_name_is_there_and_hooked(target: str) -> None:
    assert callable(pkgutil.resolve_name(target))
    assert target in HookRegistry._patched


def test_the_installed_release_is_one_that_was_looked_at() -> None:
    assert sglang.__version__ in patches.HAVE_THEM


def test_the_backend_can_be_chosen_and_gives_its_classes() -> None:
    assert "disagg" in DISAGG_TRANSFER_BACKEND_CHOICES
    backend = TransferBackend("disagg")
    assert backend is TransferBackend["DISAGG"]
    kinds = {"manager": DisaggKVManager, "sender": DisaggKVSender, "receiver": DisaggKVReceiver}
    for kind, ours in kinds.items():
        assert get_kv_class(backend, kind_of(kind)) is ours


def test_sglangs_own_backends_are_left_alone() -> None:
    fake = get_kv_class(TransferBackend.FAKE, kind_of("manager"))
    assert fake.__module__.startswith("sglang.")


def kind_of(name: str) -> object:
    from sglang.srt.disaggregation.utils import KVClassType

    return KVClassType(name)


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        (DisaggKVManager, BaseKVManager),
        (DisaggKVSender, BaseKVSender),
        (DisaggKVReceiver, BaseKVReceiver),
    ],
)
def test_nothing_that_sglang_demands_of_a_backend_is_missing(ours: type, base: type) -> None:
    assert not inspect.isabstract(ours)
    for name in base.__abstractmethods__:  # type: ignore[attr-defined]
        theirs = inspect.signature(getattr(base, name)).parameters
        mine = inspect.signature(getattr(ours, name)).parameters
        assert list(mine)[: len(theirs)] == list(theirs), name
