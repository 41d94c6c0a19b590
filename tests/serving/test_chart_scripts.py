"""The Helm chart's scripts, against a real server: the completion of `helm test` and the readiness of a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.deploy.chart import CHART, find, one_model, render
from tests.serving.server import MODEL_NAME, Server, free_port


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the chart as its pod does: by a bare Python, with nothing of this project."""
    command = [sys.executable, "-I", "-S", str(CHART / "files" / name), *arguments]
    return subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def helm_test(server: Server, **settings: Any) -> subprocess.CompletedProcess[str]:
    """What `helm test` would run with these settings of its object ``test``, against this server."""
    pod = find(render(one_model(servedNames=[MODEL_NAME], test=settings)), "Pod")
    _, *arguments = pod["spec"]["containers"][0]["args"]
    return script("completion.py", server.url, *arguments)


class TestCompletion:
    def test_a_sparse_completion_is_asked_and_counted(self, server: Server) -> None:
        before = server.metrics()
        done = helm_test(server)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "prefill ran flexprefill" in done.stdout
        assert "decode ran tidal" in done.stdout
        name, labels = "vllm_sparse_requests_total", {"phase": "decode", "method": "tidal"}
        assert server.metrics().total(name, **labels) == before.total(name, **labels) + 1

    def test_a_prompt_that_ran_dense_fails(self, server: Server) -> None:
        done = helm_test(server, promptWords=20)
        assert done.returncode == 1
        assert "prefill did not run flexprefill sparsely" in done.stderr

    def test_a_refused_request_fails_with_the_reason(self, server: Server) -> None:
        # The chart itself refuses such values before installation.
        done = script("completion.py", server.url, MODEL_NAME, json.dumps({"sparse_prefill": "quest"}), "10", "60")
        assert done.returncode == 1
        assert "HTTP 400" in done.stderr
        assert "sparse_prefill is 'quest'" in done.stderr

    def test_another_model_fails(self, server: Server) -> None:
        done = script("completion.py", server.url, "other", json.dumps({}), "10", "60")
        assert done.returncode == 1
        assert f"lists {MODEL_NAME}, not other" in done.stderr


class TestReadiness:
    def test_follows_the_listed_models(self, server: Server) -> None:
        assert script("ready.py", server.url, MODEL_NAME, VLLM_API_KEY="unused").returncode == 0
        done = script("ready.py", server.url, MODEL_NAME, "other")
        assert done.returncode == 1
        assert f"lists {MODEL_NAME}, not other" in done.stderr

    def test_a_server_that_does_not_listen_is_not_ready(self) -> None:
        assert script("ready.py", f"http://127.0.0.1:{free_port()}", MODEL_NAME).returncode == 1
