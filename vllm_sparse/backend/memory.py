"""Device memory beside the KV cache: what vLLM's profiling has to leave room for, and does not see by itself.

vLLM runs the model once before it has a cache, without attention, and gives the cache what is left of
``--gpu-memory-utilization``. Two things are missing there. What choosing for a prompt chunk takes comes and goes: it is
allocated in that run (`SelectionMemory`), where it lies beside the activations as in serving. What is kept for good,
buffers, CUDA graphs and page summaries, is made later: it is taken off the cache (`BesideCache`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vllm_sparse.backend.decode_buffers import DecodeBuffers
from vllm_sparse.backend.decode_graphs import MOST_ROWS_ALONE, graph_sizes
from vllm_sparse.config.limits import is_within, narrowed
from vllm_sparse.config.model_layers import held_layers, sparse_layers
from vllm_sparse.config.names import knob_schema
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.server import server_config
from vllm_sparse.methods.decode import BatchDecodeMethod, DecodeMethod
from vllm_sparse.methods.prefill import PrefillMethod
from vllm_sparse.methods.registry import DECODE_METHODS, PREFILL_METHODS
from vllm_sparse.step.plan import layer_roles
from vllm_sparse.step.rows import ServerSize

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse.config.settings import ServerConfig

MIB = 1 << 20
# Of a captured sparse step: 1.5 GiB for 245 of them were measured on an H200 with Llama-3.1-8B's geometry, with the
# scores of their rows, which count apart here as well.
GRAPH_BYTES = 6.5 * MIB
# Of a query head and a token that is scored.
SCORE_BYTES = 4
# A sparse prompt chunk's queries are gathered by lists, and so is what they attend to.
GATHERED_COPIES = 2


def configured_decode_methods(config: ServerConfig) -> list[DecodeMethod]:
    """Decode methods that requests may choose, as the server's configuration sets them."""
    names = [name for name in DECODE_METHODS if name in config.methods]
    methods = [configured_method(config, "decode", name) for name in names]
    return [method for method in methods if isinstance(method, DecodeMethod)]


def methods_at_once(methods: Sequence[DecodeMethod], max_seq_len: int) -> list[BatchDecodeMethod]:
    """Those whose rows are served at once on a GPU.

    Args:
        methods: as the server's configuration sets them.
        max_seq_len: of the longest request.
    """
    return [
        method for method in methods if isinstance(method, BatchDecodeMethod) and method.serves(method, max_seq_len)
    ]


def most_selection_bytes(config: ServerConfig, chunk_tokens: int, seq_len: int, heads: tuple[int, int]) -> int:
    """Memory that choosing takes for the most demanding prompt chunk that the server's limits allow.

    Args:
        config: of the server.
        chunk_tokens: of the largest prompt chunk.
        seq_len: of the longest request.
        heads: query heads and KV heads of one process.
    """
    most = 0
    for name in PREFILL_METHODS:
        if name not in config.methods:
            continue
        own = configured_method(config, "prefill", name)
        assert isinstance(own, PrefillMethod)
        schema = knob_schema("prefill", name)
        choices = [
            [(knob, value) for value in schema[knob]["enum"] if is_within(value, allowed)]
            for knob in ("list_per", "scores_per", "query_block_tokens")
            if knob in schema
            for _, allowed in [narrowed(schema[knob], getattr(own, knob), config.limits)]
        ]
        own_bytes = own.selection_bytes(chunk_tokens, seq_len, *heads)
        limit = max(config.limits.selection_mib, -(-own_bytes // MIB)) * MIB
        finer = [
            replace(own, **dict(knobs)).selection_bytes(chunk_tokens, seq_len, *heads)  # type: ignore[type-var]
            for knobs in itertools.product(*choices)
        ]
        most = max(most, own_bytes, *(size for size in finer if size <= limit))
    return most


class SelectionMemory:
    """Takes, while vLLM measures memory, what serving the most demanding prompt chunk takes.

    Args:
        vllm_config: of the server.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        longest = model.max_model_len
        self.bytes = most_selection_bytes(
            server_config(vllm_config),
            min(vllm_config.scheduler_config.max_num_batched_tokens, longest),
            longest,
            (model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)),
        )

    def take(self, query: torch.Tensor) -> None:
        """Allocate it and give it back; the allocator remembers the peak.

        Args:
            query: ``[tokens, query_heads, head_size]`` of the largest step.
        """
        if self.bytes:
            torch.empty(self.bytes + GATHERED_COPIES * query.nbytes, dtype=torch.uint8, device=query.device)


@dataclass(frozen=True)
class BesideCache:
    """What a server keeps on a GPU beside its KV cache.

    Attributes:
        buffer_bytes: of decode steps.
        graph_bytes: of the CUDA graphs of sparse steps, estimated.
        cache_share: page summaries and scores, in times of the cache.
    """

    buffer_bytes: int
    graph_bytes: int
    cache_share: float

    def left_for_cache(self, available_bytes: int) -> int:
        """What the KV cache may take of memory that it was to have alone; negative where there is too little."""
        left = available_bytes - self.buffer_bytes - self.graph_bytes
        return int(left / (1 + self.cache_share)) if left > 0 else left


def beside_cache(vllm_config: VllmConfig) -> BesideCache:
    """What a GPU server with this configuration will keep beside its cache, on each of its devices."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    config, model, parallel = server_config(vllm_config), vllm_config.model_config, vllm_config.parallel_config
    heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
    num_layers, held, head_size = sparse_layers(model), held_layers(vllm_config), model.get_head_size()
    if not held:
        return BesideCache(0, 0, 0.0)
    number_bytes = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model).itemsize
    size = ServerSize(vllm_config.scheduler_config.max_num_seqs, model.max_model_len, num_layers, kv_heads, held)
    methods = configured_decode_methods(config)
    at_once = methods_at_once(methods, size.max_seq_len) if config.decode_in_batches else []
    # Layers that choose by each kind.
    kinds = {
        method.summaries: sum(role.writes_list for role in layer_roles(method, num_layers, held))
        for method in methods
        if method.summaries is not None
    }
    token_bytes = 2 * head_size * number_bytes * len(held)
    share = sum(layers * kind.bytes_per_token(head_size, number_bytes) for kind, layers in kinds.items()) / token_bytes
    if any(method.scores_tokens for method in at_once):
        share += SCORE_BYTES * heads / (token_bytes * kv_heads)
    if not at_once:
        return BesideCache(0, 0, share)
    # Nothing is allocated on this device, and all sizes are those that will be.
    buffers = DecodeBuffers(size.requests, size, at_once, config.decode_list_tokens, torch.device("meta"))
    return BesideCache(buffers.bytes, int(_graphs(vllm_config, len(at_once)) * GRAPH_BYTES), share)


def _graphs(vllm_config: VllmConfig, methods: int) -> int:
    """CUDA graphs of sparse steps that a server captures; methods are those whose rows are served at once."""
    from vllm.config.compilation import CUDAGraphMode

    compilation = vllm_config.compilation_config
    captures = (
        vllm_config.use_v2_model_runner
        and vllm_config.speculative_config is None
        and compilation.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
    )
    sizes = [
        size
        for size in compilation.cudagraph_capture_sizes or ()
        if captures and size <= vllm_config.scheduler_config.max_num_seqs
    ]
    if not sizes:
        return 0
    sizes = graph_sizes(sizes, vllm_config.parallel_config)
    alone = len([size for size in sizes if size <= MOST_ROWS_ALONE])
    # Of each method alone and beside dense rows, and of any methods.
    return methods * (alone + len(sizes)) + len(sizes)
