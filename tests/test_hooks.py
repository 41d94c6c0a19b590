"""What `vllm_sparse/hooks` and the backends take of the installed vLLM is there, in the form in which they take it.

These tests tell of a new vLLM what it changed, by name, where the others fail with whatever follows from it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HOOKS = Path(__file__).parents[1] / "vllm_sparse" / "hooks"

CPU, SELECTOR = "vllm.platforms.cpu:CpuPlatform", "vllm.v1.attention.selector"
OUTPUT = "vllm.v1.engine.output_processor"
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager"
LAYERS = "vllm.model_executor.layers.attention"
# Parameters that a hook's replacement passes on without naming them.
OTHERS = "..."

# By file of `hooks/`: each function that it replaces, with the parameters that the replacement names.
WRAPPED: dict[str, dict[str, str]] = {
    "attention_selector": {
        f"{SELECTOR}:_cached_get_attn_backend": "backend attn_selector_config num_heads ...",
        f"{LAYERS}.chunked_local_attention:get_attn_backend": OTHERS,
        f"{LAYERS}.static_sink_attention:get_attn_backend": OTHERS,
        f"{LAYERS}.prefill_prefix_lm_attention:get_attn_backend": OTHERS,
    },
    "base_serving": {
        "vllm.entrypoints.serve.engine.serving:BaseServing._check_model": "self request",
        "vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model": "self request",
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion": (
            "self request raw_request"
        ),
        "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens": "self request raw_request",
    },
    "cpu_platform": {
        f"{CPU}.get_attn_backend_cls": "selected_backend attn_selector_config num_heads",
        f"{CPU}.check_and_update_config": "vllm_config",
        f"{CPU}._preferred_block_size_for_backends": "backend_classes default_block_size vllm_config",
    },
    "engine_args": {"vllm.engine.arg_utils:EngineArgs.create_engine_config": OTHERS},
    "gpu_model_runner": {
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state": "self scheduler_output dummy_run",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests": "self scheduler_output",
    },
    "gpu_model_runner_v1": {"vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": "self scheduler_output"},
    "gpu_worker": {"vllm.v1.worker.gpu_worker:Worker.determine_available_memory": "self"},
    "input_processor": {
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs": "self request_id prompt params ..."
    },
    "kv_cache_utils": {
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
            "request start_token_idx end_token_idx start_mm_idx"
        )
    },
    "model_cuda_graph_manager": {
        f"{GRAPHS}.capture": OTHERS,
        f"{GRAPHS}.dispatch": "self num_reqs num_tokens ...",
        f"{GRAPHS}.run_fullgraph": "self desc",
    },
    "output_processor": {
        f"{OUTPUT}:OutputProcessor.do_tracing": "self engine_core_output req_state iteration_stats",
        f"{OUTPUT}:instrument_manual": OTHERS,
        f"{OUTPUT}:OutputProcessor._update_stats_from_output": (
            "self req_state engine_core_output engine_core_timestamp iteration_stats"
        ),
        f"{OUTPUT}:OutputProcessor._update_stats_from_finished": "self req_state finish_reason iteration_stats",
    },
    "request_state": {f"{OUTPUT}:RequestState.from_new_request": "tokenizer request ..."},
    "sampling_params": {"vllm.sampling_params:SamplingParams.from_optional": OTHERS},
    "worker_base": {"vllm.v1.worker.worker_base:WorkerBase.__init__": "self ..."},
}
# Files that replace no function.
OTHER_HOOKS = {"attention_backend_enum", "logits_processor"}

# Keyword arguments that the plugin gives to functions of vLLM.
GIVEN = {
    f"{OUTPUT}:instrument_manual": "attributes",
    f"{GRAPHS}.capture": "progress_bar_desc",
    "vllm.v1.attention.ops.triton_unified_attention:unified_attention": (
        "q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal window_size block_table "
        "softcap q_descale k_descale v_descale kv_quant_mode seq_threshold_3D num_par_softmax_segments "
        "softmax_segm_output softmax_segm_max softmax_segm_expsum"
    ),
    "vllm._custom_ops:cpu_attn_get_scheduler_metadata": (
        "num_reqs num_heads num_kv_heads head_dim seq_lens dtype query_start_loc causal sliding_window_size isa "
        "enable_kv_split kv_cache_dtype"
    ),
    "vllm.v1.attention.backend:AttentionBackend.validate_configuration": "device_capability",
}

# Attributes of vLLM's objects that hooks, plans and backends read or set.
ATTRIBUTES = {
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "causal is_prefilling num_reqs query_start_loc_cpu req_idx seq_lens_cpu_upper_bound"
    ),
    "vllm.model_executor.layers.attention:Attention": "get_attn_backend impl",
    "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager": (
        "_capture_descs _max_full_descs_to_capture graphs vllm_config"
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor": "cg_mode num_reqs uniform_token_count",
    "vllm.v1.worker.gpu.model_runner:BatchReqState": "idx_mapping_np",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "is_last_pp_rank req_states",
    "vllm.v1.worker.gpu.states:RequestState": "prompt_len req_id_to_index",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "requests",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "sampling_params",
    "vllm.v1.core.sched.output:NewRequestData": "prompt_len req_id sampling_params",
    "vllm.v1.core.sched.output:SchedulerOutput": "scheduled_cached_reqs scheduled_new_reqs",
    "vllm.v1.core.sched.output:CachedRequestData": "resumed_req_ids",
    "vllm.v1.worker.gpu_worker:Worker": "available_kv_cache_memory_bytes cache_config vllm_config",
    "vllm.config:CacheConfig": "block_size kv_cache_memory_bytes user_specified_block_size",
    "vllm.config:AttentionConfig": "backend",
    f"{SELECTOR}:AttentionSelectorConfig": "has_sliding_window",
    "vllm.v1.request:Request": "cache_salt",
    f"{OUTPUT}:RequestState": "is_prefilling prompt_len stats",
    "vllm.v1.engine:EngineCoreOutput": "new_token_ids prefill_stats",
    "vllm.v1.metrics.stats:PrefillStats": "num_computed_tokens",
    "vllm.v1.metrics.stats:RequestStateStats": "num_generation_tokens",
    "vllm.v1.metrics.stats:IterationStats": "finished_requests inter_token_latencies_iter time_to_first_tokens_iter",
    "vllm.v1.metrics.stats:FinishedRequestStats": "e2e_latency",
    "vllm.v1.engine.input_processor:InputProcessor": "vllm_config",
}

INSTALL_ALL = f"""
import importlib, json, sys
from types import SimpleNamespace
import vllm.engine.arg_utils
from vllm_sparse import plugin
from vllm_sparse.hooks import (
    attention_selector, base_serving, gpu_model_runner, gpu_model_runner_v1, gpu_worker, model_cuda_graph_manager,
    output_processor, sampling_params,
)
plugin.register()
attention_selector.install_deriving()
base_serving.install(None)
for hook in gpu_model_runner, gpu_model_runner_v1, gpu_worker, model_cuda_graph_manager, sampling_params:
    hook.install()
