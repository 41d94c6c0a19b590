"""A served model, asked over HTTP: its tokenizer, its answers, its log probabilities, its densities.

Everything goes through `/v1/completions` with token ids as the prompt, so that lengths are exact and every variant
reads the same tokens. Of vLLM's own routes, `/tokenize` is used where no tokenizer is given, and
`/inference/v1/generate` to tell a model what to say.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 3600.0
# The most that a server gives where nothing is said at its start.
TOP_TOKENS = 20
SCRIPT_KEY = "script"
"""In the sampling extras of a server with `quality.script`: one token id a generated token; negative where the model
chooses."""


class ServerError(Exception):
    """The server refused a request or is not what it has to be; the message says what it answered."""


@dataclass(frozen=True)
class Answer:
    """What a request was answered.

    Attributes:
        text: generated.
        first_token_s, rest_s: seconds to the first token, and from there to the last, if it was streamed.
        tokens: ids of what was generated, if asked for.
    """

    text: str
    first_token_s: float = 0.0
    rest_s: float = 0.0
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """How a model predicted a token that it read.

    Attributes:
        loss: -log p, in nats.
        rank: 1 if no token was likelier.
    """

    loss: float
    rank: int


@dataclass(frozen=True)
class NextTokens:
    """What a model would say at each position of a generation.

    Attributes:
        tokens: what stands there.
        top: of each position, log probabilities of the likeliest tokens, most likely first.
    """

    tokens: tuple[int, ...]
    top: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class Offer:
    """What a server's requests may choose.

    Attributes:
        methods: names by phase.
        presets: names of those all of whose methods are enabled.
    """

    methods: Mapping[str, Sequence[str]]
    presets: Sequence[str]


class Tokenizer(Protocol):
    """The served model's."""

    def chat(self, messages: Sequence[Mapping[str, str]], answer_prefix: str) -> list[int]:
        """Ids of a conversation up to and with the beginning of the answer, as the chat template writes it."""

    def text(self, text: str) -> list[int]:
        """Ids of a text, with those that the tokenizer puts before every text."""


