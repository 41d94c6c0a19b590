"""Measurements that end with a table, run as a user runs them."""

from __future__ import annotations

import subprocess
import sys

LIMIT_SECONDS = 400


def measured(module: str, *arguments: str) -> tuple[list[str], list[list[str]]]:
    """Run a module and read the cells of its table.

    Args:
        module: its name.
        arguments: on its command line.

    Returns:
        The header and the lines.
    """
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.stdout.splitlines() if line[:2] == "| "]
    return rows[0], rows[1:]
