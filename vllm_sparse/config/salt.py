"""Prefix-cache salt: which requests may share the blocks of which."""

from __future__ import annotations

import hashlib

from vllm_sparse.config.request import SparseParams

# Part of the prefix-cache salt of sparse requests; clients may not use it in theirs.
SALT_MARK = "|sparse:"
# Raise when the same knobs begin to choose other pages, so that cached blocks of the older choice are not reused.
SELECTION_VERSION = 1


def cache_salt(params: SparseParams, user_salt: str | None) -> str | None:
    """Prefix-cache salt: the user's own for a dense request, else one that only equal settings share.

    Covers both phases: blocks written while decoding are cached too. Covers what files hold that settings name.
    """
    if params.is_dense:
        return user_salt
    fingerprints = [method.fingerprint for method in (params.prefill, params.decode) if method is not None]
    identity = "".join([params.serialize(), *fingerprints])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return f"{user_salt or ''}{SALT_MARK}{SELECTION_VERSION}:{digest}"
