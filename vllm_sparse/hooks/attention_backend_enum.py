"""vLLM's `AttentionBackendEnum`: a member for this backend, and its way into processes that vLLM spawns.

An enum member pickles by its value, and a spawned process unpickles vLLM's configuration before it loads plugins, when
the enum has no such member yet. Not needed any more once vLLM pickles backends by name and loads plugins first.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any


def install(name: str, path: str, restore: Callable[[str], Any]) -> None:
    """Register the backend.

    Args:
        name: of the member.
        path: of the backend's class.
        restore: called with the name where a member is unpickled; returns the member of that process.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if name in AttentionBackendEnum.__members__:
        return
    register_backend(name, path)

    def reduce(member: Any) -> Any:
        return (restore, (name,)) if member.name == name else member.__reduce_ex__(4)

    copyreg.pickle(AttentionBackendEnum, reduce)
