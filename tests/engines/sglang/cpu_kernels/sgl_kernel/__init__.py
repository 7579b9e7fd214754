"""Stands in for SGLang's kernels so that tests can start SGLang on a CPU: a test fixture.

SGLang imports ``sgl_kernel`` on every device. The package on PyPI holds the CUDA build, which does
not load without ``libcuda``; the CPU build has to be compiled from SGLang's sources. SGLang 0.5.23
needs little of it to run Llama-type models with PyTorch's own kernels (``--attention-backend
torch_native --sampling-backend pytorch``), and that little is here: names that some of its modules
import, and two operators. What is imported is never called on that path, and says so if it is.

``torch.ops.sgl_kernel.convert_weight_packed`` must stay undefined: by it SGLang tells that the CPU
kernels are there, and takes them on a processor with AMX.

The testbed puts this folder first on ``PYTHONPATH`` of the servers it starts, and of nothing else.
Whoever runs SGLang on CPUs builds the real kernels; whoever runs it on GPUs needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

# Imported by name under SGLANG_USE_CPU_ENGINE=1, by these modules of sglang 0.5.23.
ON_IMPORT = (
    "assign_req_to_token_pool_cpu",  # srt/mem_cache/allocation.py
    "copy_all_layer_kv_cache_cpu",  # kernels/ops/kvcache/cache_move.py
    "assign_draft_cache_locs_contiguous_cpu",  # kernels/ops/speculative/cache_locs.py
    "assign_extend_cache_locs_cpu",
    "fill_accept_out_cache_loc_cpu",  # kernels/ops/speculative/eagle.py
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",  # kernels/ops/speculative/multi_layer_eagle.py
    "build_tree_kernel_efficient_cpu",  # kernels/ops/speculative/spec_tree.py
    "verify_tree_greedy_cpu",
)


def _missing(name: str) -> Callable[..., NoReturn]:
    def kernel(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name}: this is a stand-in for tests; build SGLang's CPU kernels"
        )

    kernel.__name__ = name
    return kernel


for _name in ON_IMPORT:
    globals()[_name] = _missing(_name)

# Called on Arm, where SGLang binds its threads through them; on x86 only with the real kernels.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("init_cpu_threads_env(str cpus) -> str")
_library.define("initialize(int size, int rank) -> ()")
_library.impl("init_cpu_threads_env", lambda cpus: cpus, "CompositeExplicitAutograd")
_library.impl("initialize", lambda size, rank: None, "CompositeExplicitAutograd")
