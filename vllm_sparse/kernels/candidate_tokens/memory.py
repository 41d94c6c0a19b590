"""Device memory of the choice among candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse.step.rows import ServerSize


@dataclass(frozen=True)
class CandidateMemory:
    """What the choice among candidates keeps on a device; all layers use it one after the other.

    Attributes:
        arrived: int32 ``[lists]`` programs of a list that have finished; 0 between launches.
    """

    arrived: torch.Tensor

    @classmethod
    def allocate(cls, size: ServerSize, device: torch.device) -> CandidateMemory:
        """Memory for a row of each request."""
        return cls(torch.zeros(size.requests * size.kv_heads, dtype=torch.int32, device=device))

    @property
    def bytes(self) -> int:
        """Bytes of device memory."""
        return self.arrived.nbytes
