"""The levels of docs/architecture.md, enforced, and what a new process loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.imports import ask

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedpft_flower"


def table():
    """Return module -> (level, place) from the table in docs/architecture.md."""
    rows = {}
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            rows[cells[1].strip("`")] = (int(cells[0]), len(rows))
    return rows


LEVELS = table()
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "fedpft_flower":
                names = [alias.name for alias in node.names]
                yield from (
                    f"{node.module}.{name}" for name in names if name in MODULES
                )
            yield node.module


def test_the_table_lists_every_module_once():
    assert sorted(LEVELS) == MODULES
    levels = [level for level, _ in LEVELS.values()]
    assert levels == sorted(levels)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_before_it(module):
    level, place = LEVELS[module]
    for name in imported(PACKAGE / f"{module}.py"):
        top, _, rest = name.partition(".")
        if top == "fedpft_flower" and rest:
            assert LEVELS[rest][1] < place, f"{module} imports {rest}"
        if top == "flwr":
            assert level >= 5, f"{module} imports flwr"


def test_the_apps_are_thin():
    for name in ("server_app.py", "client_app.py"):
        assert len((ROOT / name).read_text().splitlines()) <= 40


def test_nothing_is_unpickled():
    for path in PACKAGE.glob("*.py"):
        names = set(imported(path))
        assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
        assert "torch.load" not in path.read_text()


MODELS = {"transformers", "peft", "accelerate", "sympy"}
OTHERS = {"sklearn", "matplotlib", "flwr_datasets"}


@pytest.mark.parametrize(
    ("handler", "needed", "spared"),
    [
        ("hello", {"datasets"}, MODELS | OTHERS),
        ("install", {"torch", "safetensors"}, MODELS | OTHERS | {"datasets", "pandas"}),
        ("train", {"torch", "datasets", "transformers", "peft"}, OTHERS),
    ],
)
def test_a_handler_in_a_new_process_loads_only_what_it_needs(handler, needed, spared):
    loaded = ask(handler).loaded
    assert needed <= loaded
    assert not spared & loaded


def test_the_client_app_itself_loads_next_to_nothing():
    """Flower's simulation loads it before it starts Ray."""
    spared = sorted(MODELS | OTHERS | {"torch", "datasets", "pandas"})
    code = f"import sys, client_app; print([n for n in {spared} if n in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "[]"
