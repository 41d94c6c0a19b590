"""The documentation's links lead somewhere, and the README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + [page for folder in ("docs", "examples") for page in (ROOT / folder).rglob("*.md")]
)
MOST_README_LINES = 150

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"")


def links(page: Path) -> list[str]:
    """What a page links to inside the repository."""
    found = ["".join(groups) for groups in LINK.findall(page.read_text())]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_resolve(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link}: there is no {path}"
        assert path.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in anchors(path), f"{link}: {path.name} has no heading of that name"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked_from_the_readme_or_its_folder(page: Path) -> None:
    linking = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    reached = {(other.parent / link.partition("#")[0]).resolve() for other in linking for link in links(other)}
    assert page.resolve() in reached
