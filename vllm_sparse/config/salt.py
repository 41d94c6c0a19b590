"""The prefix-cache salt: only requests with equal sparse settings share cached blocks."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from vllm_sparse.config.request import SparseParams

# Part of the prefix-cache salt of sparse requests; clients may not use it in theirs.
SALT_MARK = "|sparse:"
# Raise when the same knobs begin to choose other pages, so that cached blocks of the older choice are not reused.
SELECTION_VERSION = 3


def cache_salt(params: SparseParams, user_salt: str | None, first_token: int = 0) -> str | None:
    """Salt of a request: the user's own for a dense request, else one that only requests with equal settings share.

    It covers the settings of both phases, because blocks written while decoding are cached too, and the contents of
    files that settings name.

    Args:
        params: the request's settings.
        user_salt: vLLM's ``cache_salt`` of the request.
        first_token: index of the first token that a sparse step may write; blocks before it are shared with dense
            requests (`split_salt`).
    """
    if params.is_dense:
        return user_salt
    fingerprints = [method.fingerprint for method in (params.prefill, params.decode) if method is not None]
    identity = "".join([params.serialize(), *fingerprints])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    since = f":{first_token}" if first_token else ""
    return f"{user_salt or ''}{SALT_MARK}{SELECTION_VERSION}:{digest}{since}"


@lru_cache(maxsize=1024)
def split_salt(salt: str | None) -> tuple[str, str, int]:
    """The user's salt, that of the settings, and the index of the token from which on the latter counts.

    Args:
        salt: of a request, as `cache_salt` made it, or any other, which counts from 0.
    """
    user, mark, own = (salt or "").rpartition(SALT_MARK)
    if not mark:
        return salt or "", "", 0
    version, digest, *since = own.split(":")
    return user, f"{mark}{version}:{digest}", int(since[0]) if since else 0
