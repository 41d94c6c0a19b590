"""Which backend class serves which GPU, and what of a layer's call changes with an FP8 cache; no GPU is needed."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata
from vllm.v1.worker.utils import select_common_block_size

from loadtest.robustness.server import MODEL
from vllm_sparse import backend
from vllm_sparse.backend import device
from vllm_sparse.backend.cuda import SparseFlashAttentionBackend, SparseFlashAttentionImpl
from vllm_sparse.backend.executors.flash_attention import ByPageSize, FlashAttentionExecutor
from vllm_sparse.backend.executors.lists import list_executor
from vllm_sparse.backend.executors.rule import FLASH_ATTENTION, TRITON, Device
from vllm_sparse.backend.executors.triton_attention import TILE_TOKENS, TritonExecutor, whole_tiles
from vllm_sparse.backend.layer import LayerCall
from vllm_sparse.backend.triton import SparseTritonBackend, SparseTritonImpl
from vllm_sparse.step.launch import Executor, Launch
from vllm_sparse.step.plan import RowSpan


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (Device("cuda", (9, 0)), SparseFlashAttentionBackend),
        (Device("cuda", (8, 0)), SparseFlashAttentionBackend),
        (Device("cuda", (11, 0)), SparseTritonBackend),
        (Device("rocm", (9, 4)), SparseTritonBackend),
    ],
)
def test_the_backend_is_the_devices(gpu: Device, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(device, "gpu", lambda: gpu)
    assert backend.SparseAttentionBackend is expected
    assert expected.get_name() == "SPARSE"


def test_a_refused_device_is_told_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(device, "gpu", lambda: Device("cuda", (7, 0)))
    with pytest.raises(ValueError, match=r"compute capability 7\.0; supported are NVIDIA GPUs of"):
        _ = backend.SparseAttentionBackend


@pytest.mark.parametrize("stock", [SparseFlashAttentionBackend, SparseTritonBackend])
def test_fp8_caches_are_e4m3(stock: Any) -> None:
    assert stock.supports_kv_cache_dtype("fp8")
    assert stock.supports_kv_cache_dtype("fp8_e4m3")
    assert not any(map(stock.supports_kv_cache_dtype, ("fp8_e5m2", "nvfp4", "fp8_per_token_head")))
    assert not stock.supports_per_head_quant_scales()


@pytest.mark.parametrize("stock", [SparseFlashAttentionBackend, SparseTritonBackend])
def test_attention_is_always_given_its_keys(stock: Any) -> None:
    """vLLM 0.33 asks, and FlashAttention says otherwise."""
    assert not stock.supports_kv_cache_update_bypass


def test_wide_heads_are_refused_where_tiles_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparse.backend import cuda

    monkeypatch.setattr(cuda, "gpu", lambda: Device("rocm", (9, 4)))
    assert SparseTritonBackend.supports_head_size(128)
    assert not SparseTritonBackend.supports_head_size(256)
    monkeypatch.setattr(cuda, "gpu", lambda: Device("cuda", (8, 9)))
    assert SparseTritonBackend.supports_head_size(256)


class Noting(Executor):
    """Notes that it ran."""

    def __init__(self) -> None:
        self.pages: list[int] = []

    def run(
        self, launch: Launch, query: torch.Tensor, output: torch.Tensor, kv_cache: torch.Tensor, scale: float
    ) -> None:
        self.pages.append(launch.page_size_tokens)


@pytest.mark.parametrize("sparse", [SparseFlashAttentionBackend, SparseTritonBackend])
def test_blocks_of_a_model_with_several_backends_are_those_that_pages_want(
    sparse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks none of several backends for its preference."""

    def chosen(named: int | None = None) -> int:
        config = VllmConfig(model_config=ModelConfig(str(MODEL)), cache_config=CacheConfig(block_size=named))
        backends = [sparse, FlashAttentionBackend]
        size: int = Platform._preferred_block_size_for_backends(backends, 16, config)
        with set_current_vllm_config(config):
            assert select_common_block_size(size, backends) == size
        return size

    assert chosen() == 128
    assert chosen(named=16) == 16
    monkeypatch.setattr(ModelConfig, "is_hybrid", True)
    assert chosen() == 16
    # Without a server's configuration: what the stock backend takes.
    assert sparse.supports_block_size(16)
    assert not sparse.supports_block_size(8)


