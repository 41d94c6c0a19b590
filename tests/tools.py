"""Tools that are no part of the environment's Python packages."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

# Where .ci/run unpacks Debian's packages, so that they start nothing, and installs checkov, whose many pins would
# quarrel with vLLM's.
FOLDERS = ("bin", "debian/usr/bin", "checkov/bin")


def tool(name: str) -> str:
    """Path of a tool; skips the test where there is none."""
    folders = [str(Path(sys.prefix) / folder) for folder in FOLDERS]
    found = next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None) or shutil.which(name)
    if found is None:
        pytest.skip(f"NOT TESTED: no {name} on PATH or in {', '.join(folders)}; .ci/run fetches it")
    return found
