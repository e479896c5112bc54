"""Start runs from the command line."""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import tomli_w

from fedpft_flower.config import (
    MARK,
    READ_PATHS,
    WRITTEN_PATHS,
    Config,
    FedPFTError,
    existing_path,
    flat_defaults,
    flatten,
    nest,
)
from fedpft_flower.endings import end_like_ctrl_c, one_line_end

CHECKOUT = Path(__file__).resolve().parent.parent  # of the app, this package's own
START_SECONDS = 60.0
PATIENCE = 10.0  # seconds that a process has to end politely, and killed
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


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
class Failure:
    """Say how a run failed: Flower's status, and all lines of its stream."""

    status: str
    lines: Sequence[str]

    @property
    def told(self) -> str:
        """Return the line in which the app said why; "" if it could not."""
        errors = [x for x in self.lines if x.startswith(f"{MARK}error: ")]
        return errors[-1].removeprefix(f"{MARK}error: ") if errors else ""


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


USUAL_SHARE = Share()
MOST_PER_GPU = 100


def share_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `share_of` reads."""
    parser.add_argument(
        "--cpus-per-client",
        type=int,
        default=USUAL_SHARE.cpus,
        metavar="N",
        help="CPUs and threads of a virtual client (default: %(default)s)",
    )
    parser.add_argument(
        "--clients-per-gpu",
        type=int,
        default=USUAL_SHARE.per_gpu,
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
    share: Share = USUAL_SHARE,
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
        FedPFTError: the configuration or the app is wrong; no run was started.
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
        with _superlink(home) as (environment, wait):
            # Here, since the libraries that these load take as long as the SuperLink.
            from fedpft_flower.checks import check_run
            from fedpft_flower.devices import gpus_here
            from fedpft_flower.tasks import check_kind

            check_run(config)
            check_kind(config.data, config.partition)
            federation = share.federation(nodes, gpus_here())
            copy_app(app, home / "app")
            wait()
            return _run(home, home / "app", federation, environment, show)


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
    # Relative paths mean the shell's directory here, not some server process's.
    for key in READ_PATHS:
        value = flat.get(key)
        if isinstance(value, str) and value and (place := existing_path(value)):
            flat[key] = str(place.absolute())
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
    parser.add_argument(
        "--app",
        type=Path,
        default=CHECKOUT,
        help="checkout of the app (default: where this package lives)",
    )
    share_options(parser)
    parser.add_argument(
        "--verbose", action="store_true", help="show Flower's and Ray's output too"
    )
    return parser


# ----------------------------------------------------------------- the Flower processes


def flower_home(place: Path, port: int, ca: Path | None = None) -> dict[str, str]:
    """Create a Flower home that knows the SuperLink at a port by the name `own`.

    Args:
        place: a directory to create.
        port: of the SuperLink.
        ca: the certificate that its own is signed by; None for no TLS.

    Returns:
        The environment in which Flower's commands use it.
    """
    place.mkdir()
    trust = {"root-certificates": str(ca)} if ca else {"insecure": True}
    own = {"address": f"127.0.0.1:{port}", **trust}
    settings = {"superlink": {"default": "own", "own": own}}
    (place / "config.toml").write_text(tomli_w.dumps(settings))
    return {
        "FLWR_HOME": str(place),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Every run and, in a deployment, every message waits for that: 1 s by default.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "TOKENIZERS_PARALLELISM": "false",
        # Clients without a share of a GPU see none; Ray means to change that.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        "PYTHONUNBUFFERED": "1",
        # Flower finds its own commands through the path.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@contextmanager
def _superlink(home: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """Start a SuperLink of our own in a neutral directory, and stop it at the end.

    It yields the environment of Flower's commands, and what waits until it answers.
    """
    port = free_port()
    environment = {
        # Ray gives every virtual client one thread, where this does not say otherwise.
        **{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        **flower_home(home / "flwr", port),
        "RAY_DEDUP_LOGS": "0",
    }
    # Ray workers import from this directory first: it must hold no code.
    (home / "empty").mkdir()
    log = home / "superlink.log"
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=home / "empty",
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield environment, partial(wait_until_up, process, port, log)
    finally:
        stop(process)


def wait_until_up(
    process: "subprocess.Popen[Any]", port: int, log: Path, ca: Path | None = None
) -> None:
    """Wait until a SuperLink answers.

    Args:
        process: the SuperLink.
        port: where it listens.
        log: what it says.
        ca: the certificate that its own is signed by; None for no TLS.

    Raises:
        FedPFTError: it ended or does not answer; the end of its log says why.
    """
    deadline = time.monotonic() + START_SECONDS
    trust = ssl.create_default_context(cafile=ca) if ca else None
    url = f"http{'s' if ca else ''}://127.0.0.1:{port}/health"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url, timeout=2, context=trust):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    tail = log.read_text(errors="replace").strip().splitlines()[-3:]
    raise FedPFTError(f"the SuperLink did not start: {' | '.join(tail)}")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal cut this short: what was started must be stopped."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def stop(process: "subprocess.Popen[Any]") -> None:
    """Stop a process, its session, and all that it has started in other sessions.

    Flower gives a run a session of its own, which would go on training.
    """
    with undisturbed():
        descendants = set[psutil.Process]()
        for number in (signal.SIGTERM, signal.SIGKILL):
            descendants |= _descendants(process)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            for descendant in descendants:
                with suppress(psutil.Error):
                    descendant.send_signal(number)
            deadline = time.monotonic() + PATIENCE
            while process.poll() is None or any(map(_lives, descendants)):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)


def _descendants(process: "subprocess.Popen[Any]") -> set[psutil.Process]:
    if process.poll() is not None:  # its number may be another's now
        return set()
    try:
        return set(psutil.Process(process.pid).children(recursive=True))
    except psutil.Error:
        return set()


def _lives(process: psutil.Process) -> bool:
    try:  # who should collect a dead one may never do so
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def copy_app(app: Path, place: Path) -> None:
    """Copy from a checkout what goes into its bundle.

    `flwr run` looks at every file below the app's directory, and a virtual environment
    there has some fifty thousand.

    Raises:
        FedPFTError: the checkout does not say what that is, or it cannot be copied.
    """
    settings = app / "pyproject.toml"
    try:
        told = tomllib.loads(settings.read_text(encoding="utf-8"))
        patterns = told["tool"]["flwr"]["app"]["fab-include"]
        for pattern in ["pyproject.toml", *patterns]:
            for path in app.glob(pattern.lstrip("/")):
                copy = place / path.relative_to(app)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    except (KeyError, TypeError, ValueError) as error:  # UTF-8 and TOML errors too
        raise FedPFTError(
            f"{settings} has no readable tool.flwr.app.fab-include ({error!r}); give "
            "this app's checkout"
        ) from error
    except OSError as error:
        raise FedPFTError(
            f"cannot copy the app of {app} to {place} ({error}); make room there, or "
            "set TMPDIR"
        ) from error


def _run(
    home: Path,
    app: Path,
    federation: str,
    environment: Mapping[str, str],
    show: Callable[[str], None],
) -> Failure | None:
    process = subprocess.Popen(
        [
            *("flwr", "run", str(app), "own", "--stream"),
            *("--run-config", str(home / "run.toml")),
            *("--federation-config", federation),
        ],
        cwd=home / "empty",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(_ANSI.sub("", line.rstrip()))
            show(lines[-1])
        process.wait()
        status = run_status(lines, environment, home / "empty")
    finally:
        if process.poll() is None:
            stop(process)
    return None if status == "finished:completed" else Failure(status, lines)


def print_own(line: str) -> None:
    """Print a line of a run's stream if it is this app's own."""
    if line.startswith(MARK):
        _print_all(line)


def _print_all(line: str) -> None:
    print(line.removeprefix(MARK), flush=True)


def run_status(
    lines: Sequence[str], environment: Mapping[str, str], place: Path
) -> str:
    """Return the run's true status: the stream ends with 0 whatever happened."""
    started = [m[1] for line in lines if (m := re.search(r"started run (\d+)", line))]
    if not started:
        return "not started"
    status = "unknown"
    for _ in range(60):
        status = _status_now(started[0], environment, place)
        if status.startswith("finished:"):
            return status
        time.sleep(0.5)
    return status


def _status_now(run_id: str, environment: Mapping[str, str], place: Path) -> str:
    """Return a run's status as `flwr list` has it; "unknown" if that fails."""
    command = ["flwr", "list", "own", "--run-id", run_id, "--format", "json"]
    try:
        listed = subprocess.run(
            command,
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return str(json.loads(listed.stdout)["runs"][0]["status"])
    except (subprocess.SubprocessError, ValueError, LookupError):
        return "unknown"


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
