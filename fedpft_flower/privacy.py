"""Release averaged adapters with differential privacy, and account for each release.

Clipping, averaging, noise and accounting are Flower's: a wrapper around the strategy
that averages, and an RDP accountant. What is here refuses settings whose guarantee
would be false, and has every release counted on disk before anybody can use it.

The guarantee: whoever sees all releases cannot tell, up to (epsilon, delta), whether
one client's updates were in them, or zeros in their place. A round releases
    w + (1 / n) (sum_i clip(w_i - w) + N(0, (z C)^2 I)),
n clients, norm C, multiplier z: without one client the sum changes by C at most. The
sample may be known to everyone, since no amplification by sampling is counted: the seed
that chooses clients is public, and Flower's wrappers account in no other way.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import (
    GaussianPrivacyEvent,
    Grid,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from torch import Tensor

from fedpft_flower.config import Config, FedPFTError
from fedpft_flower.config import PrivacyConfig as Settings
from fedpft_flower.methods import method_of
from fedpft_flower.strategies import STRATEGIES

_WRAPPERS = {
    "server": DifferentialPrivacyServerSideFixedClipping,
    "client": DifferentialPrivacyClientSideFixedClipping,
}

# Why the noise of a mean does not cover what a strategy makes of it.
_STEP = "its memory holds means without noise, which Flower adds behind its step"
_ROBUST = "one client can move its result by more than clipping-norm / clients"
NO_MEAN = {
    "FedAvgM": _STEP,
    "FedAdam": _STEP,
    "FedYogi": _STEP,
    "FedAdagrad": _STEP,
    "QFedAvg": "it weighs clients by their losses, which have no noise",
    "FedMedian": _ROBUST,
    "FedTrimmedAvg": _ROBUST,
    "Krum": _ROBUST,
    "MultiKrum": _ROBUST,
    "Bulyan": _ROBUST,
}

# A float32 adapter w plus a clipped update is rounded: by so much of the norm of w.
_ROUNDING = 1e-6
# Rounding of the average in float32 has no noise. It is some percent of clipping-norm /
# clients at most, if that is at least this share of the adapter's norm.
_LEAST_SHARE = 1e-5
# Flower divides by the norm of an update.
_LEAST_MOVED = 1e-12


def check_private(config: Config) -> None:
    """Refuse settings whose guarantee would be false.

    Raises:
        FedPFTError: there is such a setting; the text says why.
    """
    problem = _lacking(config) if config.privacy.on else _without_effect(config.privacy)
    if problem:
        raise FedPFTError(problem)


def _without_effect(settings: Settings) -> str:
    """Return which setting has no effect without a mechanism, or nothing."""
    for name, default in asdict(Settings()).items():
        value = getattr(settings, name)
        if name != "mechanism" and value != default:
            return (
                f"privacy.{name.replace('_', '-')} = {value} guarantees nothing with "
                "privacy.mechanism = 'none'; choose 'server' or 'client'"
            )
    return ""


def _is_mean(strategy: str) -> bool:
    """Tell whether a strategy's result is the mean of the updates and nothing else."""
    return STRATEGIES[strategy].aggregate_train is FedAvg.aggregate_train


def _lacking(config: Config) -> str:
    """Return why differential privacy is not what a run would give, or nothing."""
    train, wanted = config.train, config.train.clients_per_round
    activity = config.align.activity == "clients"
    checks = [
        (
            config.weighting != "uniform",
            f"weighting = {config.weighting!r} lets a client count by its rows; with "
            "privacy.mechanism set weighting = 'uniform'",
        ),
        (
            not config.privacy.noise_multiplier,
            "privacy.noise-multiplier = 0 adds no noise; give one such as 1.0",
        ),
        (
            not config.privacy.clipping_norm,
            "privacy.clipping-norm = 0 leaves nothing of an update; give the L2 norm "
            "that updates may have, such as 0.5",
        ),
        (
            not _is_mean(config.strategy),
            f"strategy = {config.strategy!r} with privacy.mechanism is refused: "
            f"{NO_MEAN.get(config.strategy, 'it is no plain mean')}; choose one of "
            f"{', '.join(filter(_is_mean, STRATEGIES))}",
        ),
        (
            not wanted,
            "train.clients-per-round = 0 leaves the sample's size to the nodes that "
            "are there, and noise is calibrated to it; give the size",
        ),
        (
            train.min_replies != wanted,
            f"train.min-replies = {train.min_replies}, but noise is calibrated to all "
            f"{wanted} clients of a round; set train.min-replies = {wanted}",
        ),
        (
            activity and method_of(config).measures_activity,
            "align.activity = 'clients' would send activity statistics, which have no "
            "noise; set align.activity = 'public'",
        ),
        (
            config.privacy.mechanism == "client" and config.wire.adapter != "fp32",
            f"wire.adapter = {config.wire.adapter!r} rounds adapters behind the "
            "client's clipping, so that they move by more; set wire.adapter = 'fp32' "
            "or privacy.mechanism = 'server'",
        ),
    ]
    return next((why for refused, why in checks if refused), "")