def test_small_pages_go_where_they_can_be_read() -> None:
    page_lists, token_lists = Noting(), Noting()
    nothing = torch.zeros(0)
    for page_size in (1, 8, 16, 48, 128):
        launch = Launch(nothing, 1, nothing, nothing, page_size)
        ByPageSize(page_lists, token_lists).run(launch, nothing, nothing, nothing, 1.0)
    assert (page_lists.pages, token_lists.pages) == ([16, 48, 128], [1, 8])
    assert isinstance(list_executor(FLASH_ATTENTION[3]), FlashAttentionExecutor)
    assert isinstance(list_executor(FLASH_ATTENTION[2]), ByPageSize)
    assert isinstance(list_executor(FLASH_ATTENTION[4]), TritonExecutor)
    assert isinstance(list_executor(TRITON), TritonExecutor)


@pytest.mark.parametrize(("width", "page_size"), [(128, 1), (61, 1), (3, 8), (5, 16), (1, 48), (3, 128)])
def test_tiles_of_the_last_row_look_up_no_page_behind_it(width: int, page_size: int) -> None:
    pages = torch.ones(2, width, dtype=torch.int32)
    whole = whole_tiles(pages, page_size)
    assert torch.equal(whole[:, :width], pages)
    tiles = -(-width * page_size // TILE_TOKENS)
    assert (tiles * TILE_TOKENS - 1) // page_size < whole.shape[1]
    assert whole is pages or width * page_size % TILE_TOKENS


def test_other_rows_share_the_triton_kernels_scratch() -> None:
    scratch = ("seq_threshold_3D", "num_par_softmax_segments", "softmax_segm_output", "softmax_segm_max")
    kept = {"slot_mapping", "causal", "softmax_segm_expsum", *scratch}
    of_all_rows: dict[str, Any] = {field.name: f"{field.name} of all rows" for field in fields(TritonAttentionMetadata)}
    described = {"seq_lens": torch.tensor([5, 60, 7], dtype=torch.int32), "block_table": torch.arange(6).view(3, 2)}
    metadata = TritonAttentionMetadata(**{**of_all_rows, **described})
    subset: Any = SparseTritonImpl.dense_subset(None, None, None, metadata, [RowSpan(1, 1, 2, 60)])  # type: ignore[arg-type]
    assert subset.seq_lens.tolist() == [60]
    assert (subset.num_actual_tokens, subset.max_query_len, subset.max_seq_len) == (2, 2, 60)
    for field in fields(TritonAttentionMetadata):
        assert (getattr(subset, field.name) == of_all_rows[field.name]) is (field.name in kept) or isinstance(
            getattr(subset, field.name), torch.Tensor
        )


@pytest.fixture
def call() -> LayerCall:
    """A layer's call with an FP8 cache, as vLLM makes it."""
    layer = SimpleNamespace(_q_scale_float=0.5, _k_scale_float=0.25)
    query = torch.tensor([[[1.5, -448.0]]]).to(torch.float8_e4m3fn)
    cache = torch.tensor([1.0, -0.015625]).to(torch.float8_e4m3fn).view(1, 1, 1, 2).view(torch.uint8)
    return LayerCall(layer, 0, query, query, query, cache, None, torch.zeros(1, 1, 2, dtype=torch.bfloat16), 8.0)


def impl(has_float8_cache: bool) -> Any:
    """An implementation that was not made by vLLM."""
    made: Any = SparseFlashAttentionImpl.__new__(SparseFlashAttentionImpl)
    made.has_float8_cache = has_float8_cache
    return made


def test_an_fp8_call_is_read_as_its_numbers_stand(call: LayerCall) -> None:
    read = impl(True).as_read(call)
    assert read.query.dtype == torch.bfloat16
    assert read.query.tolist() == [[[1.5, -448.0]]]
    assert read.kv_cache.dtype == torch.float8_e4m3fn
    assert read.kv_cache.float().tolist() == [[[[1.0, -0.015625]]]]
    assert read.scale == 8.0 * 0.5 * 0.25
    assert impl(False).as_read(call) is call


def test_the_stock_kernel_gets_fp8_queries_back(call: LayerCall, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    stock = "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.forward"
    monkeypatch.setattr(stock, lambda self, layer, query, *_: given.append(query))
    read = impl(True).as_read(call)
    impl(True).stock_forward(read, read.query, None, read.output)
    assert torch.equal(given[0].view(torch.uint8), call.query.view(torch.uint8))


def test_outputs_are_not_quantised_on_the_way() -> None:
    assert not SparseTritonImpl.fused_output_quant_supported(None, None)  # type: ignore[arg-type]
