"""A model that reads images: its text layers by this backend, its encoder by what vLLM picks."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.text.tokenizer import build_tokenizer
from tests.serving import test_hybrid as hybrid
from tests.serving.hybrid_run import FORCED_TOKEN, GENERATED, TOP, largest
from tests.serving.multimodal_models import (
    IMAGE_TOKEN_ID,
    LAYERS,
    image_tokens,
    picture,
    write_mrope_model,
    write_prefix_model,
)
from tests.serving.server import MetricsChange, Reply, Server, prompt_of

CHUNK_TOKENS, BLOCK_TOKENS = 512, 32
WIDTH, HEIGHT = 448, 336
IMAGE_TOKENS = image_tokens(WIDTH, HEIGHT)
# The end of a chunk is within the image.
BEFORE_IMAGE = CHUNK_TOKENS - IMAGE_TOKENS // 2
# Of the text; with one image or two, what is generated stays in the block that the prompt ends in.
TEXT_TOKENS = 1120
ARGUMENTS = (
    *("--kv-cache-memory-bytes", "256M", "--max-num-batched-tokens", str(CHUNK_TOKENS), "--max-model-len", "4096"),
    *("--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--enable-prompt-tokens-details"),
    *("--limit-mm-per-prompt", '{"image": 2}'),
    *("--additional-config", json.dumps({"sparse": {"methods": ["flexprefill", "dhsa", "tidal", "tokentopk"]}})),
)
MIN_TOKENS = 128
# Lists hold everything: a budget that the context has passed is rounded up to the block that it ends in.
EVERYTHING: dict[str, Any] = {
    "sparse_prefill": "dhsa", "dhsa_budget_tokens": 4096, "sparse_decode": "tidal", "tidal_dense_layers": 0,
    "sparse_min_tokens": MIN_TOKENS,
}  # fmt: skip
FEW = {**EVERYTHING, "dhsa_budget_tokens": 128, "tidal_budget_tokens": 128}
OTHERS = {
    "sparse_prefill": "flexprefill", "flexprefill_gamma": 0.4, "flexprefill_min_budget_tokens": 128,
    "sparse_decode": "tokentopk", "tokentopk_budget_tokens": 128, "tokentopk_dense_layers": 0,
    "sparse_min_tokens": MIN_TOKENS,
}  # fmt: skip
# Of log probabilities in float32: rounding, and more than rounding.
SAME, OTHER = 2e-3, 2e-2

_TOKENIZER = build_tokenizer()
FIRST, SECOND = (picture(seed, WIDTH, HEIGHT) for seed in (1, 2))


def content(seed: int, *pictures: str) -> list[str]:
    """A text with pictures in it, the first after `BEFORE_IMAGE` tokens, a second one later."""
    tokens = _TOKENIZER.encode(prompt_of(seed, TEXT_TOKENS + 100).content, add_special_tokens=False).ids
    places = [0, BEFORE_IMAGE, TEXT_TOKENS - 100, TEXT_TOKENS]
    texts = [_TOKENIZER.decode(tokens[start:stop]) for start, stop in itertools.pairwise(places)]
    return [texts[0], pictures[0], texts[1], *pictures[1:], texts[2]]


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        prompt: log probability of each token of the prompt but the first; empty where they were not asked for.
        steps: the largest log probabilities of each forced step.
        tokens: ids of the prompt, images in place.
        cached: prompt tokens found in the prefix cache.
    """

    prompt: list[float]
    steps: list[float]
    tokens: list[int]
    cached: int

    @property
    def image(self) -> int:
        """Index of the first token of an image."""
        return self.tokens.index(IMAGE_TOKEN_ID)


def post(server: Server, parts: Sequence[str], extras: Mapping[str, Any], **body: Any) -> Reply:
    """Ask the chat endpoint with one message of texts and pictures."""
    shown = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith("data:")
        else {"type": "text", "text": part}
        for part in parts
    ]
    messages = [{"role": "user", "content": shown}]
    return server.post("/v1/chat/completions", {"messages": messages, "vllm_xargs": dict(extras), **body})


def ask(server: Server, parts: Sequence[str], extras: Mapping[str, Any], **body: Any) -> Answer:
    """Continue a message for just so many tokens, always the same ones."""
    forced = {"allowed_token_ids": [FORCED_TOKEN], "max_tokens": GENERATED, "ignore_eos": True}
    wanted = {"logprobs": True, "top_logprobs": TOP, "return_token_ids": True}
    reply = post(server, parts, extras, **forced, **wanted, **body)
    assert reply.status == 200, reply.raw
    found = reply.body["choices"][0]["logprobs"]["content"]
    steps = [logprob for step in found for logprob in largest([each["logprob"] for each in step["top_logprobs"]])]
    tokens = reply.body["prompt_token_ids"]
    of_prompt = (reply.body.get("prompt_logprobs") or [None])[1:]
    prompt = [entry[str(token)]["logprob"] for entry, token in zip(of_prompt, tokens[1:], strict=False)]
    return Answer(prompt, steps, tokens, reply.cached_tokens)


