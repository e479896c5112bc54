"""Choose who trains in a round: by names and seeds, whatever ids Flower gives nodes."""

from collections.abc import Sequence

import numpy as np

from fedpft_flower.config import Config, FedPFTError, TrainConfig, derive_seed


def clients_per_round(config: TrainConfig, nodes: int) -> int:
    """Return how many of so many nodes train in a round.

    Raises:
        FedPFTError: more clients per round, or replies, are asked for than that.
    """
    count = _clients(config, nodes)
    for key, wanted, there, what in (
        ("clients-per-round", count, nodes, "nodes"),
        ("min-replies", config.min_replies, count, "clients a round"),
    ):
        if wanted > there:
            raise FedPFTError(
                f"train.{key} = {wanted}, but there are {there} {what}; lower it or "
                "add nodes"
            )
    return count


def sample(config: Config, keys: Sequence[str], current: int) -> list[str]:
    """Choose the clients of a round; all nodes where fewer than due are there."""
    count = _clients(config.train, len(keys))
    return _draw(keys, count, derive_seed(config.seed, "sample", current))


def stand_ins(
    config: Config, keys: Sequence[str], count: int, current: int, attempt: int
) -> list[str]:
    """Choose up to `count` clients for those that went away during a round."""
    seed = derive_seed(config.seed, "stand-in", current, attempt)
    return _draw(keys, count, seed)


def _clients(config: TrainConfig, nodes: int) -> int:
    return config.clients_per_round or max(1, int(config.fraction * nodes))


def _draw(keys: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw without replacement, by a generator of this draw's own; sorted."""
    generator, size = np.random.default_rng(seed), min(count, len(keys))
    return sorted(generator.choice(sorted(keys), size=size, replace=False).tolist())
