"""The backend on GPUs whose whole contexts FlashAttention reads, and what all GPUs have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, is_quantized_kv_cache

from vllm_sparse.backend.attention_shape import attention_shape
from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import DecodeGraphs, set_graphs
from vllm_sparse.backend.device import gpu
from vllm_sparse.backend.execution import StepExecution
from vllm_sparse.backend.executors.float8 import ValueScale
from vllm_sparse.backend.executors.lists import list_executor
from vllm_sparse.backend.executors.rule import FLASH_ATTENTION, StockKernels
from vllm_sparse.backend.impl import SparseAttentionImpl
from vllm_sparse.backend.layer import seq_lens_of
from vllm_sparse.backend.memory import SelectionMemory, configured_decode_methods, methods_at_once
from vllm_sparse.backend.metadata import SparseMetadataBuilder
from vllm_sparse.backend.support import SparseDeclarations
from vllm_sparse.backend.warm_up import PrefillWarmUp, SummaryWarmUp
from vllm_sparse.config.server import server_config
from vllm_sparse.host_copy import indices_on, to_device
from vllm_sparse.keys import PagedKeys, PlainKeys
from vllm_sparse.methods.decode import BatchDecodeMethod
from vllm_sparse.methods.method import Method
from vllm_sparse.step.costs import StepCosts
from vllm_sparse.step.gpu_table import costs_of
from vllm_sparse.step.launch import Executor
from vllm_sparse.step.plan import RowSpan
from vllm_sparse.step.requests import SparseRequest
from vllm_sparse.step.rows import ServerSize

if TYPE_CHECKING:
    from vllm_sparse.backend.layer import LayerCall

logger = logging.getLogger("vllm.sparse")

PREFERRED_BLOCK_TOKENS = 128
LARGEST_HEAD_ON_AMD = 128


# What of a step's metadata holds for other rows of the step, too, by vLLM's class.
OF_ANY_ROWS: Mapping[str, tuple[str, ...]] = {
    "FlashAttentionMetadata": ("slot_mapping", "max_num_splits", "causal"),
    "TritonAttentionMetadata": (
        *("slot_mapping", "causal", "seq_threshold_3D", "num_par_softmax_segments"),
        *("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"),
    ),
}


class GpuMetadataBuilder(SparseMetadataBuilder):
    """Mixin before a stock builder of GPUs: decode rows at once, and their CUDA graphs."""

    vllm_config: Any
    kv_cache_spec: Any

    # Decode batches run in FULL graphs: vLLM's own hold dense attention only, others sparse steps (decode_graphs.py).
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        _log_kernels(impl.stock_kernels, impl.has_float8_cache)
        config = server_config(vllm_config)
        configured = configured_decode_methods(config)
        size = ServerSize(
            vllm_config.scheduler_config.max_num_seqs,
            vllm_config.model_config.max_model_len,
            self._sparse_num_layers,
            kv_cache_spec.num_kv_heads,
            self._sparse_held,
        )
        methods = methods_at_once(configured, size.max_seq_len)
        if config.decode_in_batches:
            _warn_of_rows_without_graphs(configured, methods, config.decode_list_tokens)
        if vllm_config.kernel_config.enable_jit_warmup:
            PrefillWarmUp(vllm_config, layer_names[0]).register_warmup()
            kinds = [method.summaries for method in configured if method.summaries is not None]
            SummaryWarmUp(vllm_config, layer_names[0], kinds).register_warmup()
        self.step_costs = StepCosts(
            costs_of(torch.cuda.get_device_name(device)),
            attention_shape(vllm_config, kv_cache_spec, size.num_layers, size.held),
            methods if config.decode_in_batches and self._sparse_one_group else [],
        )
        self._graphs: DecodeGraphs | None = None
        # vLLM makes a builder to measure memory with, too; its buffers are not needed beside these.
        set_graphs(None)
        if config.decode_in_batches and not self._sparse_one_group:
            logger.warning(
                "Sparse attention: layers with full attention lie in several KV-cache groups, so sparse decode rows "
                "are served one by one, without FULL CUDA graphs"
            )
        if methods and config.decode_in_batches and self._sparse_one_group:
            self.decode_buffers = DecodeBuffers(
                size.requests,
                size,
                methods,
                config.decode_list_tokens,
                device,
            )
            self._graphs = DecodeGraphs(
                self.decode_buffers,
                methods,
                self._sparse_speculative,
                guards=config.min_recall > 0,
                judged_apart=self._sparse_judged_apart,
            )
            if self._sparse_metrics.memory is not None:
                self._sparse_metrics.memory.set_buffers(self.decode_buffers.bytes + self._graphs.bytes)
        set_graphs(self._graphs)

    def step_starts(self, step: StepExecution) -> None:
        if self._graphs is not None:
            self._graphs.step = step

    def graphs_hold(self, requests: Sequence[SparseRequest], rows: int) -> bool:
        graphs = self._graphs
        return graphs is None or not graphs.sizes or graphs.holds(requests, rows)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """vLLM's own graphs hold dense attention only, those of `DecodeGraphs` what is being captured."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        if self._graphs is not None and self._graphs.capturing is not None:
            metadata.sparse_step = self._graphs.capture_step(
                metadata.seq_lens, metadata.block_table, self.batch_capacity_tokens
            )
        return metadata

    @property
    def batch_capacity_tokens(self) -> int:
        """As many as the cache holds: more are in reach only where requests share a prefix."""
        blocks: int = self.vllm_config.cache_config.num_gpu_blocks
        block_tokens: int = self.kv_cache_spec.block_size
        return blocks * block_tokens

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Runner V1 has no hook that keeps a sparse step out of a FULL graph, so it gets none."""
        return cls._cudagraph_support if vllm_config.use_v2_model_runner else AttentionCGSupport.NEVER


def _warn_of_rows_without_graphs(
    configured: Sequence[Method], served: Sequence[BatchDecodeMethod], list_tokens: int
) -> None:
    """Say at start-up which methods the configuration gives knobs with which no CUDA graph holds their rows."""
    for method in configured:
        longest = next((one.longest_list_tokens for one in served if one is method), None)
        if longest is not None and longest <= list_tokens:
            continue
        why = "its rows are served one by one" if longest is None else f"its lists have up to {longest} tokens"
        logger.warning(
            "Sparse attention: CUDA graphs do not hold %s as the object sparse configures it (%s; decode_list_tokens "
            "is %d), so every decode step with such a row, and with it all rows beside it, runs without FULL graphs",
            method.name,
            why,
            list_tokens,
        )


class SparseFlashAttentionMetadataBuilder(GpuMetadataBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention's builder with a plan for sparse rows."""


