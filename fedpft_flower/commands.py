"""Start runs from the command line."""

import argparse
import os
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from fedpft_flower.config import (
    MARK,
    READ_PATHS,
    WRITTEN_PATHS,
    Config,
    FedPFTError,
    flat_defaults,
    flatten,
    nest,
)
from fedpft_flower.disk import shell_path
from fedpft_flower.endings import end_like_ctrl_c, one_line_end
from fedpft_flower.superlink import Failure, copy_app, run_app, superlink

CHECKOUT = Path(__file__).resolve().parent.parent  # of the app, this package's own


def run(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment in simulation (`fedpft-run`); exit 0 only if it ended well.

    It uses its own Flower home, SuperLink and port, so that nothing of other runs or
    checkouts gets in, and stops what it started.
    """
    options = _parser().parse_intermixed_args(arguments)
    end_like_ctrl_c()
    show = _print_all if options.verbose else print_own
    with one_line_end("interrupted; everything that was started is stopped"):
        config = read_config(options.conf, options.set)
        share = share_of(options)
        failure = run_experiment(config, options.nodes, options.app, show, share)
    if failure is None:
        sys.exit(0)
    if not (failure.told or options.verbose):
        print("\n".join(failure.lines[-30:]), file=sys.stderr)
    print(f"the run failed ({failure.status})", file=sys.stderr)
    sys.exit(1)


@dataclass(frozen=True)
class Share:
    """Say how much of the machine a virtual client has while it trains."""

    cpus: int = 1  # and threads
    per_gpu: int = 4  # so many clients on each GPU; 0 leaves GPUs to the server

    def federation(self, nodes: int, gpus: int) -> str:
        """Return Flower's settings of a simulation on a machine with so many GPUs."""
        settings = f"num-supernodes={nodes} client-resources-num-cpus={self.cpus}"
        if gpus and self.per_gpu:  # without, Ray hides the GPUs from clients
            # Ray counts in ten-thousandths, and Flower divides by a 32-bit float: a
            # little less than a share of all is one client more for neither of them.
            share = (10_000 // self.per_gpu - 0.1) / 10_000
            settings += f" client-resources-num-gpus={share:.5f}"
        return settings


DEFAULT_SHARE = Share()
MOST_PER_GPU = 100


def machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the app's place, and the options that `share_of` reads."""
    parser.add_argument(
        "--app",
        type=Path,
        default=CHECKOUT,
        help="checkout of the app (default: where this package lives)",
    )
    parser.add_argument(
        "--cpus-per-client",
        type=int,
        default=DEFAULT_SHARE.cpus,
        metavar="N",
        help="CPUs and threads of a virtual client (default: %(default)s)",
    )
    parser.add_argument(
        "--clients-per-gpu",
        type=int,
        default=DEFAULT_SHARE.per_gpu,
        metavar="N",
        help="virtual clients that share a GPU, where there is one; 0 keeps them on "
        "the CPU (default: %(default)s)",
    )


def share_of(options: argparse.Namespace) -> Share:
    """Return what each virtual client gets.

    Raises:
        FedPFTError: it is too little, or more than there is.
    """
    cpus, per_gpu, cores = options.cpus_per_client, options.clients_per_gpu, _cores()
    if not 1 <= cpus <= cores:
        raise FedPFTError(
            f"--cpus-per-client {cpus}, and this machine has {cores}; give 1 to {cores}"
        )
    if not 0 <= per_gpu <= MOST_PER_GPU:
        raise FedPFTError(
            f"--clients-per-gpu {per_gpu}; give at most {MOST_PER_GPU}, or 0 for none"
        )
    return Share(cpus, per_gpu)


def _cores() -> int:
    return os.cpu_count() or 1


def run_experiment(
    config: Config,
    nodes: int,
    app: Path,
    show: Callable[[str], None],
    share: Share = DEFAULT_SHARE,
) -> Failure | None:
    """Run one experiment on virtual nodes and stream its progress.

    Args:
        config: the experiment.
        nodes: how many virtual nodes.
        app: the checkout of the app.
        show: takes every line of the stream; those of the app begin with `MARK`.
        share: what each virtual client gets of this machine.

    Returns:
        None if the run completed.

    Raises:
        FedPFTError: the configuration or the app is wrong; what was started is stopped.
    """
    if not (app / "pyproject.toml").is_file() or not (app / "client_app.py").is_file():
        raise FedPFTError(f"--app {app} is not this Flower app; give its checkout")
    if nodes < 1:
        raise FedPFTError(f"--nodes {nodes}; give at least 1")
    wanted = config.train.nodes_awaited
    if wanted > nodes:
        raise FedPFTError(
            f"train.clients-per-round or train.min-nodes = {wanted}, but there are "
            f"{nodes} nodes; lower it or raise --nodes"
        )
    with tempfile.TemporaryDirectory(prefix="fedpft-run-") as place:
        home = Path(place)
        (home / "run.toml").write_text(tomli_w.dumps(nest(config.flat())))
        with superlink(home) as (environment, wait):
            # What this loads takes as long as the SuperLink, and what `_check` does as
            # long as Flower needs to start the app.
            from fedpft_flower.devices import gpus_here

            federation = share.federation(nodes, gpus_here())
            copy_app(app, home / "app")
            wait()
            meanwhile = partial(_check, config)
            return run_app(home, home / "app", federation, environment, show, meanwhile)


def _check(config: Config) -> None:
    from fedpft_flower.checks import check_run
    from fedpft_flower.tasks import check_kind

    check_run(config)
    check_kind(config.data, config.partition)


def read_config(conf: Path | None, pairs: Sequence[str]) -> Config:
    """Read a TOML file, or none, and lay `key=value` pairs over it.

    Raises:
        FedPFTError: the file or a pair cannot be read, or a value makes no sense.
    """
    try:
        text = conf.read_text(encoding="utf-8") if conf else ""
        flat = flatten(tomllib.loads(text))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FedPFTError(f"cannot read {conf}: {error}; give a TOML file") from error
    for pair in pairs:
        flat |= _pair(pair)
    return resolve(flat)


def resolve(settings: Mapping[str, Any]) -> Config:
    """Build a configuration whose paths are this shell's.

    Args:
        settings: flat keys and values.

    Raises:
        FedPFTError: a value makes no sense.
    """
    flat = dict(settings)
    for key in READ_PATHS:
        value = flat.get(key)
        if isinstance(value, str) and value:
            flat[key] = shell_path(value)
    for key in WRITTEN_PATHS:
        value = flat.get(key)
        if isinstance(value, str) and value:
            flat[key] = os.path.abspath(os.path.expanduser(value))  # noqa: PTH100, PTH111
    return Config.from_run_config(flat)


def _pair(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise FedPFTError(f"{text!r} is not key=value, e.g. rounds=5")
    key, value = key.strip(), value.strip()
    if isinstance(flat_defaults().get(key), str) and value[:1] not in ("'", '"'):
        return {key: value}  # a text need not be quoted: sub-fm.whole-layers=0
    try:
        return {key: tomllib.loads(f"value = {value}")["value"]}
    except tomllib.TOMLDecodeError:
        return {key: value}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpft-run",
        description="Run one FedPFT experiment in simulation, from a TOML file.",
    )
    parser.add_argument("conf", type=Path, help="experiment, e.g. conf/demo.toml")
    parser.add_argument("set", nargs="*", metavar="key=value", help="overrides")
    parser.add_argument(
        "--nodes", type=int, default=20, help="virtual nodes (default: %(default)s)"
    )
    machine_options(parser)
    parser.add_argument(
        "--verbose", action="store_true", help="show Flower's and Ray's output too"
    )
    return parser


def print_own(line: str) -> None:
    """Print a line of a run's stream if it is this app's own."""
    if line.startswith(MARK):
        _print_all(line)


def _print_all(line: str) -> None:
    print(line.removeprefix(MARK), flush=True)
