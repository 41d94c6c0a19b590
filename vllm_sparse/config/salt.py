"""The prefix-cache salt: only requests with equal sparse settings share cached blocks."""

from __future__ import annotations

import hashlib

from vllm_sparse.config.request import SparseParams

# Part of the prefix-cache salt of sparse requests; clients may not use it in theirs.
SALT_MARK = "|sparse:"
# Raise when the same knobs begin to choose other pages, so that cached blocks of the older choice are not reused.
SELECTION_VERSION = 2


def cache_salt(params: SparseParams, user_salt: str | None) -> str | None:
    """Salt of a request: the user's own for a dense request, else one that only requests with equal settings share.

    It covers the settings of both phases, because blocks written while decoding are cached too, and the contents of
    files that settings name.

    Args:
        params: the request's settings.
        user_salt: vLLM's ``cache_salt`` of the request.
    """
    if params.is_dense:
        return user_salt
    fingerprints = [method.fingerprint for method in (params.prefill, params.decode) if method is not None]
    identity = "".join([params.serialize(), *fingerprints])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return f"{user_salt or ''}{SALT_MARK}{SELECTION_VERSION}:{digest}"
