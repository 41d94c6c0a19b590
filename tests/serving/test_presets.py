"""Presets on a server whose default is one: what prompts of two lengths run, and what the routes say and change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.server import MetricsChange, Server, prompt_of
from vllm_sparse.config.presets import PRESETS

CONFIG, METHODS = "/v1/sparse/config", "/v1/sparse/methods"
# The default of `preset_server`. Its first tier is the one that prompts of this model reach soonest.
PRESET = "fast"
TIER = PRESETS[PRESET].tiers[0]


@pytest.fixture
def changeable(preset_server: Server) -> Iterator[Server]:
    """`preset_server`; as on its command line again afterwards."""
    yield preset_server
    assert preset_server.call("PUT", CONFIG, json={}).status_code == 200


def test_what_the_default_preset_needs_is_enabled_with_a_line_in_the_log(preset_server: Server) -> None:
    answer = preset_server.call("GET", METHODS).json()
    for phase in ("prefill", "decode"):
        assert set(PRESETS[PRESET].methods(phase)) <= answer[phase]["methods"].keys()
        assert answer[phase]["default"] is None
    log = preset_server.log.read_text()
    assert log.count(f"tokentopk is enabled because preset {PRESET} needs it") == 1
    assert f"those that name none run prefill by preset {PRESET} and decode by preset {PRESET}" in log


def test_presets_are_listed_with_what_they_pick_at_which_length(preset_server: Server) -> None:
    told = preset_server.call("GET", METHODS).json()["preset"]
    assert told["default"] == PRESET
    assert list(told["presets"]) == list(PRESETS)
    assert told["presets"][PRESET]["quality"] == PRESETS[PRESET].quality
    assert {"from_prompt_tokens": TIER.from_tokens, "vllm_xargs": TIER.extras()} in told["presets"][PRESET]["tiers"]


def test_a_short_prompt_is_an_ordinary_dense_request(preset_server: Server) -> None:
    content = prompt_of(70, 1500).content
    before = preset_server.metrics()
    assert preset_server.chat(content).cached_tokens == 0
    # Of the ordinary prefix cache.
    assert preset_server.chat(content, {"sparse_preset": "dense"}).cached_tokens > 1400
    change = MetricsChange(before, preset_server.metrics())
    assert change("vllm_sparse_presets_total", preset=PRESET) == change("vllm_sparse_presets_total") == 1
    assert change.requests("prefill", "dense") == change.requests("decode", "dense") == 2
    assert change("vllm_sparse_fallbacks_total") == 0


def test_a_long_prompt_runs_its_tier_streamed_or_not(preset_server: Server) -> None:
    content = prompt_of(71, TIER.from_tokens + 200).content
    before = preset_server.metrics()
    computed = preset_server.chat(content, stream=True)
    assert computed.usage["prompt_tokens"] >= TIER.from_tokens
    # The preset, by name or by default, is what its tier's extras ask for.
    for extras in (None, {"sparse_preset": PRESET}, TIER.extras()):
        again = preset_server.chat(content, extras)
        assert again.text == computed.text
        assert again.cached_tokens > TIER.from_tokens
    change = MetricsChange(before, preset_server.metrics())
    assert change.requests("prefill", TIER.prefill.method) == change.requests("decode", TIER.decode.method) == 4
    assert change("vllm_sparse_presets_total", preset=PRESET) == 3
    assert change.density("prefill", TIER.prefill.method) < 0.9


def test_the_default_preset_is_changed_and_refused_over_http(changeable: Server) -> None:
    reply = changeable.call("PUT", CONFIG, json={"preset": "quality", "decode": "dense"})
    assert reply.status_code == 200, reply.text
    assert reply.json()["config"]["preset"] == "quality"
    before = changeable.metrics()
    assert changeable.complete("Hello.", max_tokens=1).status == 200
    assert MetricsChange(before, changeable.metrics())("vllm_sparse_presets_total", preset="quality") == 1
    for settings, message in (
        ({"preset": "turbo"}, "sparse_preset is 'turbo'; allowed are dense, quality, balanced, fast"),
        ({"preset": None}, "sparse.preset is None"),
    ):
        reply = changeable.call("PUT", CONFIG, json=settings)
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_wrong_knobs_beside_a_preset_are_refused_before_the_length_is_known(
    preset_server: Server, stream: bool
) -> None:
    for extras, message in (
        ({"sparse_preset": "turbo"}, "sparse_preset is 'turbo'; allowed are dense, quality, balanced, fast"),
        ({"sparse_preset": PRESET, "tokentopk_budget_tokens": 8}, "tokentopk_budget_tokens is 8; an integer"),
        ({"tidal_budget_tokens": 512}, 'add "sparse_decode": "tidal" or drop the knob'),
    ):
        reply = preset_server.chat("Hello.", extras, stream=stream)
        assert reply.status == 400, reply.raw
        assert message in reply.error
