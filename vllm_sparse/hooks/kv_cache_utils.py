"""vLLM's hashes of KV-cache blocks: the salt of a sparse request begins where a sparse step may have written.

vLLM puts a salt into the first block's key, from which all later keys follow, so requests would not share what they
have in common before. Where this hook is missing the whole salt is in the first key: less is shared, and nothing
wrongly. Not needed any more once a salt can say from which token on it counts.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm_sparse.config.salt import split_salt
from vllm_sparse.hooks.wrapping import is_wrapped, wraps

# Modules of vLLM that have the function by name, if they were imported before.
IMPORTED_BY = ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")


def install() -> None:
    """Wrap `generate_block_hash_extra_keys`, also where it was imported by name; idempotent."""
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.generate_block_hash_extra_keys
    if is_wrapped(original):
        return

    @wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        user_salt, sparse_salt, first_token = split_salt(request.cache_salt)
        if first_token == 0:
            return keys, next_mm_idx
        others = [key for key in keys or () if key[0] != "cache_salt"]
        salts = [user_salt] if start_token_idx == 0 and user_salt else []
        if start_token_idx <= first_token < end_token_idx:
            salts.append(sparse_salt)
        return (*others, *(("cache_salt", salt) for salt in salts)) or None, next_mm_idx

    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys
    for name in IMPORTED_BY:
        if name in sys.modules:
            sys.modules[name].generate_block_hash_extra_keys = generate_block_hash_extra_keys  # type: ignore[attr-defined]
