"""Look up on the hub what `conf/` names: pytest -m network tests/test_hub.py."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoConfig

from fedpft_flower.architectures import ARCHITECTURES
from fedpft_flower.columns import choose_columns
from fedpft_flower.commands import read_config
from fedpft_flower.config import names_in
from fedpft_flower.public import load_public
from fedpft_flower.reading import is_on_hub, read_sample
from fedpft_flower.tasks import columns_of

CONF = Path(__file__).resolve().parent.parent / "conf"
ROWS = 8
ON_HUB = [
    path.name
    for path in sorted(CONF.glob("*.toml"))
    if (data := read_config(path, []).data).path and is_on_hub(data.path)
]


def few(rows):
    return islice(rows, ROWS)


pytestmark = pytest.mark.network


def test_the_papers_data_sets_are_among_them():
    paper = ("sst2", "qnli", "mnli", "qqp", "cifar10", "cifar100", "flowers102")
    assert {f"{name}.toml" for name in paper} <= set(ON_HUB)


@pytest.mark.parametrize("name", ON_HUB)
def test_a_configuration_names_what_the_hub_has(name):
    config = read_config(CONF / name, [])
    found = AutoConfig.from_pretrained(config.fm.name)
    assert found.model_type in ARCHITECTURES
    data = config.data
    # Not every set has a `test` or a `validation` split; what is named must be there.
    named = names_in(data.test_split) if data.test_split != "test" else ()
    for split in (data.train_split, *named):
        rows = read_sample(data.path, "data.path", data.subset, split, 0, few)
        columns = columns_of(data)
        chosen = choose_columns(rows, columns, dict.fromkeys(columns, "data"))
        assert len(chosen) == ROWS
    assert load_public(replace(data, public_rows=ROWS), 0)
