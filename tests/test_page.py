"""The page of a run: whole, self-contained, safe, and true to the metrics."""

import copy
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from flwr.app import Error, Message

from fedpft_flower.charts import bars, lines, number, strip
from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.markup import Markup, element
from fedpft_flower.page import render_page
from fedpft_flower.plan import Plan
from fedpft_flower.report import run as report
from fedpft_flower.report import write_page
from fedpft_flower.runs import FinishedRun
from fedpft_flower.wording import shown_settings, size
from tests.test_federation import broken, results, run

SECTIONS = [
    "What was run",
    "Results",
    "Curves",
    "Bytes",
    "Gradient error",
    "Nodes",
    "Kept neurons",
    "Time and memory",
    "Protection sheet",
]
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>\u202e\x00\ud800"
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Walk a page: every element that opens must close; keep texts and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check(text):
    """Check what holds of every page, and return it parsed."""
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert ("html", "lang", "en") in page.attributes
    assert page.names.count("h1") == 1
    for title in SECTIONS:
        assert title in page.texts
    # Nothing is fetched, and nothing runs.
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(page.names)
    for _, name, value in page.attributes:
        assert name not in {"src", "href", "xlink:href"} and not name.startswith("on")
        assert "url(" not in (value or "")
    assert "http" not in text and "@import" not in text and "url(" not in text
    # Every picture says what it shows, every column and row what it is.
    for place, (tag, name, value) in enumerate(page.attributes):
        if (tag, name, value) == ("svg", "role", "img"):
            told = dict(pair for _, *pair in page.attributes[place : place + 2])
            assert told["aria-label"]
    heads = [
        value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")
    ]
    assert set(heads) == {"row", "col"}
    return page


def scores(value, sub_fm=None):
    names = ("accuracy", "macro-f1", "matthews", "loss")
    both = {"fm": value, "sub-fm": value if sub_fm is None else sub_fm}
    return {
        f"{k}-{n}": v + i / 100 for k, v in both.items() for i, n in enumerate(names)
    }


def client(loss, outcome="ok", **more):
    told = {"outcome": outcome, "bytes-down": 1_500_000, "bytes-up": 250_000}
    if outcome == "ok":
        told |= {
            "num-examples": 40,
            "train_loss": loss,
            "steps": 3,
            "seconds": 1.25,
            "flops": 2.5e9,
            "peak-memory": 5e8,
        }
    return told | more


@pytest.fixture
def facts(tmp_path):
    """Return the arguments of a page: rounds, a failure, one without evaluation."""
    place = "/secret/home/of/somebody"
    config = Config.from_run_config(
        {
            "fm.name": f"{place}/my-bert",
            "data.task": "text",
            "data.path": f"{place}/a.csv",
        }
    ).flat()
    kept = {0: tuple(range(10)), 1: tuple(range(0, 24, 2)), 3: tuple(range(24))}
    error = {"relative": 0.54321, "cosine": 0.81}
    better = {"relative": 0.32123, "cosine": 0.93}
    aligned = {"gradient-before": error, "gradient-after": better}
    table = {
        "down-install": {"logical": 3_000_000, "sent": 1_000_000},
        "up-adapter": {"logical": 500_000, "sent": 500_000},
    }
    rounds = [
        {"round": 0, "alignment": aligned, "seconds": 9.0, "bytes": {}, **scores(0.1)},
        {
            "round": 1,
            "lr": 0.001,
            "seconds": 2.0,
            "bytes": table,
            "failures": {"north": "boom"},
            "clients": ["north", "south"],
            "train-loss": 1.5,
            "per-client": {"south": client(1.5), "north": client(0, "boom")},
            "peak-memory-client": 5e8,
        },
        {
            "round": 2,
            "lr": 0.0005,
            "seconds": 3.0,
            "alignment": aligned,
            "bytes": table,
            "clients": ["north", "south"],
            "train-loss": 1.0,
            "per-client": {"south": client(0.9), "north": client(1.1)},
            "peak-memory-client": 5e8,
            **scores(0.7123, 0.6789),
        },
    ]
    summary = {
        "method": "fedpft",
        "rounds": 2,
        "best-round": 2,
        "select": "last",
        "test-before": scores(0.1119),
        "test-plain": scores(0.7219, 0.6619),
        "test-after": scores(0.7319, 0.6619),
        "more-tests": {"hard": scores(0.4449, 0.4339)},
        "refinement": {
            "kept": True,
            "steps": 7,
            "validation-before": 0.7,
            "validation-after": 0.71,
            "validation-loss-before": 1.2,
            "validation-loss-after": 1.1,
        },
        "share-withheld": 0.23456,
        "protection": {"rows": []},
        "privacy": None,
        "bytes-down": 6_000_000,
        "bytes-up": 1_000_000,
        "bytes-install-per-client": 1_000_000,
        "bytes-per-client-and-round": 250_000.0,
        "peak-memory-server": 2e9,
        "peak-memory-client": 5e8,
        "seconds": 14.0,
        "failures": 1,
    }
    manifest = {
        "versions": {"python": "3.11", "fedpft-flower": "0.1.0"},
        "machine": {"platform": "Linux", "threads": 2},
        "config": config,
        "seed": 0,
        "labels": ["good", "bad"],
        "splits": {"test": {"rows": 77, "source": "test", "sha256": "ab" * 32}},
        "nodes": {"north": 123, "south": 40, "idle": 5},
        "fm-sha256": "01" * 32,
        "sub-fm-sha256": "23" * 32,
        "adapter-sha256": "45" * 32,
        "final-adapter-sha256": "67" * 32,
        "plan": Plan((24, 24, 24, 24), kept, (0, 3)).to_json(),
    }
    return [config, rounds, summary, manifest]


