"""Request extras and server configuration: resolution, refusals, canonical text, salts."""

from __future__ import annotations

import re
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.request import ALL_DENSE, SparseParams, deserialize, resolve
from vllm_sparse.config.salt import SALT_MARK, cache_salt
from vllm_sparse.config.server import parse_server_config
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.block_topk import BlockTopk
from vllm_sparse.methods.flexprefill import FlexPrefill
from vllm_sparse.methods.hip import Hip, HipDecode
from vllm_sparse.methods.tidal import Tidal

LAYERS, HEADS = 32, 32
DEFAULT = ServerConfig()
MIN_TOKENS = DEFAULT.min_tokens
BOTH = {"sparse_prefill": "flexprefill", "sparse_decode": "tidal"}
HIP = {"sparse_prefill": "hip", "sparse_decode": "hip"}


def configured(**settings: Any) -> ServerConfig:
    return parse_server_config({"sparse": settings, "another_plugin": {"x": 1}}, LAYERS, HEADS)


@pytest.mark.parametrize(
    ("config", "extras", "expected"),
    [
        ({}, {}, ALL_DENSE),
        ({}, {"seed": 3, "other": [1], "spars": 1, "flex_gamma": 2}, ALL_DENSE),
        ({}, {"sparse_min_tokens": 7}, ALL_DENSE),
        ({}, {"sparse_prefill": "flexprefill"}, SparseParams(FlexPrefill(), None, MIN_TOKENS)),
        ({}, {"sparse_decode": "tidal"}, SparseParams(None, Tidal(), MIN_TOKENS)),
        ({}, BOTH, SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS)),
        ({}, {**BOTH, "sparse_min_tokens": 0}, SparseParams(FlexPrefill(), Tidal(), 0)),
        ({"min_tokens": 9}, BOTH, SparseParams(FlexPrefill(), Tidal(), 9)),
        ({}, {**BOTH, "sparse_min_recall": 1}, SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS, 1.0)),
        ({"min_recall": 0.9}, BOTH, SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS, 0.9)),
        ({"min_recall": 0.9}, {**BOTH, "sparse_min_recall": 0}, SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS)),
        ({}, {**BOTH, "sparse_unprofitable": "sparse"},
         SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS, unprofitable="sparse")),
        ({"unprofitable": "sparse"}, BOTH, SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS, unprofitable="sparse")),
        ({"unprofitable": "sparse"}, {**BOTH, "sparse_unprofitable": "dense"},
         SparseParams(FlexPrefill(), Tidal(), MIN_TOKENS)),
        # What is dense anyway has nothing to guard.
        ({}, {"sparse_min_recall": 0.9}, ALL_DENSE),
        ({"prefill": "flexprefill"}, {}, SparseParams(FlexPrefill(), None, MIN_TOKENS)),
        ({"prefill": "flexprefill"}, {"sparse_prefill": "dense"}, ALL_DENSE),
        ({"decode": "tidal"}, {"tidal_budget_tokens": 512}, SparseParams(None, Tidal(budget_tokens=512), MIN_TOKENS)),
        ({"tidal": {"budget_tokens": 512}}, {"sparse_decode": "tidal"},
         SparseParams(None, Tidal(budget_tokens=512), MIN_TOKENS)),
        ({"tidal": {"budget_tokens": 512}}, {"sparse_decode": "tidal", "tidal_budget_tokens": 99},
         SparseParams(None, Tidal(budget_tokens=99), MIN_TOKENS)),
        ({"tidal": {"budget_tokens": 512, "list_per": "query_head"}},
         {"sparse_decode": "tidal", "tidal_budget_tokens": 99},
         SparseParams(None, Tidal(budget_tokens=99, list_per="query_head"), MIN_TOKENS)),
        ({}, {"sparse_prefill": "flexprefill", "flexprefill_faithful": 1},
         SparseParams(FlexPrefill(faithful=True), None, MIN_TOKENS)),
        ({}, {"sparse_prefill": "flexprefill", "flexprefill_faithful": False},
         SparseParams(FlexPrefill(), None, MIN_TOKENS)),
        ({}, {"sparse_decode": "tidal", "tidal_reselect_layers": [5, 9]},
         SparseParams(None, Tidal(reselect_layers=(5, 9)), MIN_TOKENS)),
        # Exactly dense settings are dense, so that they share the ordinary prefix cache.
        ({}, {"sparse_prefill": "flexprefill", "flexprefill_gamma": 1.0}, ALL_DENSE),
        ({}, {"sparse_prefill": "flexprefill", "flexprefill_gamma": 1}, ALL_DENSE),
        ({}, {**BOTH, "flexprefill_gamma": 1.0}, SparseParams(None, Tidal(), MIN_TOKENS)),
        ({}, {"sparse_prefill": "flexprefill", "flexprefill_gamma": 1.0, "flexprefill_max_budget_tokens": 4096},
         SparseParams(FlexPrefill(gamma=1.0, max_budget_tokens=4096), None, MIN_TOKENS)),
        ({"methods": ["tidal"]}, {"sparse_decode": "tidal"}, SparseParams(None, Tidal(), MIN_TOKENS)),
        ({"methods": ["blocktopk"], "blocktopk": {"page_tokens": 32, "scores": "mean"}},
         {"sparse_decode": "blocktopk", "blocktopk_budget_tokens": 512},
         SparseParams(None, BlockTopk(budget_tokens=512, page_tokens=32, scores="mean"), MIN_TOKENS)),
        # One name of both phases: each phase takes the knobs that it has.
        ({}, {"sparse_prefill": "hip"}, SparseParams(Hip(), None, MIN_TOKENS)),
        ({}, {"sparse_decode": "hip"}, SparseParams(None, HipDecode(), MIN_TOKENS)),
        ({}, HIP, SparseParams(Hip(), HipDecode(), MIN_TOKENS)),
        ({}, {**HIP, "hip_recent_tokens": 64, "hip_refresh_steps": [8, 4, 2], "hip_scores_per": "layer"},
         SparseParams(Hip(recent_tokens=64, scores_per="layer"),
                      HipDecode(recent_tokens=64, refresh_steps=(8, 4, 2)), MIN_TOKENS)),
        ({}, {"sparse_prefill": "hip", "sparse_decode": "tidal", "hip_recent_tokens": 64},
         SparseParams(Hip(recent_tokens=64), Tidal(), MIN_TOKENS)),
        ({}, {"sparse_prefill": "flexprefill", "sparse_decode": "hip", "hip_recent_tokens": 64,
              "hip_refresh_steps": [8, 8, 8]},
         SparseParams(FlexPrefill(), HipDecode(recent_tokens=64, refresh_steps=(8, 8, 8)), MIN_TOKENS)),
        ({"hip": {"recent_tokens": 64, "sink_tokens": 16, "scores_per": "layer", "refresh_steps": [9, 9, 9]}},
         {**HIP, "hip_sink_tokens": 32},
         SparseParams(Hip(recent_tokens=64, sink_tokens=32, scores_per="layer"),
                      HipDecode(recent_tokens=64, sink_tokens=32, refresh_steps=(9, 9, 9)), MIN_TOKENS)),
        ({"hip": {"stage_block_tokens": [64, 16], "stage_budget_tokens": [512, 256], "query_stride": [4, 1]},
          "decode": "hip"}, {},
         SparseParams(None, HipDecode(stage_block_tokens=(64, 16), stage_budget_tokens=(512, 256)), MIN_TOKENS)),
        ({"methods": ["hip"]}, HIP, SparseParams(Hip(), HipDecode(), MIN_TOKENS)),
        ({}, {**HIP, "hip_dense_layers": 32}, ALL_DENSE),
    ],
)  # fmt: skip
def test_resolution(config: dict[str, Any], extras: dict[str, Any], expected: SparseParams) -> None:
    assert resolve(extras, configured(**config), LAYERS) == expected


