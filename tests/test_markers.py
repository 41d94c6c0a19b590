"""The markers by which `make test-fast` and `make test-gpu` choose."""

from __future__ import annotations

from pathlib import Path

from tests.slow import SLOW

ROOT = Path(__file__).parents[1]


def test_tests_that_are_called_slow_exist() -> None:
    gone = [
        f"{file}::{name}"
        for file, names in SLOW.items()
        for name in names
        if not (ROOT / file).exists() or f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert gone == [], "rename or delete them in tests/slow.py"
