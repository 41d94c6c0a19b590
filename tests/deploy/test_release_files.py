"""What `make release` makes, refuses, and says."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import release

DIGEST = f"sha256:{'0f' * 32}"
BASES = {"CUDA_BASE": f"vllm/vllm-openai:v0@{DIGEST}", "APT_SNAPSHOT": "20261128T000000Z"}


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
    def test_by_digest_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "bases.env").write_text("".join(f"{name}={value}\n" for name, value in BASES.items()))
        assert release.read_bases(tmp_path / "bases.env") == BASES

    def test_that_were_never_pinned_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(release.ReleaseError, match=r"bases\.env: not there.*deploy\.docker\.lock --bases"):
            release.read_bases(tmp_path / "bases.env")

    def test_by_tag_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "bases.env").write_text("CPU_BASE=debian:bookworm-slim\n")
        with pytest.raises(release.ReleaseError, match="CPU_BASE is 'debian:bookworm-slim', which has no digest"):
            release.read_bases(tmp_path / "bases.env")


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