FLEX, TIDAL = {"sparse_prefill": "flexprefill"}, {"sparse_decode": "tidal"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("chosen", "key", "value", "allowed"),
    [
        ({}, "sparse_prefill", "flexpre", "dense, flexprefill"),
        ({}, "sparse_prefill", "FlexPrefill", "dense, flexprefill"),
        ({}, "sparse_prefill", "tidal", "method of sparse_decode"),
        ({}, "sparse_decode", "flexprefill", "method of sparse_prefill"),
        ({}, "sparse_decode", "", "dense, tidal"),
        ({}, "sparse_decode", None, "dense, tidal"),
        ({}, "sparse_decode", 1, "dense, tidal"),
        ({}, "sparse_decode", ["tidal"], "dense, tidal"),
        ({}, "sparse_prefill", {"method": "flexprefill"}, "dense, flexprefill"),
        ({}, "sparse_budget", 3, "sparse_min_tokens"),
        ({}, "sparse_resolved", '{"min_tokens":0}', "sparse_min_tokens"),
        ({}, "sparse_", 1, "sparse_min_tokens"),
        ({}, "sparse", 1, "sparse_min_tokens"),
        # Misspelt prefixes are not passed over in silence.
        ({}, "sparse-decode", "tidal", "sparse_decode"),
        ({}, "Sparse_decode", "tidal", "sparse_decode"),
        ({}, "sparsely", 1, "sparse_prefill"),
        ({}, "sparse_min_tokens", -1, "integer of 0 or more"),
        ({}, "sparse_min_tokens", 2.5, "integer of 0 or more"),
        ({}, "sparse_min_tokens", "12", "integer of 0 or more"),
        ({}, "sparse_min_tokens", True, "integer of 0 or more"),
        ({}, "sparse_min_tokens", None, "integer of 0 or more"),
        ({}, "sparse_min_tokens", [1], "integer of 0 or more"),
        ({}, "sparse_min_tokens", NAN, "integer of 0 or more"),
        ({}, "sparse_min_recall", -0.1, "number from 0 to 1"),
        ({}, "sparse_min_recall", 1.01, "number from 0 to 1"),
        ({}, "sparse_min_recall", "0.9", "number from 0 to 1"),
        ({}, "sparse_min_recall", True, "number from 0 to 1"),
        ({}, "sparse_min_recall", None, "number from 0 to 1"),
        ({}, "sparse_min_recall", [0.9], "number from 0 to 1"),
        ({}, "sparse_min_recall", NAN, "number from 0 to 1"),
        ({}, "sparse_unprofitable", "Dense", "'dense' or 'sparse' is allowed"),
        ({}, "sparse_unprofitable", True, "'dense' or 'sparse' is allowed"),
        ({}, "sparse_unprofitable", ["dense"], "'dense' or 'sparse' is allowed"),
        ({}, "sparse_unprofitable", None, "'dense' or 'sparse' is allowed"),
        ({}, "flexprefill_gamma", 0.5, '"sparse_prefill": "flexprefill"'),
        (FLEX, "tidal_budget_tokens", 512, '"sparse_decode": "tidal"'),
        ({"sparse_decode": "dense"}, "tidal_budget_tokens", 512, '"sparse_decode": "tidal"'),
        (FLEX, "flexprefill_gama", 0.5, "flexprefill_gamma"),
        (FLEX, "flexprefill", 0.5, "flexprefill_gamma"),
        (FLEX, "flexprefill_", 0.5, "flexprefill_gamma"),
        (FLEX, "flexprefill_name", "x", "flexprefill_gamma"),
        (FLEX, "flexprefill_block_tokens", 64, "flexprefill_gamma"),
        (FLEX, "flexprefill_gamma", 0, "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", -0.1, "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", 1.0001, "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", NAN, "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", float("inf"), "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", "0.9", "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", True, "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", [0.9], "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", None, "above 0 and at most 1"),
        (FLEX, "flexprefill_gamma", {"value": 0.9}, "above 0 and at most 1"),
        (FLEX, "flexprefill_divergence_threshold", 1.5, "at least 0"),
        (FLEX, "flexprefill_min_budget_tokens", 10.0, "an integer"),
        (FLEX, "flexprefill_min_budget_tokens", -1, "at least 0"),
        (FLEX, "flexprefill_min_budget_tokens", 1 << 63, "at most 16777216"),
        (FLEX, "flexprefill_max_budget_tokens", 127, "at least 128"),
        (FLEX, "flexprefill_dense_layers", 2000, "at most 1024"),
        (FLEX, "flexprefill_faithful", 2, "true or false"),
        (FLEX, "flexprefill_faithful", "yes", "true or false"),
        (FLEX, "flexprefill_faithful", 1.0, "true or false"),
        (TIDAL, "tidal_budget_tokens", 15, "at least 16"),
        (TIDAL, "tidal_budget_tokens", True, "an integer"),
        (TIDAL, "tidal_budget_tokens", 2.0, "an integer"),
        (TIDAL, "tidal_budget_tokens", "2048", "an integer"),
        (TIDAL, "tidal_budget_tokens", [2048], "an integer"),
        (TIDAL, "tidal_list_per", "layer", "'kv_head', 'query_head'"),
        (TIDAL, "tidal_list_per", 3, "'kv_head', 'query_head'"),
        (TIDAL, "tidal_reselect_layers", 13, "list of integers"),
        (TIDAL, "tidal_reselect_layers", "13", "list of integers"),
        (TIDAL, "tidal_reselect_layers", [13.0], "list of integers"),
        (TIDAL, "tidal_reselect_layers", ["13"], "list of integers"),
        (TIDAL, "tidal_reselect_layers", [[13]], "list of integers"),
        (TIDAL, "tidal_dense_layers", -1, "at least 0"),
        ({"sparse_decode": "hip"}, "sparse_prefill", "hipp", "dense, flexprefill, sale, dhsa, hip"),
        (
            {"sparse_prefill": "hip"},
            "sparse_decode",
            "dhsa",
            "method of sparse_prefill); allowed are dense, tidal, hip",
        ),
        (
            BOTH,
            "hip_recent_tokens",
            64,
            "hip_recent_tokens is a knob of hip, which this request does not use; "
            'add "sparse_prefill": "hip" or "sparse_decode": "hip" or drop the knob',
        ),
        (
            {"sparse_prefill": "hip"},
            "hip_refresh_steps",
            [8, 8, 8],
            "hip_refresh_steps is a knob of hip for decode, which this "
            'request does not use; add "sparse_decode": "hip" or drop the knob',
        ),
        (
            {"sparse_decode": "hip"},
            "hip_scores_per",
            "layer",
            "hip_scores_per is a knob of hip for prefill, which this request "
            'does not use; add "sparse_prefill": "hip" or drop the knob',
        ),
        (
            HIP,
            "hip_widow",
            64,
            'a request chooses hip by "sparse_prefill": "hip" or "sparse_decode": "hip" and may '
            "set hip_stage_block_tokens, hip_stage_budget_tokens, hip_query_stride (prefill), hip_sink_tokens, "
            "hip_recent_tokens, hip_dense_tail_tokens (prefill), hip_scores_per (prefill), hip_dense_layers, "
            "hip_query_block_tokens (prefill), hip_list_per (prefill), hip_refresh_steps (decode)",
        ),
        (HIP, "hip_recent_tokens", -1, "at least 0"),
        ({"sparse_decode": "hip"}, "hip_recent_tokens", -1, "at least 0"),
        ({"sparse_decode": "hip"}, "hip_refresh_steps", 8, "list of integers"),
        ({"sparse_decode": "hip"}, "hip_refresh_steps", [8.5, 4, 2], "list of integers"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(
    chosen: dict[str, Any], key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(SparseParamsError) as caught:
        resolve({**chosen, key: value}, DEFAULT, LAYERS)
    error = caught.value
    assert error.key == key
    assert error.value is value or error.value == value
    assert key in str(error)
    assert allowed in str(error)
    unknown_or_unused = "is no" in str(error) or "does not use" in str(error)
    assert repr(value) in str(error) or unknown_or_unused


@pytest.mark.parametrize(
    ("extras", "key", "words"),
    [
        (
            {**FLEX, "flexprefill_max_budget_tokens": 512},
            "flexprefill_max_budget_tokens",
            ["flexprefill_max_budget_tokens is 512", "min_budget_tokens 1024"],
        ),
        (
            {**TIDAL, "tidal_budget_tokens": 64},
            "tidal_budget_tokens",
            ["tidal_budget_tokens is 64", "sink_tokens 16", "recent_tokens 64"],
        ),
        ({**TIDAL, "tidal_reselect_layers": [32]}, "tidal_reselect_layers", ["[32]", "32 layers", "3 to 31"]),
        ({**TIDAL, "tidal_reselect_layers": [2]}, "tidal_reselect_layers", ["[2]", "3 to 31"]),
        (
            {**TIDAL, "tidal_dense_layers": 32},
            "tidal_dense_layers",
            ["tidal_dense_layers is 32", "32 layers", "to 31 are allowed"],
        ),
        (
            {"sparse_decode": "hip", "hip_refresh_steps": [4, 8, 16]},
            "hip_refresh_steps",
            ["hip_refresh_steps is [4, 8, 16]", "none may be above the one before it"],
        ),
        (
            {**HIP, "hip_refresh_steps": [8, 4]},
            "hip_refresh_steps",
            ["hip_refresh_steps is [8, 4]", "each of the 3 stages"],
        ),
        (
            {
                "sparse_decode": "hip",
                "hip_stage_block_tokens": [256, 128, 64, 32, 16],
                "hip_stage_budget_tokens": [4096] * 5,
            },
            "hip_stage_block_tokens",
            ["hip_stage_block_tokens is [256, 128, 64, 32, 16]", "at most 4 stages are allowed in decoding"],
        ),
        (
            {"sparse_prefill": "hip", "hip_stage_block_tokens": [64, 16], "hip_stage_budget_tokens": [512, 256]},
            "hip_query_stride",
            ["hip_query_stride is [4, 4, 4]", "each of the 2 stages"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(extras: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(SparseParamsError) as caught:
        resolve(extras, DEFAULT, LAYERS)
    assert caught.value.key == key
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_method_that_is_not_enabled_is_refused() -> None:
    config = configured(methods=["flexprefill"])
    with pytest.raises(SparseParamsError, match=r"sparse_decode is 'tidal' \(this server.*not enable it.*are dense$"):
        resolve(TIDAL, config, LAYERS)


def test_a_method_that_takes_memory_is_enabled_by_the_server_only() -> None:
    message = r'is \'blocktopk\' \(this.*not enable it; its "methods" list.*allowed are dense, tidal, hip$'
    with pytest.raises(SparseParamsError, match=message):
        resolve({"sparse_decode": "blocktopk"}, DEFAULT, LAYERS)


@pytest.mark.parametrize(("knob", "value"), [("page_tokens", 32), ("scores", "bounds")])
def test_what_is_kept_of_a_page_is_the_servers_choice(knob: str, value: Any) -> None:
    config = configured(methods=["blocktopk"])
    with pytest.raises(
        SparseParamsError, match=f"blocktopk_{knob} is a setting of the server.*blocktopk_budget_tokens"
    ):
        resolve({"sparse_decode": "blocktopk", f"blocktopk_{knob}": value}, config, LAYERS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefil": "dense"}, r"sparse\.prefil is 'dense'.*prefill, decode, methods, min_tokens"),
        ({"prefill": "tidal"}, "sparse_prefill is 'tidal'"),
        ({"prefill": 3}, r"sparse\.prefill is 3"),
        ({"methods": ["flex"]}, r"sparse\.methods is \['flex'\]: .*flexprefill, .*tidal"),
        ({"methods": [], "decode": "tidal"}, "sparse_decode is 'tidal'.*not enable it"),
        ({"min_tokens": -1}, r"sparse\.min_tokens is -1"),
        ({"min_recall": 1.5}, r"sparse\.min_recall is 1\.5"),
        ({"min_recall": True}, r"sparse\.min_recall is True"),
        ({"unprofitable": "fast"}, r"sparse\.unprofitable is 'fast'.*'dense' or 'sparse'"),
        ({"min_recall": "0.9"}, r"sparse\.min_recall is '0\.9'"),
        ({"min_tokens": "4096"}, r"sparse\.min_tokens is '4096'"),
        ({"tidal": {"budget_tokens": 3}}, r"object sparse\.tidal: tidal_budget_tokens is 3; an integer of at least 16"),
        ({"tidal": {"buget": 3}}, r"object sparse\.tidal: tidal_buget is no knob.*tidal_budget_tokens"),
        ({"tidal": 3}, r"sparse\.tidal is 3"),
        ({"flexprefill": {"gamma": "high"}}, r"object sparse\.flexprefill: flexprefill_gamma is 'high'"),
        ({"decode": "tidal", "tidal": {"dense_layers": 32}}, "32 layers"),
        ({"blocktopk": {"page_tokens": 24}}, "blocktopk_page_tokens is 24; one of 16, 32, 64 is allowed"),
        (
            {"blocktopk": {"scores": "max"}},
            "blocktopk_scores is 'max'; one of 'mean', 'bounds', 'float8_bounds' is allowed",
        ),
        ({"decode": "blocktopk"}, "sparse_decode is 'blocktopk'.*not enable it"),
        (
            {"hip": {"widow": 3}},
            r"object sparse\.hip: hip_widow is no knob.*hip_recent_tokens.*hip_refresh_steps \(decode\)",
        ),
        (
            {"hip": {"scores_per": "heads"}},
            r"object sparse\.hip: hip_scores_per is 'heads'; one of 'query_head', 'kv_head'",
        ),
        (
            {"hip": {"refresh_steps": [1, 2, 3]}},
            r"object sparse\.hip: hip_refresh_steps is \[1, 2, 3\]; none may be above",
        ),
        (3, "sparse is 3"),
        (None, "sparse is None"),
    ],
)
def test_a_wrong_server_configuration_is_refused_at_start(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match="--additional-config") as caught:
        parse_server_config({"sparse": settings}, LAYERS, HEADS)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, "text"])
def test_no_configuration_means_the_defaults(additional: object) -> None:
    assert parse_server_config(additional, LAYERS, HEADS) == DEFAULT


flex = st.builds(
    FlexPrefill,
    gamma=st.floats(0.001, 1),
    divergence_threshold=st.floats(0, 1),
    min_budget_tokens=st.integers(0, 4096),
    max_budget_tokens=st.integers(4096, 1 << 24),
    dense_layers=st.integers(0, 40),
    faithful=st.booleans(),
)
tidal = st.builds(
    Tidal,
    budget_tokens=st.integers(64, 1 << 24),
    dense_layers=st.integers(0, 10),
    reselect_layers=st.lists(st.integers(11, 31), max_size=3).map(tuple),
    sink_tokens=st.integers(0, 32),
    recent_tokens=st.integers(0, 32),
    list_per=st.sampled_from(["kv_head", "query_head"]),
)
hip = st.builds(
    HipDecode,
    refresh_steps=st.lists(st.integers(1, 64), min_size=3, max_size=3).map(
        lambda steps: tuple(sorted(steps, reverse=True))
    ),
    sink_tokens=st.integers(0, 1024),
    recent_tokens=st.integers(0, 1024),
    dense_layers=st.integers(0, 31),
)
prefill_hip = st.builds(Hip, sink_tokens=st.integers(0, 1024), recent_tokens=st.integers(0, 1024))
settings = st.builds(
    SparseParams,
    st.none() | flex | prefill_hip,
    st.none() | tidal | hip,
    st.integers(0, 1 << 40),
    st.floats(0, 1),
    st.sampled_from(["dense", "sparse"]),
)
salts = st.none() | st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=100)


@given(settings)
def test_canonical_text_round_trips(params: SparseParams) -> None:
    restored = deserialize(params.serialize())
    assert restored == params
    assert restored.serialize() == params.serialize()


@given(settings, settings, salts, salts)
def test_only_equal_settings_and_salts_share_a_cache(
    first: SparseParams, second: SparseParams, salt: str | None, other_salt: str | None
) -> None:
    assert cache_salt(first, salt) == cache_salt(deserialize(first.serialize()), salt)
    same = salt == other_salt and (first == second or (first.is_dense and second.is_dense))
    assert (cache_salt(first, salt) == cache_salt(second, other_salt)) == same


@given(settings, salts)
def test_salts_are_what_vllm_accepts(params: SparseParams, salt: str | None) -> None:
    sparse_salt = cache_salt(params, salt)
    if params.is_dense:
        assert sparse_salt == salt
        return
    assert sparse_salt is not None
    assert sparse_salt.startswith((salt or "") + SALT_MARK)
    assert len(sparse_salt) <= 128
    assert not set(sparse_salt) & set("@/\\\0")
    assert sparse_salt.isprintable()


def test_each_knob_changes_the_salt() -> None:
    variants = [
        SparseParams(FlexPrefill(), Tidal(), 4096),
        SparseParams(FlexPrefill(), Tidal(), 4097),
        SparseParams(FlexPrefill(), Tidal(), 4096, unprofitable="sparse"),
        SparseParams(FlexPrefill(), None, 4096),
        SparseParams(None, Tidal(), 4096),
        *(
            SparseParams(FlexPrefill(**knob), Tidal(), 4096)
            for knob in (
                {"gamma": 0.85}, {"divergence_threshold": 0.2}, {"min_budget_tokens": 0}, {"max_budget_tokens": 4096},
                {"dense_layers": 1}, {"faithful": True},
            )
        ),
        *(
            SparseParams(FlexPrefill(), Tidal(**knob), 4096)
            for knob in (
                {"budget_tokens": 512}, {"dense_layers": 3}, {"reselect_layers": (9,)}, {"sink_tokens": 0},
                {"recent_tokens": 0}, {"list_per": "query_head"}, {"dense_every_steps": 16},
            )
        ),
        *(
            SparseParams(FlexPrefill(), BlockTopk(**knob), 4096)
            for knob in (
                {}, {"budget_tokens": 512}, {"dense_layers": 3}, {"sink_tokens": 0}, {"recent_tokens": 0},
                {"page_tokens": 32},
                {"scores": "mean"},
            )
        ),
        # One name and its knobs in one phase, the other, and both.
        SparseParams(Hip(), None, 4096),
        SparseParams(None, HipDecode(), 4096),
        SparseParams(Hip(), HipDecode(), 4096),
        SparseParams(Hip(), HipDecode(recent_tokens=0), 4096),
        SparseParams(Hip(recent_tokens=0), HipDecode(), 4096),
        SparseParams(Hip(), HipDecode(refresh_steps=(16, 8, 8)), 4096),
    ]  # fmt: skip
    salts_of = [cache_salt(params, "user") for params in variants]
    assert len(set(salts_of)) == len(variants)


def test_leaving_every_layer_dense_is_dense() -> None:
    """Such a chunk would be planned as sparse and have no sparse layer to count."""
    extras = {"sparse_prefill": "flexprefill", "flexprefill_dense_layers": 8}
    assert resolve(extras, ServerConfig(), 8).is_dense
    assert not resolve(extras, ServerConfig(), 9).is_dense
    extras = {**HIP, "hip_dense_layers": 8}
    assert resolve(extras, ServerConfig(), 8).is_dense
    assert resolve(extras, ServerConfig(), 9).decode == HipDecode(dense_layers=8)
    extras = {**HIP, "hip_dense_every_steps": 1}
    assert resolve(extras, ServerConfig(), 9).decode is None
    assert resolve({**HIP, "hip_dense_every_steps": 2}, ServerConfig(), 9).decode == HipDecode(dense_every_steps=2)
