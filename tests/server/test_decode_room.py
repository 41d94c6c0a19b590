"""Requests for which the CUDA graphs have no room are refused where they are admitted; the others are not."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sparse.config.messages import SparseParamsError
from vllm_sparse.config.presets import PRESETS, Choice, Preset, Tier
from vllm_sparse.methods.tidal import Tidal
from vllm_sparse.server.admission import resolve_for
from vllm_sparse.server.decode_room import has_decode_graphs

LAYERS = 8


def server(**settings: Any) -> Any:
    """vLLM's configuration, as far as admission reads it."""
    from vllm.config.compilation import CUDAGraphMode

    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(),
        get_total_num_hidden_layers=lambda: LAYERS,
        model_arch_config=SimpleNamespace(total_num_attention_heads=4),
        max_model_len=32768,
        get_num_attention_heads=lambda parallel: 4,
        get_num_kv_heads=lambda parallel: 2,
    )
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="SPARSE"), backend_per_kind=None),
        model_config=model,
        additional_config={"sparse": settings},
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        use_v2_model_runner=True,
        speculative_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
    )


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    # While it is imported, vLLM asks the platform for more than this one says.
    importlib.import_module("vllm.config.compilation")
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: True))


@pytest.mark.usefixtures("on_cuda")
def test_servers_with_graphs_are_told_apart() -> None:
    from vllm.config.compilation import CUDAGraphMode

    assert has_decode_graphs(server())
    assert not has_decode_graphs(server(decode_in_batches=False))
    for change in (
        {"use_v2_model_runner": False},
        {"speculative_config": object()},
        {"compilation_config": SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE)},
        {"compilation_config": SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE)},
    ):
        assert not has_decode_graphs(SimpleNamespace(**{**vars(server()), **change}))


REFUSED = [
    ({"tidal_budget_tokens": 9000}, r"tidal_budget_tokens is 9000: lists of 9000 tokens .* decode_list_tokens, 4352"),
    (
        {"tidal_list_per": "query_head", "tidal_sink_tokens": 5},
        "tidal_list_per is 'query_head', tidal_sink_tokens is 5: ",
    ),
]


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(("knobs", "message"), REFUSED)
def test_requests_without_room_are_refused(knobs: dict[str, Any], message: str) -> None:
    """With what was asked, what is allowed and what to do; nothing beside them is slowed down."""
    extras = {"sparse_decode": "tidal", **knobs}
    with pytest.raises(SparseParamsError, match=f"^{message}") as refused:
        resolve_for(server(), extras)
    assert refused.value.key == next(iter(knobs))
    assert "decode_in_batches" in str(refused.value)
    with pytest.raises(SparseParamsError, match="object sparse: decode_list_tokens, or these knobs in hip"):
        resolve_for(server(), {"sparse_decode": "hip", "hip_stage_block_tokens": [128, 64, 16]})


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"sparse_decode": "hip", "sparse_prefill": "flexprefill"},
        {
            "sparse_decode": "tidal",
            "tidal_dense_layers": 3,
            "tidal_selection_reads": "list",
            "tidal_budget_tokens": 4352,
            "sparse_min_recall": 0.5,
        },
    ],
)
def test_requests_that_graphs_hold_are_admitted(extras: dict[str, Any]) -> None:
    decode = resolve_for(server(), extras).at(0).decode
    assert (None if decode is None else decode.name) == extras.get("sparse_decode")


@pytest.mark.parametrize(("knobs", "message"), REFUSED)
def test_servers_without_graphs_serve_them(knobs: dict[str, Any], message: str) -> None:
    assert resolve_for(server(), {"sparse_decode": "tidal", **knobs}).at(0).decode == Tidal(
        **{key.removeprefix("tidal_"): value for key, value in knobs.items()}
    )


@pytest.mark.usefixtures("on_cuda")
def test_what_the_operator_asks_for_is_served() -> None:
    """A server whose own knobs no graph holds has none for the method, so requests for it take none away."""
    own = server(decode="tidal", tidal={"budget_tokens": 9000})
    for knobs in ({}, {"tidal_budget_tokens": 10000}, {"tidal_budget_tokens": 100, "tidal_recent_tokens": 0}):
        assert resolve_for(own, knobs).at(0).decode is not None


@pytest.mark.usefixtures("on_cuda")
def test_a_preset_without_room_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier(1000, decode=Choice("tidal", {"budget_tokens": 4000}))
    monkeypatch.setitem(PRESETS, "stepped", Preset("for tests", "not measured", (tier,)))
    assert resolve_for(server(), {"sparse_preset": "stepped"}).preset == "stepped"
    small = server(decode_list_tokens=2048)
    with pytest.raises(SparseParamsError, match=r"^sparse_preset is 'stepped': lists of 4000 tokens") as refused:
        resolve_for(small, {"sparse_preset": "stepped"})
    assert refused.value.key == "sparse_preset"


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("preset", PRESETS)
def test_default_servers_have_room_for_presets(preset: str) -> None:
    assert resolve_for(server(preset=preset), {}).preset == preset
