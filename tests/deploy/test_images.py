"""What the images run and are listed by, outside of an image."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.deploy.chart import DEPLOY

DOCKER = DEPLOY / "docker"


@contextmanager
def server(status: int) -> Iterator[int]:
    """A server whose `/health` answers so; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port
        http.shutdown()


def check(folder: Path, *processes: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the health check where these processes run, the first as number 1."""
    for number, arguments in enumerate(processes, 1):
        (folder / str(number)).mkdir()
        (folder / str(number) / "cmdline").write_text("\0".join([*arguments, ""]))
    (folder / "cpuinfo").write_text("")
    command = [sys.executable, "-I", str(DOCKER / "healthcheck.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


VLLM = ["/opt/vllm/bin/python3", "/opt/vllm/bin/vllm", "serve", "model"]


class TestHealthCheck:
    @pytest.mark.parametrize(
        "form", ["--port={}", "--port {}", "--host 0.0.0.0 --port {}", "--host=127.0.0.1 --port {}"]
    )
    def test_follows_the_port(self, form: str, tmp_path: Path) -> None:
        with server(200) as port:
            done = check(tmp_path, [*VLLM, *form.format(port).split()])
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"127.0.0.1:{port}" in done.stdout

    def test_finds_the_server_behind_an_init(self, tmp_path: Path) -> None:
        with server(200) as port:
            assert check(tmp_path, ["/sbin/docker-init", "--"], [*VLLM, "--port", str(port)]).returncode == 0

    def test_reads_the_file_of_config_below_the_arguments(self, tmp_path: Path) -> None:
        written = tmp_path / "config.yaml"
        processes = tmp_path / "processes"
        processes.mkdir()
        with server(200) as port:
            written.write_text(f"model: name\nport: {port}  # of the API\n")
            assert check(processes, [*VLLM, f"--config={written}"]).returncode == 0
            written.write_text("port: 1\n")
            (processes / "1" / "cmdline").unlink()
            (processes / "1").rmdir()
            assert check(processes, [*VLLM, f"--config={written}", "--port", str(port)]).returncode == 0

    @pytest.mark.parametrize("status", [404, 500, 503])
    def test_fails_with_the_server(self, status: int, tmp_path: Path) -> None:
        with server(status) as port:
            done = check(tmp_path, [*VLLM, f"--port={port}"])
        assert done.returncode == 1
        assert f"HTTP {status}" in done.stdout

    @pytest.mark.parametrize("arguments", [[*VLLM, "--port", "1"], [*VLLM, "--port", "http"], ["sleep", "60"]])
    def test_fails_in_a_sentence(self, arguments: list[str], tmp_path: Path) -> None:
        done = check(tmp_path, arguments)
        assert done.returncode == 1
        assert done.stdout.startswith("healthcheck: ")
        assert not done.stderr


STATUS = """Package: libnuma1
Status: install ok installed
Architecture: amd64
Version: 2.0.16-1
Description: Libraries for controlling NUMA policy
 Version: none

Package: libgone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: libstdc++6
Status: install ok installed
Architecture: arm64
Version: 1:12.2.0-14
"""
CUDA = {"cuda": {"name": "CUDA SDK", "version": "12.9.1"}, "libcublas": {"name": "CUDA cuBLAS", "version": "12.9.1.4"}}


def test_the_sbom_lists_the_system_and_cuda(tmp_path: Path) -> None:
    for path, content in (
        ("etc/os-release", "ID=debian\nVERSION_CODENAME=bookworm\n"),
        ("var/lib/dpkg/status", STATUS),
        ("usr/local/cuda-12.9/version.json", json.dumps(CUDA)),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    # As images have it.
    (tmp_path / "usr/local/cuda").symlink_to("cuda-12.9")
    listed = tmp_path / "sbom.json"
    python = {"type": "library", "bom-ref": "torch==2", "name": "torch", "version": "2"}
    listed.write_text(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [python]}))
    command = [sys.executable, "-I", str(DOCKER / "system_sbom.py"), str(listed), str(tmp_path)]
    for _ in range(2):
        # A second run adds nothing.
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        assert "2 packages of the system and 2 parts of CUDA" in done.stdout
        components = json.loads(listed.read_text())["components"]
        assert components[0] == python
        assert [component.get("purl") for component in components[1:]] == [
            "pkg:deb/debian/libnuma1@2.0.16-1?arch=amd64",
            "pkg:deb/debian/libstdc%2B%2B6@1%3A12.2.0-14?arch=arm64",
            "pkg:generic/nvidia/cuda@12.9.1",
            "pkg:generic/nvidia/libcublas@12.9.1.4",
        ]


FAKE_APT = """#!/bin/sh
list=$(echo "$*" | sed -n 's/.*SourceList=\\([^ ]*\\).*/\\1/p')
echo "apt-get $*"
[ -z "$list" ] || cat "$list"
"""


@pytest.mark.parametrize("snapshot", ["", "20261128T000000Z"])
def test_packages_come_from_one_time_of_the_archives(snapshot: str, tmp_path: Path) -> None:
    (tmp_path / "apt-get").write_text(FAKE_APT)
    (tmp_path / "apt-get").chmod(0o755)
    command = ["sh", str(DOCKER / "apt-install.sh"), snapshot, "python3", "libnuma1"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    update, *_ = done.stdout.splitlines()
    assert update.startswith("apt-get ")
    assert update.endswith(" update")
    assert "APT::Install-Recommends=false" in done.stdout
    assert "install -y python3 libnuma1" in done.stdout
    assert ("SourceParts=/dev/null" in done.stdout) is bool(snapshot)
    sources = [line for line in done.stdout.splitlines() if line.startswith("deb ")]
    # Both calls read them.
    assert len(sources) == (2 * 3 if snapshot else 0)
    assert all(f"/{snapshot}" in source for source in sources)