class ServedModel:
    """A model on a server.

    Args:
        url: of the server, without a path.
        model: served name; by default the only one.
        api_key: sent as a bearer token, if there is one.

    Raises:
        ServerError: nobody answers there, or the server has several models and none was named.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers, limits=limits)
        self._url = url
        self._densities: dict[str, tuple[float, float]] = {}
        cards = self._get("/v1/models")["data"]
        names = [card["id"] for card in cards]
        if model is None and len(names) != 1:
            raise ServerError(f"{url} serves {', '.join(names)}; say which with --served-model-name")
        if model is not None and model not in names:
            raise ServerError(f"{url} serves {', '.join(names)}, not {model!r}")
        self.name = model or names[0]
        self.max_tokens: int | None = next(card.get("max_model_len") for card in cards if card["id"] == self.name)
        self.is_sparse = "vllm_sparse_" in self._exposition()

    def complete(
        self, prompt: Sequence[int], max_tokens: int, extras: Mapping[str, Any], salt: str, return_tokens: bool = False
    ) -> Answer:
        """The greedy answer to a prompt.

        Args:
            prompt: token ids.
            max_tokens: room for the answer.
            extras: sampling extras; of a server without the plugin, none.
            salt: requests of equal salt share cached blocks.
            return_tokens: also return the ids of the answer.

        Raises:
            ServerError: the server refused it.
        """
        more = {"return_token_ids": True} if return_tokens else {}
        body = self._body(prompt, max_tokens, extras, salt) | more
        choice = self._post("/v1/completions", body)["choices"][0]
        return Answer(choice["text"], tokens=tuple(choice.get("token_ids") or ()))

    def time(self, prompt: Sequence[int], max_tokens: int, extras: Mapping[str, Any], salt: str) -> Answer:
        """As `complete`, streamed, with the times at which tokens came; exactly `max_tokens` are generated."""
        body = self._body(prompt, max_tokens, extras, salt) | {"stream": True, "ignore_eos": True}
        pieces: list[str] = []
        begin = time.perf_counter()
        first = last = 0.0
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ServerError(f"{self._url}/v1/completions: {response.status_code} {response.read().decode()}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = time.perf_counter() - begin
                    first = first or last
                    pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
        return Answer("".join(pieces), first, last - first)

    def predictions(self, prompt: Sequence[int], extras: Mapping[str, Any], salt: str) -> list[Prediction]:
        """Of each token of a prompt but the first, in one prefill; arguments and errors as of `complete`."""
        body = self._body(prompt, 1, extras, salt) | {"prompt_logprobs": 0}
        entries = self._post("/v1/completions", body)["choices"][0].get("prompt_logprobs")
        if not entries:
            raise ServerError(
                f"{self._url} gave no prompt_logprobs, which the measures `language` and `generation` need"
            )
        found = [entry[str(token)] for token, entry in zip(prompt[1:], entries[1:], strict=True)]
        return [Prediction(-one["logprob"], one["rank"]) for one in found]

    def told(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int] | int,
        extras: Mapping[str, Any],
        salt: str,
        by_script: bool = False,
    ) -> NextTokens:
        """What the model would say at each position of a generation, decoded token by token.

        Args:
            prompt: token ids.
            tokens: what it is told to say, or how many tokens it says by itself.
            extras: sampling extras.
            salt: as of `complete`.
            by_script: the server has `quality.script` in place of vLLM's trace replay.

        Raises:
            ServerError: the server does not replay tokens.
        """
        count = tokens if isinstance(tokens, int) else len(tokens)
        sampling: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": count,
            "min_tokens": count,
            "ignore_eos": True,
            "logprobs": TOP_TOKENS,
            "extra_args": dict(extras),
        }
        if not isinstance(tokens, int):
            if by_script:
                sampling["extra_args"][SCRIPT_KEY] = list(tokens)
            else:
                sampling["trace_decode_token_ids"] = list(tokens)
        body = {"model": self.name, "token_ids": list(prompt), "cache_salt": salt, "sampling_params": sampling}
        content = self._post("/inference/v1/generate", body)["choices"][0]["logprobs"]["content"]
        said = tuple(entry["token_id"] for entry in content)
        if not isinstance(tokens, int) and said != tuple(tokens):
            raise ServerError(f"{self._url} did not say what it was told; the measure `decoding` needs that")
        top = tuple(_likeliest(entry["top_logprobs"]) for entry in content)
        return NextTokens(said, top)

    def offer(self) -> Offer | None:
        """What requests may choose; None where the server has no route that says it."""
        response = self._http.get("/v1/sparse/methods")
        if response.status_code != 200:
            return None
        found = response.json()
        presets = found["preset"]["presets"]
        return Offer(
            {phase: list(found[phase]["methods"]) for phase in ("prefill", "decode")},
            [name for name, preset in presets.items() if not any(preset["methods_not_enabled"].values())],
        )

    def fresh_density(self) -> dict[str, float]:
        """Mean density of what ran since the last call, by phase."""
        totals: dict[str, list[float]] = {}
        for family in text_string_to_metric_families(self._exposition()):
            for sample in family.samples if family.name == "vllm_sparse_density_ratio" else ():
                part = sample.name.rpartition("_")[2]
                if part in ("sum", "count"):
                    pair = totals.setdefault(sample.labels["phase"], [0.0, 0.0])
                    pair[part == "count"] += sample.value
        fresh = {}
        for phase, (total, count) in totals.items():
            old_total, old_count = self._densities.get(phase, (0.0, 0.0))
            if count > old_count:
                fresh[phase] = (total - old_total) / (count - old_count)
            self._densities[phase] = (total, count)
        return fresh

    def tokenize(self, body: Mapping[str, Any]) -> list[int]:
        """vLLM's `/tokenize`."""
        tokens: list[int] = self._post("/tokenize", {"model": self.name, **body})["tokens"]
        return tokens

    def _body(self, prompt: Sequence[int], max_tokens: int, extras: Mapping[str, Any], salt: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "cache_salt": salt,
        }
        return body | ({"vllm_xargs": dict(extras)} if extras else {})

    def _exposition(self) -> str:
        response = self._http.get("/metrics")
        return response.text if response.status_code == 200 else ""

    def _get(self, path: str) -> Any:
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise ServerError(f"{self._url}: {error}") from error
        return self._content(path, response)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            response = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{self._url}{path}: {error!r}") from error
        return self._content(path, response)

    def _content(self, path: str, response: httpx.Response) -> Any:
        if response.status_code != 200:
            raise ServerError(f"{self._url}{path}: {response.status_code} {response.text}")
        return response.json()


