"""Runs jobs side by side in a random order that keeps a document's variants together, and writes the journal."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from vllm_sparse.quality.journal import Journal
from vllm_sparse.quality.records import Record

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Job:
    """What one variant does with one document.

    Attributes:
        key: the same in every run with the same arguments.
        group: jobs of a group run near one another: they are the pairs of a comparison.
        run: does it, and returns what was measured.
    """

    key: str
    group: str
    run: Callable[[], Sequence[Record]]


def in_random_order(jobs: Sequence[Job], seed: int) -> list[Job]:
    """Groups in random order, and the jobs of each in random order, so that no variant has a better time of day."""
    rng = random.Random(seed)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    shuffled = list(groups.values())
    rng.shuffle(shuffled)
    for group in shuffled:
        rng.shuffle(group)
    return [job for group in shuffled for job in group]


def run_jobs(title: str, jobs: Sequence[Job], journal: Journal, concurrency: int, seed: int) -> None:
    """Run the jobs that the journal does not have yet.

    Args:
        title: of the progress bar.
        jobs: all jobs.
        journal: written.
        concurrency: jobs at once.
        seed: of their order.

    Raises:
        Exception: what the first job that failed raised; what others had measured by then is in the journal.
    """
    open_jobs = [job for job in in_random_order(jobs, seed) if job.key not in journal.run.done]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc=title, unit="job", smoothing=0.05)
    with bar, ThreadPoolExecutor(concurrency) as threads:
        waiting = iter(open_jobs)
        running: set[Future[None]] = set()

        def work(job: Job) -> None:
            journal.add(job.key, job.run())

        try:
            while True:
                while len(running) < concurrency and (job := next(waiting, None)) is not None:
                    running.add(threads.submit(work, job))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    bar.update()
        except BaseException:
            for future in running:
                future.cancel()
            raise


class Once(Generic[Key, Value]):
    """Values that several jobs need, each made by the first job that asks, the latest ones kept.

    Args:
        make: makes a value.
        keep: how many are kept.
    """

    def __init__(self, make: Callable[[Key], Value], keep: int) -> None:
        self._make = make
        self._keep = keep
        self._lock = threading.Lock()
        self._made: dict[Key, Future[Value]] = {}

    def __call__(self, key: Key) -> Value:
        """The value of a key; whoever asks while it is being made waits."""
        with self._lock:
            future = self._made.pop(key, None)
            first = future is None
            future = future or Future()
            # The one that was asked for last is the last to go.
            self._made[key] = future
            while len(self._made) > self._keep:
                del self._made[next(iter(self._made))]
        if first:
            try:
                future.set_result(self._make(key))
            except BaseException as error:
                future.set_exception(error)
        return future.result()
