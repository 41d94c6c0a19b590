"""Which layers are sparse, as a model's configuration tells it and as vLLM makes them; the table of both."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backend.conftest import HEAD_SIZE, HEADS, KV_HEADS, LAYERS, SCALE, Engine
from vllm_sparse.backend.layer_table import layer_table, log_layer_table, merged, sparse_layer_names
from vllm_sparse.config.model_layers import check_sparse_layers, held_layers, sparse_layers

OTHERS = ("sliding_attention", "chunked_attention", "linear_attention", "mamba")


def model(layers: int, **config: Any) -> Any:
    """vLLM's configuration of a model, as far as it is read."""
    return SimpleNamespace(hf_text_config=SimpleNamespace(**config), get_total_num_hidden_layers=lambda: layers)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from(OTHERS))
def test_full_layers_are_counted(is_full: list[bool], other: str) -> None:
    kinds = ["full_attention" if full else other for full in is_full]
    assert sparse_layers(model(len(kinds), layer_types=kinds, sliding_window=64)) == sum(is_full)


@pytest.mark.parametrize(
    ("expected", "config"),
    [
        (4, {}),
        (4, {"layer_types": None, "sliding_window": None}),
        # Of every layer.
        (0, {"sliding_window": 4096}),
        # Jamba; Zamba 2.
        (1, {"layers_block_type": ["mamba", "attention", "mamba", "mamba"]}),
        (2, {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}),
        # --disable-sliding-window.
        (4, {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": None}),
        # Layers of a drafter, behind the model's own.
        (2, {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8}),
    ],
)
def test_configurations_of_models(expected: int, config: dict[str, Any]) -> None:
    assert sparse_layers(model(4, **config)) == expected


def test_a_model_without_full_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of its 4 layers has a window.*without --attention-backend sparse"):
        check_sparse_layers(model(4, sliding_window=4096))
    check_sparse_layers(model(4))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["full_attention"] * 8, [range(3), range(3, 6), range(6, 8)]),
        (["sliding_attention", "full_attention"] * 4, [range(1), range(1, 3), range(3, 4)]),
        # A stage may hold none.
        (["full_attention"] + ["mamba"] * 6 + ["full_attention"], [range(1), range(1, 1), range(1, 2)]),
    ],
)
def test_stages_number_layers_over_the_whole_model(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kinds: list[str], expected: list[range]
) -> None:
    """By vLLM's own share of a stage, of eight layers three, three and two."""
    parallel, text = engine.config.parallel_config, engine.config.model_config.hf_text_config
    monkeypatch.setattr(text, "layer_types", kinds, raising=False)
    monkeypatch.setattr(text, "sliding_window", 64, raising=False)
    assert held_layers(engine.config) == range(kinds.count("full_attention"))
    monkeypatch.setattr(parallel, "pipeline_parallel_size", 3)
    monkeypatch.setattr(parallel, "tensor_parallel_size", 2)
    found = []
    for rank in range(6):
        monkeypatch.setattr(parallel, "rank", rank)
        found.append(held_layers(engine.config))
    assert found == [held for held in expected for _ in range(2)]


def test_a_stage_with_layers_of_another_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.config.parallel_config, "pipeline_parallel_size", 2)
    with pytest.raises(ValueError, match=r"serves 8 layers of this model, whose configuration tells of 4"):
        sparse_layer_names(engine.config)


def test_one_table_of_all_stages() -> None:
    full, window = {"kind": "full", "backend": "SPARSE", "why": "a"}, {"kind": "window", "backend": "CPU", "why": "b"}
    stages = [[{**window, "layers": (0,)}, {**full, "layers": (1,)}], [{**full, "layers": (3,)}]]
    assert merged(table for table in stages for _ in range(2)) == [
        {**window, "layers": (0,)},
        {**full, "layers": (1, 3)},
    ]


@pytest.fixture
def make_layer(engine: Engine) -> Iterator[Any]:
    """Makes a layer of a class behind the model's own; they are gone after the test."""
    from vllm_sparse.hooks.attention_selector import install_deriving

    install_deriving()
    layers = engine.config.compilation_config.static_forward_context
    before = set(layers)

    def make(layer_class: Any, **arguments: Any) -> Any:
        number = LAYERS + len(set(layers) - before)
        return layer_class(
            HEADS, HEAD_SIZE, SCALE, num_kv_heads=KV_HEADS, cache_config=engine.config.cache_config,
            prefix=f"model.layers.{number}.self_attn.attn", **arguments,
        )  # fmt: skip

    yield make
    for name in set(layers) - before:
        del layers[name]


def test_layers_of_other_kinds_get_what_vllm_picks_and_are_told(
    engine: Engine, make_layer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    for _ in range(2):
        make_layer(Attention, per_layer_sliding_window=48)
    make_layer(ChunkedLocalAttention, attention_chunk_size=96)
    make_layer(Attention, per_layer_sliding_window=48)
    full, window, chunked = layer_table(engine.config)
    assert (full.kind, full.backend, full.layers) == ("full attention", "SPARSE", tuple(range(LAYERS)))
    assert (window.backend, window.layers) == ("CPU_ATTN", (8, 9, 11))
    assert (chunked.backend, chunked.layers) == ("CPU_ATTN", (10,))
    assert "48" in window.kind
    assert "96" in chunked.kind
    with caplog.at_level("INFO", logger="vllm.sparse"):
        log_layer_table(engine.config)
    assert "Sparse attention: full attention: SPARSE serves layers 0-7, because" in caplog.text
    assert "Sparse attention: sliding window of 48 tokens: CPU_ATTN serves layers 8-9, 11, because" in caplog.text
    # Others are not counted.
    assert sparse_layer_names(engine.config) == {index: layer.layer_name for index, layer in enumerate(engine.layers)}


def test_layers_that_the_configuration_does_not_tell_are_refused(engine: Engine, make_layer: Any) -> None:
    from vllm.model_executor.layers.attention import Attention

    make_layer(Attention)
    with pytest.raises(ValueError, match=r"serves 9 layers of this model, whose configuration tells of 8"):
        sparse_layer_names(engine.config)


def test_caps_are_told(engine: Engine, make_layer: Any) -> None:
    from vllm.model_executor.layers.attention import Attention

    make_layer(Attention, logits_soft_cap=30.0)
    assert layer_table(engine.config)[-1].kind == "full attention with a soft cap of 30"
