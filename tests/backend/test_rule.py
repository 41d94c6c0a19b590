"""Which stock kernels serve which GPU."""

from __future__ import annotations

import pytest

from vllm_sparse.backend.executors.rule import FLASH_ATTENTION, TRITON, Device, stock_kernels

HOPPER = Device("cuda", (9, 0))


@pytest.mark.parametrize(
    ("capability", "version"),
    [((8, 0), 2), ((8, 6), 2), ((8, 9), 2), ((9, 0), 3), ((10, 0), 4), ((10, 3), 4), ((12, 0), 2)],
)
def test_flash_attention_serves_where_vllm_has_it(capability: tuple[int, int], version: int) -> None:
    device = Device("cuda", capability)
    assert stock_kernels(device) is FLASH_ATTENTION[version]
    assert stock_kernels(device, "flash_attention") is FLASH_ATTENTION[version]
    assert stock_kernels(device, "triton") is TRITON
    assert device.tried == (device == HOPPER)


@pytest.mark.parametrize("device", [Device("cuda", (11, 0)), Device("cuda", (13, 7)), Device("rocm", (9, 4))])
def test_other_gpus_run_triton(device: Device) -> None:
    assert stock_kernels(device) is TRITON
    assert not device.tried
    with pytest.raises(ValueError, match=r'executor is "flash_attention".*set "auto" or "triton"'):
        stock_kernels(device, "flash_attention")


@pytest.mark.parametrize("device", [Device("cuda", (7, 5)), Device("xpu", (0, 0)), Device("tpu", (0, 0))])
def test_refused_devices_are_told_what_is_supported(device: Device) -> None:
    with pytest.raises(ValueError, match=r"does not support .*compute capability 8\.0 and newer.*ROCm.*x86-64 CPUs"):
        stock_kernels(device)


def test_the_version_that_the_server_chooses_wins() -> None:
    assert stock_kernels(HOPPER, flash_attn_version=2) is FLASH_ATTENTION[2]
    assert stock_kernels(HOPPER, "triton", flash_attn_version=2) is TRITON


def test_flash_attention_2_reads_no_lists_of_tokens() -> None:
    """Its pages are multiples of 16 tokens."""
    kernels = FLASH_ATTENTION[2]
    assert (kernels.dense, kernels.page_lists, kernels.token_lists) == ("flash_attention", "flash_attention", "triton")
    described = "FlashAttention 2 reads whole contexts, FlashAttention 2 lists of pages, "
    assert kernels.describe() == described + "vLLM's Triton attention lists of tokens"


def test_an_fp8_cache_is_read_by_kernels_that_can() -> None:
    assert stock_kernels(HOPPER, float8_cache=True) is FLASH_ATTENTION[3]
    assert stock_kernels(HOPPER, "triton", float8_cache=True) is TRITON
    assert stock_kernels(Device("cuda", (8, 9)), float8_cache=True) is TRITON
    assert stock_kernels(Device("cuda", (10, 0)), float8_cache=True) is FLASH_ATTENTION[4]
    for refused in (Device("cuda", (8, 0)), Device("cuda", (8, 6)), Device("rocm", (9, 4))):
        with pytest.raises(ValueError, match=r"does not read an FP8 KV cache.*set --kv-cache-dtype auto"):
            stock_kernels(refused, float8_cache=True)
    # FlashAttention 2 was asked for, and another kernel is not what was asked for.
    with pytest.raises(ValueError, match="FP8 KV cache with FlashAttention 2"):
        stock_kernels(HOPPER, flash_attn_version=2, float8_cache=True)
    with pytest.raises(ValueError, match="FP8 KV cache with FlashAttention 4"):
        stock_kernels(HOPPER, flash_attn_version=4, float8_cache=True)
