"""Which functions of vLLM this package has wrapped. `functools.wraps` does not tell, since vLLM and torch wrap too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Wrapper = TypeVar("Wrapper", bound=Callable[..., Any])

_MARK = "__vllm_sparse__"


def wraps(original: Callable[..., Any]) -> Callable[[Wrapper], Wrapper]:
    """As `functools.wraps`, for what takes the place of a function of vLLM; `is_wrapped` knows it."""

    def decorate(wrapper: Wrapper) -> Wrapper:
        functools.update_wrapper(wrapper, original)
        setattr(wrapper, _MARK, True)
        return wrapper

    return decorate


def is_wrapped(function: Callable[..., Any]) -> bool:
    """Whether this package has put a function in the place of vLLM's own."""
    return hasattr(function, _MARK)
