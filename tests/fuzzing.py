"""Random values, mutations and bounds that the fuzz tests share."""

import json
import math
import os
import signal
from contextlib import contextmanager

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from fedpft_flower.config import LONGEST

LONG = "x" * 20_000


def examples(count):
    """Return settings of so many examples, or FUZZ times so many; always the same."""
    return settings(
        max_examples=count * int(os.environ.get("FUZZ", "1")),
        deadline=None,  # `bounded` ends what hangs; the machine may be slow
        derandomize=True,
        database=None,
        print_blob=False,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """Report that something took too long; no handler of exceptions catches it."""


@contextmanager
def bounded(seconds=60):
    """End what takes longer than this."""

    def stop(number, frame):
        raise HangError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_line(text):
    """Check that an error is one line that a terminal can show."""
    assert text and text.strip() == text
    assert text.isprintable(), "it has control characters, or several lines"
    assert len(text) <= LONGEST, f"it has {len(text)} characters"


def small_federation(place, fm):
    """Write forty rows below a directory; return settings of a run on them."""
    words = ["good fast film", "very bad film"]
    rows = [f"{words[i % 2]} {'abcdef'[i % 6]},{'ab'[i % 2]}" for i in range(40)]
    (place / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return {
        "method": "fedpft",
        "fm.name": str(fm),
        "data.task": "text",
        "data.path": str(place / "rows.csv"),
        "data.public-path": str(place / "rows.csv"),
        "data.max-length": 16,
        "partition.kind": "iid",
        "rounds": 2,
        "align.steps": 1,
        "align.every": 1,
        "align.during-steps": 1,
    }


# --------------------------------------------------------------------------- values

odd_texts = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            ",",
            "\0",
            "~\0",
            "~nobody-here",
            "../../x",
            "one\ntwo",
            "one\rtwo",
            "\u2028",
            "\x1b[31mred\x07",
            "9" * 5000,
            "-" + "9" * 5000,
            "nan",
            "-1",
            "{}",
            "[" * 20_000,
            LONG,
        ]
    ),
    st.text(max_size=12),
    st.text(st.characters(max_codepoint=32), max_size=4),
)
odd_numbers = st.one_of(
    st.sampled_from(
        [
            0,
            -1,
            1,
            2**31,
            2**53 + 1,
            2**63 - 1,
            -(2**63),
            0.0,
            -0.0,
            5e-324,
            1e-30,
            1e308,
            -1e308,
            math.nan,
            math.inf,
            -math.inf,
        ]
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-3, 40),
    st.floats(),
    st.floats(-0.1, 1.1),
)
# What a record of Flower can hold.
odd_scalars = st.one_of(odd_texts, odd_numbers, st.booleans(), st.binary(max_size=6))
odd_lists = st.one_of(
    st.just([]),
    st.lists(st.integers(-3, 3), max_size=4),
    st.lists(st.floats(), max_size=4),
    st.lists(st.text(max_size=3), max_size=3),
)
odd_json = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.dictionaries(st.text(max_size=4), inside, max_size=3),
    ),
    max_leaves=4,
)
# What only Python can hand over.
odd_objects = st.one_of(
    odd_json,
    st.binary(max_size=4),
    st.sampled_from([10**400, -(10**400), 10**5000, 2**63, (), object, 1j, "\ud800"]),
)


# ----------------------------------------------------------------------------- arrays


def raw(data, dtype="float32", shape=(1,), stype="numpy.ndarray"):
    """Return an array whose fields may say anything."""
    return Array(dtype, shape, stype, data)


def header(shape, dtype="<f4"):
    """Return the bytes of an array that says a shape and holds nothing."""
    said = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    line = said.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line.encode()


def _poisoned(value):
    def poison(array):
        array = array.copy()
        array.flat[:1] = value
        return array

    return poison


