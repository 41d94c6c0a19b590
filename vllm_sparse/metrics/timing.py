"""Seconds of selection and of attention in sampled steps, by device events on a GPU and by the clock on the CPU.

Steps that replay a CUDA graph are timed by `graph_timing`.

Nothing waits for the device: events are read when a later step finds that they have passed.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparse.step.launch import Executor, Launch

# What a span of time went to; a whole one, of both.
WHOLE, SELECTION, ATTENTION, ASIDE = "whole", "selection", "attention", "aside"

# Says what the time since the former mark of the same layer went to.
Mark = Callable[[str], None]


def ignore(part: str) -> None:
    """The mark of a layer that is not timed."""


@dataclass(frozen=True)
class _Span:
    """From one mark to another: what it went to, and which rows share it."""

    part: str
    rows: Counter[tuple[str, str]]
    begin: Any
    end: Any


class StepTimer:
    """Times the sparse rows of one step.

    Args:
        on_gpu: by device events.
        rows: phase and method of each row.
    """

    def __init__(self, on_gpu: bool, rows: Sequence[tuple[str, str]]) -> None:
        self._on_gpu = on_gpu
        self.rows = Counter(rows)
        self._spans: list[_Span] = []
        self._current: Counter[tuple[str, str]] = Counter()

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def _span(self, part: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._spans.append(_Span(part, self._current, begin, self._mark()))

    @contextmanager
    def serving(self, phase: str, methods: Sequence[str]) -> Iterator[None]:
        """What follows chooses lists for rows, or attends over them.

        Args:
            phase: of the rows.
            methods: of each row.
        """
        self._current = Counter((phase, method) for method in methods)
        with self._span(WHOLE):
            yield

    def executor(self, executor: Executor) -> Executor:
        """An executor whose launches are counted as attention."""
        return _TimedExecutor(executor, lambda: self._span(ATTENTION))

    def marks(self, layer: int, methods: Sequence[str]) -> Mark:
        """Marks of one layer of decode rows that are served at once.

        Args:
            layer: index of the attention layer.
            methods: of each row.

        Returns:
            To be called with `SELECTION`, `ATTENTION` or `ASIDE`, which counts for nothing; first of all with that.
        """
        rows = Counter(("decode", method) for method in methods)
        marks: list[Any] = []

        def mark(part: str) -> None:
            marks.append(self._mark())
            if part != ASIDE:
                self._spans.append(_Span(WHOLE, rows, *marks[-2:]))
            if part == ATTENTION:
                self._spans.append(_Span(ATTENTION, rows, *marks[-2:]))

        return mark

    def seconds(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Selection and attention seconds by phase and method; a launch for several rows counts in equal shares.

        On a GPU the events must have passed.
        """
        totals: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for span in self._spans:
            elapsed = span.begin.elapsed_time(span.end) / 1e3 if self._on_gpu else span.end - span.begin
            for key, rows in span.rows.items():
                totals[key][span.part] += elapsed * rows / span.rows.total()
        return {
            key: (max(parts[WHOLE] - parts[ATTENTION], 0.0), float(parts[ATTENTION])) for key, parts in totals.items()
        }


class _TimedExecutor(Executor):
    def __init__(self, executor: Executor, span: Callable[[], AbstractContextManager[None]]) -> None:
        self._executor = executor
        self._span = span

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        with self._span():
            self._executor.run(launch, query, output, kv_cache, scale)


class NoTimer(StepTimer):
    """Of steps that are not sampled."""

    def __init__(self) -> None:
        super().__init__(False, ())
        self._nothing = nullcontext()

    def serving(self, phase: str, methods: Sequence[str]) -> AbstractContextManager[None]:  # type: ignore[override]
        return self._nothing

    def executor(self, executor: Executor) -> Executor:
        return executor

    def marks(self, layer: int, methods: Sequence[str]) -> Mark:
        return ignore


NO_TIMER = NoTimer()