def test_every_section_is_there_and_the_numbers_are_the_metrics(facts):
    page = check(render_page(*facts))
    _, _, summary, _ = facts
    for when in ("before", "plain", "after"):
        assert f"{summary[f'test-{when}']['fm-accuracy']:.3f}" in page.texts
    assert f"{summary['more-tests']['hard']['sub-fm-accuracy']:.3f}" in page.texts
    assert "23.5 %" in page.texts
    assert "7.00 MB" in page.texts  # both directions
    assert page.text.count("2.00 MB") == 1  # of 6 MB installed, what was sent
    row = page.texts.index("north")
    assert page.texts[row : row + 9] == [
        *("north", "123", "1", "1.100", "3.00 MB", "500.0 kB", "1.2", "2.5"),
        "round 1: boom",
    ]
    assert "1 more node was there and not asked" in page.text
    assert "2 nodes trained" in page.text
    assert ("div", "role", "region") in page.attributes
    row = page.texts.index("accuracy: sub-FM")
    assert page.texts[row:].index("0.679") > 0  # the curves' figures in a table
    assert "validation loss 1.200 to 1.100" in page.text


def test_curves_have_a_point_for_every_value_and_none_where_none_is(facts):
    page = check(render_page(*facts))
    titles = [text for text in page.texts if ", round " in text]
    assert "FM, plugged in, round 2: 0.712" in titles
    assert "sub-FM, round 2: 0.679" in titles
    assert not any(text.startswith("FM, plugged in, round 1:") for text in titles)
    assert "before alignment, round 2: 0.543" in titles
    assert "install, round 1: 3" in titles
    assert "clients, training, round 1: 1.5" in titles


def test_who_only_failed_has_not_trained_and_what_refinement_saw_is_told(facts):
    _, rounds, summary, _ = facts
    rounds[2]["per-client"]["north"] = client(0, "boom")
    page = check(render_page(*facts))
    assert "1 node trained" in page.text
    assert "batches were validation rows" not in page.text
    summary["refinement"]["validation-share"] = 0.25
    told = "25.0 % of its batches were validation rows, without their labels"
    assert told in check(render_page(*facts)).text
    rounds[2]["skipped"] = "1 usable replies of 2"
    assert "1 node trained" in check(render_page(*facts)).text  # in round 1


def test_a_single_gradient_error_is_a_table(facts):
    del facts[1][2]["alignment"]
    page = check(render_page(*facts))
    assert "in round 0" in page.texts
    assert {"0.543", "0.321", "0.810", "0.930"} <= set(page.texts)
    del facts[1][0]["alignment"]
    assert "This run measured no gradient error." in check(render_page(*facts)).texts


