"""Presets: which tier counts, what wins over it, what is refused, and the presets that there are."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.names import METHODS, PHASES
from vllm_sparse.config.presets import PRESETS, Choice, Preset, Tier
from vllm_sparse.config.request import ALL_DENSE, ParamsByLength, SparseParams, resolve, resolve_by_length
from vllm_sparse.config.salt import cache_salt
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.registry import DEFAULT_METHODS
from vllm_sparse.methods.sale import Sale
from vllm_sparse.methods.tidal import Tidal

LAYERS, HEADS = 32, 32
MIN_TOKENS = ServerConfig().min_tokens
# One name in both phases, a method that is not enabled by default, and a tier that is dense in one phase.
TIERS = (
    Tier(1000, prefill=Choice("hip", {"sink_tokens": 64})),
    Tier(2000, prefill=Choice("sale", {"tau": 0.5}), decode=Choice("hip", {"recent_tokens": 32})),
    Tier(3000, prefill=Choice("sale"), decode=Choice("blocktopk", {"budget_tokens": 512})),
)


def configured(**settings: Any) -> ServerConfig:
    return parse_server_config({"sparse": settings}, LAYERS, HEADS)


@pytest.fixture(autouse=True)
def stepped() -> Iterator[None]:
    """A preset of the tests' own, so that they do not depend on what the real ones hold."""
    PRESETS["stepped"] = Preset("for tests", "not measured", TIERS)
    yield
    del PRESETS["stepped"]


def params(prefill: Any = None, decode: Any = None) -> SparseParams:
    return SparseParams(prefill, decode, MIN_TOKENS)


HIP_PROMPT = Hip(sink_tokens=64)
SALE, HIP_DECODE = Sale(tau=0.5), HipDecode(recent_tokens=32)
TOPK = BlockTopk(budget_tokens=512)


@pytest.mark.parametrize(
    ("settings", "extras", "expected"),
    [
        ({}, {}, [params(HIP_PROMPT), params(SALE, HIP_DECODE), params(Sale(), TOPK)]),
        ({}, {"sparse_min_tokens": 7}, [SparseParams(HIP_PROMPT, None, 7), SparseParams(SALE, HIP_DECODE, 7),
                                        SparseParams(Sale(), TOPK, 7)]),
        # A named method replaces the preset's in its phase, its knobs too.
        ({}, {"sparse_prefill": "dense"}, [ALL_DENSE, params(None, HIP_DECODE), params(None, TOPK)]),
        ({}, {"sparse_prefill": "sale"}, [params(Sale()), params(Sale(), HIP_DECODE), params(Sale(), TOPK)]),
        ({}, {"sparse_decode": "tidal", "tidal_budget_tokens": 99},
         [params(HIP_PROMPT, Tidal(budget_tokens=99)), params(SALE, Tidal(budget_tokens=99)),
          params(Sale(), Tidal(budget_tokens=99))]),
        ({}, {"sparse_prefill": "dense", "sparse_decode": "dense"}, [ALL_DENSE] * 3),
        # Of the two phases of hip, the knobs of one are not the other's.
        ({}, {"sparse_decode": "hip"}, [params(HIP_PROMPT, HipDecode()), params(SALE, HipDecode()),
                                        params(Sale(), HipDecode())]),
        # A knob counts in the tiers whose method has it, over the preset's own.
        ({}, {"sale_tau": 0.1}, [params(HIP_PROMPT), params(Sale(tau=0.1), HIP_DECODE), params(Sale(tau=0.1), TOPK)]),
        ({}, {"hip_sink_tokens": 16},
         [params(Hip(sink_tokens=16)), params(SALE, HipDecode(recent_tokens=32, sink_tokens=16)),
          params(Sale(), TOPK)]),
        ({}, {"sale_tau": 0}, [params(HIP_PROMPT), params(None, HIP_DECODE), params(None, TOPK)]),
        # The server's knobs fill in what neither the request nor the preset names.
        ({"sale": {"tau": 0.3, "sink_tokens": 64}, "hip": {"sink_tokens": 128}}, {},
         [params(HIP_PROMPT), params(Sale(tau=0.5, sink_tokens=64), HipDecode(recent_tokens=32, sink_tokens=128)),
          params(Sale(tau=0.3, sink_tokens=64), TOPK)]),
        # The request's preset is nearer to it than the server's methods.
        ({"prefill": "flexprefill", "decode": "tidal"}, {},
         [params(HIP_PROMPT), params(SALE, HIP_DECODE), params(Sale(), TOPK)]),
        ({"preset": "quality"}, {}, [params(HIP_PROMPT), params(SALE, HIP_DECODE), params(Sale(), TOPK)]),
    ],
)  # fmt: skip
def test_a_preset_and_what_is_set_beside_it(
    settings: dict[str, Any], extras: dict[str, Any], expected: list[SparseParams]
) -> None:
    config = configured(methods=METHODS, **settings)
    for tier, wanted in zip(TIERS, expected, strict=True):
        found = resolve({"sparse_preset": "stepped", **extras}, config, LAYERS, tier.from_tokens)
        assert found == wanted, tier.from_tokens


