"""A sequence in as many parts, equal but for one value."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence


def parts_of(count: int, parts: int) -> Iterator[slice]:
    """Places of each part of a sequence of `count` values."""
    edges = [count * part // parts for part in range(parts + 1)]
    return itertools.starmap(slice, itertools.pairwise(edges))


def means_of_parts(values: Sequence[float], parts: int) -> tuple[float, ...]:
    """Mean of each part; there are at least as many values as parts."""
    slices = [values[place] for place in parts_of(len(values), parts)]
    return tuple(sum(part) / len(part) for part in slices)
