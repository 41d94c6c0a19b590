"""The order of jobs, what is skipped when a run is resumed, and what is left of a run in which a job fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vllm_sparse.quality.journal import Journal
from vllm_sparse.quality.records import LanguageRecord
from vllm_sparse.quality.schedule import Job, Once, in_random_order, run_jobs


def jobs_of(groups: int, variants: int, ran: list[str]) -> list[Job]:
    """Jobs that note that they ran."""

    def job(group: int, variant: int) -> Job:
        key = f"{group}/{variant}"

        def run() -> Sequence[LanguageRecord]:
            ran.append(key)
            return [LanguageRecord(str(variant), 1024, "code", group, 1.0, ())]

        return Job(key, str(group), run)

    return [job(group, variant) for group in range(groups) for variant in range(variants)]


def test_groups_stay_together_and_their_order_is_random_but_repeatable() -> None:
    jobs = jobs_of(20, 5, [])
    first, again, other = (in_random_order(jobs, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(job.key for job in first) == sorted(job.key for job in jobs)
    groups = [job.group for job in first]
    assert all(len(set(groups[start : start + 5])) == 1 for start in range(0, 100, 5))
    assert len({tuple(job.key[-1] for job in first[start : start + 5]) for start in range(0, 100, 5)}) > 5


def test_jobs_in_the_journal_are_not_run_again(tmp_path: Path) -> None:
    journal, ran = Journal(tmp_path, {"model": "x"}, []), list[str]()
    run_jobs("all", jobs_of(3, 2, ran), journal, 2, 0)
    assert sorted(ran) == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
    journal.close()
    resumed = Journal(tmp_path, {"model": "x"}, [])
    run_jobs("all", jobs_of(4, 2, ran), resumed, 2, 0)
    resumed.close()
    assert sorted(ran[6:]) == ["3/0", "3/1"]
    assert len(resumed.run.records) == 8


def test_no_more_jobs_run_at_once_than_allowed(tmp_path: Path) -> None:
    lock, running, most = threading.Lock(), 0, 0

    def run() -> Sequence[LanguageRecord]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return []

    journal = Journal(tmp_path, {"model": "x"}, [])
    run_jobs("all", [Job(str(number), "", run) for number in range(12)], journal, 3, 0)
    journal.close()
    assert most == 3


def test_what_was_measured_before_a_failure_stays(tmp_path: Path) -> None:
    ran: list[str] = []
    jobs = jobs_of(6, 1, ran)

    def fail() -> Sequence[LanguageRecord]:
        raise ValueError("no such thing")

    journal = Journal(tmp_path, {"model": "x"}, [])
    with pytest.raises(ValueError, match="no such thing"):
        run_jobs("all", [*jobs, Job("bad", "bad", fail)], journal, 1, 3)
    journal.close()
    assert journal.run.done == set(ran)


def test_a_value_is_made_once_and_the_oldest_go_first() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        time.sleep(0.005)
        made.append(key)
        return -key

    once = Once(make, 2)
    threads = [threading.Thread(target=once, args=(1,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert [once(2), once(1), once(3), once(1), once(2)] == [-2, -1, -3, -1, -2]
    assert made == [1, 2, 3, 2]


def test_a_failure_to_make_a_value_reaches_everyone_who_asks() -> None:
    def make(key: int) -> int:
        raise ValueError(f"{key}")

    once = Once(make, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="7"):
            once(7)
