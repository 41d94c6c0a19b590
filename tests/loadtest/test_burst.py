"""Variants and lines of the burst command."""

from __future__ import annotations

from loadtest.benchmarks.engine.burst import Burst, line, variants_of


def test_mixed_requests_have_the_methods_in_turn() -> None:
    variants = variants_of(["dhsa", "sale"], mixed=True, min_tokens=9)
    assert list(variants) == ["SPARSE, dense", "dhsa", "sale", "mixed"]
    assert [extras["sparse_prefill"] for extras in variants["mixed"]] == ["dhsa", "sale"]
    assert all(extras["sparse_min_tokens"] == 9 for extras in variants["mixed"])
    assert variants["SPARSE, dense"] == [{}]
    assert "mixed" not in variants_of(["dhsa"], mixed=False, min_tokens=9)


def test_ratios_are_the_dense_time_over_the_lines() -> None:
    dense, sparse = Burst("FLASH_ATTN", 4.0, 1000, None), Burst("dhsa", 2.0, 1000, 0.25)
    assert line(sparse, dense) == "| dhsa | 0.250 | 2.000 | 500 | 2.00x |"
    assert line(dense, dense) == "| FLASH_ATTN | 1 | 4.000 | 250 | 1.00x |"
