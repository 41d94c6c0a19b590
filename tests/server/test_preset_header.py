"""The header by which a gateway names a preset."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.presets import PRESETS
from vllm_sparse.server import door
from vllm_sparse.server.door import EXTRAS_FIELD
from vllm_sparse.server.preset_header import PresetHeader, with_preset

MESSAGES = [{"role": "user", "content": "x"}]


def answered(request: Any, *headers: tuple[str, str]) -> Any:
    """A parsed request after it came through the middleware."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # As in a server, the route runs in a task of its own.
        await asyncio.gather(asyncio.to_thread(with_preset, request, EXTRAS_FIELD))

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers]}
    asyncio.run(PresetHeader(app)(scope, None, None))
    return request


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", prompt="x", **fields)


@pytest.mark.parametrize("preset", ["dense", *PRESETS])
@pytest.mark.parametrize(
    "make",
    [
        completion,
        lambda: ChatCompletionRequest(model="m", messages=MESSAGES),
        lambda: ResponsesRequest(model="m", input="x"),
        lambda: AnthropicMessagesRequest(model="m", messages=MESSAGES, max_tokens=1),
    ],
    ids=["completion", "chat", "response", "message"],
)
def test_a_request_that_chooses_nothing_has_the_preset(make: Any, preset: str) -> None:
    assert answered(make(), ("x-sparse-preset", preset)).vllm_xargs == {"sparse_preset": preset}


def test_other_extras_stay() -> None:
    request = completion(vllm_xargs={"sparse_min_tokens": 5, "other": "a"})
    assert answered(request, ("x-sparse-preset", "fast")).vllm_xargs == {
        "sparse_min_tokens": 5,
        "other": "a",
        "sparse_preset": "fast",
    }


@pytest.mark.parametrize("own", [{"sparse_preset": "dense"}, {"sparse_prefill": "sale"}, {"sparse_decode": "dense"}])
def test_what_a_request_chooses_itself_wins(own: dict[str, Any]) -> None:
    assert answered(completion(vllm_xargs=dict(own)), ("x-sparse-preset", "fast")).vllm_xargs == own


@pytest.mark.parametrize("headers", [(), (("x-other", "fast"),)])
def test_without_the_header_nothing_changes(headers: tuple[tuple[str, str], ...]) -> None:
    assert answered(completion(), *headers).vllm_xargs is None


def test_a_request_does_not_get_the_header_of_another() -> None:
    async def both() -> list[Any]:
        async def ask(*headers: tuple[bytes, bytes]) -> Any:
            request = completion()

            async def app(scope: Any, receive: Any, send: Any) -> None:
                await asyncio.sleep(0.01)
                with_preset(request, EXTRAS_FIELD)

            await PresetHeader(app)({"type": "http", "headers": list(headers)}, None, None)
            return request.vllm_xargs

        fast, quality = (b"x-sparse-preset", b"fast"), (b"x-sparse-preset", b"quality")
        return list(await asyncio.gather(ask(fast), ask(), ask(quality)))

    assert asyncio.run(both()) == [{"sparse_preset": "fast"}, None, {"sparse_preset": "quality"}]


def test_beam_search_which_drops_extras_is_left_alone() -> None:
    assert answered(completion(use_beam_search=True), ("x-sparse-preset", "fast")).vllm_xargs is None


def test_the_door_resolves_the_request_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = []
    monkeypatch.setattr(door, "resolve_for", lambda config, extras: resolved.append(dict(extras)))
    monkeypatch.setattr(door, "uses_sparse_backend", lambda config: False)
    request = completion()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        door.check_request(None, request)

    asyncio.run(PresetHeader(app)({"type": "http", "headers": [(b"x-sparse-preset", b"fast")]}, None, None))
    assert resolved == [{"sparse_preset": "fast"}]
    assert request.to_sampling_params(16, {}).extra_args == {"sparse_preset": "fast"}


def test_an_unknown_preset_is_refused_by_the_headers_name() -> None:
    with pytest.raises(SparseParamsError, match="the header x-sparse-preset is 'turbo'; allowed are dense, quality"):
        answered(completion(), ("x-sparse-preset", "turbo"))


def test_without_the_middleware_the_header_means_nothing() -> None:
    request = completion()
    with_preset(request, EXTRAS_FIELD)
    assert request.vllm_xargs is None