def _likeliest(entries: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Log probabilities by token, most likely first; the said token stands among them only if it is likely enough."""
    ranked = sorted(entries, key=lambda entry: -entry["logprob"])[:TOP_TOKENS]
    return {entry["token_id"]: entry["logprob"] for entry in ranked}


class ServerTokenizer:
    """The served model's tokenizer and chat template, as the server itself applies them.

    Args:
        model: served by vLLM.
        template_arguments: of the chat template, such as ``{"enable_thinking": false}``.
    """

    def __init__(self, model: ServedModel, template_arguments: Mapping[str, Any]) -> None:
        self._model = model
        self._template_arguments = dict(template_arguments)
        # A base model has no template: the server says so, and the conversation is written out.
        try:
            self.chat([{"role": "user", "content": "Hello"}], "Hello")
            self.has_template = True
        except ServerError as error:
            if not re.search(r"chat[ _-]?template", str(error), re.IGNORECASE):
                raise
            self.has_template = False

    has_template = True

    def chat(self, messages: Sequence[Mapping[str, str]], answer_prefix: str) -> list[int]:
        """As of `Tokenizer`."""
        if not self.has_template:
            return self.text(plain_chat(messages, answer_prefix))
        written, turn = opened(messages, answer_prefix)
        return self._model.tokenize({"messages": written, **turn, "chat_template_kwargs": self._template_arguments})

    def text(self, text: str) -> list[int]:
        """As of `Tokenizer`."""
        return self._model.tokenize({"prompt": text})


class LocalTokenizer:
    """A tokenizer from a folder, for servers without `/tokenize`.

    Args:
        folder: as transformers loads it.
        template_arguments: as of `ServerTokenizer`.
    """

    def __init__(self, folder: str, template_arguments: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._template_arguments = dict(template_arguments)

    def chat(self, messages: Sequence[Mapping[str, str]], answer_prefix: str) -> list[int]:
        """As of `Tokenizer`."""
        if self._tokenizer.chat_template is None:
            return self.text(plain_chat(messages, answer_prefix))
        conversation, turn = opened(messages, answer_prefix)
        written: str = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, **turn, **self._template_arguments
        )
        ids: list[int] = self._tokenizer(written, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, text: str) -> list[int]:
        """As of `Tokenizer`."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids


def opened(
    messages: Sequence[Mapping[str, str]], answer_prefix: str
) -> tuple[list[Mapping[str, str]], dict[str, bool]]:
    """A conversation with the assistant's turn open, and what a chat template is told of that."""
    turn = {"add_generation_prompt": not answer_prefix, "continue_final_message": bool(answer_prefix)}
    beginning = [{"role": "assistant", "content": answer_prefix}] if answer_prefix else []
    return [*messages, *beginning], turn


def plain_chat(messages: Sequence[Mapping[str, str]], answer_prefix: str) -> str:
    """A conversation as a model without a chat template reads it."""
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, f"Assistant: {answer_prefix}"])
