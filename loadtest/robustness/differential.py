"""Each request of random traffic beside the same request alone, and dense ones beside stock vLLM.

A difference is what rounding does not explain: answers part at a token that is no near tie (`judge`). What a method of
the prompt reads may depend on where the scheduler cuts it and on what the cache holds, what the guard finds on when it
looks, and a preempted request comes back with what it generated as a part of its prompt (docs/operations.md, *Prefix
cache*; docs/configuration.md, *Guard*): `documented` names those kinds, which are counted and do not fail the run. With
--whole-prompts nothing cuts, so that only guarded ones may differ.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from loadtest.robustness.client import Answer, complete
from loadtest.robustness.judge import NEAR_TIE_NATS, Judgement, Likeness, judge
from loadtest.robustness.server import BLOCK_TOKENS, served
from loadtest.robustness.traffic import Asked, asked

ARGUMENTS = ("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--scheduling-policy", "priority")
WHOLE_PROMPTS = ("--no-enable-chunked-prefill", "--no-enable-prefix-caching")
# In a refusal that is right where graphs are captured, which is on a GPU.
BEYOND_GRAPHS = "this server's CUDA graphs"
PREEMPTIONS = "vllm:num_preemptions_total"


@dataclasses.dataclass(frozen=True)
class Compared:
    """A request with a judgement of its answer, and what it was compared with; `lost` says why it has no answer."""

    asked: Asked
    beside: str
    judgement: Judgement | None
    lost: str | None = None


async def answers_of(
    url: str, requests: Sequence[Asked], concurrency: int, alone: bool, ready: Callable[[int], None] | None = None
) -> list[Answer]:
    """Answers to requests, so many at a time.

    Args:
        url: of the server.
        requests: in the order in which they are sent.
        concurrency: requests in flight.
        alone: whole answers, each computed anew; otherwise aborts happen and cached prefixes are shared.
        ready: told how many are answered.
    """
    places = asyncio.Semaphore(concurrency)
    done = 0

    async def answer(session: aiohttp.ClientSession, request: Asked) -> Answer:
        nonlocal done
        async with places:
            body = {**request.body, "cache_salt": f"alone{request.number}"} if alone else request.body
            found = await complete(session, url, body, None if alone else request.aborted_after_events)
        done += 1
        if ready is not None:
            ready(done)
        return found

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False) as session:
        return list(await asyncio.gather(*(answer(session, request) for request in requests)))


def compared(
    requests: Sequence[Asked], beside: str, alone: Iterable[Answer], others: Iterable[Answer], whole: bool
) -> list[Compared]:
    """Judge answers beside those of the requests alone.

    Args:
        requests: that were asked.
        beside: what `others` are, for reports.
        alone: their answers alone.
        others: their other answers.
        whole: the others were not broken off either.
    """
    found = []
    for request, one, other in zip(requests, alone, others, strict=True):
        lost = one.error or other.error
        aborted = request.aborted_after_events is not None and not whole
        found.append(Compared(request, beside, None if lost else judge(one, other, aborted), lost))
    return found


def without_extras(request: Asked) -> Asked:
    """A dense request as a server without the plugin takes it."""
    body = {key: value for key, value in request.body.items() if key != "vllm_xargs"}
    return dataclasses.replace(request, body=body)


def documented(request: Asked, whole_prompts: bool, preempted: bool) -> bool:
    """Whether a request's answer may depend on its neighbours, by what is documented.

    Args:
        request: that was asked.
        whole_prompts: nothing cut prompts.
        preempted: some requests were, and nobody knows which.
    """
    if request.is_dense:
        return False
    return "guarded" in request.kinds or not (whole_prompts or ("prefill dense" in request.kinds and not preempted))


def is_failure(one: Compared, whole_prompts: bool, preempted: bool) -> bool:
    """Whether a comparison found what must not be; arguments as of `documented`."""
    if one.judgement is None:
        return True
    may_differ = one.beside == "mixed" and documented(one.asked, whole_prompts, preempted)
    return one.judgement.likeness == Likeness.DIFFERENT and not may_differ


def table(comparisons: Sequence[Compared]) -> str:
    """Likeness by what was compared and by kind of request, as a Markdown table."""
    lines = [
        "| beside alone | requests | number | same tokens | near tie | different | lost | largest shift, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for beside in dict.fromkeys(one.beside for one in comparisons):
        of_this = [one for one in comparisons if one.beside == beside]
        kinds = ["all", *sorted({kind for one in of_this for kind in one.asked.kinds})]
        for kind in kinds:
            some = [one for one in of_this if kind == "all" or kind in one.asked.kinds]
            judged = [one.judgement for one in some if one.judgement is not None]
            counts = [sum(found.likeness == likeness for found in judged) for likeness in Likeness]
            shift = max((found.shift_nats for found in judged), default=0.0)
            cells = [beside, kind, len(some), *counts, len(some) - len(judged), f"{shift:.1e}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def preemptions(metrics: str) -> float:
    """Preemptions that a server's metrics tell."""
    families = text_string_to_metric_families(metrics)
    return sum(sample.value for family in families for sample in family.samples if sample.name == PREEMPTIONS)


