"""The device's clock in Triton. There is no reference, because PyTorch cannot read it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def stamp_kernel(time_pointer):
    tl.store(time_pointer, globaltimer())


def stamp(time_ns: torch.Tensor) -> None:
    """Write the time at which all work queued before on the stream has ended.

    Args:
        time_ns: int64 ``[]``, written: nanoseconds since an arbitrary moment.
    """
    stamp_kernel[(1,)](time_ns, num_warps=1)
