"""Mixed load for a time: memory and files stay flat, nothing of a request is left, and SIGTERM under load ends it all.

A series grows if its line through the medians (Theil-Sen), after a first third in which caches fill, rises over the
rest of the run by more than 2 % of its median, and by more than its least amount that counts.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import secrets
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtest.robustness.client import complete
from loadtest.robustness.differential import ARGUMENTS
from loadtest.robustness.server import Served, served
from loadtest.robustness.traffic import asked
from vllm_sparse.metrics.directory import DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE

BLOCKS = ("--num-gpu-blocks-override", "140")
# Time for requests in flight to end. Where it kills an engine that still has some, vLLM's API server at times waits for
# answers that will never come.
DRAIN = ("--shutdown-timeout", "60")
SAMPLE_SECONDS, SETTLED_SECONDS, END_SECONDS = 5.0, 60.0, 90.0
MIB = 1 << 20
# On a CPU the worker's temporaries are up to megabytes each. glibc keeps such pieces of its heap when they are freed,
# 1.4 of 2.0 GiB after 40 minutes, which hides what is in use. Larger pieces than this go back at once.
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
# Growth that counts, by the first word of a series' name.
GROWTH_SHARE = 0.02
LEAST_GROWTH = {"resident": 16.0, "files": 2.0, "file": 1.0, "gauge": 1.0}
# What the plugin keeps beside the cache, in MiB.
KEPT = ("vllm_sparse_side_data_bytes", "vllm_sparse_decode_buffer_bytes")
BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")

Sample = dict[str, float]


def folders_of(server: Served) -> set[Path]:
    """Folders of metrics files that the server's processes were told of."""
    told = [process.environ() for process in server.process.children(recursive=True)]
    variables = (DIRECTORY_VARIABLE, PROMETHEUS_VARIABLE)
    return {Path(variable[name]) for variable in told for name in variables if name in variable}


async def totals(session: aiohttp.ClientSession, url: str) -> defaultdict[str, float]:
    """A server's metrics, each summed over its labels."""
    async with session.get(f"{url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    found: defaultdict[str, float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


async def sampled(session: aiohttp.ClientSession, server: Served, folders: set[Path]) -> Sample:
    """Resident memory of each process and files, in MiB, and what the plugin keeps."""
    found: Sample = {}
    for process in [server.process, *server.process.children(recursive=True)]:
        found[f"resident {process.name()} {process.pid}, MiB"] = process.memory_info().rss / MIB
    files = [file for folder in folders for file in folder.iterdir()]
    found["files of metrics"] = len(files)
    found["file bytes of metrics, MiB"] = sum(file.stat().st_size for file in files) / MIB
    metrics = await totals(session, server.url)
    return found | {f"gauge {name}, MiB": metrics[name] / MIB for name in KEPT}


def growth(values: Sequence[float]) -> float:
    """How much a series rises from a third of it to its end, by the median of the slopes between all its values."""
    rest = list(enumerate(values[len(values) // 3 :]))
    slopes = [(late - early) / (after - before) for (before, early), (after, late) in itertools.combinations(rest, 2)]
    return statistics.median(slopes) * (len(rest) - 1) if slopes else 0.0


def grows(name: str, values: Sequence[float]) -> bool:
    """Whether a series grows by more than counts."""
    return growth(values) > max(LEAST_GROWTH[name.split()[0]], GROWTH_SHARE * statistics.median(values))


async def soak(server: Served, seed: int, seconds: float, concurrency: int) -> tuple[list[Sample], list[str]]:
    """Load a server, let it come to rest, load it again and send SIGTERM.

    Returns:
        Samples, and what went wrong.
    """
    folders, samples, wrong = folders_of(server), [], []
    numbers, stopping = itertools.count(), False

    async def worker(session: aiohttp.ClientSession, url: str) -> None:
        while not stopping:
            request = asked(seed, next(numbers))
            answer = await complete(session, url, request.body, request.aborted_after_events)
            if answer.error is not None and not stopping:
                wrong.append(f"request {request.number}: {answer.error}")

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.TaskGroup() as group:
        workers = [group.create_task(worker(session, server.url)) for _ in range(concurrency)]
        end, shown = time.monotonic() + seconds, 0.0
        while time.monotonic() < end:
            await asyncio.sleep(SAMPLE_SECONDS)
            try:
                samples.append(await sampled(session, server, folders))
            except (aiohttp.ClientError, psutil.Error, OSError) as error:
                wrong.append(f"the server ended under load: {error}")
                break
            if time.monotonic() > shown + 60:
                shown = time.monotonic()
                print(f"  {end - shown:.0f} s left, {samples[-1]}", flush=True)
        stopping = True
        await asyncio.wait(workers)
        if not server.process.is_running():
            return samples, wrong
        wrong += await left_behind(session, server.url)
        stopping = False
        workers = [group.create_task(worker(session, server.url)) for _ in range(concurrency)]
        await asyncio.sleep(2)
        stopping = True
        wrong += await asyncio.to_thread(ended, server, folders)
        # Whoever waits is told, at once.
        _, pending = await asyncio.wait(workers, timeout=5)
        wrong += [f"{len(pending)} clients still wait after the server's end"] if pending else []
    print(f"{next(numbers)} requests")
    return samples, wrong


async def left_behind(session: aiohttp.ClientSession, url: str) -> list[str]:
    """What a server without clients still holds."""
    deadline = time.monotonic() + SETTLED_SECONDS
    while True:
        metrics = await totals(session, url)
        busy = [f"{name} is {metrics[name]:g} without clients" for name in BUSY if metrics[name]]
        if not busy or time.monotonic() > deadline:
            return busy
        await asyncio.sleep(1)


def ended(server: Served, folders: set[Path]) -> list[str]:
    """End a server by SIGTERM; what is wrong with its end."""
    processes = [server.process, *server.process.children(recursive=True)]
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    print(f"SIGTERM under load: ended after {time.monotonic() - started:.1f} s")
    wrong = [f"{process.name()} is alive {END_SECONDS:g} s after SIGTERM" for process in alive]
    return wrong + [f"{folder} was left" for folder in folders if folder.exists()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where something grows or goes wrong."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.robustness.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--concurrency", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("soak"), help="folder for samples and log")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}", flush=True)
    with served((*ARGUMENTS, *BLOCKS, *DRAIN), options.output / "sparse.log", variables=VARIABLES) as running:
        samples, wrong = asyncio.run(soak(running, seed, options.seconds, options.concurrency))
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    with (options.output / "samples.csv").open("w") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(samples)
    print("| series | first | median | last | growth after a third | verdict |\n|---|---|---|---|---|---|")
    for name in names:
        values = [sample[name] for sample in samples if name in sample]
        verdict = "grows" if grows(name, values) else "flat"
        wrong += [f"{name} grows"] if verdict == "grows" else []
        cells = [f"{value:.1f}" for value in (values[0], statistics.median(values), values[-1], growth(values))]
        print(f"| {name} | {' | '.join(cells)} | {verdict} |")
    print("\n".join(wrong) or "nothing went wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
