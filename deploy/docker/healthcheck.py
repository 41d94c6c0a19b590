"""Health check of the images: asks ``/health`` where the container's server listens, as its own arguments say.

Exit status 0 if it answers with 200, 1 with a sentence if not.
"""

from __future__ import annotations

import http.client
import re
import ssl
import sys
from pathlib import Path

TIMEOUT_SECONDS = 4
DEFAULT_PORT = 8000
# Addresses that stand for all of the machine's own.
EVERY_ADDRESS = ("0.0.0.0", "::", "")


def server_arguments(processes: Path) -> list[str]:
    """Arguments after ``serve`` of the first process that has it; it is the first one, or an init's child.

    Args:
        processes: ``/proc``.

    Raises:
        LookupError: no process serves.
    """
    numbered = (path for path in processes.iterdir() if path.name.isdigit())
    for process in sorted(numbered, key=lambda path: int(path.name)):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:
            # Ended meanwhile.
            continue
        if "serve" in arguments:
            return arguments[arguments.index("serve") + 1 :]
    raise LookupError("no process runs `vllm serve`")


def settings(arguments: list[str]) -> dict[str, str]:
    """Options of ``vllm serve`` by name, those of its ``--config`` file below those of the command line."""
    found: dict[str, str] = {}
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.removeprefix("--").partition("=")
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            # vLLM reads _ as -.
            found[name.replace("_", "-")] = value if equals else following
    if "config" in found:
        text = Path(found["config"]).read_text()
        written = re.findall(r"^([a-z_-]+):[ \t]*['\"]?([^'\"#\n]*?)['\"]?[ \t]*(?:#.*)?$", text, re.MULTILINE)
        found = {name.replace("_", "-"): value for name, value in written} | found
    return found


def main() -> int:
    processes = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/proc")
    try:
        options = settings(server_arguments(processes))
        host, port = options.get("host", ""), int(options.get("port", DEFAULT_PORT))
        address = "127.0.0.1" if host in EVERY_ADDRESS else host
        connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_SECONDS)
        if "ssl-certfile" in options:
            # The server's own name is not what is asked here, so its certificate proves nothing.
            unchecked = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(address, port, timeout=TIMEOUT_SECONDS, context=unchecked)
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, LookupError, ValueError) as error:
        print(f"healthcheck: {error}")
        return 1
    print(f"healthcheck: HTTP {status} at {address}:{port}")
    return int(status != http.HTTPStatus.OK)


if __name__ == "__main__":
    sys.exit(main())
