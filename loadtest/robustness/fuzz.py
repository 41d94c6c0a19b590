"""Random bodies to all routes that compute or configure: no HTTP 5xx, no hang, and the server as before afterwards.

What stock vLLM answers with 5xx too is counted, but is no finding. Where a body ends the server, the next ones go to
a new one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.robustness.bodies import CONFIG_ROUTE, Body, random_body
from loadtest.robustness.server import MODEL_NAME, served
from vllm_sparse.server_process import is_healthy

# Sparse steps need room for lists that leave something out, and no body more than a moment.
ARGUMENTS = ("--max-model-len", "512", "--enable-scale-out")
REQUEST_SECONDS, SETTLED_SECONDS = 60.0, 60.0
# A changed configuration is reset after so many bodies.
RESET_BODIES = 50
JSON = {"Content-Type": "application/json"}
# A known answer, sparse in both phases.
ASKED = {
    "model": MODEL_NAME,
    "prompt": list(range(100, 400)),
    "max_tokens": 16,
    "temperature": 0,
    "ignore_eos": True,
    "vllm_xargs": {
        "sparse_prefill": "streaming",
        "streaming_recent_tokens": 64,
        "sparse_min_tokens": 0,
        "sparse_decode": "tidal",
        "tidal_budget_tokens": 128,
        "tidal_sink_tokens": 16,
        "tidal_recent_tokens": 64,
    },
}


@dataclass(frozen=True)
class Reply:
    """What came of a body: an HTTP status, 0 for none in time or a broken connection, and the beginning of the text."""

    number: int
    body: Body
    status: int
    text: str


async def send(session: aiohttp.ClientSession, url: str, number: int, body: Body) -> Reply:
    """Send a body and read the whole answer; no error leaves this function."""
    try:
        async with (
            asyncio.timeout(REQUEST_SECONDS),
            session.request(body.method, f"{url}{body.path}", data=body.content, headers=JSON) as response,
        ):
            return Reply(number, body, response.status, (await response.text(errors="replace"))[:2000])
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        return Reply(number, body, 0, f"{type(error).__name__}: {error}")


async def fuzz(url: str, seed: int, first: int, bodies: int, concurrency: int) -> list[Reply]:
    """Replies to bodies, in the order of their numbers, until the server ends, if a body ends it.

    Args:
        url: of the server.
        seed: of the bodies.
        first: number of the first body.
        bodies: how many.
        concurrency: requests in flight.
    """
    # Where an exception leaves its routes, vLLM closes the connection, which another request must not run into.
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        async with session.get(f"{url}/openapi.json") as response:
            document = await response.json()
        numbers = iter(range(first, first + bodies))
        replies: list[Reply] = []
        shown = time.monotonic()
        ended = False

        async def worker() -> None:
            nonlocal shown, ended
            for number in numbers:
                if ended:
                    return
                body = random_body(random.Random(f"{seed}/{number}"), document)
                if number % RESET_BODIES == 0:
                    body = Body("PUT", CONFIG_ROUTE, b"{}")
                replies.append(reply := await send(session, url, number, body))
                ended = ended or (not reply.status and not await asyncio.to_thread(is_healthy, url))
                if time.monotonic() > shown + 30:
                    shown = time.monotonic()
                    print(f"  {len(replies)} answered", flush=True)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return sorted(replies, key=lambda reply: reply.number)


async def known_answer(url: str) -> Any:
    """What the server says to a known request, computed anew."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{url}{CONFIG_ROUTE}", json={}) as response:
            response.raise_for_status()
        async with session.post(f"{url}/v1/completions", json={**ASKED, "cache_salt": secrets.token_hex()}) as response:
            response.raise_for_status()
            return (await response.json())["choices"][0]["text"]


async def requests_left(url: str) -> float:
    """Requests that the engine still has once nobody waits for one: those that a client left behind end soon."""
    deadline = time.monotonic() + SETTLED_SECONDS
    while True:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
            text = await response.text()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        left = sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names))
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(1)


async def in_turn(url: str, replies: Sequence[Reply]) -> list[Reply]:
    """The same bodies once more, one after the other, as long as the server is there."""
    repeated = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        for reply in replies:
            repeated.append(await send(session, url, reply.number, reply.body))
            if not is_healthy(url):
                break
    return repeated


def again(replies: Sequence[Reply], log: Path, stock: bool) -> list[Reply]:
    """The same bodies once more, one after the other, on a new server after each that ends one.

    Args:
        replies: to the bodies before.
        log: takes the servers' output.
        stock: servers without the plugin.
    """
    repeated: list[Reply] = []
    while len(repeated) < len(replies):
        with served(ARGUMENTS, log.with_stem(f"{log.stem}_{len(repeated)}"), stock=stock) as running:
            repeated += asyncio.run(in_turn(running.url, replies[len(repeated) :]))
    return repeated


def is_bad(reply: Reply) -> bool:
    """Whether no server should answer so."""
    return reply.status == 0 or reply.status >= 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where it found something."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.robustness.fuzz", description=__doc__)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first body; with --bodies 1 it is replayed")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("fuzz"), help="folder for failures and logs")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}", flush=True)
    replies: list[Reply] = []
    left, alive, ends, unexplained = 0.0, True, 0, 0
    first, end = options.first, options.first + options.bodies
    while first < end:
        log = options.output / f"sparse_{first}.log"
        with served(ARGUMENTS, log) as running:
            before = asyncio.run(known_answer(running.url))
            some = asyncio.run(fuzz(running.url, seed, first, end - first, options.concurrency))
            first = some[-1].number + 1
            ended = not is_healthy(running.url)
            if not ended:
                left = asyncio.run(requests_left(running.url))
                alive = asyncio.run(known_answer(running.url)) == before
        if ended:
            ends += 1
            print(f"the server ended at one of the bodies up to {first - 1}; others go to a new one", flush=True)
            # Those that were in flight beside the one that ended it are not to blame.
            fresh = {reply.number: reply for reply in again([one for one in some if is_bad(one)], log, stock=False)}
            some = [fresh.get(reply.number, reply) for reply in some]
            unexplained += all(reply.status for reply in fresh.values())
        replies += some
    bad = [reply for reply in replies if is_bad(reply)]
    of_vllm = {reply.number for reply in again(bad, options.output / "stock.log", stock=True) if is_bad(reply)}
    with (options.output / "failures.jsonl").open("w") as file:
        for reply in bad:
            record = {"seed": seed, "number": reply.number, "stock_vllm_too": reply.number in of_vllm}
            record |= {
                "method": reply.body.method,
                "path": reply.body.path,
                "body": reply.body.content.decode("latin1"),
            }
            file.write(json.dumps({**record, "status": reply.status, "text": reply.text}) + "\n")
    statuses = Counter(reply.status for reply in replies)
    findings = len(bad) - len(of_vllm)
    print(f"seed {seed}, {len(replies)} bodies, by status: {dict(sorted(statuses.items()))}")
    print(f"{len(bad)} answered 5xx or not at all, {len(of_vllm)} of them by stock vLLM too")
    print(f"{ends} ends of the server, {unexplained} of them by no body alone; {left:g} requests left behind")
    print(f"the known answer is {'the same' if alive else 'ANOTHER ONE'}")
    return int(bool(findings or unexplained or left or not alive))


if __name__ == "__main__":
    raise SystemExit(main())
