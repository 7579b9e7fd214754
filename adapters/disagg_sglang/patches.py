"""Every name of SGLang that this adapter hooks, and what it does there. Nothing is changed on disk.

SGLang's own plugin door does the patching: ``HookRegistry`` (``srt/plugins/hook_registry.py``,
0.5.23). Three of the four hooks carry what a transfer backend is not told: a request's prompt, so
that KV is bound to it, and the pool and model of the scheduler, so that nothing is guessed from
addresses. Loaded inside the engine only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from disagg_plugins.errors import UnsupportedEngineError
from disagg_sglang.launcher import TRANSFER_BACKEND

if TYPE_CHECKING:
    from enum import Enum

GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
CREATE_SENDER = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.create_sender"
CREATE_RECEIVER = (
    "sglang.srt.disaggregation.decode.DecodePreallocQueue._create_receiver_and_enqueue"
)
INIT_PREFILL_MANAGER = "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue._init_kv_manager"
INIT_DECODE_MANAGER = "sglang.srt.disaggregation.decode.DecodePreallocQueue._init_kv_manager"

HOOKED = (
    GET_KV_CLASS,
    CREATE_SENDER,
    CREATE_RECEIVER,
    INIT_PREFILL_MANAGER,
    INIT_DECODE_MANAGER,
)
"""Dotted paths."""

HAVE_THEM = ("0.5.18", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
"""SGLang releases in whose sources every one of these names was found, with the plugin door itself.
Only the last was run."""

ENUM_MEMBER = "DISAGG"

queue_in_making: ContextVar[Any] = ContextVar("queue_in_making", default=None)
"""SGLang's queue that is making its KV manager right now: it knows the pool and the model."""


def register() -> None:
    """Make the transfer backend known to SGLang; idempotent.

    Raises:
        UnsupportedEngineError: This SGLang lacks a name that is hooked or extended.
    """
    try:
        from sglang.srt.disaggregation.utils import TransferBackend
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        from sglang.srt.server_args import (
            DISAGG_TRANSFER_BACKEND_CHOICES,
            add_disagg_transfer_backend_choices,
        )
    except ImportError as error:
        raise UnsupportedEngineError(
            f"this SGLang has no door for a transfer backend ({error}); this release was written "
            "for SGLang 0.5.23"
        ) from error
    if TRANSFER_BACKEND in DISAGG_TRANSFER_BACKEND_CHOICES:
        return
    add_disagg_transfer_backend_choices([TRANSFER_BACKEND])
    add_member(TransferBackend, ENUM_MEMBER, TRANSFER_BACKEND)
    HookRegistry.register(GET_KV_CLASS, _get_kv_class, HookType.AROUND)
    HookRegistry.register(CREATE_SENDER, _tell_sender, HookType.AFTER)
    HookRegistry.register(CREATE_RECEIVER, _tell_receiver, HookType.AFTER)
    for target in (INIT_PREFILL_MANAGER, INIT_DECODE_MANAGER):
        HookRegistry.register(target, _remember_queue, HookType.AROUND)


def check_applied() -> None:
    """Raise unless every hook is in place: SGLang logs a hook that fails, and goes on.

    Raises:
        UnsupportedEngineError: A hooked name is missing in this SGLang.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in HOOKED if target not in HookRegistry._patched]
    if missing:
        raise UnsupportedEngineError(
            f"SGLang did not apply the hooks on {', '.join(missing)}: this SGLang is not supported "
            "by this release (written for 0.5.23)"
        )


def add_member(enum: type[Enum], name: str, value: str) -> None:
    """Add a member to an enumeration that is closed; idempotent."""
    if name in enum.__members__:
        return
    member = object.__new__(enum)
    member._name_ = name
    member._value_ = value
    enum._member_map_[name] = member
    enum._member_names_.append(name)
    enum._value2member_map_[value] = member
    type.__setattr__(enum, name, member)


def _get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Answer for our backend; SGLang answers for its own."""
    from sglang.srt.disaggregation.utils import KVClassType

    if transfer_backend.value != TRANSFER_BACKEND or class_type == KVClassType.KVARGS:
        return original(transfer_backend, class_type)
    from disagg_sglang.manager import DisaggBootstrapServer, DisaggKVManager
    from disagg_sglang.receiver import DisaggKVReceiver
    from disagg_sglang.sender import DisaggKVSender

    return {
        KVClassType.MANAGER: DisaggKVManager,
        KVClassType.SENDER: DisaggKVSender,
        KVClassType.RECEIVER: DisaggKVReceiver,
        KVClassType.BOOTSTRAP_SERVER: DisaggBootstrapServer,
    }.get(class_type)


def _tell_sender(made: bool, queue: Any, req: Any, *_: Any, **__: Any) -> None:
    """Tell the new sender which prompt it publishes."""
    expect = getattr(req.disagg_kv_sender, "expect", None) if made else None
    if expect is not None:
        expect(req)


def _tell_receiver(decode_req: Any, queue: Any, req: Any, *_: Any, **__: Any) -> None:
    """Tell the new receiver which prompt it loads."""
    expect = getattr(decode_req.kv_receiver, "expect", None)
    if expect is not None:
        expect(req)


def _remember_queue(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
    """Let the manager see the queue that makes it."""
    token = queue_in_making.set(queue)
    try:
        return original(queue, *args, **kwargs)
    finally:
        queue_in_making.reset(token)
