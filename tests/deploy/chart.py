"""The Helm chart, rendered by Helm's own engine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import helm_python
import yaml

from deploy.helm import generate

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "vllm-sparse"

EXAMPLES = sorted(path.stem for path in generate.EXAMPLES.glob("*.yaml"))

Values = dict[str, Any]
Manifest = dict[str, Any]


@functools.cache
def generated_files() -> dict[Path, str]:
    """What the generator would write now."""
    files: dict[Path, str] = generate.generated()
    return files


def example(name: str) -> Values:
    """Values of an example of the chart."""
    values: Values = yaml.safe_load((generate.EXAMPLES / f"{name}.yaml").read_text())
    return values


def one_model(**settings: Any) -> Values:
    """Values of a release with one model ``m``, from the hub unless the settings name a source."""
    return {"models": {"m": {"source": {"hub": "org/name"}, **settings}}}


def manifest_text(values: Values) -> str:
    """Every object of a release, as Helm renders it."""
    return generate.render(values)


def render(values: Values) -> list[Manifest]:
    """Every object of a release."""
    # In C: the dashboard is long.
    return [manifest for manifest in yaml.load_all(manifest_text(values), Loader=yaml.CSafeLoader) if manifest]


def find(manifests: list[Manifest], kind: str, name_end: str = "") -> Manifest:
    """The only object of a kind whose name ends so."""
    (found,) = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"].endswith(name_end)]
    return found


def pod_spec(values: Values) -> Manifest:
    """Pod of the only Deployment."""
    spec: Manifest = find(render(values), "Deployment")["spec"]["template"]["spec"]
    return spec


def server(values: Values) -> Manifest:
    """Container of the server in the only Deployment."""
    container: Manifest = pod_spec(values)["containers"][0]
    return container


def refusal(values: Values) -> str:
    """What Helm says against values."""
    try:
        manifest_text(values)
    except helm_python.HelmError as error:
        return str(error)
    raise AssertionError(f"Helm accepts {values}")
