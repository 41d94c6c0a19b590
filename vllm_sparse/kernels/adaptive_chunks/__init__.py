"""DHSA's chunks with boundaries where neighbouring keys differ most, by a rule without training."""

from __future__ import annotations

from types import ModuleType

from vllm_sparse.kernels.adaptive_chunks import reference
from vllm_sparse.kernels.chunk_scores import KeyChunks
from vllm_sparse.keys import PagedKeys, PlainKeys

__all__ = ["adaptive_chunks"]


def adaptive_chunks(keys: PagedKeys, threshold: float) -> KeyChunks:
    """Cut a context's keys into chunks of 8 to 64 tokens; only the last one may be shorter or longer.

    A boundary lies where the mean of 4 keys, all KV heads side by side, is less like the mean of the next 4 than at
    any of the 8 positions before and the 8 after: ``1 - cosine``, above `threshold`. Longer stretches are split. A
    boundary is set once the keys that decide it exist, so that more keys never move one: the boundaries of a shorter
    context are the first ones of a longer.

    Computed from the cache at every chunk of the prompt, as page means are. Runs in Triton on CUDA, else in
    PyTorch; without a device-to-host sync.

    Args:
        keys: the request's keys.
        threshold: least ``1 - cosine`` of a boundary, 0 to 2.
    """
    implementation: ModuleType = reference
    if keys.kv_cache.is_cuda and isinstance(keys, PlainKeys):
        from vllm_sparse.kernels.adaptive_chunks import triton as implementation
    start = reference.chunk_starts(implementation.boundary_scores(keys), threshold)
    return KeyChunks(implementation.representations(keys, start), start, reference.LOOK_AHEAD_TOKENS)
