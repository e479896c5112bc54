"""Comparisons: specs, cells through the app, tables that can be recomputed."""

import csv
import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fedpft_flower import compare, results, tables
from fedpft_flower.compare import Comparison
from fedpft_flower.config import MARK, Config, FedPFTError, PrivacyConfig
from fedpft_flower.disk import lock
from fedpft_flower.spec import Cell, Spec
from fedpft_flower.superlink import Failure
from fedpft_flower.tables import interval
from tests.test_federation import run

ROOT = Path(__file__).parent.parent
SPECS = sorted((ROOT / "conf").glob("*/*.toml"))

SPEC = """
nodes = 3
seeds = [0, 1]
methods = ["fedpetuning", "fedpft-n", "aligned"]
kept = [0.5, 0.25]
pairs = [["aligned", "fedpft-n"]]

[settings]
rounds = 2
gradient-every = 1
fm.name = "{FM_OF_TEST}"
data.task = "digits"
data.max-train-rows = 120
data.max-validation-rows = 40
data.max-test-rows = 40
data.public-rows = 64
train.clients-per-round = 2
train.local-steps = 2

[task.digits]

[partition.alike]
partition.kind = "iid"

[method.aligned]
method = "fedpft-b"
align.steps = 2
"""


@pytest.fixture
def spec_file(tmp_path, vit_directory, monkeypatch):
    monkeypatch.setenv("FM_OF_TEST", str(vit_directory))
    monkeypatch.setenv("FEDPFT_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "small.toml"
    place.write_text(SPEC)
    return place


@pytest.fixture
def engine(local_grid, monkeypatch):
    """Run cells in this process; returns the configurations that were run."""
    ran = []

    def run_here(config, nodes, app, *rest):
        ran.append(config)
        run(local_grid, config.flat(), nodes=nodes)

    monkeypatch.setattr(compare, "run_experiment", run_here)
    return ran


def compared(spec_file, out, *options):
    """Call the command; return its exit status."""
    with pytest.raises(SystemExit) as ended:
        compare.run([str(spec_file), "--out", str(out), *options])
    return ended.value.code


def errors(capsys):
    """Return the lines of errors, without those of handlers of closed streams."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("error: ")]


def test_cells_run_once_and_every_table_follows_from_the_csv(
    spec_file, engine, tmp_path, capsys
):
    out = tmp_path / "out"
    assert compared(spec_file, out) == 0
    # The whole FM is kept for both fractions: 1 + 2 + 2 cells a seed.
    assert len(engine) == 10
    shown = capsys.readouterr().out
    assert "10 to go" in shown and "1 to go, about" in shown
    assert shown.rstrip().endswith(f"results: {out}")
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 10 and {row["state"] for row in rows} == {"finished"}
    text = (out / "table.md").read_text()
    for method, kept in (
        ("fedpetuning", "1"),
        ("fedpft-n", "0.5"),
        ("aligned", "0.25"),
    ):
        found = [
            float(row["test-fm"])
            for row in rows
            if (row["method"], row["kept"]) == (method, str(float(kept)))
        ]
        assert len(found) == 2
        mean = f"{statistics.mean(found):.3f} ({statistics.stdev(found):.3f})"
        assert f"| {method} | {kept} | {mean} |" in text
    assert "| digits, alike | 0.5 | aligned | fedpft-n | 2 | " in text
    for plot in ("metric-rounds", "metric-bytes", "metric-kept", "gradient-rounds"):
        assert (out / f"{plot}.png").stat().st_size > 10_000
    # Nothing is run again.
    assert compared(spec_file, out) == 0
    assert len(engine) == 10
    # No file names a place of this machine.
    kept_files = [*out.glob("cells/*"), out / "results.csv", out / "table.md"]
    assert not any(str(tmp_path.parent) in f.read_text() for f in kept_files)


def test_csv_rows_are_those_of_the_runs(spec_file, engine, tmp_path):
    out = tmp_path / "out"
    assert compared(spec_file, out, "--only", "aligned-k0.5") == 1  # others are unrun
    rows = list(csv.DictReader((out / "results.csv").open()))
    states = [row["state"] for row in rows]
    assert (states.count("finished"), states.count("unrun")) == (2, 8)
    assert "## Cells unrun" in (out / "table.md").read_text()
    for row in rows:
        if row["state"] == "unrun":
            continue
        name = f"digits-alike-aligned-k0.5-lr0.001-s{row['seed']}-n3"
        (place,) = out.glob(f"runs/{name}/*")
        summary = json.loads((place / "summary.json").read_text())
        assert float(row["test-fm"]) == summary["test-after"]["fm-accuracy"]
        assert int(row["bytes-down"]) == summary["bytes-down"]
        assert int(row["parameters-sub-fm"]) == summary["parameters"]["sub-fm"]
        hits = json.loads((place / "hits.json").read_text())
        assert hits["fm"].count("1") / len(hits["fm"]) == float(row["test-fm"])
        rounds = [json.loads(x) for x in (place / "metrics.jsonl").open()]
        start = rounds[0]["alignment"]["gradient-after"]["relative"]
        assert float(row["gradient-error"]) == start
        last = rounds[-1]["gradient-error"]["relative"]
        assert float(row["gradient-error-last"]) == last != start
        assert not (place / "checkpoints").exists()


def test_a_failed_cell_says_why_and_stops_no_other(
    spec_file, engine, tmp_path, monkeypatch, capsys
):
    out, works = tmp_path / "out", compare.run_experiment

    def breaks(config, nodes, app, *rest):
        if config.method == "fedpft-n":
            return Failure("finished:failed", [f"{MARK}error: no room for it"])
        return works(config, nodes, app, *rest)

    monkeypatch.setattr(compare, "run_experiment", breaks)
    assert compared(spec_file, out, "--only", "k0.5-") == 1
    assert capsys.readouterr().out.count("failed: no room for it") == 2
    text = (out / "table.md").read_text()
    name = "digits-alike-fedpft-n-k0.5-lr0.001-s0"
    assert f"- {name}: no room for it" in text
    told = json.loads((out / "cells" / f"{name}.failed.json").read_text())
    assert told["lines"] == [f"{MARK}error: no room for it"]
    monkeypatch.setattr(compare, "run_experiment", works)  # it was mended
    compared(spec_file, out, "--only", "k0.5-")
    assert "no room" not in (out / "table.md").read_text()


def test_a_stopped_cell_goes_on_where_it_was(spec_file, engine, tmp_path, monkeypatch):
    out = tmp_path / "out"
    from fedpft_flower.server import ProxyServer

    real = ProxyServer.end_round

    def stopped(self, current, *rest):
        if current == 2:
            raise KeyboardInterrupt
        return real(self, current, *rest)

    monkeypatch.setattr(ProxyServer, "end_round", stopped)
    only = ("--only", "aligned-k0.5-lr0.001-s0")
    assert compared(spec_file, out, *only) == 130
    monkeypatch.setattr(ProxyServer, "end_round", real)
    compared(spec_file, out, *only)
    assert [bool(config.resume) for config in engine] == [False, True]
    assert len(list(out.glob("cells/*.json"))) == 1


def test_results_of_another_spec_are_refused(spec_file, engine, tmp_path, capsys):
    out = tmp_path / "out"
    compared(spec_file, out, "--only", "fedpetuning")
    spec_file.write_text(SPEC.replace("rounds = 2", "rounds = 3"))
    assert compared(spec_file, out) == 2
    (error,) = errors(capsys)
    assert "was made with rounds = 2, the spec says 3" in error


def test_of_several_rates_each_method_takes_its_best(
    spec_file, engine, tmp_path, capsys
):
    rates = "lrs = [1e-6, 0.02]\n"
    spec_file.write_text(rates + SPEC.replace("kept = [0.5, 0.25]", "kept = [0.5]"))
    spec, out = Spec(spec_file), tmp_path / "out"
    assert compared(spec_file, out, "--only", "fedpft-n") == 1
    assert len(engine) == 3  # two rates with the first seed, the best with the second
    told = re.findall(r"(\d+) to go", capsys.readouterr().out)
    assert told == ["3", "2", "1"]
    comparison = Comparison(spec, out)
    cell = Cell("digits", "alike", "fedpft-n", 0.5, 0.02, 1)
    losses = {}
    for lr in (1e-6, 0.02):
        name = f"digits-alike-fedpft-n-k0.5-lr{lr:g}-s0"
        found = json.loads((out / "cells" / f"{name}.json").read_text())
        losses[lr] = found["rounds"][-1]["fm-accuracy"]
    best = max(losses, key=losses.get)
    assert comparison.best_lr(cell) == best
    # The table says which rate it shows, and by what it was chosen.
    for row in csv.DictReader((out / "results.csv").open()):
        if row["state"] == "finished":
            assert row["shown"] == str(float(row["lr"]) == best)
        if row["state"] == "finished" and row["seed"] == "0":
            assert float(row["validation"]) == losses[float(row["lr"])]
    # A rate that fails, as one that diverges does, leaves the others.
    name = f"digits-alike-fedpft-n-k0.5-lr{best:g}-s0"
    (out / "cells" / f"{name}.json").unlink()
    (out / "cells" / f"{name}.failed.json").write_text('{"reason": "it diverged"}')
    (other,) = losses.keys() - {best}
    assert Comparison(spec, out).best_lr(cell) == other


def test_the_score_that_chooses_is_that_of_the_reported_model():
    entries = [{"round": n, "fm-accuracy": n / 10} for n in (0, 4, 6)]
    found = {"rounds": [*entries, {"round": 7}], "summary": {"best-round": 4}}
    assert results.validation_score(found, "accuracy") == 0.6
    found["summary"]["select"] = "best"
    assert results.validation_score(found, "accuracy") == 0.4
    found["summary"]["refinement"] = {"kept": False, "validation-after": 0.9}
    assert results.validation_score(found, "accuracy") == 0.4
    found["summary"]["refinement"]["kept"] = True
    assert results.validation_score(found, "accuracy") == 0.9


@pytest.mark.parametrize(
    ("part", "said"),
    [("recipe", "was made with recipe"), ("manifest", "with unlike test rows")],
)
def test_results_that_only_look_alike_are_refused(
    spec_file, engine, tmp_path, capsys, part, said
):
    out = tmp_path / "out"
    compared(spec_file, out, "--only", "k0.5-lr0.001-s0")
    place = out / "cells" / "digits-alike-aligned-k0.5-lr0.001-s0.json"
    found = json.loads(place.read_text())
    if part == "recipe":
        found["recipe"]["patience"] = 3
    else:
        found["manifest"]["splits"]["test"]["sha256"] = "ab" * 32
    place.write_text(json.dumps(found))
    capsys.readouterr()
    assert compared(spec_file, out) == 2
    (error,) = errors(capsys)
    assert said in error and str(place) in error


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("sensitivity", "align.sensitivity"),
        ("refine_on_validation", "plug-in.validation-share"),
    ],
)
def test_results_from_before_there_was_a_choice_know_that_they_had_none(
    spec_file, engine, tmp_path, capsys, older, part, setting
):
    out, only = tmp_path / "out", ("--only", "aligned-k0.5-lr0.001-s0")
    compared(spec_file, out, *only)
    (place,) = out.glob("cells/*.json")
    found = json.loads(place.read_text())
    del found["recipe"][part], found["config"][setting]
    if older:
        del found["recipe"]  # so did results before that
    place.write_text(json.dumps(found))
    compared(spec_file, out, *only)
    assert len(engine) == 1  # it is still the same
    spec_file.write_text(f"{SPEC}{setting} = 0.5\n")
    capsys.readouterr()
    assert compared(spec_file, out, *only) == 2
    (error,) = errors(capsys)
    assert f"'{part}': 0.0" in error and f"'{part}': 0.5" in error


def test_a_stopped_cell_does_not_go_on_with_other_nodes(spec_file, engine, tmp_path):
    out, only = tmp_path / "out", ("--only", "aligned-k0.5-lr0.001-s0")
    compared(spec_file, out, *only)
    (place,) = out.glob("cells/*.json")
    place.unlink()
    spec_file.write_text(SPEC.replace("nodes = 3", "nodes = 4"))
    compared(spec_file, out, *only)
    places = {config.out_dir.rpartition("-")[2] for config in engine}
    assert places == {"n3", "n4"}


def test_a_run_that_ended_and_was_not_kept_is_not_run_again(
    spec_file, engine, tmp_path, monkeypatch
):
    out, only = tmp_path / "out", ("--only", "aligned-k0.5-lr0.001-s0")
    real = Comparison._write

    def full(self, cell, suffix, content):
        raise FedPFTError("cannot write")

    monkeypatch.setattr(Comparison, "_write", full)
    assert compared(spec_file, out, *only) == 2
    monkeypatch.setattr(Comparison, "_write", real)
    compared(spec_file, out, *only)
    assert len(engine) == 1 and len(list(out.glob("cells/*.json"))) == 1
    # What was kept as a result, and removed by hand, would be run again.
    (runs,) = out.glob("runs/digits*")
    assert compare._unkept(runs, engine[0].flat()) is None


def test_a_stopped_run_that_cannot_be_read_is_not_begun_anew(
    spec_file, engine, tmp_path
):
    out, cell = tmp_path / "out", Spec(spec_file).all_cells[0]
    place = out / "runs" / f"{cell.name}-n{Spec(spec_file).nodes}" / "7"
    (place / "checkpoints" / "round-000001").mkdir(parents=True)
    (place / "config.toml").write_text("rounds = ")
    compared(spec_file, out)
    failed = json.loads((out / "cells" / f"{cell.name}.failed.json").read_text())
    assert f"cannot read how {place} was run" in failed["reason"]
    begun = {config.out_dir.rpartition("/")[2] for config in engine}
    assert place.parent.name not in begun
    assert engine  # the others went on


def test_a_run_that_broke_is_told_by_its_last_words(
    spec_file, engine, tmp_path, monkeypatch
):
    comparison = Comparison(Spec(spec_file), tmp_path / "out")
    for lines, said in (
        (["round 1", "Killed by signal 9", " "], "Killed by signal 9"),
        ([f"{MARK}error: no room", "Traceback"], "no room"),
        ([], "finished:failed"),
    ):
        failure = Failure("finished:failed", lines)
        monkeypatch.setattr(compare, "run_experiment", lambda *_, f=failure: f)
        flat = comparison.spec.config(comparison.spec.all_cells[0]).flat()
        assert comparison._attempt(flat).reason == said


def test_a_run_that_cannot_be_resumed_starts_anew_but_for_what_it_released(
    spec_file, engine, tmp_path, monkeypatch
):
    spec, useless = Spec(spec_file), "resume: fedpft-flower is '2', the checkpoint..."
    cell = spec.all_cells[0]
    asked = []

    def refuses(self, flat):
        asked.append(flat)
        return compare._Failed(useless)

    monkeypatch.setattr(Comparison, "_attempt", refuses)
    comparison = Comparison(spec, tmp_path / "out")
    assert comparison._run(cell) == f"failed: {useless}"
    assert len(asked) == 2
    private = replace(
        spec.config(cell),
        privacy=PrivacyConfig(mechanism="server"),
        weighting="uniform",
    )
    monkeypatch.setattr(Spec, "config", lambda self, cell: private)
    comparison._run(cell)
    assert len(asked) == 3


def test_two_comparisons_do_not_run_in_one_directory(
    spec_file, engine, tmp_path, capsys
):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    with lock(tmp_path / "out" / "runs" / ".lock"):
        assert compared(spec_file, tmp_path / "out") == 2
    (error,) = errors(capsys)
    assert "in use by another comparison" in error and not engine


def test_a_method_may_read_less_and_another_fm_is_refused(
    spec_file, engine, tmp_path, capsys, monkeypatch, request
):
    text = SPEC.replace("seeds = [0, 1]", "seeds = [0, 1]\nreference = 'fedpft-n'")
    spec_file.write_text(f"{text}data.max-train-rows = 60\n")
    out = tmp_path / "out"
    compared(spec_file, out, "--only", "k0.5-lr0.001-s0")
    assert compared(spec_file, out, "--tables") == 1  # others are unrun, all is sound
    other = tmp_path / "other"
    shutil.copytree(request.getfixturevalue("vit_directory"), other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: 2 * v for k, v in tensors.items()}, other / "model.safetensors")
    monkeypatch.setenv("FM_OF_TEST", str(other))
    capsys.readouterr()
    # The first cell that has read something else ends it, not only the next call.
    assert compared(spec_file, out, "--only", "s1") == 2
    (error,) = errors(capsys)
    assert "were made with unlike FM" in error
    assert len(list(out.glob("cells/*-s1.json"))) == 1


def read_of_test(seed, config, **sources):
    """Return what a cell has read of the split to test on, and what decided on it."""
    splits = {
        name: {"rows": 40, "source": source, "sha256": name}
        for name, source in sources.items()
    }
    result = {"manifest": {"splits": splits}, "config": config}
    found = compare._read_by(Cell("t", "", "a", 0.5, 0.1, seed), result)
    return [key for key in found if key[0] == "test rows"]


def test_seeds_share_the_rows_that_none_of_them_drew():
    def shared(config, **sources):
        first, second = (read_of_test(seed, config, **sources) for seed in (0, 1))
        assert len(first) == len(second) == 1
        return first == second

    assert shared({}, test="validation", train="train")
    assert shared({"data.max-test-rows": 0}, test="test")
    assert shared({"data.max-test-rows": 41}, test="test")
    assert not shared({"data.max-test-rows": 40}, test="test")
    assert not shared({}, test="10% of train, seeded")
    # What another split was held out from.
    assert not shared({}, test="test", validation="half of test, seeded")
    assert shared({}, test="test", validation="10% of train, seeded")


def test_of_places_that_no_variable_names_cells_hold_the_last_part(
    spec_file, engine, tmp_path, capsys, request
):
    directory = request.getfixturevalue("vit_directory")
    spec_file.write_text(SPEC.replace("{FM_OF_TEST}", str(directory)))
    out, only = tmp_path / "out", ("--only", "fedpft-n-k0.5-lr0.001-s0")
    compared(spec_file, out, *only)
    (place,) = out.glob("cells/*.json")
    found = json.loads(place.read_text())
    last, _, told = found["config"]["fm.name"].partition("~")
    assert last == directory.name and len(told) == 8
    # Older ones held the whole, and stay what they were.
    found["config"]["fm.name"] = str(directory)
    place.write_text(json.dumps(found))
    compared(spec_file, out, *only)
    assert len(engine) == 1 and not errors(capsys)
    # Another place is another one, if it is called alike.
    other = tmp_path / directory.name
    shutil.copytree(directory, other)
    spec_file.write_text(SPEC.replace("{FM_OF_TEST}", str(other)))
    assert compared(spec_file, out, *only) == 2
    (error,) = errors(capsys)
    assert f"was made with fm.name = '{directory.name}~" in error


def test_tables_say_what_runs_under_a_name_that_settings_changed(spec_file):
    spec_file.write_text(
        SPEC.replace("rounds = 2", 'rounds = 2\nalign.before = "none"')
        + '\n[partition.other]\npartition.kind = "dirichlet"\n'
        + "plug-in.steps = 3\n"
    )
    lines = tables._methods(Spec(spec_file))
    assert lines == [
        "- fedpft-n: with plug-in.steps = 3 (digits, other)",
        "- aligned: fedpft-b with align.before = none, align.steps = 2 (digits, alike)",
        "- aligned: fedpft-b with align.before = none, plug-in.steps = 3, "
        "align.steps = 2 (digits, other)",
    ]


def test_further_test_splits_have_columns_of_their_own():
    def result(seed, hard):
        scores = {"fm-accuracy": 0.5, "sub-fm-accuracy": 0.4}
        more = {"hard": {"fm-accuracy": hard, "sub-fm-accuracy": 0.1}} if hard else {}
        summary = {"test-after": scores, "test-plain": scores, "more-tests": more}
        found = {"config": {"data.task": "digits"}, "summary": summary}
        return results.Result(Cell("t", "", "a", 0.5, 0.1, seed), found, None)

    spec = SimpleNamespace(
        columns=[("t", "")],
        seeds=[0, 1],
        methods=["a"],
        groups=lambda: [("t", "", "a", 0.5)],
        kept=lambda *of: [0.5],
        lrs=lambda *of: [0.1],
        config=lambda cell: Config(),
    )
    groups = {("t", "", "a", 0.5): [result(0, 0.25), result(1, None)]}
    lines = tables._paper_table(spec, groups)
    assert lines[0] == "| method | kept | t (accuracy) | hard, t (accuracy) |"
    assert lines[2] == "| a | 0.5 | 0.500 (0.000) | 0.250 [1 seed] |"


def test_further_test_splits_have_gaps_of_their_own():
    def cells(method, *right):
        found = []
        for seed, hits in enumerate(right):
            share = sum(map(int, hits)) / len(hits)
            scores = {"fm-accuracy": share, "sub-fm-accuracy": 0.1}
            summary = {"test-after": scores, "more-tests": {"hard": scores}}
            of = {"fm": "0" * 8, "fm (hard)": hits}
            cell = {"config": {"data.task": "digits"}, "summary": summary, "hits": of}
            cell |= {"manifest": {}}
            found.append(results.Result(Cell("t", "", method, 1, 1, seed), cell, None))
        return found

    spec = SimpleNamespace(
        seeds=[0, 1],
        reference="b",
        groups=lambda: [("t", "", "a", 1), ("t", "", "b", 1)],
        kept=lambda *of: [1],
    )
    groups = {
        ("t", "", "a", 1): cells("a", "11110000", "11111100"),
        ("t", "", "b", 1): cells("b", "11111111", "11111111"),
    }
    lines = tables._split_table(spec, groups, ("t", ""), "hard")
    assert lines[0] == "| method | kept | FM | sub-FM | gap to b | by seed |"
    first = lines[2]
    assert first.startswith("| a | 1 | 0.625 (0.177) | 0.100 (0.000) | -37.5 (-")
    assert first.endswith(" points | -50.0, -25.0 |")
    assert lines[3].endswith("| - | - |")
    assert len(tables._split_table(spec, groups, ("t", ""), "other")) == 2


def test_differences_find_the_fraction_that_the_other_has():
    def group(method, kept):
        cells = [Cell("t", "", method, kept, 0.1, seed) for seed in (0, 1)]
        return [results.Result(cell, {"rounds": []}, None) for cell in cells]

    fractions = {"whole": [1.0], "a": [0.25, 0.5], "b": [0.125], "c": [0.25, 0.5]}
    spec = SimpleNamespace(kept=lambda task, part, method: fractions[method])
    keys = [("whole", 1.0), ("a", 0.25), ("a", 0.5), ("b", 0.125), ("c", 0.5)]
    groups = {("t", "", *key): group(*key) for key in keys}

    def found(one, other):
        both = tables._both(spec, groups, "t", "", one, other)
        return [(kept, *(x and x[0].cell.kept for x in rest)) for kept, *rest in both]

    assert found("a", "whole") == [("0.25", 0.25, 1.0), ("0.5", 0.5, 1.0)]
    assert found("whole", "a") == [("0.25", 1.0, 0.25), ("0.5", 1.0, 0.5)]
    assert found("b", "whole") == [("0.125", 0.125, 1.0)]
    assert found("a", "b") == [("0.25", 0.25, 0.125), ("0.5", 0.5, 0.125)]
    # What is not there yet is not made up for by another fraction.
    assert found("a", "c") == [("0.5", 0.5, 0.5)]
    fractions["none"] = [0.25]
    assert found("a", "none") == [("-", [], [])]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("nodes = 3", "nodes = 3\nlrs = 1"), "lrs is no list"),
        (("nodes = 3", ""), "nodes is missing"),
        (("seeds = [0, 1]", "seeds = [0, 0]"), "names one twice"),
        (('"fedpft-n", ', '"fedpft-x", '), "'fedpft-x' is neither a table"),
        (("rounds = 2", "rouns = 2"), "unknown configuration key 'rouns'"),
        (("kept = [0.5", 'kept = ["a"'), "give a list of floats"),
        (("[task.digits]", "[task.a/b]"), "cannot read"),
        (("[settings]", "[setings]"), "unknown key 'setings'"),
        (('["aligned", "fedpft-n"]', '["aligned", "fedot"]'), "none of methods"),
        (("{FM_OF_TEST}", "{NO_SUCH_VARIABLE}"), "set the environment variable"),
        (("[method.aligned]", "[method.alinged]"), "'aligned' is neither"),
        (("align.steps = 2", "align.steps = 2\n[method.x]"), "is none of methods"),
        (("nodes = 3", "nodes = true"), "nodes is no int"),
        (("nodes = 3", "nodes = -1"), "give at least 1"),
        (("kept = [0.5", "kept = [1.0, 0.5"), "fractions between 0 and 1"),
        (("rounds = 2", "sub-fm.keep-neurons = 3"), "exclude each other"),
        (("[task.digits]", "[task.digits]\nbase = 5"), "is no file's name"),
        (("[task.digits]", '[task.digits]\nbase = "no.toml"'), "cannot read"),
        (("rounds = 2", 'train.lr = "fast"'), "train.lr"),
        (("kept = [0.5", "lrs = [1e-3, 1.0000001e-3]\nkept = [0.5"), "other names"),
        (('method = "fedpft-b"', 'method = ["fedpft-b"]'), "method"),
        (("align.steps = 2", "sub-fm.keep-fraction = 0.3"), "exclude each other"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(
    spec_file, engine, tmp_path, capsys, change, said
):
    spec_file.write_text(SPEC.replace(*change))
    assert compared(spec_file, tmp_path / "out") == 2
    (error,) = errors(capsys)
    assert said in error
    assert not engine


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"summary": null}', "cut", "no test", "no hash"]
)
def test_an_unreadable_result_names_the_file(
    spec_file, engine, tmp_path, capsys, content
):
    place = tmp_path / "out/cells"
    place.mkdir(parents=True)
    broken = place / "digits-alike-fedpetuning-k1-lr0.001-s0.json"
    cell = {"cell": {}, "nodes": 3, "config": {}, "rounds": [], "hits": {}}
    cell |= {"summary": None, "manifest": {"splits": {}}}
    if content == "no test":
        cell["summary"] = {"best-round": 0, "select": "last"}
        cell["rounds"] = [{"round": 0, "fm-accuracy": 0.5}]
    if content == "no hash":
        cell["manifest"] = {"splits": {"test": {}}}
    broken.write_text(json.dumps(cell) if content.isalpha() else content)
    assert compared(spec_file, tmp_path / "out") == 2
    assert str(broken) in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", SPECS, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_spec_makes_configurations(path, monkeypatch, tmp_path):
    for name in ("DATA", "VIT", "QNLI", "PUBLIC", "SST2"):
        monkeypatch.setenv(name, str(tmp_path))
    spec = Spec(path)
    assert len({cell.name for cell in spec.all_cells}) == len(spec.all_cells) > 1


def test_a_spec_that_is_not_there_is_one_line(tmp_path, capsys):
    assert compared(tmp_path / "no.toml", tmp_path / "out") == 2
    assert "cannot read" in capsys.readouterr().err


def test_the_interval_covers_seeds_and_examples():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 400)) + 0.5
    low, high = interval(values)
    assert low < values.mean() < high
    # Over the examples alone: 1.96 standard errors of the mean over the seeds.
    alike = np.repeat(values[:1], 3, axis=0)
    low, high = interval(alike)
    error = 1.96 * alike[0].std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(error, rel=0.1)
    # Seeds that differ widen it.
    wide = alike + np.array([[-1.0], [0.0], [1.0]])
    assert interval(wide)[1] > high + 0.5


def test_the_interval_of_seeds_with_rows_of_their_own():
    """Rows drawn for each seed alone: S seeds of N rows are as many as S N rows.

    The variance of the mean by such a bootstrap is (2 S - 1) / S times that of a seed's
    mean, over S; drawn for all seeds at once, rows that vary alike count once.
    """
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 500))
    values -= values.mean(axis=1, keepdims=True)  # seeds alike but for their rows
    for shared, variance in ((False, 1 / 4), (True, 7 / 16)):
        low, high = interval(values, shared)
        error = 1.96 * (variance / 500) ** 0.5
        assert (high - low) / 2 == pytest.approx(error, rel=0.1)


def test_gaps_are_paired_by_seed():
    def result(method, seed, hits, rows=""):
        found = {
            "config": {"data.task": "digits"},
            "summary": {"test-after": {"fm-accuracy": hits.count("1") / len(hits)}},
            "hits": {"fm": hits},
            "manifest": {"splits": {"test": {"sha256": rows}} if rows else {}},
        }
        return results.Result(Cell("t", "", method, 0.5, 0.1, seed), found, None)

    ones = [result("a", 0, "1111"), result("a", 1, "1100"), result("a", 2, "1111")]
    others = [result("b", 1, "1000"), result("b", 0, "1110")]
    spec = SimpleNamespace(seeds=[0, 1, 2])
    shown = tables._gap(ones, others, spec)
    assert shown[0].startswith("+25.0 (") and shown[0].endswith(" points [2 seeds]")
    assert shown[1] == "+25.0, +25.0"
    assert tables._gap(ones, ones, spec) == tables._gap(ones, [], spec) == ("-", "-")
    # Rows that a seed has for itself are drawn for it alone; unknown ones are shared.
    half = ["1" * 200 + "0" * 200, "0" * 200 + "1" * 200]
    for known, same in ((("", ""), True), (("x", "x"), True), (("x", "y"), False)):
        ones = [result("a", s, half[s], known[s]) for s in (0, 1)]
        others = [result("b", s, "0" * 400, known[s]) for s in (0, 1)]
        mean = [100 * np.array(list(one), dtype=float) for one in half]
        low, high = interval(np.stack(mean), shared=same)
        told = f"+50.0 ({low:+.1f} to {high:+.1f}) points"
        assert tables._gap(ones, others, SimpleNamespace(seeds=[0, 1]))[0] == told
    # Rows of other numbers are no pairs.
    ones = [result("a", 0, "1111"), result("a", 1, "1100")]
    others = [result("b", 1, "10000"), result("b", 0, "1110")]
    assert tables._gap(ones, others, spec)[0].startswith("+27.50 points")


def test_nothing_of_a_place_that_cannot_be_written(spec_file, engine, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compared(spec_file, tmp_path / "file" / "out") == 2
    assert "choose another --out" in capsys.readouterr().err
    with pytest.raises(FedPFTError, match="choose another"):
        Comparison(Spec(spec_file), tmp_path / "file" / "out")
