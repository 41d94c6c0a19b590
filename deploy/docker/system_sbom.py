"""Add what is no Python package to a list of packages (CycloneDX): the system's packages and the CUDA libraries.

Runs in the image, with its own Python and nothing else.

Usage: python3 system_sbom.py SBOM.json [ROOT]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]


def system_packages(root: Path) -> list[Component]:
    """Packages that dpkg has installed below a root."""
    release = dict(line.split("=", 1) for line in (root / "etc/os-release").read_text().splitlines() if "=" in line)
    system = release["ID"].strip('"')
    components = []
    for paragraph in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        place = f"pkg:deb/{system}/{quote(name, safe='')}@{quote(version, safe='')}?arch={architecture}"
        components.append({"type": "library", "bom-ref": place, "name": name, "version": version, "purl": place})
    return components


def cuda_libraries(root: Path) -> list[Component]:
    """Parts of the CUDA toolkits in ``/usr/local``, as their own ``version.json`` tells."""
    components: list[Component] = []
    seen: set[Path] = set()
    for listed in sorted((root / "usr/local").glob("cuda*/version.json")):
        if listed.resolve() in seen:
            continue
        seen.add(listed.resolve())
        for name, part in json.loads(listed.read_text()).items():
            place = f"pkg:generic/nvidia/{quote(name, safe='')}@{quote(part['version'], safe='')}"
            described = {"name": part.get("name", name), "version": part["version"], "purl": place}
            components.append({"type": "library", "bom-ref": place, **described})
    return components


def main() -> None:
    path, root = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "/")
    listed = json.loads(path.read_text())
    known = {component.get("bom-ref") for component in listed["components"]}
    system, cuda = system_packages(root), cuda_libraries(root)
    listed["components"] += [component for component in (*system, *cuda) if component["bom-ref"] not in known]
    path.write_text(json.dumps(listed, indent=2) + "\n")
    print(f"{path}: {len(system)} packages of the system and {len(cuda)} parts of CUDA")


if __name__ == "__main__":
    main()
