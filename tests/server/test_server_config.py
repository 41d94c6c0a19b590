"""A server's configuration is parsed once: processes that start later and copies of vLLM's have what was parsed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_sparse.config.server import server_config

MODEL = str(Path(__file__).parents[2] / "loadtest" / "model" / "weights")


@pytest.fixture(params=[{}, {"sparse": {"min_tokens": 512}, "other": {"a": 1}}], ids=["none", "some"])
def config(request: pytest.FixtureRequest) -> Any:
    """Of a server, as vLLM makes it, which has been parsed."""
    made = EngineArgs(
        model=MODEL, attention_backend="sparse", additional_config=dict(request.param)
    ).create_engine_config()
    assert server_config(made).min_tokens == request.param.get("sparse", {}).get("min_tokens", 8192)
    return made


def test_copies_that_vllm_makes_have_it(config: Any) -> None:
    """Such as that of the text part of a model that reads images, which is made of vLLM's fields alone."""
    copied = config.with_hf_config(config.model_config.hf_config)
    assert server_config(copied) is server_config(config)


def test_processes_that_start_later_have_it(config: Any) -> None:
    parsed = server_config(config)
    # Parsed again, it would be another one.
    config.additional_config["sparse"]["min_tokens"] = 77
    received = pickle.loads(pickle.dumps(config))
    assert server_config(received) == parsed
    assert server_config(received).min_tokens != 77
    # vLLM names caches of compiled code by it.
    assert received.compute_hash() == config.compute_hash()
