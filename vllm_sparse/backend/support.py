"""Everything that this backend refuses at start-up, with its reason and what to do instead.

`SparseDeclarations` is what vLLM itself asks of a backend and refuses; the tables hold what vLLM does not ask for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sparse.backend.device import gpu
from vllm_sparse.backend.executors.rule import FLASH_ATTENTION
from vllm_sparse.config.request import configured_method
from vllm_sparse.config.server import server_config
from vllm_sparse.kernels.top_coded_tokens.cuda import PAGES
from vllm_sparse.methods.decode import DecodeMethod
from vllm_sparse.methods.registry import SUMMARISING_METHODS
from vllm_sparse.step.requests import TABLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sparse.kernels.page_summaries import SummaryKind

logger = logging.getLogger("vllm.sparse")

FLASH_ATTENTION_VERSION = 3
ADVICE = "serve without --attention-backend sparse, or change that setting"

# KV connectors of vLLM that find blocks by its block hashes, which chain the cache salt, or by the salt itself. What a
# sparse request wrote is found there by requests of equal settings only, as in the prefix cache.
SALTED_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector", "LMCacheMPConnector")

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Refusal(Generic[Subject]):
    """Something that is not supported.

    Attributes:
        applies: whether the subject asks for it.
        message: what is said then.
    """

    applies: Callable[[Subject], bool]
    message: Callable[[Subject], str]


@dataclass(frozen=True)
class Server:
    """A server that starts.

    Attributes:
        config: vLLM's configuration.
    """

    config: VllmConfig

    @property
    def unsalted_connectors(self) -> list[str]:
        """KV connectors, those within others too, by which blocks of a sparse request may reach any other request."""
        transfer = self.config.kv_transfer_config
        if transfer is None or transfer.kv_connector is None:
            return []
        return _unsalted(
            {
                "kv_connector": transfer.kv_connector,
                "kv_connector_module_path": transfer.kv_connector_module_path,
                "kv_connector_extra_config": transfer.kv_connector_extra_config,
            }
        )


def _unsalted(connector: Mapping[str, Any]) -> list[str]:
    """`Server.unsalted_connectors` of a connector's configuration, as vLLM writes it."""
    name, module = connector["kv_connector"], connector.get("kv_connector_module_path")
    if name == "MultiConnector" and not module:
        inner = connector.get("kv_connector_extra_config", {}).get("connectors", [])
        return [unsalted for one in inner for unsalted in _unsalted(one)]
    # A module of its own may give another connector a name of vLLM's.
    return [] if name in SALTED_CONNECTORS and not module else [f"{module}.{name}" if module else name]


@dataclass(frozen=True)
class Summarised:
    """An enabled decode method that keeps summaries, and the cache that it would summarise.

    Attributes:
        config: vLLM's configuration.
        method: name of the method.
        kind: of its summaries, as the server's configuration sets it.
        block_size_tokens: tokens of a KV-cache block.
    """

    config: VllmConfig
    method: str
    kind: SummaryKind
    block_size_tokens: int


SERVER_REFUSALS: tuple[Refusal[Server], ...] = (
    Refusal(
        lambda server: server.config.model_config.runner_type == "pooling",
        lambda server: (
            "attention backend sparse does not support pooling models (embedding, classification, scoring): its "
            "settings are those of generations; serve without --attention-backend sparse"
        ),
    ),
    Refusal(
        lambda server: server.config.parallel_config.enable_dbo,
        lambda server: f"attention backend sparse does not support dual-batch overlap yet; {ADVICE}",
    ),
    Refusal(
        lambda server: server.config.speculative_config is not None and not server.config.use_v2_model_runner,
        lambda server: (
            "attention backend sparse does not support speculative decoding on model runner V1, which hands no "
            f"sampling parameters to plugins then; {ADVICE}"
        ),
    ),
    Refusal(
        lambda server: bool(server.unsalted_connectors),
        lambda server: (
            f"attention backend sparse does not work with KV connector {', '.join(server.unsalted_connectors)}: it "
            "finds blocks neither by vLLM's block hashes nor by the cache salt, so it would hand keys and values of a "
            "sparse request to dense requests and to those of other settings; serve without it, with one of "
            f"{', '.join(SALTED_CONNECTORS)} in its place, or without --attention-backend sparse"
        ),
    ),
    Refusal(
        lambda server: current_platform.is_cpu() and server_config(server.config).executor != "auto",
        lambda server: (
            f'executor is "{server_config(server.config).executor}" in --additional-config, object sparse, and on a '
            'CPU there is one only; set "auto" or leave it out'
        ),
    ),
    Refusal(
        lambda server: (
            is_quantized_kv_cache(server.config.cache_config.cache_dtype)
            and server.config.model_config.dtype != torch.bfloat16
        ),
        lambda server: (
            f"attention backend sparse reads an FP8 KV cache for models in bfloat16, this one runs in "
            f"{server.config.model_config.dtype}; set --dtype bfloat16 or --kv-cache-dtype auto"
        ),
    ),
    Refusal(
        lambda server: envs.VLLM_USE_RUST_FRONTEND,
        lambda server: (
            "attention backend sparse checks and resolves requests in vLLM's Python frontend; "
            "unset VLLM_USE_RUST_FRONTEND"
        ),
    ),
    Refusal(
        lambda server: not TABLE.attached,
        lambda server: (
            "attention backend sparse receives request parameters through the entry point 'sparse' of the group "
            "vllm.logits_processors, which was not loaded; reinstall vllm-sparse"
        ),
    ),
)

