"""A real `vllm serve` as a child process, requests to it, and its metrics."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from loadtest.text.needles import NeedlePrompt, needle_prompt
from loadtest.text.tokenizer import build_tokenizer, count_tokens

MODEL_NAME = "needle"
# Sent with every request; servers that were started without a key do not look at it.
API_KEY = "the tests' key"
_AUTHORIZATION = {"Authorization": f"Bearer {API_KEY}"}
START_SECONDS = 240.0
REQUEST_SECONDS = 240.0
LOG_TAIL_LINES = 60

FLEXPREFILL: dict[str, Any] = {"sparse_prefill": "flexprefill"}
TIDAL: dict[str, Any] = {"sparse_decode": "tidal"}
BOTH: dict[str, Any] = {**FLEXPREFILL, **TIDAL}

FOR_A_GPU = {"unprofitable": "sparse", "limits": {"new_kernels": "any"}, "prompt_cost": 1000}

_TOKENIZER = build_tokenizer()


def prompt_of(seed: int, tokens: int, needles: int = 3) -> NeedlePrompt:
    """A document of about `tokens` tokens with a question about one of its needles; equal arguments, equal prompt."""
    return needle_prompt(random.Random(seed), tokens, lambda text: count_tokens(_TOKENIZER, text), needles)


def random_prompt(seed: int, tokens: int) -> list[int]:
    """Token ids of no text; equal arguments, equal prompt."""
    generator = random.Random(seed)
    return [generator.randrange(10, 4000) for _ in range(tokens)]


def serve_command(model_folder: Path, port: int, arguments: Sequence[str], *, stock: bool = False) -> list[str]:
    """`vllm serve` by this interpreter, with the sparse backend or with what vLLM picks."""
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_folder)]
    common = ["--host", "127.0.0.1", "--port", str(port), *dtype_flags(), "--served-model-name", MODEL_NAME]
    chosen = arguments if stock else ["--attention-backend", "sparse", *sparse_on_a_gpu(arguments)]
    return [*serve, *common, *chosen]


def sparse_on_a_gpu(arguments: Sequence[str]) -> list[str]:
    """Arguments of a server, which on a GPU make the bundled model sparse though that does not pay, and compile."""
    taken, option = list(arguments), "--additional-config"
    if not torch.cuda.is_available():
        return taken
    if option not in taken:
        return [*taken, option, json.dumps({"sparse": FOR_A_GPU})]
    place = taken.index(option) + 1
    configuration = json.loads(taken[place])
    configuration["sparse"] = {**FOR_A_GPU, **configuration.get("sparse", {})}
    taken[place] = json.dumps(configuration)
    return taken


def dtype_flags() -> list[str]:
    """As `make serve` finds by measuring: a CPU without instructions for bfloat16 is much quicker in float32."""
    capabilities = torch.cpu.get_capabilities()
    emulates = capabilities["architecture"] == "x86_64" and not (
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    )
    return ["--dtype", "float32"] if emulates and not torch.cuda.is_available() else []


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_tail(log: Path) -> str:
    """The end of a server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


