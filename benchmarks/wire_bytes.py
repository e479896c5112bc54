"""Compare the ledger of a deployed run with the bytes on its connections.

A SuperLink, SuperNodes and the ServerApp run as real processes on this machine. Every
SuperNode, and the ServerApp, reaches the SuperLink through a port that counts:
    python -m benchmarks.wire_bytes --conf conf/demo.toml --nodes 2 key=value ...

Ledger bytes are those that were sent. Captured bytes are TCP's payload: HTTP without
TLS, headers included. What nodes and SuperLink say without a message is shown on its
own; its rate is measured before the run, while nothing else happens.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import ROOT, markdown_table, parser, run_main
from benchmarks.finished import only_run
from benchmarks.tap import APP, STANDBY, Count, NodeTap, Tap
from deploy.processes import Deployment
from fedpft_flower.commands import read_config
from fedpft_flower.metrics import Metrics
from fedpft_flower.wire import HELLO, INSTALL, TRAIN

# Message types, and which of the ledger's kinds they carry; control is apart.
KINDS = {
    "greeting": (HELLO, ()),
    "sub-FM": (INSTALL, ("install", "delta")),
    "training": (TRAIN, ("adapter", "statistics")),
}
TITLES = ("ledger", "captured", "more", "requests")  # behind a row's name
START_SECONDS = 20.0


def main() -> None:
    """Run a deployment and print the comparison."""
    options = _options()
    with TemporaryDirectory() as place:
        pairs = [*options.set, f"out-dir={place}/out"]
        config = read_config(options.conf, pairs)
        settings = {**config.flat(), "train.min-nodes": options.nodes}
        with Deployment(Path(place)) as deployment:
            server = deploy_tapped_superlink(deployment)
            taps = [NodeTap(deployment.port) for _ in range(options.nodes)]
            for number, tap in enumerate(taps):
                node = f"partition-id={number} num-partitions={options.nodes}"
                deployment.supernode(f"node-{number}", node, f"127.0.0.1:{tap.port}")
            time.sleep(START_SECONDS)
            idle = _rates([taps[0], server], options.idle)
            deployment.submit("run", settings)
            status = deployment.status("run", seconds=3600)
            if status != "finished:completed":
                sys.exit(f"{deployment.log('run')}\nthe run is {status}")
        _, rounds = only_run(Path(place) / "out")
    print(table(rounds, total(tap.counts() for tap in taps)))
    print(f"\n{server_table(rounds, server.counts())}\n")
    for name, (up, down) in zip(["node", "ServerApp's side"], idle, strict=True):
        print(f"Idle, one {name}: {up:.0f} bytes/s up, {down:.0f} bytes/s down.")


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("set", nargs="*", metavar="key=value", help="overrides")
    arguments.add_argument("--conf", type=Path, default=ROOT / "conf" / "demo.toml")
    arguments.add_argument("--nodes", type=int, default=2)
    arguments.add_argument("--idle", type=float, default=120.0, help="seconds to watch")
    return arguments.parse_intermixed_args()


def deploy_tapped_superlink(deployment: Deployment) -> Tap:
    """Start a SuperLink whose ServerApps reach it through a tap; return the tap."""
    deployment.superlink("--isolation", "process")
    tap = Tap(deployment.port)
    address = ("--runtime-api-address", f"127.0.0.1:{tap.port}")
    deployment.start("superexec", "flower-superexec", "--insecure", *address)
    return tap


def total(counts: Iterable[Mapping[str, Count]]) -> dict[str, Count]:
    """Return the sums of what several taps have counted."""
    sums: dict[str, Count] = defaultdict(Count)
    for one in counts:
        for kind, count in one.items():
            sums[kind] += count
    return dict(sums)


def ledger_bytes(rounds: Iterable[Metrics]) -> dict[tuple[str, str], int]:
    """Return what was sent by direction and kind, in the kinds of `KINDS`.

    Control bytes of round 0 are the greeting's; the later ones, a few hundred bytes a
    message, are counted with the training although installs have some of them.
    """
    names = {kind: name for name, (_, kinds) in KINDS.items() for kind in kinds}
    sums = {(way, name): 0 for way in ("down", "up") for name in KINDS}
    for entry in rounds:
        control = "training" if entry["round"] else "greeting"
        for key, size in entry["bytes"].items():
            way, _, kind = key.partition("-")
            sums[way, names.get(kind, control)] += size["sent"]
    return sums


def table(rounds: list[Metrics], captured: Mapping[str, Count]) -> str:
    """Return ledger and captured bytes of the nodes' connections as Markdown."""
    rows = []
    ledger = ledger_bytes(rounds)
    for way in ("down", "up"):
        for name, (message_type, _) in KINDS.items():
            count = captured.get(message_type, Count())
            size = count.down if way == "down" else count.up
            rows.append(_row(f"{way}, {name}", ledger[way, name], size, count))
    for name in (APP, STANDBY):
        count = captured.get(name, Count())
        for way, size in (("down", count.down), ("up", count.up)):
            rows.append(_row(f"{way}, {name}", 0, size, count))
    return markdown_table(["nodes and SuperLink", *TITLES], rows)


def server_table(rounds: list[Metrics], captured: Mapping[str, Count]) -> str:
    """Return the same of the ServerApp's connections: objects hold the payload."""
    ledger = ledger_bytes(rounds)
    sums = {way: sum(ledger[way, name] for name in KINDS) for way in ("down", "up")}
    rest = dict(captured)
    pushed, pulled, polled = (
        rest.pop(action, Count())
        for action in ("push-object", "pull-object", "pull-messages")
    )
    other = sum(rest.values(), Count())
    rows = [
        _row("down, objects", sums["down"], pushed.up, pushed),
        _row("up, objects", sums["up"], pulled.down, pulled),
        _row("both, polling for replies", 0, polled.up + polled.down, polled),
        _row("both, all else", 0, other.up + other.down, other),
    ]
    return markdown_table(["ServerApp and SuperLink", *TITLES], rows)


def _row(name: str, ledger: int, captured: int, count: Count) -> tuple[str, ...]:
    more = f"{100 * (captured / ledger - 1):.1f} %" if ledger else "-"
    return name, f"{ledger:,}", f"{captured:,}", more, f"{count.requests:,}"


def _rates(taps: list[Tap], seconds: float) -> list[tuple[float, float]]:
    """Return bytes/s up and down of each tap while nothing happens."""
    before = [sum(tap.counts().values(), Count()) for tap in taps]
    time.sleep(seconds)
    rates = []
    for tap, old in zip(taps, before, strict=True):
        now = sum(tap.counts().values(), Count())
        rates.append(((now.up - old.up) / seconds, (now.down - old.down) / seconds))
    return rates


if __name__ == "__main__":
    run_main(main)
