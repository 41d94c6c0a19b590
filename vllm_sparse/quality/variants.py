"""Settings that are compared: a name, the sampling extras that ask for them, and whether they are a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Settings under a name.

    Attributes:
        name: as tables print it.
        extras: sampling extras of its requests (``vllm_xargs``).
        baseline: of a variant that others are judged by, its kind: ``streaming``, ``random`` or ``oracle``; else "".
    """

    name: str
    extras: Mapping[str, Any]
    baseline: str = ""

    @property
    def sparse_prefill(self) -> bool:
        """Its prompts are sparse, so that its cached blocks are its own."""
        return self.extras.get("sparse_prefill", "dense") != "dense" or "sparse_preset" in self.extras

    @property
    def sparse_decode(self) -> bool:
        """Its generated tokens are decoded with sparse attention."""
        return self.extras.get("sparse_decode", "dense") != "dense" or "sparse_preset" in self.extras
