"""Registration, pickling into fresh processes, and selection on the CPU platform."""

from __future__ import annotations

import base64
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from vllm_sparse import plugin
from vllm_sparse.backend.cpu import DEFAULT_BLOCK_TOKENS

MODEL = str(Path(__file__).parents[1] / "loadtest" / "model" / "weights")


needs_cpu_platform = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's platform is not the CPU")


def member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    return AttentionBackendEnum.__members__["SPARSE"]


def fresh(code: str) -> str:
    """Output of Python code in a process that has loaded nothing."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip().splitlines()[-1]


def test_registering_twice_changes_nothing() -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.engine.input_processor import InputProcessor

    backend = member()
    hooks = (
        CpuPlatform.__dict__["get_attn_backend_cls"],
        CpuPlatform.__dict__["check_and_update_config"],
        InputProcessor.process_inputs,
    )
    plugin.register()
    assert member() is backend
    assert backend.get_path() == plugin.BACKEND_PATH
    assert hooks == (
        CpuPlatform.__dict__["get_attn_backend_cls"],
        CpuPlatform.__dict__["check_and_update_config"],
        InputProcessor.process_inputs,
    )


@pytest.mark.parametrize("library", ["pickle", "cloudpickle"])
def test_the_backend_unpickles_where_no_plugin_was_loaded(library: str) -> None:
    pickler = pytest.importorskip(library)
    text = base64.b64encode(pickler.dumps({"backend": member()})).decode()
    out = fresh(
        f"import base64, pickle; member = pickle.loads(base64.b64decode('{text}'))['backend']\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "assert member is AttentionBackendEnum.__members__['SPARSE']\n"
        "print(member.name, member.get_path())"
    )
    assert out == f"SPARSE {plugin.BACKEND_PATH}"


def test_workers_do_not_load_the_servers_room() -> None:
    """What a worker loads: the plugin, the backend, and the logits processor with the hooks of runner V2."""
    out = fresh(
        "import sys\n"
        "from vllm_sparse import plugin\n"
        "plugin.register()\n"
        "import vllm_sparse.backend, vllm_sparse.hooks.logits_processor\n"
        "from vllm_sparse.hooks import gpu_model_runner, model_cuda_graph_manager\n"
        "print([name for name in sys.modules if name.startswith('vllm_sparse.server')])"
    )
    assert out == "[]"


def test_backends_copy_to_themselves() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for backend in (member(), AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLASH_ATTN):
        assert copy.deepcopy(backend) is backend
        assert pickle.loads(pickle.dumps(backend)) is backend


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32 and 0\.33, found 0\.31\.2; install"):
        plugin.register()


def select(backend: Any, **changes: Any) -> str:
    """The real selection of the CPU platform for a real configuration."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plugin.register()
    wanted = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 32, **changes}
    path: str = CpuPlatform.get_attn_backend_cls(backend, AttentionSelectorConfig(**wanted), num_heads=8)
    return path


@needs_cpu_platform
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_size": 128}, {"dtype": torch.float32}, {"block_size": None}, {"block_size": 48},
     {"kv_cache_dtype": None}, {"kv_cache_dtype": "bfloat16"}],
    ids=repr,
)  # fmt: skip
def test_the_cpu_platform_selects_the_backend(changes: dict[str, Any]) -> None:
    assert select(member(), **changes) == plugin.BACKEND_PATH


@needs_cpu_platform
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"head_size": 72}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"block_size": 40}, "block_size not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_sparse": True}, "sparse not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_the_cpu_platform_refuses_what_the_backend_cannot_do(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="attention backend sparse does not support this configuration") as caught:
        select(member(), **changes)
    assert reason in str(caught.value)
    assert "serve without --attention-backend sparse" in str(caught.value)


@needs_cpu_platform
def test_other_backends_are_selected_as_before() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for backend in (None, AttentionBackendEnum.CPU_ATTN):
        assert select(backend) == AttentionBackendEnum.CPU_ATTN.get_path()
        assert select(backend, kv_cache_dtype="fp8") == AttentionBackendEnum.CPU_ATTN.get_path()
        assert "mla" in select(backend, use_mla=True).lower()


@needs_cpu_platform
@pytest.mark.parametrize(("asked", "expected"), [(None, DEFAULT_BLOCK_TOKENS), (64, 64)])
@pytest.mark.parametrize("window", [False, True], ids=["one backend", "two backends"])
def test_blocks_are_small_unless_the_command_line_says_otherwise(
    asked: int | None, expected: int, window: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is a block on a CPU. vLLM chooses with the configuration, from 0.33 on again when layers are known."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    backends = [member().get_class(), *([AttentionBackendEnum.CPU_ATTN.get_class()] if window else [])]
    monkeypatch.setattr(CpuPlatform, "_find_non_ssm_backends", lambda _: backends)
    config = EngineArgs(model=MODEL, attention_backend="sparse", block_size=asked).create_engine_config()
    CpuPlatform.update_block_size_for_backend(config)
    assert config.cache_config.block_size == expected


@needs_cpu_platform
def test_stock_blocks_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    monkeypatch.setattr(CpuPlatform, "_find_non_ssm_backends", lambda _: [AttentionBackendEnum.CPU_ATTN.get_class()])
    config = EngineArgs(model=MODEL).create_engine_config()
    CpuPlatform.update_block_size_for_backend(config)
    assert config.cache_config.block_size == 128