output_processor.observe_requests()
output_processor.trace_requests(SimpleNamespace(speculative_config=None))
left = []
for path in {[path for paths in WRAPPED.values() for path in paths]!r}:
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    code = getattr(found, "__code__", None)
    if code is None or "vllm_sparse" not in code.co_filename:
        left.append(path)
print(json.dumps(left))
"""


def of_vllm(path: str) -> Any:
    """What ``module:name.name`` names."""
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def attributes_of(kind: type) -> set[str]:
    """What objects of a class have: what it declares, and what its methods set."""
    found = set(dir(kind)) | {name for one in kind.__mro__ for name in vars(one).get("__annotations__", {})}
    for one in kind.__mro__[:-1]:
        if one.__module__.startswith("vllm."):
            found |= set(re.findall(r"\bself\.(\w+)\b[^=\n(]*=[^=]", inspect.getsource(one)))
    return found


def test_each_hook_is_listed() -> None:
    files = {path.stem for path in HOOKS.glob("*.py")} - {"__init__", "wrapping"}
    assert files == WRAPPED.keys() | OTHER_HOOKS


@pytest.mark.parametrize(
    ("path", "named"), [pair for paths in WRAPPED.values() for pair in paths.items()], ids=lambda value: str(value)
)
def test_what_hooks_wrap_takes_what_they_pass_on(path: str, named: str) -> None:
    taken = list(inspect.signature(of_vllm(path)).parameters)
    names = named.split()
    if names[-1] == OTHERS:
        assert taken[: len(names) - 1] == names[:-1]
    else:
        assert taken == names


@pytest.mark.parametrize(("path", "names"), GIVEN.items(), ids=lambda value: str(value)[:80])
def test_functions_take_the_arguments_that_they_are_given(path: str, names: str) -> None:
    parameters = inspect.signature(of_vllm(path)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    assert set(names.split()) <= parameters.keys()


def test_flash_attention_takes_the_arguments_that_it_is_given() -> None:
    """Read, not imported: the module wants its CUDA library."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    (function,) = [node for node in functions if node.name == "flash_attn_varlen_func"]
    taken = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    given = (
        "q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal block_table softcap "
        "fa_version q_descale k_descale v_descale"
    )
    assert set(given.split()) <= taken


@pytest.mark.parametrize(("path", "names"), ATTRIBUTES.items(), ids=lambda value: str(value)[:80])
def test_objects_have_what_is_read_of_them(path: str, names: str) -> None:
    assert set(names.split()) <= attributes_of(of_vllm(path))


def test_layers_have_the_scales_of_an_fp8_cache() -> None:
    layer: Any = torch.nn.Module()
    of_vllm("vllm.model_executor.layers.attention.attention:set_default_quant_scales")(layer, register_buffer=True)
    assert float(layer._v_scale) == layer._q_scale_float == layer._k_scale_float == 1.0


def test_all_hooks_can_be_installed() -> None:
    """In a process of its own, since hooks stay."""
    run = subprocess.run([sys.executable, "-c", INSTALL_ALL], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("runner", ["vllm.v1.worker.gpu.sample.logits_processor", "vllm.v1.sample.logits_processor"])
def test_logits_processors_of_both_runners_have_the_methods_that_are_overridden(runner: str) -> None:
    from vllm_sparse.hooks.logits_processor import SparseParamsProcessor

    interface = of_vllm(f"{runner}:LogitsProcessor")
    asked = {name for name, value in vars(interface).items() if getattr(value, "__isabstractmethod__", False)}
    assert asked <= vars(SparseParamsProcessor).keys()
