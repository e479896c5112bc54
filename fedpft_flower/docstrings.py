"""Extract the embedded task: tell from a docstring which library it documents.

Real English that every installation has, nothing to download. Files are parsed, never
imported. The texts depend on the installed versions, so figures compare only where the
content hash in the manifest is equal.
"""

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from pyarrow import parquet

from fedpft_flower.config import FedPFTError
from fedpft_flower.disk import cache_dir, keep

# The classes: libraries that this project's own requirements install.
LIBRARIES = (
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "ray",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "transformers",
)
# The public corpus: other packages where installed, and the standard library.
PUBLIC_PACKAGES = (
    "PIL",
    "accelerate",
    "aiohttp",
    "cryptography",
    "datasets",
    "flwr",
    "fontTools",
    "fsspec",
    "grpc",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "joblib",
    "mpmath",
    "peft",
    "pip",
    "pyarrow",
    "pydantic",
    "requests",
    "rich",
    "urllib3",
    "yaml",
)
# Rows per library.
SPLITS = {"train": 200, "validation": 30, "test": 100}
PUBLIC_ROWS = 4000
MOST_WORDS, FEWEST_WORDS = 28, 8
# Longer files take most of the parsing time and are mostly tables or tests.
MOST_FILE_BYTES = 60_000
_NAMES = re.compile(
    r"\b(matplotlib|mpl|pyplot|plt|networkx|nx|numpy|np|ndarray|pandas|pd|ray|scipy|"
    r"scikit-learn|scikit|sklearn|sympy|torch|pytorch|transformers?|hugging\s?face)\b",
    re.IGNORECASE,
)


def load_docstrings() -> Dataset:
    """Load the task from the cache, or extract it once.

    Returns:
        Columns `text`, `library` ("" in the public corpus) and `split`.

    Raises:
        FedPFTError: a library of the task is not installed or has too few docstrings.
    """
    path = cache_dir() / f"docstrings-{_fingerprint()}.parquet"
    if not path.exists():
        table = pa.Table.from_pylist(_extract())
        keep(path, lambda draft: parquet.write_table(table, draft))
    return Dataset(parquet.read_table(path))


def _extract() -> list[dict[str, str]]:
    wanted = sum(SPLITS.values())
    # Text -> library; a text that documents two libraries tells nothing.
    found: dict[str, str] = {}
    ambiguous: set[str] = set()
    for library in LIBRARIES:
        count = 0
        for text in _texts(_root(library)):
            if text in found:
                if found[text] != library:
                    ambiguous.add(text)
                continue
            found[text] = library
            count += 1
            # A margin for texts that turn out ambiguous.
            if count == wanted + wanted // 10:
                break
    rows = []
    for library in LIBRARIES:
        texts = [t for t, name in found.items() if name == library]
        texts = sorted((t for t in texts if t not in ambiguous), key=_order)[:wanted]
        if len(texts) < wanted:
            raise FedPFTError(
                f"library {library} has {len(texts)} docstrings, {wanted} are needed; "
                "reinstall it with its sources"
            )
        start = 0
        for split, size in SPLITS.items():
            for text in texts[start : start + size]:
                rows.append({"text": text, "library": library, "split": split})
            start += size
    public = {text: None for text in _public_texts() if text not in found}
    chosen = sorted(public, key=_order)[:PUBLIC_ROWS]
    rows += [{"text": text, "library": "", "split": "public"} for text in chosen]
    return rows


def _public_texts() -> Iterator[str]:
    roots = [_root(name) for name in PUBLIC_PACKAGES if find_spec(name)]
    roots.append(Path(sysconfig.get_path("stdlib")))
    for root in roots:
        for count, text in enumerate(_texts(root)):
            if count == 2 * PUBLIC_ROWS // len(roots):
                break
            yield text


def _texts(root: Path) -> Iterator[str]:
    """Yield the usable docstrings below a directory, files in hash order."""
    files = [
        path
        for path in root.rglob("*.py")
        if not {"tests", "test", "site-packages"} & set(path.relative_to(root).parts)
        and path.stat().st_size <= MOST_FILE_BYTES
    ]
    for path in sorted(files, key=lambda path: _order(str(path.relative_to(root)))):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError, OSError):
            continue  # templates and fixtures that are not Python source
        for node in ast.walk(tree):
            if isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
            ):
                text = _clean(ast.get_docstring(node) or "")
                if text:
                    yield text


def _clean(docstring: str) -> str:
    words = _NAMES.sub("library", docstring).split()[:MOST_WORDS]
    return " ".join(words) if len(words) >= FEWEST_WORDS else ""


def _root(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise FedPFTError(
            f"data.task = 'docstrings' reads the sources of {name}, which is not "
            "installed; install it, or choose another data.task"
        )
    return Path(spec.origin).parent


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _fingerprint() -> str:
    """Name the extraction by this file's source and the files it would read."""
    sizes = {}
    for name in (*LIBRARIES, *PUBLIC_PACKAGES):
        if name in LIBRARIES or find_spec(name):
            init = _root(name) / "__init__.py"
            stat = init.stat()
            sizes[name] = (str(init), stat.st_size, stat.st_mtime_ns)
    content = Path(__file__).read_text(encoding="utf-8") + json.dumps(sizes)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
