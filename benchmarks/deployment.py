"""Run a SuperLink, SuperNodes and `flwr run` as real processes on this machine."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from benchmarks import ROOT
from fedpft_flower.commands import (
    flower_home,
    free_port,
    run_status,
    stop,
    wait_until_up,
)
from fedpft_flower.config import nest


class Deployment:
    """Hold the processes of one federation, all below one directory.

    Each has a name, a log `NAME.log`, a working directory without code, and a session
    of its own, so that it can be killed together with its children.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.environment = {**os.environ, **flower_home(place / "home", self.port)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (place / "empty").mkdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Nodes first: they wait for a SuperLink that is gone.
        for process in reversed(self.processes.values()):
            stop(process)

    def start(self, name: str, *command: str, **extra: str) -> None:
        """Start a process under a name that is new, or whose process has ended."""
        if name in self.processes:
            stop(self.processes[name])  # its children may have outlived it
        with (self.place / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.place / "empty",
                env={**self.environment, **extra},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def superlink(self, *options: str) -> None:
        """Start the SuperLink and wait until it answers."""
        command = ("flower-superlink", "--insecure", "--host", "127.0.0.1")
        self.start("superlink", *command, "--port", str(self.port), *options)
        log = self.place / "superlink.log"
        wait_until_up(self.processes["superlink"], self.port, log)

    def supernode(self, name: str, settings: str, port: int = 0) -> None:
        """Start a SuperNode with a store of its own.

        Args:
            name: of its process.
            settings: its node-config.
            port: where it reaches the SuperLink, if not directly.
        """
        self.start(
            name,
            *("flower-supernode", "--insecure", "--port", str(free_port())),
            *("--superlink", f"127.0.0.1:{port or self.port}"),
            *("--node-config", settings),
            FEDPFT_CACHE=str(self.store(name)),
        )

    def store(self, name: str) -> Path:
        """Return a SuperNode's cache directory."""
        return self.place / f"store-{name}"

    def submit(self, name: str, settings: Mapping[str, Any], app: Path = ROOT) -> None:
        """Start `flwr run`; the run's progress goes to the log of this name."""
        conf = self.place / f"{name}.toml"
        conf.write_text(tomli_w.dumps(nest(settings)))
        command = ("flwr", "run", str(app), "own", "--stream", "-c", str(conf))
        self.start(name, *command)

    def status(self, name: str, seconds: float) -> str:
        """Wait for the end of a submitted run and return its status."""
        self.processes[name].wait(seconds)
        return run_status(
            self.log(name).splitlines(), self.environment, self.place / "empty"
        )

    def log(self, name: str) -> str:
        """Return all that a process has said so far."""
        return (self.place / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """Kill a process and its children, as a power cut does."""
        process = self.processes[name]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()  # until it is reaped, its children believe that it lives