@dataclass(frozen=True)
class Reply:
    """What a completion endpoint answered.

    Attributes:
        status: the HTTP status code.
        texts: one text per choice.
        body: the parsed JSON; of a stream its last event that had a usage.
        raw: the response as it came.
    """

    status: int
    texts: tuple[str, ...]
    body: dict[str, Any]
    raw: str

    @property
    def text(self) -> str:
        """The only choice's text."""
        assert self.status == 200, self.raw
        (text,) = self.texts
        return text

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts."""
        assert self.status == 200, self.raw
        usage: dict[str, Any] = self.body["usage"]
        return usage

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from the prefix cache."""
        return int((self.usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    @property
    def logprobs(self) -> list[float]:
        """Log probabilities of the tokens of an unstreamed completion that asked for them."""
        assert self.status == 200, self.raw
        logprobs: list[float] = self.body["choices"][0]["logprobs"]["token_logprobs"]
        return logprobs

    @property
    def error(self) -> str:
        """The message of a refusal."""
        return str(self.body["error"]["message"])


class Metrics:
    """A snapshot of ``/metrics``."""

    def __init__(self, text: str) -> None:
        self._samples: list[tuple[str, dict[str, str], float]] = []
        for family in text_string_to_metric_families(text):
            self._samples += [(sample.name, sample.labels, sample.value) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples of this name that carry these labels; 0 if there are none."""
        return sum(value for sample, have, value in self._samples if sample == name and labels.items() <= have.items())

    def labels_of(self, name: str) -> list[dict[str, str]]:
        """The label sets of the samples of this name."""
        return [labels for sample, labels, _ in self._samples if sample == name]


@dataclass(frozen=True)
class MetricsChange:
    """How metrics moved between two snapshots."""

    before: Metrics
    after: Metrics

    def __call__(self, name: str, **labels: str) -> float:
        return self.after.total(name, **labels) - self.before.total(name, **labels)

    def density_count(self, phase: str, method: str) -> float:
        """Observations of a phase's density."""
        return self("vllm_sparse_density_ratio_count", phase=phase, method=method)

    def density(self, phase: str, method: str) -> float:
        """Mean density of a phase."""
        count = self.density_count(phase, method)
        assert count > 0, f"no {phase} ran {method}"
        return self("vllm_sparse_density_ratio_sum", phase=phase, method=method) / count

    def requests(self, phase: str, method: str) -> float:
        """Answers admitted for a method."""
        return self("vllm_sparse_requests_total", phase=phase, method=method)

    def fallbacks(self, phase: str, method: str, reason: str) -> float:
        """Chunks or decode steps that ran dense although the request asked for a method."""
        return self("vllm_sparse_fallbacks_total", phase=phase, method=method, reason=reason)


class Server:
    """A running server. Temperature is 0 unless a request says otherwise.

    Args:
        model_folder: what it serves.
        arguments: of `vllm serve`.
        log: file for its output.
        environment: variables beside those of this process.
        stock: without the sparse backend; ``VLLM_PLUGINS`` empty in `environment` leaves the plugin out too.
    """

    def __init__(
        self,
        model_folder: Path,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        stock: bool = False,
    ) -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._salts = 0
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                serve_command(model_folder, self.port, arguments, stock=stock),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # Its own process group, so that the engine and the workers end with it.
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {self._process.returncode}:\n{log_tail(self.log)}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise TimeoutError(f"vllm serve was not ready after {START_SECONDS:.0f} s:\n{log_tail(self.log)}")

    @property
    def pid(self) -> int:
        """Of the process that was started, which started all others."""
        return self._process.pid

    def stop(self) -> None:
        """End the server and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            # Whatever is left of the group: workers that outlive their parent, or a server that does not end.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)

    def fresh_salt(self) -> str:
        """A prefix-cache salt that no request has used: the prompt will really be computed."""
        self._salts += 1
        return f"fresh{self._salts}"

    def metrics(self) -> Metrics:
        """A snapshot of the metrics, over a connection of its own."""
        reply = httpx.get(f"{self.url}/metrics", timeout=30)
        reply.raise_for_status()
        return Metrics(reply.text)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Any request, over a connection of its own."""
        options["headers"] = {**_AUTHORIZATION, **options.get("headers", {})}
        return httpx.request(method, f"{self.url}{path}", timeout=REQUEST_SECONDS, **options)

    def post(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Send a request; NaN and infinity go as Python writes them."""
        content = json.dumps({"model": MODEL_NAME, "temperature": 0, **body})
        headers = {"Content-Type": "application/json", **_AUTHORIZATION}
        response = httpx.post(f"{self.url}{path}", content=content, headers=headers, timeout=REQUEST_SECONDS)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return _read_stream(response)
        parsed = response.json()
        texts = [_choice_text(choice, "message") for choice in parsed.get("choices", ())]
        return Reply(response.status_code, tuple(texts), parsed, response.text)

    def complete(
        self, prompt: str | Sequence[str], extras: Mapping[str, Any] | None = None, max_tokens: int = 16, **body: Any
    ) -> Reply:
        """Ask the completion endpoint."""
        return self.post("/v1/completions", {"prompt": prompt, **_options(extras, max_tokens, body)})

    def chat(self, content: str, extras: Mapping[str, Any] | None = None, max_tokens: int = 16, **body: Any) -> Reply:
        """Ask the chat endpoint with one user message."""
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", {"messages": messages, **_options(extras, max_tokens, body)})

    def ask(self, endpoint: str, prompt: NeedlePrompt, extras: Mapping[str, Any] | None = None, **body: Any) -> Reply:
        """Put a prompt's question to ``completions`` or ``chat``; never from the prefix cache."""
        body.setdefault("cache_salt", self.fresh_salt())
        if endpoint == "chat":
            return self.chat(prompt.content, extras, **body)
        return self.complete(prompt.completion_prompt, extras, **body)


def _options(extras: Mapping[str, Any] | None, max_tokens: int, body: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": max_tokens, **body}
    if extras is not None:
        options["vllm_xargs"] = extras
    if body.get("stream"):
        options.setdefault("stream_options", {"include_usage": True})
    return options


def _choice_text(choice: Mapping[str, Any], holder: str) -> str:
    text = choice["text"] if "text" in choice else (choice.get(holder) or {}).get("content")
    return text or ""


def _read_stream(response: httpx.Response) -> Reply:
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1:] == ["[DONE]"], response.text
    texts: dict[int, str] = {}
    body: dict[str, Any] = {}
    for event in map(json.loads, events[:-1]):
        if "error" in event or event.get("usage"):
            body = event
        for choice in event.get("choices", ()):
            index = choice["index"]
            texts[index] = texts.get(index, "") + _choice_text(choice, "delta")
    return Reply(response.status_code, tuple(texts[index] for index in sorted(texts)), body, response.text)


class ServerKeeper:
    """Runs one server at a time: asking for another one ends the former. Tests are sorted so that this is rare."""

    def __init__(self, model_folder: Path, logs: Path) -> None:
        self._model_folder = model_folder
        self._logs = logs
        self._settings: tuple[tuple[str, ...], Mapping[str, str] | None] | None = None
        self._server: Server | None = None
        self._started = 0

    def get(self, arguments: tuple[str, ...], environment: Mapping[str, str] | None = None) -> Server:
        """The server with these arguments and variables, started if it is not the running one."""
        settings = arguments, environment
        if self._server is None or self._settings != settings:
            self.stop()
            self._started += 1
            log = self._logs / f"server{self._started}.log"
            self._server = Server(self._model_folder, arguments, log, environment)
            self._settings = settings
        return self._server

    def restart(self) -> Server:
        """End the running server and start it again as it was."""
        assert self._settings is not None
        self.stop()
        return self.get(*self._settings)

    def stop(self) -> None:
        """End the running server, if any."""
        if self._server is not None:
            self._server.stop()
            self._server = None
