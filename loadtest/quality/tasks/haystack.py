"""What needles are hidden in."""

from __future__ import annotations

import random
from collections.abc import Sequence

from loadtest.text.needles import sentence

# Says nothing, like RULER's stock line, in words of our own.
NOISE = "Rain fell on the roof. The road went on. Nobody was there. A bird flew over the field. It was quiet again."


def noise(units: int) -> list[str]:
    """The same line again and again."""
    return [NOISE] * units


def prose(rng: random.Random, units: int) -> list[str]:
    """Generated English-like sentences: they stand in for RULER's essays, which would have to be downloaded."""
    return [sentence(rng) for _ in range(units)]


def hide(rng: random.Random, haystack: Sequence[str], needles: Sequence[str]) -> list[str]:
    """Put the needles at random places of the haystack; they keep their order."""
    places = sorted(rng.randint(0, len(haystack)) for _ in needles)
    lines = list(haystack)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        lines.insert(place, needle)
    return lines
