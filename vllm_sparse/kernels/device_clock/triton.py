"""The device's clock in Triton. There is no reference, because PyTorch cannot read it."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer
from triton.language.extra.hip import memrealtime

from vllm_sparse.kernels.common.triton import is_amd

Clock = Literal["nvidia", "gfx9", "amd"]
# Of AMD's clocks, which count at 100 MHz.
COUNT_NS = tl.constexpr(10)


@triton.jit
def stamp_kernel(time_pointer, CLOCK: tl.constexpr):
    if CLOCK == "nvidia":
        time_ns = globaltimer()
    elif CLOCK == "gfx9":
        # What Triton has for it waits for another counter than the one that this instruction raises.
        instructions: tl.constexpr = "s_memrealtime $0\ns_waitcnt lgkmcnt(0)"
        counted = tl.inline_asm_elementwise(instructions, "=s", [], dtype=tl.int64, is_pure=False, pack=1)
        time_ns = counted * COUNT_NS
    else:
        time_ns = memrealtime() * COUNT_NS
    tl.store(time_pointer, time_ns)


def clock() -> Clock:
    """The clock of the current device."""
    if not is_amd():
        return "nvidia"
    return "gfx9" if str(triton.runtime.driver.active.get_current_target().arch).startswith("gfx9") else "amd"


def stamp(time_ns: torch.Tensor) -> None:
    """Write the time at which all work queued before on the stream has ended.

    Args:
        time_ns: int64 ``[]``, written: nanoseconds since an arbitrary moment.
    """
    stamp_kernel[(1,)](time_ns, CLOCK=clock(), num_warps=1)
