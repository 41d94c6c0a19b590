"""Bounded parts of `loadtest.robustness`: the commands themselves run as long as wanted."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from loadtest.robustness import differential, fuzz

pytestmark = pytest.mark.usefixtures("no_server", "answers_known")


def test_requests_answer_mixed_as_alone_and_dense_ones_as_stock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = differential.main(["--requests", "50", "--seed", str(secrets.randbits(32)), "--output", str(tmp_path)])
    assert status == 0, capsys.readouterr().out + (tmp_path / "differences.jsonl").read_text()


def test_no_body_makes_the_server_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = fuzz.main(["--bodies", "600", "--seed", str(secrets.randbits(32)), "--output", str(tmp_path)])
    assert status == 0, capsys.readouterr().out + (tmp_path / "failures.jsonl").read_text()