class GpuAttentionImpl(SparseAttentionImpl):
    """Mixin before a stock implementation of GPUs."""

    supports_dcp = False
    kv_cache_dtype: str
    logits_soft_cap: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_float8_cache = is_quantized_kv_cache(self.kv_cache_dtype)
        self._selection_memory = SelectionMemory(get_current_vllm_config())

    @property
    @abstractmethod
    def stock_kernels(self) -> StockKernels:
        """What serves this layer."""

    def as_read(self, call: LayerCall) -> LayerCall:
        """With an FP8 cache, queries come in FP8 too.

        They are read in the output's dtype, which holds them exactly; so are keys. What both were divided by goes into
        the softmax scale.
        """
        if not self.has_float8_cache:
            return call
        layer = call.layer
        scale = call.scale * layer._q_scale_float * layer._k_scale_float
        query, kv_cache = call.query.to(call.output.dtype), call.kv_cache.view(torch.float8_e4m3fn)
        return replace(call, query=query, kv_cache=kv_cache, scale=scale)

    def stock_forward(self, call: LayerCall, query: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        if self.has_float8_cache:
            query = query.to(torch.float8_e4m3fn)
        super().stock_forward(call, query, metadata, output)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Sparse rows write outputs as they are; vLLM's Triton attention could round them."""
        return False

    def take_selection_memory(self, query: torch.Tensor) -> None:
        self._selection_memory.take(query)

    def make_executor(self, layer: Any) -> Executor:
        value_scale = ValueScale(layer._v_scale) if self.has_float8_cache else None
        return list_executor(self.stock_kernels, value_scale, self.logits_soft_cap)

    def keys_of(self, layer: Any, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: int) -> PagedKeys:
        return PlainKeys(kv_cache, block_table, seq_len)

    def prefill_page_size(self, wanted_tokens: int, block_size_tokens: int) -> int:
        # The kernel is as efficient with small pages as with large ones; they have to divide a block.
        return min(wanted_tokens, block_size_tokens & -block_size_tokens)

    def decode_page_size(self, block_size_tokens: int) -> int:
        # Token lists cost FlashAttention 3 no more than page lists; of the other kernels that was not measured.
        return 1

    def dense_subset(self, layer: Any, query: torch.Tensor, metadata: Any, spans: list[RowSpan]) -> Any:
        device = metadata.seq_lens.device
        rows = indices_on(device, [span.row for span in spans])
        starts = [0, *accumulate(span.query_tokens for span in spans)]
        return _of_other_rows(
            metadata,
            num_actual_tokens=starts[-1],
            max_query_len=max(span.query_tokens for span in spans),
            max_seq_len=max(span.seq_len for span in spans),
            query_start_loc=to_device(torch.tensor(starts, dtype=torch.int32), device),
            seq_lens=seq_lens_of(metadata.seq_lens[rows], spans),
            block_table=metadata.block_table[rows],
        )

    def dense_rows(
        self, metadata: Any, seq_lens: torch.Tensor, block_table: torch.Tensor, query_starts: torch.Tensor
    ) -> Any:
        return _of_other_rows(
            metadata,
            num_actual_tokens=seq_lens.shape[0],
            max_query_len=1,
            max_seq_len=metadata.max_seq_len,
            query_start_loc=query_starts,
            seq_lens=seq_lens,
            block_table=block_table,
        )


def _of_other_rows(metadata: Any, **rows: Any) -> Any:
    """Metadata of other rows than a step's.

    Made anew, not copied: whatever else the step's holds, such as the kernel's schedule or a prefix of all rows, is of
    the whole batch. Of other rows it is what the class starts with: the kernel schedules itself.

    Args:
        metadata: of the whole step.
        rows: what describes the rows.
    """
    kind = type(metadata)
    return kind(**{name: getattr(metadata, name) for name in OF_ANY_ROWS[kind.__name__]}, **rows)


@lru_cache
def _log_kernels(kernels: StockKernels, float8_cache: bool) -> None:
    """Once, though vLLM makes several builders."""
    logger.info("Sparse attention: %s", kernels.describe())
    if float8_cache:
        logger.info(
            "Sparse attention: the KV cache is FP8, which sale's CUDA kernels do not read; their Triton twins choose "
            "in their place, which takes longer"
        )
    if not gpu().tried:
        logger.warning(
            "Sparse attention has never run on %s: its speed and answers there were not measured. Dense steps count as "
            'on the fastest GPU known and choosing as slower than on any, unless "unprofitable" is "sparse"',
            gpu().name,
        )


class SparseFlashAttentionImpl(GpuAttentionImpl, FlashAttentionImpl):
    """FlashAttention's implementation with a path for sparse rows."""

    vllm_flash_attn_version: int

    @property
    def stock_kernels(self) -> StockKernels:
        return FLASH_ATTENTION[self.vllm_flash_attn_version]


class GpuDeclarations(SparseDeclarations):
    """Mixin before a stock backend of GPUs."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    # From vLLM 0.33 on FlashAttention lets models write keys themselves and leave them out here. Not tested.
    supports_kv_cache_update_bypass: ClassVar[bool] = False

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Wider heads' tiles do not fit the shared memory of AMD's GPUs (tests/kernels/test_targets.py)."""
        widest = LARGEST_HEAD_ON_AMD if gpu().platform == "rocm" else head_size
        return head_size <= widest and bool(super().supports_head_size(head_size))  # type: ignore[misc]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major blocks: a head of a block is then a plain view, in pages of any size."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_TOKENS

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """What the stock backend takes; multiples of the preferred size where nobody named one.

        Of a model with several backends vLLM asks none for its preference, but takes the smallest size that all take. A
        model with state-space layers has blocks as large as their state, which need not be such a multiple.
        """
        stock: list[int | MultipleOf] = super().get_supported_kernel_block_sizes(kv_cache_spec)  # type: ignore[misc]
        config = get_current_vllm_config_or_none()
        if (
            config is None
            or config.cache_config.user_specified_block_size
            or config.model_config is None
            or config.model_config.is_hybrid
            or not all(isinstance(size, MultipleOf) for size in stock)
        ):
            return stock
        return [MultipleOf(PREFERRED_BLOCK_TOKENS)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """By the sizes above, where a stock backend has an answer of its own."""
        return bool(AttentionBackend.supports_block_size.__func__(cls, block_size))


class SparseFlashAttentionBackend(GpuDeclarations, FlashAttentionBackend):
    """``--attention-backend sparse`` where FlashAttention reads whole contexts."""

    @staticmethod
    def get_impl_cls() -> type[SparseFlashAttentionImpl]:
        return SparseFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFlashAttentionMetadataBuilder]:
        return SparseFlashAttentionMetadataBuilder
