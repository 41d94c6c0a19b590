"""Variants: what their requests send, and what baselines read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse.config.request import resolve
from vllm_sparse.config.settings import ServerConfig
from vllm_sparse.methods.registry import DEFAULT_METHODS
from vllm_sparse.quality.variants import BASELINES, Variant, baseline_variants, default_variants, parse_variant

CONFIG = ServerConfig(methods=(*DEFAULT_METHODS, *BASELINES))


@pytest.mark.parametrize("text", ["name", "=1", " ={}", "name={", "name=3", 'name=["sale"]'])
def test_what_is_no_variant_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|JSON") as raised:
        parse_variant(text)
    assert repr(text) in str(raised.value)


def test_phases_of_a_variant() -> None:
    assert parse_variant('a={"sparse_prefill": "sale"}').sparse_prefill
    assert not parse_variant('a={"sparse_prefill": "sale"}').sparse_decode
    assert not parse_variant('a={"sparse_prefill": "dense", "sparse_decode": "tidal"}').sparse_prefill
    assert parse_variant('a={"sparse_preset": "fast"}').sparse_decode
    assert not parse_variant('a={"sparse_preset": "dense"}').sparse_prefill


@given(st.sampled_from([1024, 8192, 32768, 131072]), st.floats(0.05, 0.9))
def test_a_server_accepts_the_baselines_of_every_length(length: int, density: float) -> None:
    variants = list(baseline_variants([density], ["prefill", "decode"]))
    assert [variant.baseline for variant in variants] == [*BASELINES, *BASELINES]
    for variant in variants:
        params = resolve(variant.extras_at(length), CONFIG, 24)
        assert (params.prefill is not None) == variant.sparse_prefill
        assert (params.decode is not None) == variant.sparse_decode


@given(st.integers(1024, 1 << 17), st.floats(0.05, 0.9))
def test_streaming_prefill_keeps_the_share_that_it_is_named_for(length: int, density: float) -> None:
    (variant,) = (each for each in baseline_variants([density], ["prefill"]) if each.baseline == "streaming")
    window = variant.extras_at(length)["streaming_recent_tokens"]
    # Pairs of query and key inside the window, over all pairs.
    kept = window * length - window * (window - 1) / 2
    assert kept / (length * (length + 1) / 2) == pytest.approx(density, abs=0.01)


def test_default_variants_are_the_methods_alone() -> None:
    methods = {"prefill": ["sale", "streaming", "hip"], "decode": ["hip", "random"]}
    assert [(variant.name, variant.sparse_prefill, variant.sparse_decode) for variant in default_variants(methods)] == [
        ("sale prefill", True, False),
        ("hip prefill", True, False),
        ("hip decode", False, True),
    ]


def test_knobs_that_say_a_density_are_sent_as_the_variant_has_them() -> None:
    extras = {"sparse_prefill": "dhsa", "dhsa_density": 0.25}
    assert Variant("mine", extras).extras_at(8192) == extras
