"""Run a SuperLink, SuperNodes and `flwr run` as real processes on this machine.

What the demo, the drills, benchmarks and tests of deployments share.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from fedpft_flower.commands import CHECKOUT
from fedpft_flower.config import FedPFTError, nest
from fedpft_flower.superlink import (
    copy_app,
    flower_home,
    free_port,
    run_status,
    stop,
    undisturbed,
    wait_until_up,
)

HERE = Path(__file__).resolve().parent


class Deployment:
    """Hold the processes of one federation, all below one directory.

    Each has a name, a log `NAME.log`, a working directory without code, and a session
    of its own, so that it can be killed together with its children.
    """

    def __init__(self, place: Path, secure: bool = False) -> None:
        """Prepare a federation; nothing is started yet.

        Args:
            place: an empty directory for all that it writes.
            secure: whether connections have TLS and SuperNodes prove who they are, with
                certificates and keys made here. The SuperLink then has a database.
        """
        self.place, self.port, self.secure = place, free_port(), secure
        self.certificates, self._keys = place / "certificates", place / "keys"
        if secure:
            make = HERE / "certificates.sh"
            _call(str(make), str(self.certificates), "localhost")
        ca = self.certificates / "ca.crt" if secure else None
        home = flower_home(place / "home", self.port, ca)
        self.environment = {**os.environ, **home}
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
        with undisturbed():
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
        trust, ca = ["--insecure"], None
        if self.secure:
            ca = self.certificates / "ca.crt"
            trust = ["--ssl-ca-certfile", str(ca)]
            trust += ["--ssl-certfile", str(self.certificates / "server.pem")]
            trust += ["--ssl-keyfile", str(self.certificates / "server.key")]
            trust += ["--enable-supernode-auth"]
            trust += ["--database", str(self.place / "state.db")]
        command = ["flower-superlink", *trust, "--host", "127.0.0.1"]
        self.start("superlink", *command, "--port", str(self.port), *options)
        log = self.place / "superlink.log"
        wait_until_up(self.processes["superlink"], self.port, log, ca)

    def supernode(
        self, name: str, settings: str, at: str = "", within: Sequence[str] = ()
    ) -> None:
        """Start a SuperNode with a store of its own, registered where it must be.

        Args:
            name: of its process.
            settings: its node-config.
            at: address and port at which it reaches the SuperLink, if not directly.
            within: the start of a command that runs it in another place.
        """
        trust = ["--insecure"]
        if self.secure:
            trust = ["--root-certificates", str(self.certificates / "ca.crt")]
            trust += ["--auth-supernode-private-key", str(self.key(name))]
        self.start(
            name,
            *within,
            *("flower-supernode", *trust, "--port", str(free_port())),
            *("--superlink", at or f"127.0.0.1:{self.port}"),
            *("--node-config", settings),
            FEDPFT_CACHE=str(self.store(name)),
        )

    def key(self, name: str) -> Path:
        """Return a SuperNode's key; a new one is registered at the SuperLink."""
        key = self._keys / name
        if not key.exists():
            _call(str(HERE / "node-key.sh"), str(self._keys), name)
            public = ("register", f"{key}.pub", "own", "--name", name)
            _call("flwr", "supernode", *public, **self.environment)
        return key

    def online(self) -> int:
        """Return how many SuperNodes the SuperLink has online."""
        command = ("flwr", "supernode", "list", "own", "--format", "json")
        return _call(*command, **self.environment).count('"status": "online"')

    def store(self, name: str) -> Path:
        """Return a SuperNode's cache directory."""
        return self.place / f"store-{name}"

    def submit(
        self, name: str, settings: Mapping[str, Any], app: Path = CHECKOUT
    ) -> None:
        """Start `flwr run`; the run's progress goes to the log of this name."""
        conf = self.place / f"{name}.toml"
        conf.write_text(tomli_w.dumps(nest(settings)))
        few = self.place / f"{name}-app"
        copy_app(app, few)
        command = ("flwr", "run", str(few), "own", "--stream", "-c", str(conf))
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


def _call(*command: str, **environment: str) -> str:
    """Run a command to its end and return what it said.

    Raises:
        FedPFTError: it failed; the end of what it said tells why.
    """
    done = subprocess.run(
        command,
        env=environment or None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        told = " ".join(done.stdout.split()[-60:])
        raise FedPFTError(f"{' '.join(command[:3])} failed: {told}")
    return done.stdout