_CHANGES = [
    _poisoned(np.nan),
    _poisoned(np.inf),
    _poisoned(-np.inf),
    lambda a: a[..., :0],
    lambda a: a[None],
    lambda a: a.reshape(-1)[:-1],
    lambda a: a.ravel(),
    lambda a: a.astype("f8"),
    lambda a: a.astype("f2"),
    lambda a: a.astype(">f4"),
    lambda a: a.astype("i4"),
    lambda a: a.astype("c8"),
    lambda a: a.astype("S3"),
    lambda a: a.astype("U3"),
    lambda a: a.astype(bool),
    lambda a: np.array(3.0, dtype="f4"),
    lambda a: np.zeros((0, 3), "f4"),
    lambda a: np.zeros(2, [("a", "f4")]),
]
_RAW = [
    raw(b""),
    raw(b"\x80\x04K\x01."),  # a pickle
    raw(b"PK\x03\x04"),  # the beginning of a zip
    raw(b"PK\x05\x06" + bytes(18)),  # a whole zip, empty
    raw(b"\x93NUMPY\x01\x00"),
    raw(header("(4,)")),
    raw(header("(2, 10000000000000)")),
    raw(header("(-1,)")),
    raw(header("(" * 40)),
    raw(header("(1,)", dtype="|O") + b"\x80\x04K\x01."),
    raw(header("(0,)"), dtype="", shape=(7,), stype="torch"),
]


@st.composite
def changed_arrays(draw, arrays):
    """Return arrays of which one has other bytes, another type, shape or values.

    Args:
        draw: given by hypothesis.
        arrays: name -> `Array`.
    """
    name = draw(st.sampled_from(sorted(arrays)))
    change = draw(st.sampled_from([*_CHANGES, *_RAW]))
    if isinstance(change, Array):
        return {**arrays, name: change}
    try:
        return {**arrays, name: Array(change(arrays[name].numpy()))}
    except Exception:  # it is broken already, or of a type that cannot change so
        return {**arrays, name: draw(st.sampled_from(_RAW))}


# ---------------------------------------------------------------- records and messages


@st.composite
def changed_keys(draw, values, news):
    """Return a dictionary that lacks a key, or has another one, value or order."""
    names = list(values)
    how = draw(st.sampled_from(["drop", "rename", "add", "change", "change", "turn"]))
    if how == "add" or not names:
        return {**values, draw(st.one_of(st.just("stranger"), odd_texts)): draw(news)}
    name = draw(st.sampled_from(names))
    if how == "change":
        return {**values, name: draw(news)}
    if how == "turn":
        return dict(reversed(values.items()))
    rest = {key: value for key, value in values.items() if key != name}
    if how == "rename":
        rest[name + draw(st.sampled_from(["x", "\0", " ", "@rows", "@scale"]))] = (
            values[name]
        )
    return rest


_NEW_RECORDS = st.one_of(
    st.builds(ConfigRecord, st.dictionaries(st.text(max_size=4), odd_scalars)),
    st.builds(MetricRecord, st.dictionaries(st.text(max_size=4), odd_numbers)),
    st.just(ArrayRecord({"x": Array(np.zeros(2, "f4"))})),
    st.just(ArrayRecord({})),
)


def changed_records(records):
    """Return records of which one is missing, renamed, strange or too many."""
    return changed_keys(records, _NEW_RECORDS)


def content_of(records):
    """Return the content of a message of these records."""
    return RecordDict(dict(records))


@st.composite
def changed_json(draw, text):
    """Return JSON text with one value changed, added or left out, at any depth."""
    tree = json.loads(text)
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(odd_texts, odd_json.map(json.dumps)))
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return json.dumps(tree)
        key = draw(st.sampled_from(keys))
        inside = place[key]
        if not isinstance(inside, dict | list) or draw(st.integers(0, 3)) == 0:
            break
        place = inside
    how = draw(st.sampled_from(["change", "change", "drop", "add"]))
    if how == "drop":
        del place[key]
    elif how == "add" and isinstance(place, dict):
        place[draw(st.one_of(st.just("auto_map"), odd_texts))] = draw(odd_json)
    else:
        place[key] = draw(odd_json)
    return json.dumps(tree)
