"""Settings that are compared: a name, the sampling extras that ask for them, and whether they are a baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sparse.config.presets import PRESETS

PHASES = ("prefill", "decode")
DENSE_EXTRAS = {"sparse_prefill": "dense", "sparse_decode": "dense"}
BASELINES = ("streaming", "random", "oracle")
"""Methods that others are judged by: sink and window, random pages, and the true attention."""


@dataclass(frozen=True)
class Variant:
    """Settings under a name.

    Attributes:
        name: as tables print it.
        extras: sampling extras of its requests (``vllm_xargs``).
        baseline: of a variant that others are judged by, its kind, one of `BASELINES`; else "".
        density: of a baseline, share of the context that it reads, nearly; knobs that say it follow from the length.
    """

    name: str
    extras: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = ""
    density: float | None = None

    @property
    def sparse_prefill(self) -> bool:
        """Its prompts are sparse, so that its cached blocks are its own."""
        return self.is_sparse("prefill")

    @property
    def sparse_decode(self) -> bool:
        """Its generated tokens are decoded with sparse attention."""
        return self.is_sparse("decode")

    def is_sparse(self, phase: str) -> bool:
        """A phase, ``prefill`` or ``decode``, is sparse; that of a preset at some length."""
        chosen = self.extras.get(f"sparse_{phase}", "dense")
        return bool(chosen != "dense" or self.extras.get("sparse_preset", "dense") != "dense")

    def extras_at(self, length_tokens: int) -> dict[str, Any]:
        """Sampling extras of its requests of a length."""
        extras = dict(self.extras)
        if self.density is None:
            return extras
        if self.baseline == "streaming":
            # A window of w tokens keeps w of each context between w and the length; of a decode step's, w of all.
            share = 1 - math.sqrt(1 - self.density) if self.sparse_prefill else self.density
            extras["streaming_recent_tokens"] = max(1, round(share * length_tokens))
        elif self.sparse_prefill:
            extras[f"{self.baseline}_density"] = self.density
        else:
            extras[f"{self.baseline}_budget_tokens"] = max(256, round(self.density * length_tokens))
        return extras


def parse_variant(text: str) -> Variant:
    """A variant from ``NAME=JSON``.

    Raises:
        ValueError: it is something else.
    """
    name, equals, extras = text.partition("=")
    if not name.strip() or not equals:
        raise ValueError(
            f'{text!r}: NAME=JSON of sampling extras is allowed, such as \'mine={{"sparse_prefill": "sale"}}\''
        )
    try:
        parsed = json.loads(extras)
    except ValueError as error:
        raise ValueError(f"{text!r}: what follows the first = is no JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{text!r}: a JSON object is allowed, this is {type(parsed).__name__}")
    return Variant(name.strip(), parsed)


def default_variants(methods: Mapping[str, Sequence[str]]) -> Iterator[Variant]:
    """Each method alone, at its defaults.

    Args:
        methods: names by phase, as a server offers them.
    """
    for phase in PHASES:
        for method in methods[phase]:
            if method not in BASELINES:
                yield Variant(f"{method} {phase}", {**DENSE_EXTRAS, f"sparse_{phase}": method})


def least_preset_tokens() -> int:
    """Shortest prompt for which some preset is sparse."""
    return min(tier.from_tokens for preset in PRESETS.values() for tier in preset.tiers)


def baseline_variants(densities: Sequence[float], phases: Sequence[str]) -> Iterator[Variant]:
    """Each baseline at each density, phase by phase."""
    for phase in phases:
        for kind in BASELINES:
            for density in densities:
                extras = {**DENSE_EXTRAS, f"sparse_{phase}": kind}
                yield Variant(f"{kind} {phase} {density:g}", extras, kind, density)