class Privacy:
    """Be the strategy of a run that releases its averages with noise."""

    def __init__(
        self,
        config: Config,
        inner: FedAvg,
        nodes: int,
        note: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Wrap a strategy that averages uniformly.

        Args:
            config: the run, which `check_private` let pass.
            inner: the strategy that averages.
            nodes: how many nodes there are.
            note: puts the accountant's state on disk, and returns when it is there.

        Raises:
            FedPFTError: dp-accounting is missing, delta is too large for so many nodes,
                or not even one round fits in `max-epsilon`.
        """
        self._settings, self._note = config.privacy, note
        # How many clients train in a round, neither more nor fewer.
        self.clients = config.train.clients_per_round
        if config.privacy.delta * nodes >= 1:
            raise FedPFTError(
                f"privacy.delta = {config.privacy.delta:g} lets one of {nodes} nodes "
                f"be given away; set less than {1 / nodes:.2g}"
            )
        self._accountant = self._new_accountant()
        self._event = GaussianPrivacyEvent(
            config.privacy.noise_multiplier, self.clients, self.clients
        )
        planned = self._new_accountant()
        planned.compose(self._event, config.rounds)
        # What is spent when every round releases.
        self.planned_epsilon = planned.get_privacy_spent().epsilon
        if not math.isfinite(self.planned_epsilon):
            raise FedPFTError(
                f"privacy.noise-multiplier = {config.privacy.noise_multiplier:g} is "
                "next to no noise, epsilon is not finite; give one such as 1.0"
            )
        if self.is_over:
            raise FedPFTError(
                f"privacy.max-epsilon = {config.privacy.max_epsilon:g} allows no "
                "round, one alone spends more; raise it, or privacy.noise-multiplier"
            )
        self._strategy = _WRAPPERS[config.privacy.mechanism](
            inner,
            config.privacy.noise_multiplier,
            config.privacy.clipping_norm,
            self.clients,
            accountant=self._accountant,
        )

    def _new_accountant(self) -> RdpAccountant:
        """Return an accountant that has counted nothing.

        Its population is the sample itself: without amplification the population does
        not matter, so that nodes may come and go.
        """
        try:
            return RdpAccountant(
                PrivacyConfig(
                    self._settings.delta,
                    self.clients,
                    NeighboringRelation.ADD_OR_REMOVE_ONE,
                    SamplingMethod.NO_AMPLIFICATION,
                    self._settings.max_epsilon or None,
                )
            )
        except ImportError as error:
            raise FedPFTError(
                f"privacy.mechanism = {self._settings.mechanism!r} needs dp-accounting "
                "at the server; install it: pip install 'fedpft-flower[dp]'"
            ) from error

    @property
    def is_over(self) -> bool:
        """Tell whether one more release would exceed `max-epsilon`."""
        bounded = self._settings.max_epsilon > 0
        return bounded and bool(self._accountant.would_exceed(self._event))

    def spent(self) -> dict[str, float]:
        """Return epsilon and delta so far, and how many releases they are of."""
        spent = self._accountant.get_privacy_spent()
        return {
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "releases": spent.num_releases,
        }

    def state(self) -> dict[str, Any]:
        """Return what the accountant has counted, as JSON can hold it."""
        return dict(self._accountant.state_dict())

    def begin(self, *saved: Mapping[str, Any]) -> None:
        """Count on from that of some saved states which has counted most; or from none.

        Raises:
            FedPFTError: a state cannot be read, or is of other settings.
        """
        for state in saved:
            other = self._new_accountant()
            try:
                other.load_state_dict(dict(state))
            except (TypeError, ValueError) as error:
                raise FedPFTError(
                    f"resume: the privacy that was spent cannot be read ({error}); "
                    "start anew"
                ) from error
            if other.num_releases > self._accountant.num_releases:
                self._accountant.load_state_dict(other.state_dict())
        self._note(self.state())

    def check_clipping(self, adapter: Mapping[str, Tensor]) -> None:
        """Check that updates of the clipping norm are not lost in float32's rounding.

        Raises:
            FedPFTError: they are, beside this adapter.
        """
        size, norm = _norm(adapter), self._settings.clipping_norm
        least = _LEAST_SHARE * size * self.clients
        if norm < least:
            raise FedPFTError(
                f"privacy.clipping-norm = {norm:g} for {self.clients} clients is lost "
                f"in the rounding of an adapter with an L2 norm of {size:.3g}; set "
                f"{least:.2g} or more"
            )

    def check_moved(self, moved: float, sent: Mapping[str, Tensor]) -> None:
        """Check how far training moved an adapter, where clipping needs it.

        Args:
            moved: L2 norm of the update.
            sent: the adapter that it started from.

        Raises:
            FedPFTError: it did not move; or further than a client that clips lets it.
        """
        if moved < _LEAST_MOVED:
            raise FedPFTError(
                "the adapter is the one that was sent, nothing is trained"
            )
        size, most = _norm(sent), self._settings.clipping_norm
        if (
            self._settings.mechanism == "client"
            and moved > most * (1 + _ROUNDING) + _ROUNDING * size
        ):
            raise FedPFTError(
                f"the adapter moved by more than privacy.clipping-norm = {most:g} (L2 "
                "norm): the node does not clip"
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as the inner strategy does; clients that clip are told the norm."""
        return self._strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, add noise, and return both once the release is counted on disk.

        Whoever is killed in between has counted a release that nobody saw, never the
        other way round.
        """
        # Flower draws noise from NumPy's global generator, which anything in this
        # process may have seeded: begin with the system's entropy each time.
        np.random.seed()
        arrays, metrics = self._strategy.aggregate_train(server_round, replies)
        if arrays is not None:
            self._note(self.state())
        return arrays, metrics


def _norm(adapter: Mapping[str, Tensor]) -> float:
    squares = (tensor.double().square().sum() for tensor in adapter.values())
    return math.sqrt(sum(map(float, squares)))
