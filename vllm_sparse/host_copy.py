"""Copies from the host that do not wait for what the device still has to do.

From pageable memory the driver would first wait for the stream, in every step that copies. The allocator of pinned
memory hands a block out again only once copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of what is on the host, queued behind the work of the current stream.

    Args:
        values: of the host, not written afterwards.
        device: of the copy.
    """
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def copy_to(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy what is on the host to where it is wanted; arguments otherwise as in `to_device`."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


def indices_on(device: torch.device, indices: Sequence[int]) -> torch.Tensor:
    """Indices as int64 ``[indices]`` on a device, without waiting for it."""
    return to_device(torch.tensor(indices, dtype=torch.int64), device)
