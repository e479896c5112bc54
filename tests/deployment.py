"""A federation of two sites with digits of their own, for real processes."""

import json
import subprocess
import time
from contextlib import contextmanager, suppress

from deploy.processes import Deployment

SITES = {"north": range(100), "south": range(100, 130)}


def prepare(place, vit_directory):
    """Write the rows of all sites and of the server; return the run's settings."""
    for name, rows in {**SITES, "server/test": range(130, 200)}.items():
        write_digits(place / name, rows)
    write_digits(place / "public", range(200, 264))
    return {
        "method": "fedpft",  # which realigns
        "rounds": 2,
        "out-dir": str(place / "out"),
        "fm.name": str(vit_directory),
        "data.task": "image",
        "data.path": str(place / "server"),
        "data.public-path": str(place / "public"),
        "train.min-nodes": len(SITES),
        "train.fraction": 1.0,
        "align.steps": 4,
        "align.every": 1,
        "align.during-steps": 2,
    }


def write_digits(place, rows):
    """Write scikit-learn's digits as a folder of images, one folder a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in rows:
        folder = place / str(digits.target[row])
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[row] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{row}.png")


def start_site(deployment, site, **where):
    settings = f'site="{site}" data-path="{deployment.place / site}"'
    deployment.supernode(site, settings, **where)


class Cable:
    """A network of a node's own (a namespace), with one cable to this machine."""

    HERE, THERE = "10.213.77.1", "10.213.77.2"

    def __init__(self, name):
        """Lay the cable; RuntimeError where that takes root, or `ip` is lacking."""
        self.name, self.end = name, f"{name}-0"
        self.within = ("ip", "netns", "exec", name)
        try:
            self.remove()  # what a killed drill left
            self._ip("netns", "add", name)
            self._ip(
                "link", "add", self.end, "type", "veth", "peer", "eth0", "netns", name
            )
            self._ip("address", "add", f"{self.HERE}/30", "dev", self.end)
            self._ip("-n", name, "address", "add", f"{self.THERE}/30", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", name, "link", "set", device, "up")
            self.plug()
        except (OSError, subprocess.CalledProcessError) as error:
            self.remove()
            raise RuntimeError(f"no network namespaces here: {error}") from error

    def plug(self):
        self._ip("link", "set", self.end, "up")

    def pull(self):
        self._ip("link", "set", self.end, "down")

    def remove(self):
        with suppress(OSError):
            delete = ["ip", "netns", "delete", self.name]
            subprocess.run(delete, check=False, capture_output=True)

    def _ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def deploy(place, *options):
    """Start the SuperLink and a SuperNode for every site; stop all at the end."""
    with Deployment(place) as deployment:
        deployment.superlink(*options)
        for site in SITES:
            start_site(deployment, site)
        yield deployment


def run_directory(place):
    (directory,) = (place / "out").iterdir()
    return directory


def checkpoints(place):
    """Return the names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in place.glob("out/*/checkpoints/round-*"))


def rounds_of(directory):
    """Return the metrics of the rounds so far."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_until(condition, seconds, what):
    """Return the first value of `condition()` that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"in {seconds} s not: {what}")


def expected_adapter(local_grid, settings, place):
    """Return the adapter's hash at the end of the same run in this process."""
    from tests.test_federation import results, run

    configs = [{"site": site, "data-path": str(place / site)} for site in SITES]
    settings = {**settings, "out-dir": str(place / "expected")}
    run(local_grid, settings, nodes=len(SITES), configs=configs)
    return results(settings)[3]["adapter-sha256"]


def adapter_of(directory):
    return json.loads((directory / "manifest.json").read_text())["adapter-sha256"]


def apps_of(deployment, name, command):
    """Return the app processes that a SuperLink or SuperNode runs, newest last.

    For some milliseconds an app has a child that looks like it: itself, forked to ask
    the system what it is.
    """
    import psutil

    children = psutil.Process(deployment.processes[name].pid).children(recursive=True)
    parents = {}
    for child in children:
        with suppress(psutil.Error):  # it has just ended
            if command in " ".join(child.cmdline()):
                parents[child] = child.ppid()
    numbers = {child.pid for child in parents}
    apps = [child for child, parent in parents.items() if parent not in numbers]
    return sorted(apps, key=lambda app: app.create_time())