@pytest.mark.parametrize(
    ("settings", "extras", "expected"),
    [
        ({"preset": "stepped"}, {}, params(SALE, HIP_DECODE)),
        ({"preset": "stepped"}, {"sparse_decode": "dense"}, params(SALE)),
        ({"preset": "stepped"}, {"sale_tau": 0.1}, params(Sale(tau=0.1), HIP_DECODE)),
        ({"preset": "stepped"}, {"sparse_preset": "dense"}, ALL_DENSE),
        ({"preset": "stepped"}, {"sparse_preset": "dense", "sparse_decode": "tidal"}, params(None, Tidal())),
        ({"preset": "stepped", "prefill": "dense"}, {}, params(None, HIP_DECODE)),
        ({"preset": "stepped", "prefill": "flexprefill"}, {}, params(FlexPrefill(), HIP_DECODE)),
        ({"preset": "stepped", "prefill": None, "decode": None}, {}, params(SALE, HIP_DECODE)),
        ({"preset": "stepped", "prefill": "flexprefill"}, {"sparse_preset": "stepped"}, params(SALE, HIP_DECODE)),
        ({"prefill": "flexprefill"}, {"sparse_preset": "dense"}, ALL_DENSE),
        ({"preset": "dense", "prefill": "flexprefill"}, {}, params(FlexPrefill())),
    ],
)
def test_a_servers_preset(settings: dict[str, Any], extras: dict[str, Any], expected: SparseParams) -> None:
    assert resolve(extras, configured(**settings), LAYERS, 2500) == expected


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True),
    st.lists(st.integers(0, 110), min_size=1, max_size=20),
)
def test_the_tier_is_the_last_one_that_begins_at_or_below_the_length(edges: list[int], lengths: list[int]) -> None:
    edges.sort()
    budgets = {edge: 1000 + edge for edge in edges}
    tiers = tuple(Tier(edge, decode=Choice("tidal", {"budget_tokens": budget})) for edge, budget in budgets.items())
    PRESETS["drawn"] = Preset("", "", tiers)
    settings = resolve_by_length({"sparse_preset": "drawn"}, ServerConfig(), LAYERS)
    del PRESETS["drawn"]
    for length in lengths:
        reached = [edge for edge in edges if edge <= length]
        expected = params(None, Tidal(budget_tokens=budgets[reached[-1]])) if reached else ALL_DENSE
        assert settings.at(length) == expected


def test_a_length_that_counts_has_to_be_known() -> None:
    with pytest.raises(ValueError, match="preset stepped needs the length of the prompt"):
        resolve({"sparse_preset": "stepped"}, configured(methods=METHODS), LAYERS)
    with pytest.raises(ValueError, match="needs the length"):
        resolve({}, configured(preset="stepped"), LAYERS)


@pytest.mark.parametrize("value", ["turbo", "Fast", "none", "", None, 1, ["fast"]])
def test_an_unknown_preset_is_named_with_those_that_there_are(value: Any) -> None:
    with pytest.raises(SparseParamsError) as caught:
        resolve_by_length({"sparse_preset": value}, configured(methods=METHODS), LAYERS)
    assert caught.value.key == "sparse_preset"
    assert str(caught.value).startswith(f"sparse_preset is {value!r}; allowed are dense, quality, balanced, fast")


NOT_ENABLED = (
    r"sparse_preset is 'stepped', whose decode method blocktopk this server does not enable; start the server with "
    r'"methods": \["flexprefill", "sale", "dhsa", "hip", "tidal", "blocktopk"\], or name a sparse_decode beside the '
    r"preset \(allowed are dense, tidal, hip\)"
)


def test_a_preset_whose_method_is_not_enabled_is_refused_at_every_length() -> None:
    config = configured()
    with pytest.raises(SparseParamsError, match=NOT_ENABLED) as caught:
        resolve_by_length({"sparse_preset": "stepped"}, config, LAYERS)
    assert caught.value.key == "sparse_preset"
    beside = {"sparse_preset": "stepped", "sparse_decode": "dense"}
    assert resolve(beside, config, LAYERS, 3000) == params(Sale())
    alone = {**beside, "sparse_prefill": "sale"}
    assert resolve_by_length(alone, configured(methods=["sale"]), LAYERS) == ParamsByLength(
        "dense", ((0, params(Sale())),)
    )