def test_layers_say_what_is_kept(facts):
    page = check(render_page(*facts))
    labels = [value for tag, name, value in page.attributes if name == "aria-label"]
    assert [text for text in labels if text.startswith("layer")] == [
        "layer 0 keeps 10 of 24 neurons",
        "layer 1 keeps 12 of 24 neurons",
        "layer 2 keeps 0 of 24 neurons",
        "layer 3 keeps 24 of 24 neurons",
    ]
    place = page.texts.index("which")
    states = " ".join(page.texts[place + 1 : place + 17])
    assert states == (
        "0 compressed 10 of 24 yes 1 compressed 12 of 24 no "
        "2 dropped 0 of 24 no 3 whole 24 of 24 yes"
    )


def test_names_and_reasons_from_nodes_stay_text(facts):
    _, rounds, _, manifest = facts
    rounds[1]["per-client"][HOSTILE] = client(0, HOSTILE)
    rounds[1]["clients"].append(HOSTILE)
    manifest["nodes"][HOSTILE] = 3
    manifest["labels"][0] = HOSTILE
    text = render_page(*facts)
    page = check(text)
    assert text.encode("utf-8")
    # A direction mark or control character shows its code.
    shown = HOSTILE.encode("unicode_escape").decode()
    assert shown in page.texts and f"round 1: {shown}" in page.texts


def test_paths_of_this_machine_are_not_shown(facts):
    text = render_page(*facts)
    assert "/secret" not in text and "my-bert" in text and "a.csv" in text
    shown = shown_settings({"fm.name": "org/name", "out-dir": "~/runs", "seed": 1})
    assert shown == {"fm.name": "org/name", "out-dir": "runs", "seed": 1}


def test_protection_and_privacy_are_shown_where_a_run_has_them(facts):
    assert "Differential privacy" not in check(render_page(*facts)).text
    sheet = [{"name": "<b>held</b>", "value": "23 %", "note": "of weights"}]
    facts[2] |= {
        "protection": {"rows": sheet},
        "privacy": {"epsilon": 3.5, "delta": 1e-5},
    }
    for entry in facts[1]:
        entry["privacy"] = {"epsilon": entry["round"] + 0.5}
    page = check(render_page(*facts))
    assert "<b>held</b>" in page.texts
    assert "Differential privacy: epsilon 3.5, delta 1e-05." in page.texts
    assert "epsilon, round 2: 2.5" in page.texts


def test_values_that_no_axis_holds_do_no_harm(facts):
    for value in (math.nan, math.inf, 0.0, -1.0, 1e300):
        odd = copy.deepcopy(facts)
        odd[1][2] |= {"fm-accuracy": value, "train-loss": value}
        check(render_page(*odd))


def test_a_chart_of_large_ratios_is_logarithmic():
    drawn = lines("p", "perplexity", {"FM": [(0, 1e6), (1, 50.0), (2, 12.0)]})
    assert "perplexity (log)" in drawn
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    span = [math.log10(1e6 / 50), math.log10(50 / 12)]
    steps = [heights[1] - heights[0], heights[2] - heights[1]]
    assert steps[0] / steps[1] == pytest.approx(span[0] / span[1], rel=0.01)


def test_nothing_to_draw_is_nothing():
    assert lines("a", "b", {"c": [], "d": [(0, math.nan)]}) == ""
    assert bars("a", "b", {0: {}, 1: {"x": 0.0}}) == ""


def test_bars_stand_on_each_other_and_fill_the_axis_in_proportion():
    drawn = bars("a", "MB", {1: {"x": 1.0, "y": 3.0}})
    found = re.findall(
        r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', drawn
    )
    (x_top, x_high), (y_top, y_high) = [tuple(map(float, pair)) for pair in found[:2]]
    assert y_high == pytest.approx(3 * x_high, abs=0.2)
    assert y_top + y_high == pytest.approx(x_top, abs=0.2)


def test_a_strip_covers_the_share_of_its_layer():
    for width, kept in ((24, range(0, 24, 3)), (3072, range(768)), (300, range(300))):
        drawn = strip("x", list(kept), width)
        covered = sum(
            float(opacity) * sum(map(int, re.findall(r"h(\d+)v", path)))
            for path, opacity in re.findall(
                r'd="([^"]*)".*?fill-opacity: ([\d.]+)', drawn
            )
        )
        bins = min(width, 256)
        assert covered / bins == pytest.approx(len(kept) / width, abs=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (12.0, "12"), (1234.5, "1234"), (2.5e6, "2.5e+06"), (0, "0")],
)
def test_numbers_have_sensible_digits(value, text):
    assert number(value) == text


