import numpy as np
import pytest

from fedpft_flower.config import Config, DataConfig, FedPFTError, PartitionConfig
from fedpft_flower.partitions import PARTITIONS, _partitioner, load_partition
from fedpft_flower.tasks import load_task

DIGITS = DataConfig(task="digits")


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "sizes"])
@pytest.mark.parametrize("count", [1, 7, 50])
def test_partitions_are_disjoint_complete_and_repeatable(kind, count):
    config = PartitionConfig(kind, alpha=0.5)
    train = load_task(DIGITS, 0).train
    parts = [load_partition(DIGITS, config, i, count, 0) for i in range(count)]
    # Seven clients with two classes each may leave one of ten classes out.
    complete = kind != "pathological" or count == 50
    assert (sum(map(len, parts)) == len(train)) == complete
    assert min(map(len, parts)) >= 1
    together = sorted(key for part in parts for key in map(row_key, part))
    everything = sorted(map(row_key, train))
    assert together == everything if complete else set(together) <= set(everything)

    _partitioner.cache_clear()
    again = load_partition(DIGITS, config, count - 1, count, 0)
    assert list(map(row_key, again)) == list(map(row_key, parts[-1]))


def row_key(row):
    return (np.asarray(row["image"]).tobytes(), row["label"])


def test_small_alpha_skews_labels_and_iid_does_not():
    def skew(kind, alpha):
        parts = [
            load_partition(DIGITS, PartitionConfig(kind, alpha), i, 10, 0)
            for i in range(10)
        ]
        shares = [np.bincount(p["label"], minlength=10) / len(p) for p in parts]
        return np.mean([share.max() for share in shares])

    assert skew("dirichlet", 0.1) > 0.4 > 0.25 > skew("iid", 1.0)


def test_more_nodes_than_rows_are_refused():
    with pytest.raises(FedPFTError, match="empty partition"):
        load_partition(DIGITS, PartitionConfig("iid"), 0, 2000, 0)


def test_every_kind_that_the_config_offers_is_there():
    with pytest.raises(FedPFTError, match="choose one of") as refused:
        Config.from_run_config({"partition.kind": "magic"})
    offered = str(refused.value).partition("choose one of ")[2].split(", ")
    assert set(offered) == set(PARTITIONS)


def test_pathological_clients_have_so_many_classes():
    config = PartitionConfig("pathological", classes=3)
    parts = [load_partition(DIGITS, config, i, 12, 0) for i in range(12)]
    assert {len(set(part["label"])) for part in parts} == {3}
    assert set().union(*(part["label"] for part in parts)) == set(range(10))
    with pytest.raises(FedPFTError, match=r"partition.kind = 'pathological'.*11"):
        load_partition(DIGITS, PartitionConfig("pathological", classes=11), 0, 12, 0)


def test_sizes_are_skewed_and_classes_are_not():
    def sizes(alpha):
        config = PartitionConfig("sizes", alpha=alpha)
        return [len(load_partition(DIGITS, config, i, 20, 0)) for i in range(20)]

    assert max(sizes(0.2)) > 5 * np.median(sizes(0.2))
    assert min(sizes(0.01)) == 1
    assert max(sizes(1e6)) - min(sizes(1e6)) <= 2


def natural(tmp_path, owners):
    rows = [f"row {i},{i % 2},{owner}" for i, owner in enumerate(owners)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,label,hospital", *rows]) + "\n")
    return DataConfig(task="text", path=str(path), client_column="hospital")


def test_natural_clients_are_those_of_the_column(tmp_path):
    owners = [f"h{i % 5}" for i in range(100)]
    data, config = natural(tmp_path, owners), PartitionConfig("natural")
    parts = [load_partition(data, config, i, 5, 0) for i in range(5)]
    for i, part in enumerate(parts):
        assert {int(text.split()[1]) % 5 for text in part["text"]} == {i}
    # More owners than nodes: each node has the rows of several, whole.
    two = [load_partition(data, config, i, 2, 0) for i in range(2)]
    held = [{int(text.split()[1]) % 5 for text in part["text"]} for part in two]
    assert held == [{0, 2, 4}, {1, 3}]
    with pytest.raises(FedPFTError, match="5 different values, but there are 6"):
        load_partition(data, config, 0, 6, 0)
    with pytest.raises(FedPFTError, match=r"name it in data\.client-column"):
        load_partition(DIGITS, config, 0, 2, 0)


@pytest.mark.parametrize(("count", "alpha"), [(20, 0.1), (50, 0.05)])
def test_few_classes_are_shared_among_many_clients(tmp_path, count, alpha):
    """Of two classes hardly a draw gives every client enough: the poorest get some."""
    path = tmp_path / "two.csv"
    rows = [f"text {i},{int(i % 20 == 0)}" for i in range(1200)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    data = DataConfig(task="text", path=str(path))
    train = load_task(data, 0).train
    config = PartitionConfig("dirichlet", alpha=alpha)
    parts = [load_partition(data, config, i, count, 0) for i in range(count)]
    least = max(1, min(10, len(train) // (10 * count)))
    sizes = [len(part) for part in parts]
    assert min(sizes) == least and sum(sizes) == len(train)
    texts = [text for part in parts for text in part["text"][:]]
    assert sorted(texts) == sorted(train["text"][:])
    _partitioner.cache_clear()
    again = load_partition(data, config, 3, count, 0)
    assert again["text"][:] == parts[3]["text"][:]
