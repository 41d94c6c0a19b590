"""KV connectors: those that would hand a sparse request's blocks to another one are refused, by what they really do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from tests.vllm_versions import kv_cache_config
from vllm_sparse.backend.support import SALTED_CONNECTORS, check_server
from vllm_sparse.config.request import SparseParams
from vllm_sparse.config.salt import cache_salt
from vllm_sparse.methods.flexprefill import FlexPrefill

MODEL = str(Path(__file__).parents[2] / "loadtest" / "model" / "weights")
BLOCK_TOKENS = 32

SPARSE = cache_salt(SparseParams(prefill=FlexPrefill()), None)
OTHER_GAMMA = cache_salt(SparseParams(prefill=FlexPrefill(gamma=0.5)), None)


def configuration(connector: str, **settings: Any) -> VllmConfig:
    """Of a server with a KV connector."""
    transfer = KVTransferConfig(kv_connector=connector, kv_role="kv_both", **settings)
    config: VllmConfig = EngineArgs(
        model=MODEL,
        attention_backend="sparse",
        block_size=BLOCK_TOKENS,
        disable_hybrid_kv_cache_manager=True,
        kv_transfer_config=transfer,
    ).create_engine_config()
    return config


def refuse(config: VllmConfig) -> None:
    """Check a server, all of whose layers the backend serves."""
    check_server(config)


def scheduler_side(config: VllmConfig) -> Any:
    """The connector itself, as the scheduler has it."""
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.float32)
    layers = {f"model.layers.{layer}.self_attn.attn": spec for layer in range(2)}
    config.cache_config.kv_cache_layout = "LBHNC"
    cache = kv_cache_config(config, layers, 1 << 26)
    return KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache)


def request(name: str, tokens: list[int], salt: str | None) -> Request:
    """As the scheduler sees it."""
    init_none_hash(sha256)
    return Request(
        name,
        tokens,
        SamplingParams(max_tokens=4),
        None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )


def found(connector: Any, asking: Request) -> int:
    """Tokens that a connector would load for a request."""
    connector.on_new_request(asking)
    tokens: int = connector.get_num_new_matched_tokens(asking, 0)[0]
    return tokens


def test_an_offloading_connector_finds_blocks_of_equal_settings_only() -> None:
    config = configuration("OffloadingConnector", kv_connector_extra_config={"cpu_bytes_to_use": 1 << 24})
    connector = scheduler_side(config)
    tokens = list(range(4 * BLOCK_TOKENS))
    writer = request("writer", tokens, SPARSE)
    connector.on_new_request(writer)
    state = connector.scheduler._req_status["writer"]
    state.update_offload_keys()
    keys = state.group_states[0].offload_keys
    assert len(keys) == 4
    manager = connector.scheduler.manager
    manager.prepare_store(keys, state.req_context)
    manager.complete_store(keys, state.req_context)

    assert found(connector, request("equal", tokens, SPARSE)) > 0
    assert found(connector, request("dense", tokens, None)) == 0
    assert found(connector, request("other", tokens, OTHER_GAMMA)) == 0


def test_the_example_connector_hands_them_to_everybody_and_is_refused(tmp_path: Path) -> None:
    config = configuration("ExampleConnector", kv_connector_extra_config={"shared_storage_path": str(tmp_path)})
    connector = scheduler_side(config)
    tokens = list(range(4 * BLOCK_TOKENS + 1))
    # It leaves out the last block of a prompt. Its folders are named by tokens: no salt comes in.
    folder = connector._generate_foldername_debug(torch.tensor(tokens)[: 3 * BLOCK_TOKENS], [], create_folder=True)
    assert Path(folder).is_relative_to(tmp_path)
    assert found(connector, request("dense", tokens, None)) > 0
    with pytest.raises(ValueError, match=r"KV connector ExampleConnector.*serve without it, with one of Offloading"):
        refuse(config)


def refused_by_connector(config: VllmConfig) -> bool:
    """Whether a server is refused for its connector; a test's process has loaded no logits processors."""
    try:
        refuse(config)
    except ValueError as error:
        return "with KV connector" in str(error)
    return False


@pytest.fixture(scope="module")
def any_configuration() -> VllmConfig:
    """A server's configuration, whose connector is replaced."""
    return configuration("OffloadingConnector")


@pytest.mark.parametrize("name", sorted(KVConnectorFactory._registry))
def test_each_connector_of_vllm_is_allowed_by_name_or_refused(any_configuration: VllmConfig, name: str) -> None:
    """One that comes with a later vLLM is refused until somebody has looked at its keys."""
    within = {"connectors": [{"kv_connector": "OffloadingConnector"}, {"kv_connector": name}]}
    allowed = name in SALTED_CONNECTORS
    if name != "MultiConnector":
        any_configuration.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role="kv_both")
        assert refused_by_connector(any_configuration) != allowed
        any_configuration.kv_transfer_config = KVTransferConfig(
            kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config=within
        )
        assert refused_by_connector(any_configuration) != allowed


def test_a_module_of_ones_own_is_refused_whatever_its_name(any_configuration: VllmConfig) -> None:
    any_configuration.kv_transfer_config = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_connector_module_path="mine", kv_role="kv_both"
    )
    with pytest.raises(ValueError, match=r"KV connector mine\.OffloadingConnector"):
        refuse(any_configuration)
