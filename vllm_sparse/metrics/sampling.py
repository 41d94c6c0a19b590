"""How often is measured what costs more than a count."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Intervals of what is measured in randomly drawn steps; 0: never.

    Attributes:
        timing_interval_steps: in one of so many steps with sparse rows, selection and attention are timed.
        recall_interval_steps: in one of so many with sparse rows of a phase, the recall of one of them in one layer is
            measured.
    """

    timing_interval_steps: int = 0
    recall_interval_steps: int = 0


def is_due(interval_steps: int) -> bool:
    """Whether to measure in this step, drawn with probability 1 / `interval_steps`.

    Drawn and not counted: what methods do in one of several steps would fall on all of the steps at equal intervals, or
    on none.
    """
    return interval_steps > 0 and random.randrange(interval_steps) == 0