def test_sizes_and_elements():
    assert [size(x) for x in (12, 5e6, 7.25e9)] == ["0.0 kB", "5.00 MB", "7.25 GB"]
    assert (
        element("b", "<", Markup("<i>"), id=None, hidden=True)
        == "<b hidden>&lt;<i></b>"
    )


# -------------------------------------------------------------------------- real runs


def page_of(settings):
    place, rounds, summary, manifest = results(settings)
    text = (place / "report.html").read_text(encoding="utf-8")
    assert text == render_page(manifest["config"], rounds, summary, manifest)
    return check(text), summary


def test_a_run_with_a_failure_writes_its_page_and_it_can_be_made_again(
    local_grid, settings, capsys
):
    settings |= {"eval-every": 2, "sub-fm.whole-layers": "0"}
    fault = broken(lambda m, _: Message(Error(2, "boom <b>"), reply_to=m))
    run(local_grid, settings, {1: fault, 2: fault})
    page, summary = page_of(settings)
    assert summary["failures"] == 3
    assert "boom <b>" in page.text
    place = results(settings)[0]
    before = (place / "report.html").read_bytes()
    (place / "report.html").unlink()
    report([str(place)])
    assert (place / "report.html").read_bytes() == before
    assert capsys.readouterr().out.endswith(f"report: {place / 'report.html'}\n")


@pytest.mark.parametrize("method", ["fedpetuning", "fedot"])
def test_other_methods_have_a_page(local_grid, settings, method):
    run(local_grid, settings | {"method": method, "rounds": 1})
    page, _ = page_of(settings)
    assert ("sub-FM after" in page.texts) == (method == "fedot")
    assert ("dropped" in page.texts) == (method == "fedot")


def test_a_run_that_generates_has_a_page(local_grid, generation):
    run(
        local_grid,
        generation | {"method": "fedpft-ls", "plug-in.steps": 2, "rounds": 1},
    )
    page, summary = page_of(generation)
    assert "perplexity on validation" in page.texts
    assert f"{summary['test-after']['fm-perplexity']:.3f}" in page.texts


def test_what_is_no_finished_run_ends_in_one_line(tmp_path, capsys, full_disk, facts):
    with pytest.raises(SystemExit) as caught:
        report([str(tmp_path)])
    assert caught.value.code == 2
    assert "is not the directory of a finished run" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(FedPFTError, match="cannot read"):
        FinishedRun.read(tmp_path)
    config, rounds, summary, manifest = facts
    finished = FinishedRun(
        tmp_path, Config.from_run_config(config), rounds, {}, manifest
    )
    with pytest.raises(FedPFTError, match="lack what a page shows"):
        write_page(finished)
    with full_disk(), pytest.raises(FedPFTError, match="make room"):
        write_page(FinishedRun(tmp_path, finished.config, rounds, summary, manifest))
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


# --------------------------------------------------------------------------- a browser


@pytest.fixture
def chromium(tmp_path):
    """Open a page in Chromium, offline, and return what the browser prints of it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")

    def opened(path, *options):
        done = subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync"),
                f"--user-data-dir={tmp_path / 'profile'}",
                *("--window-size=1000,1400", *options),
                path.as_uri(),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return opened


def shows(chromium, path):
    """Check that the browser's elements are those that were written."""
    shown = Page(chromium(path, "--dump-dom"))
    written = Page(path.read_text(encoding="utf-8"))
    assert shown.names == written.names
    assert shown.text == written.text
    return shown


def test_a_browser_shows_the_page_and_nothing_runs(facts, tmp_path, chromium):
    _, rounds, _, manifest = facts
    rounds[1]["per-client"][HOSTILE] = client(0, HOSTILE)
    manifest["nodes"][HOSTILE] = 3
    path = tmp_path / "report.html"
    path.write_text(render_page(*facts), encoding="utf-8")
    shows(chromium, path)
    chromium(path, f"--screenshot={tmp_path / 'page.png'}")
    from PIL import Image

    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1000, 1400)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_a_browser_shows_what_a_run_wrote(local_grid, settings, chromium):
    run(local_grid, settings | {"method": "fedpft-ls", "plug-in.steps": 2})
    page = shows(chromium, results(settings)[0] / "report.html")
    assert set(SECTIONS) <= set(page.texts)
    assert page.names.count("svg") >= 4
