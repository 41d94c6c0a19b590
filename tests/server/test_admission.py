"""Admission where the configuration changes between a request's parsing and its admission."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).parents[2] / "loadtest" / "model" / "weights"

# In a process of its own: it teaches vLLM's request classes the configuration of one server.
CODE = """
import asyncio, os, sys, tempfile
from types import SimpleNamespace
import prometheus_client
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.exceptions import VLLMValidationError
from vllm_sparse.config.presets import PRESETS, Choice, Preset, Tier
from vllm_sparse.config.request import RESOLVED_KEY, deserialize
from vllm_sparse.config.server import server_config
from vllm_sparse.hooks import base_serving, sampling_params
from vllm_sparse.server.admission import admit
from vllm_sparse.server.runtime_config import DIRECTORY_VARIABLE, Served, change_config

os.environ[DIRECTORY_VARIABLE] = sys.argv[2]
vllm_config = EngineArgs(
    model=sys.argv[1], attention_backend="sparse", additional_config={"sparse": {"prefill": "flexprefill"}}
).create_engine_config()
base_serving.install(vllm_config)
sampling_params.install()
extras = {"flexprefill_gamma": 0.5}
route = OpenAIServingCompletion.__new__(OpenAIServingCompletion)
route.request_logger = None
route._is_model_supported = lambda name: True

def parse(n=1):
    request = CompletionRequest(model="m", prompt="x", stream=True, n=n, vllm_xargs=extras)
    async def answer():
        await route._check_model(request)
        return request.to_sampling_params(4, {})
    return asyncio.run(answer())

def prefill_of(params, prompt_tokens=9000):
    def build():
        return SimpleNamespace(
            sampling_params=params.clone(), cache_salt=None, prompt_token_ids=[5] * prompt_tokens, resumable=False
        )
    admitted = admit(vllm_config, params, build)
    resolved = (admitted.sampling_params.extra_args or {}).get(RESOLVED_KEY)
    return resolved and deserialize(resolved).prefill

parsed = parse()
served = Served(server_config(vllm_config), 8, 4, 4096, False)
change_config(served, {"prefill": "dense"}, None)
assert prefill_of(parsed).gamma == 0.5
try:
    parse()
except VLLMValidationError as error:
    assert "flexprefill_gamma is a knob of flexprefill, which this request does not use" in str(error)
    print("refused")

# Of a preset, what prompts of each length run is kept.
def presets_counted():
    labels = {"model_name": vllm_config.model_config.served_model_name, "preset": "stepped"}
    return prometheus_client.REGISTRY.get_sample_value("vllm_sparse_presets_total", labels)

extras = {"tidal_budget_tokens": 99}
PRESETS["stepped"] = Preset("", "", (Tier(10000, Choice("sale", {"tau": 0.5}), Choice("tidal")),))
change_config(served, {"preset": "stepped", "prefill": None}, None)
parsed = parse()
change_config(served, {"prefill": "dense"}, None)
assert presets_counted() is None
assert prefill_of(parsed, 9999) is None
assert prefill_of(parsed, 10000).tau == 0.5
assert presets_counted() == 2
print("kept by length")

# Each of several answers counts, as in vLLM's metrics.
change_config(served, {"preset": "stepped", "prefill": None}, None)
assert prefill_of(parse(n=3)) is None
assert presets_counted() == 5
print("counted by answers")
"""


def test_a_request_keeps_what_it_was_parsed_to(tmp_path: Path) -> None:
    """Its stream may have begun; the next one is refused, while that can still be done."""
    output = subprocess.check_output([sys.executable, "-c", CODE, str(MODEL), str(tmp_path)], text=True, timeout=300)
    assert output.splitlines()[-3:] == ["refused", "kept by length", "counted by answers"]
