"""Say which code and which libraries run here, and keep these from talking."""

import hashlib
import platform
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

# This project's package, and what shapes a result.
OWN = "fedpft-flower"
_PACKAGES = (
    OWN,
    "flwr",
    "flwr-datasets",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "pillow",
    "peft",
    "datasets",
    "numpy",
    "ray",
)


@cache
def source_hash() -> str:
    """Return the hash of this package's sources, to refuse runs of mixed code."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def quiet() -> None:
    """Turn off the reports and progress bars of the libraries that load."""
    # Here, since a node's process may load neither.
    import datasets
    import transformers

    # PEFT asks models for a name that transformers is about to drop.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the app runs from a bundle, not installed
            found[package] = "not installed"
    return MappingProxyType(found)


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return which of our libraries another machine has in other versions: theirs.

    Not this package: a node runs the code that the server sent with the run.
    """
    return {
        name: theirs.get(name, "unknown")
        for name, own in ours.items()
        if name != OWN and theirs.get(name) != own
    }
