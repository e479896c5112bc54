"""Start Flower's processes, watch a run of the app, and stop what was started."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

import psutil
import tomli_w

from fedpft_flower.config import MARK, FedPFTError

START_SECONDS = 60.0
PATIENCE = 10.0  # seconds that a process has to end politely, and killed
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


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
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    spared = ",".join(filter(None, (spared, "127.0.0.1", "localhost")))
    return {
        "FLWR_HOME": str(place),
        # No proxy reaches this machine's own ports.
        **dict.fromkeys(("NO_PROXY", "no_proxy"), spared),
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
def superlink(home: Path) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
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
    asked = build_opener(ProxyHandler({}), HTTPSHandler(context=trust))
    url = f"http{'s' if ca else ''}://127.0.0.1:{port}/health"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with asked.open(url, timeout=2):
                return
        except OSError:
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


def run_app(
    home: Path,
    app: Path,
    federation: str,
    environment: Mapping[str, str],
    show: Callable[[str], None],
    meanwhile: Callable[[], None],
) -> Failure | None:
    """Run an app by `flwr run`, and stream what it says.

    Args:
        home: with `run.toml`, the run's configuration.
        app: the app's directory.
        federation: Flower's settings of the simulation.
        environment: of Flower's commands.
        show: takes every line of the stream.
        meanwhile: what to do while it starts; what this raises stops it.

    Returns:
        None if the run completed.
    """
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
        meanwhile()
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
