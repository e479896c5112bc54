"""Real processes killed at random moments: the run goes on, or resumes to the same end.

`pytest -m slow tests/test_drills.py`: minutes each, a dead node is known after one.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.tap import Tap
from deploy.processes import Deployment
from fedpft_flower.commands import CHECKOUT
from fedpft_flower.software import source_hash
from fedpft_flower.superlink import copy_app
from tests.deployment import (
    SITES,
    Cable,
    adapter_of,
    apps_of,
    checkpoints,
    deploy,
    expected_adapter,
    prepare,
    rounds_of,
    run_directory,
    start_site,
    wait_until,
)

pytestmark = pytest.mark.slow
SERVER_APP, CLIENT_APP = "flwr-serverapp", "flwr-clientapp"
UNIT_WAITS = 65  # seconds between two starts, by deploy/supernode.service


@pytest.fixture
def moment(request):
    """Return random seconds, the same in every repetition of a test."""
    generator = random.Random(request.node.name)
    return lambda low, high: generator.uniform(low, high)


@pytest.fixture
def settings(tmp_path, vit_directory):
    return prepare(tmp_path, vit_directory) | {"rounds": 3, "timeout-seconds": 120.0}


def works_on(deployment, site, message="train"):
    """Return whether a site works, or has worked, on a message of this type."""
    _, _, since = deployment.log(site).partition(f"Receiving: {message}")
    return "Start `flwr-clientapp` process" in since


def trains(deployment, site):
    """Return whether a site's app has begun to train."""
    return "round 1: training on" in deployment.log(site)


def empty(store):
    shutil.rmtree(store)


def damage(store):
    for weights in store.glob("sub-fms/*/weights"):
        body = bytearray(weights.read_bytes())
        body[-5] ^= 0xFF
        weights.write_bytes(body)


@pytest.mark.parametrize(
    ("message", "harm"),
    [("query.install", None), ("train", None), ("train", empty), ("train", damage)],
)
def test_a_node_that_is_killed_and_restarted_takes_part_again(
    tmp_path, settings, moment, message, harm
):
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: works_on(deployment, "south", message), 400, message)
        time.sleep(moment(0, 5))
        deployment.kill("south")
        if harm:
            harm(deployment.store("south"))
        start_site(deployment, "south")
        assert deployment.status("run", 900) == "finished:completed"
    rounds = rounds_of(run_directory(tmp_path))
    assert list(rounds[1]["failures"]) == ["south"]
    assert all(not entry["failures"] for entry in rounds[2:])
    assert rounds[3]["per-client"]["south"]["outcome"] == "ok"


def test_a_node_that_is_killed_comes_back_by_its_key(tmp_path, settings):
    """Not before the SuperLink has given up its old session, which takes a minute."""
    with Deployment(tmp_path, secure=True) as deployment:
        deployment.superlink()
        for site in SITES:
            start_site(deployment, site)
        deployment.submit("run", settings | {"rounds": 8})
        wait_until(lambda: works_on(deployment, "south"), 400, "training")
        deployment.kill("south")
        start_site(deployment, "south")
        assert deployment.processes["south"].wait(60) != 0
        assert "Failed to activate" in deployment.log("south")
        time.sleep(UNIT_WAITS)
        start_site(deployment, "south")
        assert deployment.status("run", 900) == "finished:completed"
        assert deployment.online() == len(SITES)  # the same node, not one more
    rounds = rounds_of(run_directory(tmp_path))
    assert list(rounds[1]["failures"]) == ["south"]
    assert rounds[8]["per-client"]["south"]["outcome"] == "ok"


@pytest.fixture
def cable():
    """Return a network of a node's own; needs root and iproute2."""
    try:
        cable = Cable("fedpft-drill")
    except RuntimeError as error:
        pytest.skip(str(error))
    yield cable
    cable.remove()


@pytest.mark.parametrize("seconds", [20, 45, 90])
def test_a_node_whose_network_is_cut_comes_back_by_itself(
    tmp_path, settings, cable, seconds
):
    """Twenty seconds are no matter; after 60 without a heartbeat the round goes on.

    In between a message may be lost: then one round waits for it. How many rounds the
    node misses depends on how long one takes, so the run goes on until it is back.
    """

    def rounds():
        return rounds_of(run_directory(tmp_path))

    def is_back():
        south = rounds()[-1].get("per-client", {}).get("south", {})
        return len(rounds()) > 6 and south.get("outcome") == "ok"

    settings |= {"rounds": 500}
    with Deployment(tmp_path) as deployment:
        deployment.superlink()
        start_site(deployment, "north")
        # The SuperLink has no port but this machine's own.
        at = f"{cable.HERE}:{Tap(deployment.port, cable.HERE).port}"
        start_site(deployment, "south", at=at, within=cable.within)
        deployment.submit("run", settings)
        wait_until(lambda: works_on(deployment, "south"), 400, "training")
        cable.pull()
        time.sleep(seconds)
        cable.plug()
        wait_until(is_back, 400, "a round with both nodes")
        apps_of(deployment, "superlink", SERVER_APP)[0].terminate()
        assert deployment.status("run", 300).startswith("finished:")
        # That is enough: the run ends early, with a result.
        ended = {"resume": str(run_directory(tmp_path)), "rounds": len(rounds()) - 1}
        deployment.submit("ended", settings | ended)
        assert deployment.status("ended", 300) == "finished:completed"
    outcomes = [entry["failures"] for entry in rounds()[1:]]
    assert len(outcomes) == ended["rounds"]
    if seconds == 20:
        assert not any(outcomes)
    if seconds == 90:
        assert "Node Unavailable" in outcomes[0]["south"]
    assert outcomes[-1] == {}


