"""The search for the highest load that a server holds: faster until the SLO breaks, then between the last two."""

from __future__ import annotations

import math


class Search:
    """Says which rate to try next.

    Args:
        first: rate to begin with.
        factor: from one rate to the next, above 1, until there is one that holds and one that breaks.
        refinements: rates tried between those two, each at their geometric mean.
        most: rates in all.
    """

    def __init__(self, first: float, factor: float, refinements: int, most: int) -> None:
        self._next: float | None = first
        self._factor = factor
        self._refinements = refinements
        self._left = most
        self.holds: float | None = None
        self.breaks: float | None = None

    def next_rate(self) -> float | None:
        """The rate to try; none when the search has ended."""
        return self._next if self._left else None

    def tell(self, rate: float, held: bool) -> None:
        """Take in what became of a rate."""
        self._left -= 1
        if held:
            self.holds = rate if self.holds is None else max(self.holds, rate)
        else:
            self.breaks = rate if self.breaks is None else min(self.breaks, rate)
        if self.breaks is None:
            self._next = rate * self._factor
        elif self.holds is None:
            self._next = rate / self._factor
        elif self._refinements:
            self._refinements -= 1
            self._next = math.sqrt(self.holds * self.breaks)
        else:
            self._next = None
