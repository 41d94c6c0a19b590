"""The tasks by name. Results are "RULER-style": the haystacks are generated, not RULER's essays."""

from __future__ import annotations

from collections.abc import Callable

from loadtest.quality.tasks import niah
from loadtest.quality.tasks.frequent_words import frequent_words
from loadtest.quality.tasks.task import CountTokens, Task
from loadtest.quality.tasks.variable_tracking import variable_tracking

TASKS: dict[str, Callable[[int, int, CountTokens], Task]] = {
    "niah_single": niah.single,
    "niah_multi_key": niah.multi_key,
    "niah_multi_value": niah.multi_value,
    "niah_multi_query": niah.multi_query,
    "variable_tracking": variable_tracking,
    "frequent_words": frequent_words,
}
"""Each takes a seed, the tokens of prompt and answer together, and how tokens are counted."""