def test_a_run_whose_server_is_killed_again_and_again_ends_as_if_it_had_not(
    tmp_path, settings, moment, local_grid
):
    expected = expected_adapter(local_grid, settings, tmp_path)
    with deploy(tmp_path) as deployment:
        deployment.submit("run-0", settings)
        wait_until(lambda: checkpoints(tmp_path), 400, "the first checkpoint")
        kills = 0
        for longest in (2, 40, 40):  # the first is surely before the end
            time.sleep(moment(0, longest))
            apps = apps_of(deployment, "superlink", SERVER_APP)
            if len(apps) != 1:
                break
            apps[0].kill()
            kills += 1
            again = {"resume": str(run_directory(tmp_path))}
            deployment.submit(f"run-{kills}", settings | again)
        assert kills
        assert deployment.status(f"run-{kills}", 900) == "finished:completed"
    assert adapter_of(run_directory(tmp_path)) == expected


@pytest.mark.parametrize("options", [(), ("--database", "state.db")])
def test_a_run_whose_superlink_is_killed_is_resumed(
    tmp_path, settings, moment, local_grid, options
):
    expected = expected_adapter(local_grid, settings, tmp_path)
    with deploy(tmp_path, *options) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: checkpoints(tmp_path), 400, "the first checkpoint")
        time.sleep(moment(0, 40))
        deployment.kill("superlink")
        time.sleep(moment(0, 20))
        deployment.superlink(*options)
        if not options:
            # A SuperLink without a memory knows no node, and they end.
            for site in SITES:
                deployment.processes[site].wait(90)
                start_site(deployment, site)
        again = {"resume": str(run_directory(tmp_path))}
        deployment.submit("resumed", settings | again)
        assert deployment.status("resumed", 900) == "finished:completed"
    assert adapter_of(run_directory(tmp_path)) == expected


@pytest.fixture
def small_disk():
    """Return a function that mounts a file system of so many bytes; needs root."""
    mounted = []

    def mount(place, size):
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place):
    """Leave no free byte on a disk; return the file that takes them."""
    path = place / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return path


def test_a_run_on_a_full_disk_fails_in_one_line_and_is_resumed(
    tmp_path, settings, moment, local_grid, small_disk
):
    expected = expected_adapter(local_grid, settings, tmp_path)
    small_disk(tmp_path / "out", 4_000_000)
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: checkpoints(tmp_path), 400, "the first checkpoint")
        time.sleep(moment(0, 30))
        filler = fill(tmp_path / "out")
        assert deployment.status("run", 900) == "finished:failed"
        told = [x for x in deployment.log("run").splitlines() if "error:" in x]
        assert len(told) == 1 and "No space left" in told[0]
        filler.unlink()
        again = {"resume": str(run_directory(tmp_path))}
        deployment.submit("resumed", settings | again)
        assert deployment.status("resumed", 900) == "finished:completed"
    assert adapter_of(run_directory(tmp_path)) == expected


def test_a_superlink_whose_disk_was_full_is_started_again_with_its_nodes(
    tmp_path, settings, local_grid, small_disk
):
    """Its SuperExec ends and so do the nodes' heartbeats: nothing comes back alone."""
    expected = expected_adapter(local_grid, settings, tmp_path)
    small_disk(tmp_path / "db", 40_000_000)
    options = ("--database", str(tmp_path / "db" / "state.db"))
    with deploy(tmp_path, *options) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: checkpoints(tmp_path), 400, "the first checkpoint")
        filler = fill(tmp_path / "db")
        for name in ("superlink", *SITES):
            wait_until(
                lambda n=name: "500 Internal Server Error" in deployment.log(n),
                200,
                f"{name} notices",
            )
        assert all(deployment.processes[n].poll() is None for n in SITES)
        filler.unlink()
        for name in ("superlink", *SITES):
            deployment.kill(name)
        deployment.superlink(*options)
        for site in SITES:
            start_site(deployment, site)
        again = {"resume": str(run_directory(tmp_path))}
        deployment.submit("resumed", settings | again)
        assert deployment.status("resumed", 900) == "finished:completed"
    assert adapter_of(run_directory(tmp_path)) == expected