async def text_at(url: str) -> str:
    """What a server answers."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where something differs or is lost."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.robustness.differential", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="of the traffic; a report names it")
    parser.add_argument("--concurrency", type=int, default=12, help="requests in flight in the mixed run")
    parser.add_argument(
        "--blocks", type=int, default=140, help=f"KV cache, in blocks of {BLOCK_TOKENS} tokens: small ones preempt"
    )
    parser.add_argument(
        "--whole-prompts", action="store_true", help="nothing cuts a prompt: no chunks, cached prefixes or preemptions"
    )
    parser.add_argument("--output", type=Path, default=Path("differential"), help="folder for table, failures and logs")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    options.output.mkdir(parents=True, exist_ok=True)
    requests = [asked(seed, number) for number in range(options.requests)]
    mixed_order = random.Random(seed).sample(requests, len(requests))
    shown = time.monotonic()

    def ready(done: int) -> None:
        nonlocal shown
        if time.monotonic() > shown + 30:
            shown = time.monotonic()
            print(f"  {done} answered", flush=True)

    cache = WHOLE_PROMPTS if options.whole_prompts else ("--num-gpu-blocks-override", str(options.blocks))
    server = (*ARGUMENTS, *cache)
    with served(server, options.output / "sparse.log") as running:
        print(f"seed {seed}: {len(requests)} requests mixed, {options.concurrency} at a time", flush=True)
        in_order = asyncio.run(answers_of(running.url, mixed_order, options.concurrency, False, ready))
        mixed = dict(zip((request.number for request in mixed_order), in_order, strict=True))
        preempted = preemptions(asyncio.run(text_at(f"{running.url}/metrics")))
        print("each alone", flush=True)
        alone = asyncio.run(answers_of(running.url, requests, 1, True, ready))
    beyond = [BEYOND_GRAPHS in (one.error or "") for one in alone]
    print(f"{sum(beyond)} refused: {BEYOND_GRAPHS} do not hold their knobs", flush=True)
    kept = [request for request, refused in zip(requests, beyond, strict=True) if not refused]
    comparisons = compared(
        kept, "mixed", (alone[one.number] for one in kept), (mixed[one.number] for one in kept), whole=False
    )
    # Alone they are the same whatever cuts prompts.
    dense = [] if options.whole_prompts else [request for request in kept if request.is_dense]
    if dense:
        with served(server, options.output / "stock.log", stock=True) as running:
            print(f"{len(dense)} dense ones alone on stock vLLM", flush=True)
            stock = asyncio.run(answers_of(running.url, [without_extras(one) for one in dense], 1, True, ready))
        comparisons += compared(dense, "stock vLLM", (alone[one.number] for one in dense), stock, whole=True)
    failures = [one for one in comparisons if is_failure(one, options.whole_prompts, preempted > 0)]
    with (options.output / "differences.jsonl").open("w") as file:
        for one in comparisons:
            if one.judgement is None or one.judgement.likeness == Likeness.DIFFERENT:
                record = {"seed": seed, "failure": one in failures, **dataclasses.asdict(one)}
                file.write(json.dumps(record) + "\n")
    summary = (
        f"seed {seed}, {len(kept)} requests, {options.concurrency} at a time, {' '.join(cache)}, "
        f"{preempted:g} preemptions; near tie: {NEAR_TIE_NATS} nats; {len(failures)} failures\n\n{table(comparisons)}\n"
    )
    (options.output / "table.md").write_text(summary)
    print(summary)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
