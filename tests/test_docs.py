"""The documents: links that lead somewhere, settings that there are, whole lists."""

import re
import shutil
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fedpft_flower.architectures import model_types
from fedpft_flower.config import Config, flatten
from fedpft_flower.methods import METHODS
from fedpft_flower.partitions import PARTITIONS
from fedpft_flower.selection import SELECTIONS
from fedpft_flower.spec import Spec

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def _anchors(page: Path) -> set[str]:
    """Name the headings of a page as GitHub does in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", text.lower()) for text in headings)
    return {text.replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_readme_leads_to_every_page_of_the_documents():
    links = set(re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_toml_shown_is_a_run_or_a_comparison(page, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for text in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        table = tomllib.loads(text)
        if "superlink" in table:  # Flower's own
            continue
        if "methods" in table:
            (tmp_path / "compare.toml").write_text(text)
            assert Spec(tmp_path / "compare.toml").all_cells
        else:
            assert Config.from_run_config(flatten(table)) != Config()


def first_cells(page: str, heading: str) -> set[str]:
    """Return the names that the table behind a text has in its first column."""
    table = (ROOT / page).read_text().partition(heading)[2].partition("\n\n")[0]
    rows = table.partition("\n|---")[2]  # behind its head
    return set(re.findall(r"^\| `([\w-]+)`", rows, re.MULTILINE))


def test_the_lists_in_the_documents_are_whole():
    assert first_cells("README.md", "## Methods\n\n") == set(METHODS)
    assert first_cells("docs/data.md", "## Virtual clients\n\n") == set(PARTITIONS)
    parts = (ROOT / "docs/methods.md").read_text().partition("`sub-fm.selection` (")[2]
    named = set(re.findall(r"`([\w-]+)`", parts.partition(")")[0]))
    assert named == set(SELECTIONS)
    families = (ROOT / "docs/families.md").read_text()
    assert {name for name in model_types() if f"`{name}`" not in families} == set()
    compared = Spec(ROOT / "conf/compare/quick.toml").methods
    assert set(compared) >= set(METHODS)


def test_one_range_of_pytorch_stands_everywhere():
    places = (
        "pyproject.toml",
        "Makefile",
        "deploy/Containerfile",
        "docs/deployment.md",
    )
    found = [re.findall(r"torch>=[0-9.,<]+", (ROOT / p).read_text()) for p in places]
    assert all(found) and len({one for ones in found for one in ones}) == 1


def test_every_command_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    installed = {e.name: e for e in entry_points(group="console_scripts")}
    for name, target in scripts.items():
        assert installed[name].value == target and callable(installed[name].load())
