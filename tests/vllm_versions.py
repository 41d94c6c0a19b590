"""What tests ask of vLLM in another way of each supported version; the only such file of the tests."""

from __future__ import annotations

from typing import Any

import vllm

SINCE_0_33 = tuple(int(number) for number in vllm.__version__.split(".")[:2]) >= (0, 33)


def kv_cache_config(vllm_config: Any, layers: dict[str, Any], available_bytes: int) -> Any:
    """vLLM's `KVCacheConfig` of a single worker.

    Args:
        vllm_config: vLLM's configuration.
        layers: by name of a layer its `KVCacheSpec`.
        available_bytes: what the cache gets.
    """
    if SINCE_0_33:
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

        groups = get_global_kv_cache_groups(vllm_config, [layers])
        (cache,) = get_kv_cache_configs(vllm_config, [layers], [available_bytes], groups)
    else:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        (cache,) = get_kv_cache_configs(vllm_config, [layers], [available_bytes])
    return cache


def serve_parser() -> Any:
    """vLLM's parser of the arguments of `vllm serve`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if SINCE_0_33:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    else:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    return make_arg_parser(FlexibleArgumentParser())