def measure(server: Server, parts: Sequence[str], extras: Mapping[str, Any]) -> Answer:
    """As `ask`, with the prompt's log probabilities, and so never from the prefix cache."""
    return ask(server, parts, extras, prompt_logprobs=0)


def difference(left: list[float], right: list[float]) -> float:
    """The largest one."""
    assert len(left) == len(right) > 0
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


def blocks(tokens: int) -> int:
    """Tokens of the whole blocks of the cache among so many."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


MESSAGES = {"one image": content(1, FIRST), "another": content(1, SECOND), "two images": content(1, FIRST, SECOND)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mrope_model(tmp_path_factory.mktemp("multimodal") / "model")


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[str, Answer]:
    """What vLLM answers without the plugin."""
    server = Server(folder, ARGUMENTS, folder / "stock.log", {"VLLM_PLUGINS": ""}, stock=True)
    try:
        return {name: measure(server, parts, {}) for name, parts in MESSAGES.items()}
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(folder: Path, stock: dict[str, Answer]) -> Iterator[Server]:
    """A server of the plugin with its routes, started when that of `stock` has ended."""
    served = Server(folder, ARGUMENTS, folder / "log", {"VLLM_PLUGINS": "sparse"})
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture(scope="module")
def dense(server: Server) -> dict[str, Answer]:
    return {name: measure(server, parts, {}) for name, parts in MESSAGES.items()}


@pytest.mark.usefixtures("no_server")
class TestMultimodal:
    def test_dense_is_what_vllm_computes_by_itself(self, stock: dict[str, Answer], dense: dict[str, Answer]) -> None:
        assert dense == stock

    def test_the_messages_tell_what_the_other_tests_need(self, dense: dict[str, Answer]) -> None:
        """The image lies where a chunk ends, and what it shows changes the answer."""
        one, another = dense["one image"], dense["another"]
        assert one.tokens == another.tokens
        assert one.tokens.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
        assert one.image + 32 < CHUNK_TOKENS < one.image + IMAGE_TOKENS - 32
        assert dense["two images"].tokens.count(IMAGE_TOKEN_ID) == 2 * IMAGE_TOKENS
        assert difference(one.prompt, another.prompt) > OTHER
        assert difference(one.steps, another.steps) > OTHER

    @pytest.mark.parametrize("name", MESSAGES)
    def test_lists_of_everything_give_the_same(self, server: Server, dense: dict[str, Answer], name: str) -> None:
        expected = dense[name]
        before = server.metrics()
        found = measure(server, MESSAGES[name], {**EVERYTHING, "tidal_budget_tokens": len(expected.tokens)})
        moved = MetricsChange(before, server.metrics())
        assert difference(found.prompt, expected.prompt) < SAME
        assert difference(found.steps, expected.steps) < SAME
        # These were lists.
        assert moved.density_count("prefill", "dhsa") == -(-len(expected.tokens) // CHUNK_TOKENS)
        assert moved.density_count("decode", "tidal") == GENERATED - 1
        assert moved("vllm_sparse_fallbacks_total") == 0

    @pytest.mark.parametrize("extras", [FEW, OTHERS], ids=["dhsa-tidal", "flexprefill-tokentopk"])
    def test_sparse_settings_apply(self, server: Server, dense: dict[str, Answer], extras: dict[str, Any]) -> None:
        prefill, decode = extras["sparse_prefill"], extras["sparse_decode"]
        before = server.metrics()
        found = measure(server, MESSAGES["one image"], extras)
        moved = MetricsChange(before, server.metrics())
        assert moved.density_count("prefill", prefill) == -(-len(found.tokens) // CHUNK_TOKENS)
        assert moved.density_count("decode", decode) == GENERATED - 1
        assert moved.density("prefill", prefill) < 0.9
        assert moved.density("decode", decode) < 0.5
        assert moved("vllm_sparse_fallbacks_total") == 0
        expected = dense["one image"]
        assert difference(found.prompt, expected.prompt) > OTHER
        assert difference(found.steps, expected.steps) > OTHER

    def test_a_dense_neighbour_with_another_image_stays_dense(self, server: Server, dense: dict[str, Answer]) -> None:
        with ThreadPoolExecutor(2) as pool:
            sparse = pool.submit(measure, server, MESSAGES["one image"], FEW)
            found = pool.submit(measure, server, MESSAGES["another"], {}).result()
        assert difference(sparse.result().steps, dense["one image"].steps) > OTHER
        assert difference(found.prompt, dense["another"].prompt) < SAME
        assert difference(found.steps, dense["another"].steps) < SAME

    @pytest.mark.parametrize("min_tokens", [140, 530, 820], ids=["before", "within", "after"])
    def test_neither_images_nor_settings_share_blocks(self, server: Server, min_tokens: int) -> None:
        """With the settings' salt beginning before the image, within it, and after it."""
        one, another = content(min_tokens, FIRST), content(min_tokens, SECOND)
        sparse = {**FEW, "sparse_min_tokens": min_tokens}
        first = ask(server, one, sparse)
        assert first.cached == 0
        # Of equal settings what comes before the image, of equal images what comes before the sparse tokens.
        image, dense, whole = (blocks(tokens) for tokens in (first.image, min_tokens, len(first.tokens) - 1))
        assert ask(server, another, sparse).cached == image
        assert ask(server, one, {**sparse, "tidal_budget_tokens": 256}).cached == dense
        for parts, found_tokens in ((one, dense), (another, max(dense, image))):
            found, again = (ask(server, parts, {}) for _ in range(2))
            computed = ask(server, parts, {}, cache_salt=server.fresh_salt())
            assert (found.cached, again.cached, computed.cached) == (found_tokens, whole, 0)
            assert difference(found.steps, computed.steps) < SAME
            assert difference(again.steps, computed.steps) < SAME
            assert ask(server, parts, sparse).cached == whole

    def test_a_second_image_has_blocks_of_its_own(self, server: Server) -> None:
        same, other = content(200, FIRST, FIRST), content(200, FIRST, SECOND)
        first = ask(server, same, FEW)
        second = len(first.tokens) - 1 - first.tokens[::-1].index(IMAGE_TOKEN_ID) - IMAGE_TOKENS + 1
        assert ask(server, other, FEW).cached == blocks(second)

    def test_the_encoder_is_left_to_vllm(self, server: Server) -> None:
        """Its attention goes in both directions, which is not refused."""
        (table,) = httpx.get(f"{server.url}/v1/sparse/methods", timeout=60).json()["layers"]
        assert (table["kind"], table["backend"], table["layers"]) == ("full attention", "SPARSE", [*range(LAYERS)])
        log = server.log.read_text()
        assert log.count(f"Sparse attention: full attention: SPARSE serves layers 0-{LAYERS - 1}") == 1
        encoders = re.findall(r"Using AttentionBackendEnum\.(\w+) for MMEncoderAttention", log)
        assert encoders
        assert "SPARSE" not in encoders

    @pytest.mark.parametrize(
        ("parts", "extras", "message"),
        [
            ([*MESSAGES["two images"], FIRST], FEW, "2 image"),
            (["What is this? ", "data:image/png;base64,AAAA"], FEW, "image"),
            (["What is this? ", f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"], {}, "image"),
            (["What is this? ", FIRST], {**FEW, "dhsa_budget_tokens": "x"}, "dhsa_budget_tokens is 'x'"),
        ],
        ids=["three images", "no base64 of a picture", "no picture", "settings"],
    )
    def test_wrong_inputs_are_refused(
        self, server: Server, parts: list[str], extras: dict[str, Any], message: str
    ) -> None:
        reply = post(server, parts, extras, max_tokens=2)
        assert reply.status == 400, reply.raw
        assert message in reply.error

    def test_a_video_is_refused(self, server: Server) -> None:
        video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
        reply = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": [video]}], "vllm_xargs": FEW}
        )
        assert reply.status == 400, reply.raw
        assert "video" in reply.error

    def test_it_answers_as_before_after_all_that(self, server: Server, dense: dict[str, Answer]) -> None:
        assert measure(server, MESSAGES["two images"], {}) == dense["two images"]


@pytest.mark.usefixtures("no_server")
def test_text_of_a_model_whose_images_are_refused(tmp_path: Path) -> None:
    """Its text part is made of a copy of vLLM's configuration, as that of most models that read images."""
    model = write_prefix_model(tmp_path / "model")
    asked = [{}, hybrid.EVERYTHING, hybrid.FEW]
    dense, everything, few = hybrid.run_offline(model, "SPARSE", asked, language_model_only=True)
    assert difference(everything[0], dense[0]) < SAME
    assert difference(few[0], dense[0]) > OTHER
