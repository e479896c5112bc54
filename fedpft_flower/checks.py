"""Check what a run asks for before anything is loaded."""

from fedpft_flower.config import Config
from fedpft_flower.methods import method_of
from fedpft_flower.metrics import metric_of
from fedpft_flower.privacy import check_private
from fedpft_flower.strategies import strategy_of


def check_run(config: Config) -> None:
    """Check all that needs neither data nor models.

    Raises:
        FedPFTError: there is no such method, selection, strategy, task or metric, or
            what is asked for does not go together.
    """
    method_of(config)
    strategy_of(config.strategy, config.strategy_args)
    check_private(config)
    metric_of(config.data)
