import pytest
from PIL import Image as Picture

from fedpft_flower.data_check import run

ROWS = [f"text number {i},{('bad', 'good')[i % 2]},{i}" for i in range(40)]


def csv(place, rows, header="text,label,id"):
    place.write_text("\n".join([header, *rows]) + "\n")
    return str(place)


def checked(capsys, *arguments):
    try:
        run(["check", *arguments])
        status = 0
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_sound_site_is_described(tmp_path, capsys):
    path = csv(tmp_path / "a.csv", ROWS)
    status, said = checked(capsys, path, "data.labels=good,bad")
    assert status == 0
    assert "rows     40\n" in said
    assert "columns  text, label (not used: id)" in said
    assert "labels   good 20, bad 20" in said
    assert "median 3, 95 % at most 3, longest 3" in said
    assert "warning" not in said and "error" not in said


def test_what_is_odd_is_told_but_not_refused(tmp_path, capsys):
    rows = ["same text,good,1"] * 3 + ["same text,bad,2", '" ",good,3']
    status, said = checked(
        capsys, csv(tmp_path / "a.csv", rows), "data.labels=good,bad,x"
    )
    assert status == 0
    for line in (
        "no row of x",
        "fewer than 10 rows of good, bad",
        "5 rows are fewer than a batch",
        "1 texts are empty",
        "3 texts occur again",
        "1 texts have two labels",
    ):
        assert f"warning: {line}" in said
    _, said = checked(capsys, csv(tmp_path / "b.csv", ROWS))
    assert "warning: data.labels is not given" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["data.text-columns=note"],
            "data.text-columns: no column 'note'; this data has text",
        ),
        (["data.labels=bad,fine"], "label 'good' in train is outside the label set"),
        (["data.train-split=rows"], "no split 'rows'; set data.train-split to one of"),
        (["data.min-words=9"], "no training row is left"),
    ],
)
def test_what_a_run_would_refuse_exits_1(tmp_path, capsys, settings, said):
    status, text = checked(capsys, csv(tmp_path / "a.csv", ROWS), *settings)
    assert status == 1
    assert f"error: {said}" in text
    assert "would take" not in text


def test_what_cannot_be_read_exits_2(tmp_path, capsys):
    for arguments in (
        [str(tmp_path / "none.csv")],
        [csv(tmp_path / "a.csv", ROWS), "data.magic=1"],
        [csv(tmp_path / "a.csv", ROWS), "data.task=digits"],
    ):
        status, said = checked(capsys, *arguments)
        assert status == 2
        assert said.startswith("error: ") and said.count("\n") == 1


def test_images_are_decoded_and_measured(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(12):
            Picture.new("L", (9 + i // 8, 7)).save(tmp_path / label / f"{i}.png")
    settings = ["data.task=image", "data.labels=cat,dog"]
    status, said = checked(capsys, str(tmp_path), *settings)
    assert status == 0
    assert "images   mostly 9 x 7 pixels, 2 different sizes" in said
    (tmp_path / "dog" / "3.png").write_bytes(b"no image")
    status, said = checked(capsys, str(tmp_path), *settings)
    assert status == 1 and "cannot be decoded" in said


def test_the_runs_own_file_may_be_given(tmp_path, capsys):
    conf = tmp_path / "run.toml"
    conf.write_text('[data]\ntask = "text"\ntext-columns = "text,id"\n')
    path = csv(tmp_path / "a.csv", ROWS)
    status, said = checked(capsys, path, "--conf", str(conf), "data.labels=bad,good")
    assert status == 0
    assert "words    text_pair: median 1" in said
