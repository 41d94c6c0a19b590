"""What `make release` makes, refuses, and says."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy.docker import lock
from tools import release

DIGEST = f"sha256:{'0f' * 32}"
BASES = {
    **{argument: f"{image}@{DIGEST}" for argument, image in lock.base_images().items()},
    "APT_SNAPSHOT": "20261128T000000Z",
}


def wheel(folder: Path, tag: str, *files: str) -> Path:
    path = folder / f"vllm_sparse-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for name in files:
            packed.writestr(name, "")
    return path


class TestWheel:
    LIBRARY = "vllm_sparse/kernels/libraries/sm90.so"

    def test_with_kernels_and_tag_is_good(self, tmp_path: Path) -> None:
        release.check_wheel(wheel(tmp_path, "manylinux_2_34_x86_64", self.LIBRARY), {"sm90"})

    def test_without_kernels_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(release.ReleaseError, match="lacks the CUDA kernels of csrc/sm100"):
            release.check_wheel(wheel(tmp_path, "manylinux_2_34_x86_64", self.LIBRARY), {"sm90", "sm100"})

    def test_for_any_linux_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(release.ReleaseError, match="no manylinux tag"):
            release.check_wheel(wheel(tmp_path, "linux_x86_64", self.LIBRARY), {"sm90"})


class TestBases:
    def read(self, folder: Path, bases: dict[str, str]) -> dict[str, str]:
        (folder / "bases.env").write_text("".join(f"{name}={value}\n" for name, value in bases.items()))
        return release.read_bases(folder / "bases.env")

    def test_by_digest_are_read(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, BASES) == BASES

    def test_are_all_that_the_dockerfile_builds_from(self) -> None:
        """Each stage begins with one of them or with a stage before it."""
        begun: set[str] = set()
        for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", lock.DOCKERFILE.read_text(), re.MULTILINE):
            assert base in begun or base.strip("${}") in BASES
            begun.add(name)
        assert {"cuda", "cpu"} <= begun

    def test_that_were_never_pinned_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(release.ReleaseError, match=r"bases\.env: not there.*deploy\.docker\.lock --bases"):
            release.read_bases(tmp_path / "bases.env")

    @pytest.mark.parametrize("left_out", BASES)
    def test_of_which_one_is_missing_are_refused(self, left_out: str, tmp_path: Path) -> None:
        bases = {name: value for name, value in BASES.items() if name != left_out}
        with pytest.raises(release.ReleaseError, match=f"allowed: .*{left_out}.*deploy.docker.lock --bases"):
            self.read(tmp_path, bases)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("CPU_BASE", "debian:bookworm-slim"),
            ("CPU_BASE", f"debian:bookworm-slim@{DIGEST[:-1]}"),
            # Of the image that the Dockerfile named before.
            ("CUDA_BASE", f"vllm/vllm-openai:v0.1.0@{DIGEST}"),
            ("APT_SNAPSHOT", ""),
        ],
    )
    def test_that_pin_nothing_are_refused(self, argument: str, value: str, tmp_path: Path) -> None:
        with pytest.raises(release.ReleaseError, match=f"{argument} is '{re.escape(value)}'; allowed: .*; run"):
            self.read(tmp_path, {**BASES, argument: value})


FAKE_SKOPEO = f"""#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
echo {DIGEST}
"""


class TestPinning:
    def test_asks_for_the_digest_of_each_base(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "skopeo").write_text(FAKE_SKOPEO)
        (tmp_path / "skopeo").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        pinned = lock.bases_by_digest()
        (tmp_path / "bases.env").write_text("".join(f"{name}={value}\n" for name, value in pinned.items()))
        assert release.read_bases(tmp_path / "bases.env") == pinned
        asked = (tmp_path / "asked").read_text().splitlines()
        assert [line.split()[-1] for line in asked] == [f"docker://{image}" for image in lock.base_images().values()]

    def test_needs_skopeo(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SystemExit, match="skopeo is not on PATH"):
            lock.bases_by_digest()


def test_a_tool_has_the_hashes_of_all_its_files() -> None:
    def package(digest: str) -> dict[str, Any]:
        archive = {"archive_info": {"hashes": {"sha256": digest}}}
        return {"metadata": {"name": "lxml", "version": "6"}, "download_info": archive}

    # Of x86_64, of Arm, and one that is the same for both.
    assert lock.locked([package("a"), package("b"), package("a")]) == "lxml==6 --hash=sha256:a --hash=sha256:b\n"


def test_tools_have_hashes_for_both_machines() -> None:
    """The list of packages is made in the CPU image, and in vLLM's of x86_64 and of Arm."""
    (lxml,) = [line for line in lock.LOCK_SBOM.read_text().splitlines() if line.startswith("lxml==")]
    assert lxml.count("--hash=sha256:") == 1 + len(lock.ELSEWHERE) == 3


@pytest.mark.parametrize(("target", "arm"), [("cuda", True), ("cpu", False)])
def test_images_are_attested_and_pinned(target: str, arm: bool, tmp_path: Path) -> None:
    command = release.image_command(target, "1.2", "abc", "2026-11-29T00:00:00Z", BASES, tmp_path / "image.oci.tar")
    text = " ".join(command)
    assert "--provenance mode=max" in text
    assert "--sbom true" in text
    assert ("linux/arm64" in text) is arm
    assert {f"--build-arg={name}={value}" for name, value in BASES.items()} <= set(command)
    assert "--build-arg=REVISION=abc" in command
    assert f"type=oci,dest={tmp_path / 'image.oci.tar'}" in command


class TestMissingTools:
    def named(self, monkeypatch: pytest.MonkeyPatch, folder: Path, images: bool, *present: str) -> list[str]:
        for name in present:
            (folder / name).write_text("#!/bin/sh\nexit 1\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(release, "find_nvcc", lambda: "nvcc" if "nvcc" in present else None)
        return [missing.split()[0] for missing in release.missing_tools(images)]

    def test_are_all_named_at_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert self.named(monkeypatch, tmp_path, True) == ["git", "nvcc", "docker"]

    def test_docker_is_for_images_only(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert self.named(monkeypatch, tmp_path, False, "git", "nvcc") == []

    def test_docker_without_buildx_is_not_enough(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (missing,) = self.named(monkeypatch, tmp_path, True, "git", "nvcc", "docker")
        assert missing == "docker's"

    def test_end_with_their_names(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(release, "find_nvcc", lambda: None)
        assert release.main([str(tmp_path / "release"), "--without-images"]) == 2
        assert "release: missing on this machine: nvcc" in capsys.readouterr().err
        assert not (tmp_path / "release").exists()


def test_nothing_old_is_released(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(release, "find_nvcc", lambda: "nvcc")
    (tmp_path / "vllm_sparse-0.0.1.tar.gz").write_text("")
    with pytest.raises(release.ReleaseError, match="is not empty"):
        release.release(tmp_path, images=False)


def test_checksums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    for name in ("a.whl", "b.tgz"):
        (tmp_path / name).write_text(name)
    release.write_checksums(tmp_path)
    check = ["sha256sum", "--check", release.CHECKSUMS]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    (tmp_path / "a.whl").write_text("another")
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_what_is_next_says_how_to_sign_and_push(tmp_path: Path) -> None:
    (tmp_path / "vllm-sparse-1.2-cuda.oci.tar").write_text("")
    told = release.what_is_next(tmp_path, "1.2")
    for word in ("cosign sign-blob", "twine upload", "helm push vllm-sparse-1.2.tgz", "skopeo copy --all"):
        assert word in told
    assert "docker://REGISTRY/vllm-sparse:1.2-cuda" in told