@pytest.mark.parametrize(
    ("extras", "key", "words"),
    [
        # Of a method that no tier runs, or that is replaced.
        ({"tidal_budget_tokens": 512}, "tidal_budget_tokens", "which this request does not use"),
        ({"sparse_prefill": "dense", "sale_tau": 0.1}, "sale_tau", "which this request does not use"),
        ({"sparse_preset": "dense", "sale_tau": 0.1}, "sale_tau", "which this request does not use"),
        # Its value is looked at, though short prompts would not use it.
        ({"blocktopk_budget_tokens": 8}, "blocktopk_budget_tokens", "blocktopk_budget_tokens is 8; an integer"),
        ({"blocktopk_page_tokens": 16}, "blocktopk_page_tokens", "is a setting of the server"),
        (
            {"blocktopk_sink_tokens": 600},
            "sparse_preset",
            "sparse_preset is 'stepped', which for prompts of 3000 tokens or more asks for .*"
            "'blocktopk_budget_tokens': 512}: blocktopk_budget_tokens is 512; .*sink_tokens 600",
        ),
    ],
)
def test_wrong_knobs_beside_a_preset(extras: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(SparseParamsError) as caught:
        resolve_by_length({"sparse_preset": "stepped", **extras}, configured(methods=METHODS), LAYERS)
    assert caught.value.key == key
    assert re.search(words, str(caught.value)), str(caught.value)


def test_a_server_enables_what_its_preset_needs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.sparse"):
        assert configured(preset="stepped").methods == (*DEFAULT_METHODS, "blocktopk")
    assert "blocktopk is enabled because preset stepped needs it" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "vllm.sparse"):
        # Nothing of it is needed.
        assert configured(preset="stepped", decode="dense").methods == DEFAULT_METHODS
        assert configured(prefill="sale").methods == DEFAULT_METHODS
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "turbo"}, "object sparse: sparse_preset is 'turbo'; allowed are dense, quality, balanced, fast"),
        ({"preset": 3}, r"sparse\.preset is 3"),
        ({"preset": "stepped", "methods": list(DEFAULT_METHODS)}, f"object sparse: {NOT_ENABLED}"),
        ({"preset": "stepped", "blocktopk": {"sink_tokens": 600}}, "sink_tokens 600"),
    ],
)
def test_a_wrong_preset_stops_the_server_at_its_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="--additional-config") as caught:
        configured(**settings)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_salts_are_those_of_what_is_run() -> None:
    """A tier shares cached blocks with all that run the same, and none with another tier."""
    config = configured(methods=METHODS)
    by_preset = [resolve({"sparse_preset": "stepped"}, config, LAYERS, edge) for edge in (0, 1000, 1999, 2000, 3000)]
    salts = [cache_salt(found, "mine") for found in by_preset]
    assert salts[0] == "mine"
    assert salts[1] == salts[2]
    assert len(set(salts)) == 4
    assert salts[3] == cache_salt(resolve(TIERS[1].extras(), config, LAYERS), "mine")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layers", [8, 24, 80])
class TestEachPreset:
    def test_tiers_rise_and_are_what_their_extras_ask_for(self, name: str, layers: int) -> None:
        config = configured(methods=METHODS)
        tiers = PRESETS[name].tiers
        edges = [tier.from_tokens for tier in tiers]
        assert edges == sorted(set(edges))
        assert edges[0] > 0
        settings = resolve_by_length({"sparse_preset": name}, config, layers)
        assert settings.at(edges[0] - 1) == ALL_DENSE
        for tier, end in zip(tiers, [*edges[1:], 1 << 24], strict=True):
            alone = resolve(tier.extras(), config, layers)
            assert settings.at(tier.from_tokens) == settings.at(end - 1) == alone
            assert not alone.is_dense

    def test_its_decoding_is_in_the_graphs_of_a_server_with_defaults(self, name: str, layers: int) -> None:
        config = configured(preset=name)
        for _, found in resolve_by_length({}, config, layers).tiers:
            if found.decode is None:
                continue
            captured = PHASES["decode"][found.decode.name]()
            assert isinstance(captured, BatchDecodeMethod)
            assert isinstance(found.decode, BatchDecodeMethod)
            assert captured.serves(found.decode, 1 << 17)
            assert captured.layer_roles(layers) == found.decode.layer_roles(layers)
            assert found.decode.longest_list_tokens <= config.decode_list_tokens