SUMMARY_REFUSALS: tuple[Refusal[Summarised], ...] = (
    Refusal(
        lambda cache: cache.config.kv_transfer_config is not None,
        lambda cache: (
            f"{cache.method} keeps summaries of blocks, and that the first step of a request finds all blocks to "
            f"summarise which the KV connector {cache.config.kv_transfer_config.kv_connector} loads was not tested; "
            f'serve without the connector (or KV offloading), or without {cache.method} in "methods" of '
            "--additional-config, object sparse"
        ),
    ),
    Refusal(
        lambda cache: cache.kind.content == "float8_bounds" and not current_platform.is_cpu() and not gpu().has_float8,
        lambda cache: (
            f"{cache.method} is to keep bounds in FP8, which {gpu().name} does not have; leave out scores, or set "
            f'"bounds", in --additional-config, object sparse.{cache.method}'
        ),
    ),
    Refusal(
        lambda cache: cache.block_size_tokens % cache.kind.page_tokens != 0,
        lambda cache: (
            f"{cache.method} scores pages of {cache.kind.page_tokens} tokens, which do not divide a KV-cache block of "
            f"{cache.block_size_tokens}; set --block-size to a multiple, or page_tokens in --additional-config, "
            f"object sparse.{cache.method}"
        ),
    ),
)

# Of a stock implementation of a layer, as it was made.
LAYER_REFUSALS: tuple[Refusal[Any], ...] = (
    Refusal(
        lambda impl: getattr(impl, "alibi_slopes", None) is not None,
        lambda impl: "attention backend sparse does not support ALiBi; serve this model without it",
    ),
    Refusal(
        lambda impl: getattr(impl, "vllm_flash_attn_version", FLASH_ATTENTION_VERSION) not in FLASH_ATTENTION,
        lambda impl: (
            f"attention backend sparse needs FlashAttention {', '.join(map(str, FLASH_ATTENTION))} or vLLM's Triton "
            f"attention on a GPU, this configuration resolves to version {impl.vllm_flash_attn_version} of the former; "
            'set "executor": "triton" in --additional-config, object sparse, or another '
            "--attention-config.flash_attn_version, or serve without it"
        ),
    ),
)


def _refuse(refusals: Iterable[Refusal[Subject]], subject: Subject) -> None:
    for refusal in refusals:
        if refusal.applies(subject):
            raise ValueError(refusal.message(subject))


def check_server(vllm_config: VllmConfig) -> None:
    """Refuse a server that the backend cannot serve.

    Args:
        vllm_config: the server's configuration.

    Raises:
        ValueError: with the reason and what to do instead.
    """
    _refuse(SERVER_REFUSALS, Server(vllm_config))


def check_summaries(vllm_config: VllmConfig, block_size_tokens: int) -> None:
    """Refuse a cache whose pages cannot be summarised as an enabled method wants them.

    Args:
        vllm_config: the server's configuration.
        block_size_tokens: tokens of a KV-cache block.

    Raises:
        ValueError: with the reason and what to do instead, or the plugin's configuration is wrong.
    """
    config = server_config(vllm_config)
    for name in SUMMARISING_METHODS:
        if name not in config.methods:
            continue
        method = configured_method(config, "decode", name)
        assert isinstance(method, DecodeMethod)
        assert method.summaries is not None
        _refuse(SUMMARY_REFUSALS, Summarised(vllm_config, name, method.summaries, block_size_tokens))
        pages = method.summaries.page_tokens
        if method.summaries.content == "codes" and pages < block_size_tokens and block_size_tokens in PAGES:
            logger.warning(
                "%s codes keys in pages of %d tokens, and the cache's blocks have %d: each step codes the newest block "
                'again before it chooses. {"sparse": {"%s": {"page_tokens": %d}}} in --additional-config saves that.',
                *(name, pages, block_size_tokens, name, block_size_tokens),
            )


def check_layer(impl: Any) -> None:
    """Refuse a layer whose stock implementation does what sparse rows cannot.

    Args:
        impl: the implementation, made.

    Raises:
        ValueError: with the reason and what to do instead.
    """
    _refuse(LAYER_REFUSALS, impl)


def check_packing(packing: str, readable: Collection[str]) -> None:
    """Refuse a processor whose kernel packs keys in a way that selection cannot read.

    Args:
        packing: vLLM's name of the instruction set.
        readable: those that selection reads.

    Raises:
        ValueError: with the reason and what to do instead.
    """
    if packing not in readable:
        raise ValueError(
            f"attention backend sparse cannot read keys as this processor's kernel packs them ({packing}); "
            f"it reads {', '.join(readable)}; serve without it"
        )


class SparseDeclarations:
    """Mixin before a stock backend: withdraws what the stock kernel can do and sparse rows cannot yet."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "SPARSE"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Plans are made from the host's query lengths."""
        return False
