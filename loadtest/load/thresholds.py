"""When a run has failed, as a scenario or `--fail-on` writes it: ``failed_share > 0.01``, ``dense: score < 0.9``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

COUNTED = (
    "failures",
    "failed_share",
    "good_share",
    "score",
    "requests_per_second",
    "output_tokens_per_second",
    "goodput_per_second",
    "right_goodput_per_second",
)
TIMED = ("ttft_seconds", "tpot_seconds", "gap_seconds", "latency_seconds")
PARTS = ("mean", "p50", "p90", "p95", "p99", "p99.9")
COMPARED = ("ttft_ratio", "tpot_ratio", "latency_ratio", "score_difference")
OVERLOADED = "overloaded"

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FORM = re.compile(
    r"(?:(?P<method>[^:]+):)?\s*(?P<measure>[a-z_]+)(?:\.(?P<part>[a-z0-9.]+))?\s*(?P<operator><=?|>=?)\s*(?P<limit>\S+)"
)


@dataclass(frozen=True)
class Threshold:
    """A condition under which a run has failed.

    Attributes:
        text: as it was written.
        method: whose requests; none: all together, or every method where methods are compared.
        measure: of `COUNTED`, `TIMED`, `COMPARED`, or `OVERLOADED`, which has no limit.
        part: of a measure in `TIMED`: a percentile or the mean.
        operator, limit: a value on that side of the limit fails.
    """

    text: str
    method: str | None
    measure: str
    part: str | None
    operator: str
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a value fails the run."""
        return _OPERATORS[self.operator](value, self.limit)


def parse_threshold(text: str) -> Threshold:
    """A threshold from its text.

    Raises:
        ValueError: it is not of that form, or there is no such measure.
    """
    if text.strip() == OVERLOADED:
        return Threshold(OVERLOADED, None, OVERLOADED, None, ">", 0.0)
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r}: '[METHOD:] MEASURE < or > NUMBER' is wanted, such as 'failed_share > 0.01'")
    measure, part = found["measure"], found["part"]
    if measure not in (*COUNTED, *TIMED, *COMPARED):
        allowed = ", ".join((*COUNTED, *TIMED, *COMPARED, OVERLOADED))
        raise ValueError(f"{text!r}: no measure {measure!r}; there are {allowed}")
    if (part in PARTS) != (measure in TIMED):
        raise ValueError(f"{text!r}: one of {', '.join(PARTS)} belongs to {', '.join(TIMED)}, and only to them")
    try:
        limit = float(found["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ValueError(f"{text!r}: the limit {found['limit']!r} is no finite number")
    method = found["method"].strip() if found["method"] else None
    return Threshold(text.strip(), method, measure, part, found["operator"], limit)


def _checked(text: str) -> str:
    parse_threshold(text)
    return text


ThresholdText = Annotated[str, AfterValidator(_checked)]
