"""Device memory of HiP's decoding: what stages keep from step to step, and what a step needs in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Knobs of a row: sink, window, and of each stage, the last one first, the chunk, the kept tokens and the refresh
# interval. Rows of fewer stages than the memory has use its last ones and hold zeros for the others.
ROW_KNOBS, STAGE_KNOBS = 2, 3


@dataclass(frozen=True)
class StageMemory:
    """What stages kept of the request in each slot, in one layer.

    Attributes:
        chunks: int32 ``[stages, slots, kv_heads, 1 + most_chunks]``: how many chunks, then their first tokens in
            ascending order.
        context_tokens: int32 ``[slots]`` context at the step that used the slot last; anything where none did.
    """

    chunks: torch.Tensor
    context_tokens: torch.Tensor

    @classmethod
    def allocate(
        cls, stages: int, slots: int, kv_heads: int, most_chunks: int, device: torch.device | str
    ) -> StageMemory:
        """Memory of no request. Its size in bytes is 4 * slots * (stages * kv_heads * (1 + most_chunks) + 1)."""
        return cls(
            torch.zeros(stages, slots, kv_heads, 1 + most_chunks, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class StageScratch:
    """What all layers of a step use one after the other.

    Attributes:
        scores: float32 ``[rows, kv_heads, most_candidates]``.
        arrived: int32 ``[rows, kv_heads]`` programs that are done with a stage; 0 between launches.
    """

    scores: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, kv_heads: int, most_candidates: int, device: torch.device | str) -> StageScratch:
        """Scratch for so many rows. Its size in bytes is 4 * rows * kv_heads * (most_candidates + 1)."""
        return cls(
            torch.empty(rows, kv_heads, most_candidates, dtype=torch.float32, device=device),
            torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class HipMemory:
    """All that a server's HiP decoding keeps on a device.

    Attributes:
        layers: of each attention layer.
        scratch: of all of them.
    """

    layers: tuple[StageMemory, ...]
    scratch: StageScratch

    @property
    def bytes(self) -> int:
        """Of device memory."""
        tensors = [self.scratch.scores, self.scratch.arrived]
        for layer in self.layers:
            tensors += [layer.chunks, layer.context_tokens]
        return sum(tensor.nbytes for tensor in tensors)
