"""DHSA's key blocks with boundaries where neighbouring keys differ most, by a rule that needs no training."""

from __future__ import annotations

from types import ModuleType

from vllm_sparse.kernels.adaptive_blocks import reference
from vllm_sparse.kernels.block_scores import KeyBlocks
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["adaptive_blocks"]


def adaptive_blocks(keys: PagedKeys, threshold: float) -> KeyBlocks:
    """Cut a context's keys into key blocks of 8 to 64 tokens; only the last one may be shorter or longer.

    The change at a position is ``1 - cosine`` between the mean of the 4 keys before it and the mean of the 4 keys from
    it on, all KV heads concatenated. A boundary lies where the change is above `threshold` and larger than at the 8
    positions before and the 8 after. Longer stretches between boundaries are split. A boundary is set only once all
    keys that decide it exist, so more keys never move it: a shorter context has the first boundaries of a longer one.

    The key blocks are computed from the cache for every prompt chunk, as page means are. Runs in Triton on CUDA, else
    in PyTorch; without a device-to-host sync.

    Args:
        keys: the request's keys.
        threshold: the change, 0 to 2, that a boundary must exceed.
    """
    implementation: ModuleType = reference
    if keys.kv_cache.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.adaptive_blocks import triton as implementation
    start = reference.block_starts(implementation.boundary_scores(keys), threshold)
    return KeyBlocks(implementation.representations(keys, start), start, reference.LOOK_AHEAD_TOKENS)
