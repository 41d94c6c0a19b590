"""An OpenAI-compatible server that takes no model: known times, known tokens, known answers, and faults on demand.

    python -m tests.loadtest.simulated_server --port 8000

A request's `vllm_xargs` say what becomes of it (`Behaviour`). The answer is the word after ``answer=`` in the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from aiohttp import web

MODEL_NAME = "simulated"
ADAPTERS = ("poet", "sql")


@dataclass(frozen=True)
class Behaviour:
    """What becomes of a request.

    Attributes:
        ttft_seconds: until the first token.
        tpot_seconds: between tokens.
        right: whether it answers right.
        fault: ``429``, ``500``, ``stall``, ``garbage``, ``html``, ``error``, ``cut``, ``truncate``, ``empty``, ``die``.
        fault_after: tokens that come before a fault of the stream.
        usage: whether the server counts tokens.
        continuous: whether it counts them in every event when asked to; otherwise only in a last one.
        leading: events without a token between the role and the first token, evenly over `ttft_seconds`.
        finish_seconds: so long after the last token an event says why the answer ended; 0: the last token's does.
        together: tokens in one event.
        in_turn: wait until no other such request runs, as a server that gains nothing from several at once.
        dressed: comments, `id:`, `retry:`, `event:`, CRLF and data over several lines, as event streams may have.
    """

    ttft_seconds: float = 0.05
    tpot_seconds: float = 0.01
    right: bool = True
    fault: str = ""
    fault_after: int = 3
    usage: bool = True
    continuous: bool = True
    leading: int = 0
    finish_seconds: float = 0.0
    together: int = 1
    in_turn: bool = False
    dressed: bool = False


class SimulatedServer:
    """The state of one server: how many requests it runs, and those that it has seen."""

    def __init__(self) -> None:
        self.running = 0
        self.started = 0
        self.bodies: list[dict[str, Any]] = []
        self.truths: list[dict[str, Any]] = []
        self._turn = asyncio.Lock()

    async def models(self, request: web.Request) -> web.Response:
        adapters = [{"id": name, "root": f"adapters/{name}", "parent": MODEL_NAME} for name in ADAPTERS]
        return web.json_response({"data": [{"id": MODEL_NAME, "root": "nowhere", "parent": None}, *adapters]})

    async def tokenize(self, request: web.Request) -> web.Response:
        """A word is a token."""
        body = await request.json()
        return web.json_response({"count": len(body["prompt"].split())})

    async def metrics(self, request: web.Request) -> web.Response:
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{model_name="{MODEL_NAME}"}} {self.running}',
            "# TYPE vllm_sparse_density_ratio histogram",
            f'vllm_sparse_density_ratio_sum{{phase="prefill",method="flexprefill"}} {self.started * 0.25}',
            f'vllm_sparse_density_ratio_count{{phase="prefill",method="flexprefill"}} {self.started}',
            "# TYPE vllm_sparse_fallbacks counter",
            'vllm_sparse_fallbacks_total{phase="prefill",method="flexprefill",reason="short_context"} '
            f"{self.started * 3}",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def requests(self, request: web.Request) -> web.Response:
        """What was asked: the bodies of all requests, in order."""
        return web.json_response(self.bodies)

    async def truth(self, request: web.Request) -> web.Response:
        """When requests arrived and when their tokens left, in seconds; and their extras."""
        return web.json_response(self.truths)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        behaviour = Behaviour(**{name: value for name, value in body.get("vllm_xargs", {}).items() if name in _NAMES})
        if behaviour.fault in ("429", "500"):
            return web.json_response({"error": {"message": "not now"}}, status=int(behaviour.fault))
        if behaviour.fault == "html":
            return web.Response(text="<html>gateway</html>", content_type="text/html")
        self.started += 1
        self.running += 1
        try:
            async with self._turn if behaviour.in_turn else contextlib.nullcontext():
                return await self._stream(request, body, behaviour)
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], behaviour: Behaviour) -> web.StreamResponse:
        chat = request.path.endswith("chat/completions")
        prompt = json.dumps(body["messages"]) if chat else body["prompt"]
        truth: dict[str, Any] = {
            "extras": body.get("vllm_xargs", {}),
            "arrived_seconds": time.perf_counter(),
            "tokens": [],
        }
        self.truths.append(truth)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        due = loop.time() + behaviour.ttft_seconds
        options = body.get("stream_options", {})
        continuous = behaviour.usage and behaviour.continuous and options.get("continuous_usage_stats")
        # Newer clients of chats give the second name.
        words = _words(prompt, behaviour, body.get("max_tokens") or body["max_completion_tokens"])
        # AIPerf reads no event without it.
        kind = "chat.completion.chunk" if chat else "text_completion"

        async def send(text: str, tokens: int, so_far: int, **more: Any) -> None:
            choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = list(range(so_far - tokens, so_far))
            event: dict[str, Any] = {"object": kind, "choices": [choice | more]}
            if continuous:
                event["usage"] = {"prompt_tokens": len(prompt.split()), "completion_tokens": so_far}
            await _send(response, event, behaviour.dressed)
            if tokens:
                truth["tokens"].append([tokens, time.perf_counter()])

        if chat:
            await send("", 0, 0, delta={"role": "assistant", "content": ""})
        for _ in range(behaviour.leading):
            await asyncio.sleep(behaviour.ttft_seconds / (behaviour.leading + 1))
            await send("", 0, 0, finish_reason=None)
        for number in range(0, len(words), behaviour.together):
            if behaviour.fault and number >= behaviour.fault_after:
                return await self._fail(request, response, behaviour)
            await asyncio.sleep(max(0.0, due - loop.time()))
            some = words[number : number + behaviour.together]
            due += behaviour.tpot_seconds * behaviour.together
            so_far = number + len(some)
            ends = so_far == len(words) and not behaviour.finish_seconds
            await send("".join(some), len(some), so_far, finish_reason="length" if ends else None)
        if behaviour.finish_seconds:
            await asyncio.sleep(behaviour.finish_seconds)
            await send("", 0, len(words), finish_reason="length")
        if behaviour.usage:
            usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(words)}
            await _send(response, {"object": kind, "choices": [], "usage": usage}, behaviour.dressed)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _fail(self, request: web.Request, response: web.StreamResponse, how: Behaviour) -> web.StreamResponse:
        if how.fault == "die":
            os._exit(1)
        if how.fault == "stall":
            await asyncio.sleep(3600)
        if how.fault == "garbage":
            await response.write(b"data: {not json\n\n")
        if how.fault == "error":
            await _send(response, {"error": {"message": "engine died", "code": 500}})
        if how.fault == "cut":
            assert request.transport is not None
            request.transport.abort()
        if how.fault == "empty":
            await _send(response, {"choices": [{"delta": {"content": ""}, "text": "", "finish_reason": "stop"}]})
            await response.write(b"data: [DONE]\n\n")
        return response


_NAMES = {one.name for one in fields(Behaviour)}


def _words(prompt: str, behaviour: Behaviour, max_tokens: int) -> list[str]:
    found = re.search(r"answer=(\w+)", prompt)
    answer = found.group(1) if found and behaviour.right else "wrong"
    return [answer, *[" more"] * (max_tokens - 1)]


async def _send(response: web.StreamResponse, event: dict[str, Any], dressed: bool = False) -> None:
    if not dressed:
        await response.write(f"data: {json.dumps(event)}\n\n".encode())
        return
    await response.write(b": still here\r\n\r\nid: 7\r\nretry: 3000\r\n\r\n")
    lines = "\r\n".join(f"data:{line}" for line in json.dumps(event, indent=1, ensure_ascii=False).split("\n"))
    for piece in (f"event: message\r\n{lines}\r", "\n\r\n"):
        await response.write(piece.encode())


def application() -> web.Application:
    """The server's routes."""
    server = SimulatedServer()
    app = web.Application(client_max_size=1 << 26)
    app.add_routes(
        [
            web.get("/health", lambda request: _ok()),
            web.get("/v1/models", server.models),
            web.get("/metrics", server.metrics),
            web.get("/requests", server.requests),
            web.get("/truth", server.truth),
            web.post("/tokenize", server.tokenize),
            web.post("/v1/completions", server.complete),
            web.post("/v1/chat/completions", server.complete),
        ]
    )
    return app


async def _ok() -> web.Response:
    return web.Response()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", help="file of a key and a certificate: serve https")
    given = parser.parse_args(arguments)
    context = None
    if given.certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(given.certificate)
    web.run_app(application(), host="127.0.0.1", port=given.port, print=None, ssl_context=context)


if __name__ == "__main__":
    main()
