"""List the methods to compare: each is one row over the same three knobs."""

from dataclasses import dataclass

from fedpft_flower.config import FedPFTError
from fedpft_flower.planners import Planner, drop_layers, keep_all, keep_salient


@dataclass(frozen=True)
class Method:
    """Describe a method: what the clients get, and when it is aligned with the FM."""

    paper: str
    plan: Planner
    align_before: bool
    align_during: bool
    # Fixes how neurons are scored; "" leaves it to `sub-fm.saliency`.
    saliency: str = ""


_FEDPFT = "Peng et al. 2024, arXiv 2404.11536"
_FEDOT = "Xiao et al. 2023, arXiv 2302.04870, federated"

METHODS: dict[str, Method] = {
    "fedpft": Method(_FEDPFT, keep_salient, align_before=True, align_during=True),
    # Ablations: N no alignment, B before training only, D during training only.
    "fedpft-n": Method(_FEDPFT, keep_salient, align_before=False, align_during=False),
    "fedpft-b": Method(_FEDPFT, keep_salient, align_before=True, align_during=False),
    "fedpft-d": Method(_FEDPFT, keep_salient, align_before=False, align_during=True),
    # The control for the choice of neurons: random ones, aligned like fedpft's.
    "fedpft-r": Method(_FEDPFT, keep_salient, True, True, saliency="random"),
    # Whole layers dropped, adapters in the end layers; B: the rest distilled before.
    "fedot": Method(_FEDOT, drop_layers, align_before=False, align_during=False),
    "fedot-b": Method(_FEDOT, drop_layers, align_before=True, align_during=False),
    # The upper bound: LoRA on the full FM at every client.
    "fedpetuning": Method(
        "Zhang et al. 2023, arXiv 2212.10025",
        keep_all,
        align_before=False,
        align_during=False,
    ),
}


def method_of(name: str) -> Method:
    """Return the row of a method.

    Raises:
        FedPFTError: there is no such method.
    """
    if name not in METHODS:
        raise FedPFTError(f"method = {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
