"""The command that the Helm chart's Job runs, against a simulated server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.deploy.chart import find, one_model, render
from tests.loadtest.conftest import ROOT, Simulated

SCENARIO = """
description: of the chart
methods: {plain: {}}
workloads: [{name: chats, kind: text, input_tokens: 60, output_tokens: 5}]
load: {loop: closed, concurrency: [2], requests: 100}
slo: {ttft_seconds: 10, tpot_seconds: 10}
"""


def test_the_job_tests_with_what_the_image_holds_and_leaves_its_results(simulated: Simulated, tmp_path: Path) -> None:
    load_test = {"run": "first", "scenarioFile": SCENARIO, "set": ["load.requests=4"]}
    manifests = render(one_model(loadTest=load_test, servedNames=["simulated"], apiKey={"existingSecret": "key"}))
    (container,) = find(manifests, "Job")["spec"]["template"]["spec"]["containers"]
    (tmp_path / "scenario").mkdir()
    (tmp_path / "scenario" / "scenario.yaml").write_text(
        find(manifests, "ConfigMap", "-load-first")["data"]["scenario.yaml"]
    )
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "key").write_text("secret")
    # As the Dockerfile copies it: without the model's weights.
    image = tmp_path / "image"
    shutil.copytree(ROOT / "loadtest", image / "loadtest", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    replaced = {
        "http://example-vllm-sparse-m:8000": simulated.url,
        mounts["results"]: str(tmp_path / "results"),
        mounts["scenario"]: str(tmp_path / "scenario"),
        mounts["key"]: str(tmp_path / "key"),
    }
    arguments = list(container["args"])
    for place, here in replaced.items():
        assert any(place in argument for argument in arguments), place
        arguments = [argument.replace(place, here) for argument in arguments]
    program = Path(sys.executable).parent / container["command"][0]
    ended = subprocess.run(
        [program, *container["command"][1:], *arguments],
        cwd=image,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "| plain  | 4/4" in ended.stdout
    assert (tmp_path / "results" / "first" / "report.html").exists()
    assert (tmp_path / "results" / "first" / "report.json").exists()
