"""Try a deployment on this machine: three sites with data of their own, TLS, keys.

python -m deploy.demo [key=value ...]

A SuperLink and three SuperNodes run as real processes. Each site has a directory with
rows of the embedded task, some libraries more than others; the server has the FM, the
rows to judge by, and public texts. Everything but the results is removed at the end.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from datasets import Dataset

from deploy.processes import Deployment
from fedpft_flower.commands import print_own, read_config
from fedpft_flower.config import DataConfig, FedPFTError
from fedpft_flower.endings import end_like_ctrl_c, one_line_end
from fedpft_flower.public import load_public
from fedpft_flower.software import quiet
from fedpft_flower.superlink import undisturbed
from fedpft_flower.tasks import load_task

HERE = Path(__file__).resolve().parent
SITES = ("north", "south", "west")
ONLINE_SECONDS = 120.0


def main() -> None:
    """Run the demo; exit 0 only if the run completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", nargs="*", metavar="key=value", help="overrides")
    parser.add_argument(
        "--rows", type=Path, metavar="DIR", help="only write rows there, to try with"
    )
    end_like_ctrl_c()
    options = parser.parse_args()
    with one_line_end("interrupted; everything that was started is stopped"):
        if options.rows is None:
            sys.exit(demonstrate(options.set))
        if options.set:
            parser.error("--rows takes no overrides")
        quiet()
        try:
            labels = write_rows(options.rows)
        except OSError as error:
            raise FedPFTError(
                f"cannot write {options.rows} ({error}); give another directory"
            ) from error
        tell(f'data.labels = "{labels}"')
        tell(f"rows: {options.rows.absolute()}")


def demonstrate(pairs: Sequence[str]) -> int:
    """Run the demo.

    Args:
        pairs: settings to change, as `key=value`.

    Returns:
        0 if the run completed, 1 if it failed.

    Raises:
        FedPFTError: a setting is wrong, or a process does not start.
    """
    began = time.monotonic()
    quiet()
    with _temporary_place() as place:
        tell("writing the rows of the server and of every site")
        labels = write_rows(place / "data")
        # Labels in no need of a vote: the server has all of them.
        own = [f"data.path={place / 'data' / 'server'}", f"data.labels={labels}"]
        public = f"data.public-path={place / 'data' / 'public'}"
        config = read_config(HERE / "demo.toml", [*own, public, *pairs])
        tell("making certificates")
        (place / "run").mkdir()
        with Deployment(place / "run", secure=True) as deployment:
            tell("starting the SuperLink, with TLS, and three SuperNodes with keys")
            deployment.superlink("--disable-runtime-dependency-installation")
            # The sites train at the same time, on the cores of one machine.
            threads = max(1, (os.cpu_count() or 1) // len(SITES))
            deployment.environment["OMP_NUM_THREADS"] = str(threads)
            for site in SITES:
                rows = place / "data" / site
                deployment.supernode(site, f'site="{site}" data-path="{rows}"')
            wait_for(deployment)
            deployment.submit("run", config.flat())
            follow(deployment)
            status = deployment.status("run", 60.0)
            tell(f"status: {status} ({time.monotonic() - began:.0f} s in all)")
            if status != "finished:completed":
                print(deployment.log("run")[-3000:], file=sys.stderr)
                return 1
    tell("everything that was started is stopped")
    return 0


@contextmanager
def _temporary_place() -> Iterator[Path]:
    """Yield a directory that goes at the end, whatever signal comes meanwhile."""
    place = Path(mkdtemp(prefix="fedpft-deploy-"))
    try:
        yield place
    finally:
        with undisturbed():
            shutil.rmtree(place)


def write_rows(place: Path) -> str:
    """Write a directory of CSV for the server, the public texts and every site.

    Returns:
        The label set, joined by commas.
    """
    config = DataConfig(task="docstrings", public_rows=2000)
    task, public = load_task(config, seed=0), load_public(config, seed=0)
    assert task.train is not None
    names = dict(enumerate(task.labels))
    splits = {"validation": task.validation, "test": task.test}
    for split, rows in splits.items():
        write_csv(rows, names, place / "server" / f"{split}.csv")
    (place / "public").mkdir(parents=True, exist_ok=True)
    public.select_columns(["text"]).to_csv(str(place / "public" / "train.csv"))
    # A third of the rows each; of its own libraries a site has three times as many.
    for number, site in enumerate(SITES):
        chosen = [
            row
            for row, label in enumerate(task.train["label"])
            if (row + label) % 5
            in ((number, 3, 4) if label % 3 == number else (number,))
        ]
        write_csv(task.train.select(chosen), names, place / site / "train.csv")
    return ",".join(task.labels)


def write_csv(rows: Dataset, names: dict[int, str], place: Path) -> None:
    """Write texts with the names of their labels."""
    place.parent.mkdir(parents=True, exist_ok=True)
    labelled = rows.select_columns(["text"]).add_column(
        "label", [names[label] for label in rows["label"]]
    )
    labelled.to_csv(str(place))


def wait_for(deployment: Deployment) -> None:
    """Wait until all sites are online.

    Raises:
        FedPFTError: they are not, after two minutes; the end of a log says why.
    """
    deadline, online = time.monotonic() + ONLINE_SECONDS, -1
    while online < len(SITES):
        if (now := deployment.online()) != online:
            online = now
            tell(f"{online} of {len(SITES)} SuperNodes are online")
        for site in SITES:
            if deployment.processes[site].poll() is not None:
                told = " ".join(deployment.log(site).split()[-40:])
                raise FedPFTError(f"the SuperNode {site} has ended: {told}")
        if time.monotonic() > deadline:
            raise FedPFTError(f"only {online} SuperNodes are online; see their logs")
        time.sleep(0.5)


def follow(deployment: Deployment) -> None:
    """Show the run's lines until its stream ends."""
    shown, ended = 0, False
    while not ended:
        ended = deployment.processes["run"].poll() is not None
        lines = deployment.log("run").split("\n")[:-1]
        for line in lines[shown:]:
            print_own(line)
        shown = len(lines)
        time.sleep(0.2)


def tell(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
