"""Measure rounds and memory of one GPU that server and virtual clients share.

python -m benchmarks.sharing [--at-a-time N ...] [--nodes N] [--rounds N] key=value ...

For every number of clients at a time (0: on the CPU), one `fedpft-run` of the same
experiment, on a random BERT (BERT-base's size unless told otherwise) or, with fm.name,
on another FM. A steady round is one after the first and without alignment. The peak of
the machine's first GPU is the most that its driver told, asked ten times a second, of
all processes; those of server and clients are what PyTorch gave each of them, without
what it keeps ready.
"""

import argparse
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import torch

from benchmarks import ROOT, header, line, parser, run_main, spread
from benchmarks.finished import only_run, run_app, seconds_after_first
from benchmarks.scaling import write_fm
from fedpft_flower.config import FedPFTError
from fedpft_flower.devices import gpus_here

TELL_MEMORY = "nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits"
MIB = 2**20 / 1e9  # in GB


def main() -> None:
    """Run the experiment for every number of clients at a time; print a row of each."""
    options = _options()
    if not gpus_here() or shutil.which("nvidia-smi") is None:
        raise FedPFTError("PyTorch sees no GPU, or nvidia-smi is missing: install both")
    titles = ("clients at a time", "steady round, s", "aligned, s", "GPU's peak, GB")
    print(header([*titles, "the server's", "a client's"]), flush=True)
    with TemporaryDirectory() as name:
        place = Path(name)
        write_fm(place / "fm", options.layers, options.hidden, 512)
        for count in options.at_a_time:
            print(line(measure(options, count, place)), flush=True)
    # Only now: to ask may take some of its memory.
    print(f"\non {torch.cuda.get_device_name()}, PyTorch {torch.__version__}")


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("set", nargs="*", metavar="key=value", help="overrides")
    arguments.add_argument("--conf", type=Path, default=ROOT / "conf" / "demo.toml")
    arguments.add_argument("--at-a-time", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    arguments.add_argument("--nodes", type=int, default=20)
    arguments.add_argument("--rounds", type=int, default=6, help="3 or more")
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--hidden", type=int, default=768)
    return arguments.parse_intermixed_args()


def measure(
    options: argparse.Namespace, at_a_time: int, place: Path
) -> Sequence[object]:
    """Run once, with so many clients at a time; return the cells of its row."""
    out = place / str(at_a_time)
    pairs = [f"fm.name={place / 'fm'}", f"out-dir={out}", f"rounds={options.rounds}"]
    pairs += ["plug-in.steps=0", *options.set]
    with watched() as used:
        run_app(options.conf, pairs, options.nodes, f"--clients-per-gpu={at_a_time}")
    rounds = only_run(out)[1]
    both = [seconds_after_first(rounds, aligned) for aligned in (False, True)]
    peaks = [
        max(entry.get(f"peak-gpu-memory-{side}", 0) for entry in rounds)
        for side in ("server", "client")
    ]
    memory = (max(used) * MIB, *(peak / 1e9 for peak in peaks))
    cells = (spread(seconds, 2) if seconds else "-" for seconds in both)
    return [at_a_time or "on the CPU", *cells, *(f"{gb:.2f}" for gb in memory)]


@contextmanager
def watched() -> Iterator[list[int]]:
    """Yield a list that afterwards holds what memory was in use, in MiB."""
    used: list[int] = []
    command = [*TELL_MEMORY.split(), "--loop-ms=100"]
    with TemporaryFile("w+") as told, subprocess.Popen(command, stdout=told) as telling:
        try:
            yield used
        finally:
            telling.terminate()
            telling.wait()
        told.seek(0)
        used += map(int, told.read().split()[:-1])  # the last may be half a number


if __name__ == "__main__":
    run_main(main)
