"""Serve a model with the reference engine: ``python -m disagg_reference.serve --model FOLDER``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError, DisaggError
from disagg_reference.config import read_config
from disagg_reference.faults import FaultyHost, read_faults
from disagg_reference.settings import read_settings
from disagg_reference.tiny import make_tiny

if TYPE_CHECKING:
    from disagg_reference.config import ModelConfig
    from disagg_reference.engine import MakeHost
    from disagg_reference.hosting import ConnectorHost
    from disagg_reference.pool import KVPool

TINY = "tiny"
TINY_FOLDER = "tiny-1"
"""Raise the number whenever the generated model changes."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(prog="disagg-reference", description=__doc__)
    found.add_argument(
        "--model",
        required=True,
        type=Path,
        help="a folder in Hugging Face's form; tiny: one that is made here, of random weights",
    )
    found.add_argument("--served-model-name", help="what clients call it; default: the folder")
    found.add_argument("--host", default="127.0.0.1")
    found.add_argument("--port", type=int, default=8000)
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, help="of torch; default: as torch finds right")
    found.add_argument("--tensor-parallel-size", type=int, default=1)
    found.add_argument("--block-size", type=int, default=32, help="tokens of a KV block")
    found.add_argument("--num-blocks", type=int, default=512, help="KV blocks")
    found.add_argument("--max-num-batched-tokens", type=int, default=512)
    found.add_argument("--max-num-seqs", type=int, default=64)
    found.add_argument("--policy", help="disagg.yaml: take part in handoffs as it says")
    found.add_argument("--worker", help="this worker's name in the policy")
    found.add_argument(
        "--kv-connector-config",
        type=Path,
        metavar="FILE",
        help="a YAML file with TensorRT-LLM's kv_connector_config: host that connector instead",
    )
    found.add_argument(
        "--fault", action="append", default=[], metavar="FAULT", help="plant a fault, for tests"
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status."""
    given = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(given))
    except (DisaggError, OSError) as exc:
        print(f"disagg-reference: {exc}", file=sys.stderr)
        return 1
    return 0


async def _serve(given: argparse.Namespace) -> None:
    try:
        import torch
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"torch is not installed for {sys.executable}",
            fix="pip install 'disagg-plugins[reference]'",
        ) from exc

    from disagg_reference.engine import Engine, EngineOptions
    from disagg_reference.server import Server, run_server
    from disagg_reference.text import Text

    if given.threads:
        torch.set_num_threads(given.threads)
    if str(given.model) == TINY:
        given.model = make_tiny(cache_folder() / TINY_FOLDER)
    faults = read_faults(given.fault)
    if faults is not None:
        config = read_config(given.model)
        faults.check(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads)
    options = EngineOptions(
        given.model,
        dtype=given.dtype,
        device=given.device,
        tp_size=given.tensor_parallel_size,
        block_size_tokens=given.block_size,
        num_blocks=given.num_blocks,
        budget_tokens=given.max_num_batched_tokens,
        most_running=given.max_num_seqs,
    )
    make_host = _host_maker(given)
    if make_host is not None and faults is not None:
        inner = make_host

        def make_host(pools: Sequence[KVPool], config: ModelConfig) -> ConnectorHost:
            return FaultyHost(inner(pools, config), pools, faults)

    text = Text(given.model)
    engine = Engine(
        options,
        make_host=make_host,
        before_step=None if faults is None else faults.before_step,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine.start()
    try:
        name = given.served_model_name or given.model.name
        await run_server(Server(engine, text, name), given.host, given.port, stop)
    finally:
        engine.close()


def cache_folder() -> Path:
    """Return where what can be made again is kept (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "disagg-plugins"


def _host_maker(given: argparse.Namespace) -> MakeHost | None:
    """Return what makes the KV mover that the command line asks for."""
    if given.kv_connector_config is not None:
        from disagg_reference.trtllm.host import host_maker

        return host_maker(given.kv_connector_config, given.model)
    if given.policy is None:
        return None
    from disagg_reference.native import NativeHost

    settings = read_settings(given.policy, worker=given.worker, port=given.port)
    return lambda pools, config: NativeHost(pools, given.model, settings)


if __name__ == "__main__":
    sys.exit(main())