def test_a_node_with_a_full_disk_is_left_out_until_there_is_room(
    tmp_path, settings, small_disk
):
    small_disk(tmp_path / "store-south", 1_000_000)
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: works_on(deployment, "south"), 400, "training")
        filler = fill(deployment.store("south"))
        wait_until(lambda: "left out" in deployment.log("run"), 400, "it is left out")
        filler.unlink()
        assert deployment.status("run", 900) == "finished:completed"
    rounds = rounds_of(run_directory(tmp_path))
    reason = rounds[2]["failures"]["south"]
    assert reason.startswith("cannot keep the sub-FM") and "No space left" in reason
    assert rounds[3]["per-client"]["south"]["outcome"] == "ok"


def test_a_node_whose_app_is_ended_is_waited_for_once(tmp_path, settings):
    """Its SuperNode lives and waits for that app for ever; a new one takes part."""
    settings |= {"timeout-seconds": 50.0, "rounds": 10, "train.local-steps": 600}
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: trains(deployment, "south"), 400, "training")
        apps_of(deployment, "south", CLIENT_APP)[-1].terminate()
        wait_until(lambda: "round-000003" in checkpoints(tmp_path), 400, "round 3")
        deployment.kill("south")
        start_site(deployment, "south")
        assert deployment.status("run", 900) == "finished:completed"
    rounds = rounds_of(run_directory(tmp_path))
    assert "no reply in time" in rounds[1]["failures"]["south"]
    assert [entry["failures"] for entry in rounds[2:]] == [{}] * 9
    assert all("south" not in entry["per-client"] for entry in rounds[2:4])
    assert rounds[10]["per-client"]["south"]["outcome"] == "ok"


def test_a_run_that_is_stopped_says_so_and_is_resumed(tmp_path, settings, local_grid):
    expected = expected_adapter(local_grid, settings, tmp_path)
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: checkpoints(tmp_path), 400, "the first checkpoint")
        apps_of(deployment, "superlink", SERVER_APP)[0].terminate()
        assert deployment.status("run", 300).startswith("finished:")
        log = run_directory(tmp_path) / "run.log"
        (line,) = [x for x in log.read_text().splitlines() if "error:" in x]
        assert "ended from outside" in line
        again = {"resume": str(run_directory(tmp_path))}
        deployment.submit("resumed", settings | again)
        assert deployment.status("resumed", 900) == "finished:completed"
    assert adapter_of(run_directory(tmp_path)) == expected


def test_a_reply_that_comes_too_late_is_not_used(tmp_path, settings):
    settings |= {"timeout-seconds": 50.0, "train.local-steps": 600}
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings)
        wait_until(lambda: trains(deployment, "south"), 400, "training")
        app = apps_of(deployment, "south", CLIENT_APP)[-1]
        app.suspend()
        wait_until(lambda: "in time" in deployment.log("run"), 400, "the timeout")
        app.resume()
        assert deployment.status("run", 900) == "finished:completed"
    rounds = rounds_of(run_directory(tmp_path))
    assert "no reply in time" in rounds[1]["failures"]["south"]
    assert rounds[3]["per-client"]["south"]["outcome"] == "ok"


def test_nodes_run_the_code_that_the_run_brings(tmp_path, settings):
    """The package was upgraded where runs are submitted, and at no node."""
    settings |= {"rounds": 1}
    newer = tmp_path / "newer"
    copy_app(CHECKOUT, newer)
    module = newer / "fedpft_flower" / "__init__.py"
    module.write_text(module.read_text() + "\n# A newer version.\n")
    with deploy(tmp_path) as deployment:
        deployment.submit("run", settings, app=newer)
        assert deployment.status("run", 300) == "finished:completed"
    manifest = json.loads((run_directory(tmp_path) / "manifest.json").read_text())
    assert manifest["source"] != source_hash()  # of what is installed
    assert set(manifest["nodes"]) == set(SITES)


def test_the_demo_of_a_deployment_leaves_nothing_when_it_is_interrupted(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = subprocess.Popen(
        [sys.executable, "-m", "deploy.demo"],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What a shell starts behind `&` has it ignored, and would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = []
    for line in demo.stdout:
        said.append(line)
        if line.startswith("3 of 3 SuperNodes are online"):
            break
    started = set(psutil.Process(demo.pid).children(recursive=True))
    assert len(started) >= 4, said
    for _ in range(2):  # as whoever is impatient does
        demo.send_signal(signal.SIGINT)
        time.sleep(0.5)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130 and "Traceback" not in rest, rest
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not [process for process in alive if process.status() != "zombie"]
    assert not list(tmp_path.glob("fedpft-*"))
