"""One NIXL process of the ``handoff`` benchmark: JSON lines in, JSON lines out.

Runs in an environment that has ``nixl``; imports nothing of this project.
"""

from __future__ import annotations

import base64
import json
import resource
import sys
import time

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config


class Agent:
    """A target or an initiator of UCX reads between two DRAM buffers."""

    def __init__(self, name: str) -> None:
        self.agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self.name = name
        self.remote = ""

    def setup(self, payload_bytes: int) -> dict[str, object]:
        """Allocate, warm and register the buffer."""
        self.buffer = np.zeros(payload_bytes, dtype=np.uint8)
        if self.name == "target":
            self.buffer.reshape(-1, 4096)[:] = (np.arange(payload_bytes // 4096) % 251)[:, None]
        else:
            self.buffer[:] = 255
        self.address = self.buffer.ctypes.data
        registered = self.agent.get_reg_descs([(self.address, payload_bytes, 0, "")], "DRAM")
        self.agent.register_memory(registered)
        metadata = self.agent.get_agent_metadata()
        return {"metadata": base64.b64encode(metadata).decode(), "address": self.address}

    def peer(self, metadata: str, address: int) -> dict[str, object]:
        """Learn the other side."""
        self.remote = self.agent.add_remote_agent(base64.b64decode(metadata))
        if isinstance(self.remote, bytes):
            self.remote = self.remote.decode()
        self.remote_address = address
        return {}

    def size(self, block_bytes: int) -> dict[str, object]:
        """Prepare descriptor lists of another block size."""
        starts = range(0, self.buffer.nbytes, block_bytes)
        local = [(self.address + s, block_bytes, 0) for s in starts]
        remote = [(self.remote_address + s, block_bytes, 0) for s in starts]
        agent = self.agent
        self.local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", agent.get_xfer_descs(local, "DRAM"))
        self.far = agent.prep_xfer_dlist(self.remote, agent.get_xfer_descs(remote, "DRAM"))
        self.indices = list(range(len(local)))
        return {}

    def read(self, pause_s: float) -> dict[str, object]:
        """Read the whole payload once; wait by polling, with ``pause_s`` between two looks."""
        agent = self.agent
        handle = agent.make_prepped_xfer(
            "READ", self.local, self.indices, self.far, self.indices, b"done"
        )
        state = agent.transfer(handle)
        while state not in ("DONE", "ERR"):
            if pause_s:
                time.sleep(pause_s)
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state == "ERR":
            raise RuntimeError("NIXL reports a failed transfer")
        return {}

    def drain(self) -> dict[str, object]:
        """Take the notifications of finished reads."""
        return {"notifications": sum(len(v) for v in self.agent.get_new_notifs().values())}

    def correct(self) -> dict[str, object]:
        """Say whether the buffer holds the target's pattern."""
        pages = self.buffer.reshape(-1, 4096)
        return {"correct": bool((pages == (np.arange(len(pages)) % 251)[:, None]).all())}


def main() -> None:
    """Serve commands until the input ends."""
    agent = Agent(sys.argv[1])
    out = sys.stdout
    sys.stdout = sys.stderr  # NIXL prints on its own.
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("cmd")
        if name == "usage":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            answer: dict[str, object] = {"cpu_s": usage.ru_utime + usage.ru_stime}
        else:
            answer = getattr(agent, name)(**command)
        print("\x1e" + json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
