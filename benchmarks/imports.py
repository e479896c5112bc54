"""Measure what each handler of a node loads, and the seconds until it has answered.

A deployed node runs every message in a new process, so every answer waits for imports:
    python -m benchmarks.imports --repeats 5

Seconds run from the start of a fresh process to the handler's answer to the smallest
message: a hello with two rows in a file of the node's own, an install of one tensor, a
train on a sub-FM that the node lacks, so that nothing is trained. A cell is a median
over processes, with the smallest and the largest behind it.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Context,
    Message,
    RecordDict,
    UserConfig,
)
from flwr.supercore.task_identity import TaskIdentity

from benchmarks import ROOT, markdown_table, parser, run_main, spread
from client_app import app
from fedpft_flower.config import FedPFTError

Values = dict[str, ConfigRecordValues]

QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
# What is heavy of the packages that this project or its dependencies load.
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "pandas",
    "flwr_datasets",
    "sklearn",
    "scipy",
    "sympy",
    "matplotlib",
)


@dataclass(frozen=True)
class Answer:
    """Say how long a fresh process took to answer, and what it held then."""

    seconds: float
    # Of the processor, all threads together: other work on the machine counts less.
    cpu: float
    # The process's largest resident memory, in MB.
    memory: float
    # Top-level packages and modules.
    loaded: frozenset[str]


def main() -> None:
    """Ask every handler in fresh processes and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats
    for handler in MESSAGES:
        ask(handler)  # compiles what is new, and fills the disk's cache
    answers = {handler: [ask(handler) for _ in range(repeats)] for handler in MESSAGES}
    print(table(answers))


def ask(handler: str) -> Answer:
    """Let a fresh process answer the smallest message of a handler.

    Raises:
        FedPFTError: it did not, and said why on standard error.
    """
    code = f"from benchmarks.imports import answer; answer({handler!r})"
    with TemporaryDirectory() as place:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "FEDPFT_CACHE": place, **QUIET},
            stdout=subprocess.PIPE,
        )
    if done.returncode:
        raise FedPFTError(f"{handler} was not answered; see above")
    told = json.loads(done.stdout)
    seconds = told["at"] - began
    return Answer(seconds, told["cpu"], told["memory"], frozenset(told["loaded"]))


# ------------------------------------------------------------------- the fresh process


def answer(handler: str) -> None:
    """Answer as a new process of a node does, and print when and what is loaded.

    Raises:
        FedPFTError: the handler refused the message.
    """
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    rows = Path(os.environ["FEDPFT_CACHE"]) / "rows.csv"
    rows.write_text("text,label\na good film,good\na bad film,bad\n")
    node: UserConfig = {"data-path": str(rows), "site": "here"}
    context = Context(1, 1, node, RecordDict(), {"data.task": "text"})
    kind, content = MESSAGES[handler]
    reply = app(Message(content(), 1, kind), context)
    at, cpu = time.monotonic(), time.process_time()
    if reply.has_error():
        raise FedPFTError(str(reply.error.reason))
    # Linux counts in KiB.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps({"at": at, "cpu": cpu, "memory": memory, "loaded": loaded}))


def _hello() -> RecordDict:
    request: Values = {"labels": json.dumps(["good", "bad"])}
    return RecordDict({"config": ConfigRecord(request)})


def _install() -> RecordDict:
    # Here, since the processes of the other handlers must not load it.
    from fedpft_flower.store import package_hash
    from fedpft_flower.wire import unpack_tensors

    arrays = ArrayRecord({"weight": Array(np.ones(2, dtype=np.float32))})
    text = json.dumps({"files": {}})
    content = package_hash(unpack_tensors(arrays), text)
    request: Values = {"sub-fm": content, "base": "", "bit-cast": "{}", "package": text}
    return RecordDict({"arrays": arrays, "config": ConfigRecord(request)})


def _train() -> RecordDict:
    request: Values = {"sub-fm": "0" * 64, "server-round": 1}
    return RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord(request)})


MESSAGES: dict[str, tuple[str, Callable[[], RecordDict]]] = {
    "hello": ("query.hello", _hello),
    "install": ("query.install", _install),
    "train": ("train", _train),
}

# -------------------------------------------------------------------------- the report


def table(answers: Mapping[str, Sequence[Answer]]) -> str:
    """Return the answers as Markdown."""
    rows = []
    for handler, all_of in answers.items():
        seconds = spread([one.seconds for one in all_of], 2)
        cpu = spread([one.cpu for one in all_of], 2)
        memory = spread([one.memory for one in all_of], 0)
        loads = ", ".join(name for name in HEAVY if name in all_of[0].loaded)
        rows.append((handler, seconds, cpu, memory, loads))
    return markdown_table(("handler", "seconds", "CPU seconds", "MB", "loads"), rows)


if __name__ == "__main__":
    run_main(main)
