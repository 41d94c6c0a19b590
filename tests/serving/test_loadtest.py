"""The smoke scenario of the load test against the real server, shortened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.serving.server import Server

ROOT = Path(__file__).parents[2]
SHORTER = (
    "load.requests=18",
    "workloads.0.input_tokens=2500",
    "workloads.1.weight=3",
    "request_timeout_seconds=200",
)


def test_dense_and_two_sparse_methods_side_by_side(server: Server, answers_known: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest.load", "smoke", "--url", server.url]
    settings = [part for setting in SHORTER for part in ("--set", setting)]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), *settings],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["summary"]["failures"] == {}
    (stage,) = report["summary"]["stages"]
    assert [*stage["methods"]] == ["dense", "flexprefill", "tidal"]
    for one in stage["methods"].values():
        assert one["succeeded"] == one["requests"] >= 3
        assert one["ttft_seconds"]["mean"] > 0
        assert one["tpot_seconds"]["count"] >= 1
    assert stage["methods"]["dense"]["score"]["mean"] > 0.6
    assert 0 < stage["density"]["prefill/flexprefill"] < 1
    assert 0 < stage["density"]["decode/tidal"] < 0.5
    assert stage["workloads"]["short chats"]["succeeded"] >= 1
    assert all(row["pairs"] == stage["methods"]["dense"]["requests"] for row in report["summary"]["comparisons"])
    planned = {entry["input_tokens"] for entry in report["stages"][-1]["schedule"] if entry["workload"] == "needles"}
    measured = [request["input_tokens"] for request in report["stages"][-1]["requests"] if request["score"] is not None]
    assert planned == {2500}
    assert all(2350 <= tokens <= 2510 for tokens in measured)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http://127.0.0.1", "").partition("Settings")[0]
