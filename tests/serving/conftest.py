"""Servers for the served tests. A server starts on first use and ends when another one is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving.server import API_KEY, Server, ServerKeeper
from tests.serving.span_receiver import SpanReceiver

BUNDLED_MODEL = Path(__file__).parents[2] / "loadtest" / "model" / "weights"

_COMMON = ("--kv-cache-memory-bytes", "1G", "--max-num-batched-tokens", "2048", "--enable-prompt-tokens-details")

# A small KV cache, so that three long requests do not fit once they have generated some hundred tokens.
CONFIGURATION = {
    "sparse": {
        "prefill": "flexprefill",
        "methods": ["flexprefill", "blocktopk"],
        "min_tokens": 1024,
        "flexprefill": {"gamma": 0.9, "min_budget_tokens": 256},
    }
}
_CONFIGURED = (
    *_COMMON,
    *("--additional-config", json.dumps(CONFIGURATION), "--api-server-count", "2", "--enforce-eager"),
    *("--block-size", "32", "--num-gpu-blocks-override", "400", "--max-model-len", "8192"),
    *("--api-key", API_KEY),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--model-folder` runs the served tests with another model; those that need right answers are skipped then."""
    parser.addoption("--model-folder", type=Path, default=None, help="model for tests/serving, instead of the bundled")


@pytest.fixture(scope="session")
def model_folder(pytestconfig: pytest.Config) -> Path:
    """The model that is served."""
    folder: Path = pytestconfig.getoption("--model-folder", default=None) or BUNDLED_MODEL
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model in {folder}; `git checkout -- loadtest/model/weights` restores the bundled one")
    return folder


@pytest.fixture(scope="session")
def _keeper(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerKeeper]:
    keeper = ServerKeeper(model_folder, tmp_path_factory.mktemp("servers"))
    yield keeper
    keeper.stop()


@pytest.fixture
def server(_keeper: ServerKeeper) -> Server:
    """A server as a user starts it, with default settings and compilation, and the routes of token ids beside."""
    return _keeper.get((*_COMMON, "--enable-scale-out"))


@pytest.fixture(scope="session")
def spans() -> Iterator[SpanReceiver]:
    """Receives the spans of `configured_server`."""
    with SpanReceiver() as receiver:
        yield receiver


@pytest.fixture
def configured_server(_keeper: ServerKeeper, spans: SpanReceiver) -> Server:
    """Two API servers with the plugin's routes, an API key and tracing; defaults, two enabled methods, a small KV
    cache."""
    environment = {
        "VLLM_PLUGINS": "sparse",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    return _keeper.get((*_CONFIGURED, "--otlp-traces-endpoint", spans.url), environment)


@pytest.fixture
def sharing_server(_keeper: ServerKeeper) -> Server:
    """A server with methods of prompts, of generations, and such that keep something beside the cache."""
    methods = {"sparse": {"methods": ["flexprefill", "tidal", "blocktopk", "tokentopk"]}}
    arguments = ("--additional-config", json.dumps(methods), "--block-size", "32", "--enforce-eager")
    return _keeper.get((*_COMMON, *arguments))


@pytest.fixture
def preset_server(_keeper: ServerKeeper) -> Server:
    """A server whose default is a preset, with the plugin's routes."""
    arguments = (*_COMMON, "--additional-config", json.dumps({"sparse": {"preset": "fast"}}), "--enforce-eager")
    return _keeper.get(arguments, {"VLLM_PLUGINS": "sparse"})


@pytest.fixture
def restarted(_keeper: ServerKeeper) -> Callable[[], Server]:
    """Starts the running server again."""
    return _keeper.restart


@pytest.fixture
def no_server(_keeper: ServerKeeper) -> None:
    """Ends the running server: the test starts vLLM itself."""
    _keeper.stop()


@pytest.fixture
def answers_known(model_folder: Path) -> None:
    """Skips with a model that was not trained to answer."""
    if model_folder.resolve() != BUNDLED_MODEL:
        pytest.skip("only the bundled model answers right")
