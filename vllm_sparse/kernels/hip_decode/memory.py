"""Device memory of HiP's decoding: what stages keep from step to step, and what a step needs while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# A row's knobs are its sink, its window and 1 if its last stage scores all keys, else 0. Then three for each stage,
# from the last stage to the first: tokens of a key block, tokens kept, steps between two searches. A row with fewer
# stages than the memory uses the memory's last stages, and holds zeros for the others.
ROW_KNOBS, STAGE_KNOBS = 3, 3


@dataclass(frozen=True)
class StageMemory:
    """What the stages kept of the request in each slot, in one layer.

    Attributes:
        key_blocks: int32 ``[stages, slots, kv_heads, 1 + most_key_blocks]``: the number of key blocks, then their first
            tokens, ascending.
        seq_lens: int32 ``[slots]`` the request's context at the last step that used the slot; undefined if no
            step did.
    """

    key_blocks: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def allocate(
        cls, stages: int, slots: int, kv_heads: int, most_key_blocks: int, device: torch.device | str
    ) -> StageMemory:
        """Memory in which no slot holds a request.

        It takes ``4 * slots * (stages * kv_heads * (1 + most_key_blocks) + 1)`` bytes.
        """
        return cls(
            torch.zeros(stages, slots, kv_heads, 1 + most_key_blocks, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class StageScratch:
    """Buffers that all layers of a step use one after the other.

    Attributes:
        scores: float32 ``[rows, kv_heads, most_candidates]`` scores of the key blocks of one stage.
        arrived: int32 ``[rows, kv_heads]`` number of programs that have finished a stage; 0 between launches.
    """

    scores: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, kv_heads: int, most_candidates: int, device: torch.device | str) -> StageScratch:
        """Buffers for up to `rows` rows. Their size in bytes is 4 * rows * kv_heads * (most_candidates + 1)."""
        return cls(
            torch.empty(rows, kv_heads, most_candidates, dtype=torch.float32, device=device),
            torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class RowMemory:
    """Where `token_lists` finds what the stages kept for each row.

    Attributes:
        slots: int32 ``[rows]`` slot of each row's request in `stages`, none twice; undefined for rows that do not take
            part.
        fresh: int32 ``[rows]``, with the stride of `slots`: not 0 if the slot has got a new request since its last
            step.
        stages: memory of the layer.
        scratch: for at least as many rows; overwritten.
    """

    slots: torch.Tensor
    fresh: torch.Tensor
    stages: StageMemory
    scratch: StageScratch


@dataclass(frozen=True)
class HipMemory:
    """All that HiP's decoding keeps on a device.

    Attributes:
        layers: memory of each attention layer that the process holds, by its number.
        scratch: buffers that the layers share.
    """

    layers: Mapping[int, StageMemory]
    scratch: StageScratch

    @property
    def bytes(self) -> int:
        """Bytes of device memory."""
        tensors = [self.scratch.scores, self.scratch.arrived]
        for layer in self.layers.values():
            tensors += [layer.key_blocks, layer.seq_lens]
        return sum(tensor.nbytes for tensor in tensors)
