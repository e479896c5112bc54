"""List the methods to compare: each is one row over the same knobs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedpft_flower.config import Config, Scalar, row_called
from fedpft_flower.planners import Planner, drop_layers, keep_all, keep_salient
from fedpft_flower.selection import selection_of


@dataclass(frozen=True)
class Method:
    """Describe a method: what the clients get, and when it is aligned with the FM.

    `selection` says how neurons are scored, `before` and `during` how the sub-FM is
    aligned, `patience` when that ends early, `sensitivity` how far tokens count by how
    much the logits depend on them, `refine` how long the adapter is adjusted in the FM
    at the end, and `refine_on_validation` how much of that is on validation rows; where
    they are given, settings take their place.
    """

    paper: str
    planner: Planner
    selection: str = "norm"
    before: str = "none"
    during: str = "none"
    # Of the layer-level distillation (`align.patience`).
    patience: int = 0
    # Of choosing neurons and of all alignment (`align.sensitivity`).
    sensitivity: float = 0.0
    # Steps of the plug-in's refinement after the last round.
    refine: int = 0
    # Of its batches, the share of validation rows (`plug-in.validation-share`).
    refine_on_validation: float = 0.0

    @property
    def needs_public(self) -> bool:
        """Tell whether this method needs a public corpus for anything."""
        aligns = (self.before, self.during) != ("none", "none") or self.refine > 0
        return aligns or selection_of(self.selection).needs != "nothing"

    @property
    def steps_before(self) -> list[str]:
        """Return the steps of the alignment before training."""
        return [] if self.before == "none" else self.before.split("+")

    @property
    def measures_activity(self) -> bool:
        """Tell whether realignment goes by which neurons are active."""
        return self.during == "distill"


# Which setting takes the place of which part of a row.
_IN_PLACE = {
    "selection": "sub-fm.selection",
    "before": "align.before",
    "during": "align.during",
    "patience": "align.patience",
    "sensitivity": "align.sensitivity",
    "refine": "plug-in.steps",
    "refine_on_validation": "plug-in.validation-share",
}

_FEDPFT = "Peng et al. 2024, arXiv 2404.11536"
_FEDOT = "Xiao et al. 2023, arXiv 2302.04870, federated"

METHODS: dict[str, Method] = {
    "fedpft": Method(_FEDPFT, keep_salient, before="distill", during="distill"),
    # Ablations: N no alignment, B before training only, D during training only.
    "fedpft-n": Method(_FEDPFT, keep_salient),
    "fedpft-b": Method(_FEDPFT, keep_salient, before="distill"),
    "fedpft-d": Method(_FEDPFT, keep_salient, during="distill"),
    # The control for the choice of neurons: random ones, aligned like fedpft's.
    "fedpft-r": Method(
        _FEDPFT, keep_salient, selection="random", before="distill", during="distill"
    ),
    # Neurons chosen by what they do on public data, and a closed-form start.
    "fedpft-ls": Method(
        f"after {_FEDPFT}; docs/results.md of FedPFT-Flower",
        keep_salient,
        selection="greedy",
        before="least-squares+distill",
        patience=3,
        refine=200,
        refine_on_validation=0.5,
    ),
    # Whole layers dropped, adapters in the end layers; B: the rest distilled before.
    "fedot": Method(_FEDOT, drop_layers),
    "fedot-b": Method(_FEDOT, drop_layers, before="distill"),
    # The upper bound: LoRA on the full FM at every client.
    "fedpetuning": Method("Zhang et al. 2023, arXiv 2212.10025", keep_all),
}


def method_of(config: Config) -> Method:
    """Return the row of a run's method, with what its settings put in place.

    Raises:
        FedPFTError: there is no such method or selection.
    """
    row = row_called(config.method, METHODS, "method")
    if config.sub_fm.selection:
        selection_of(config.sub_fm.selection)
    if row.planner is keep_all:  # there is nothing to select or to align
        return row
    if row.planner is keep_salient:
        row = replace(row, selection=config.sub_fm.selection or row.selection)
    patience, steps = config.align.patience, config.plug_in.steps
    share, own = config.align.sensitivity, config.plug_in.validation_share
    return replace(
        row,
        before=config.align.before or row.before,
        during=config.align.during or row.during,
        patience=row.patience if patience < 0 else patience,
        sensitivity=row.sensitivity if share < 0 else share,
        refine=row.refine if steps < 0 else steps,
        refine_on_validation=row.refine_on_validation if own < 0 else own,
    )


def changes_of(config: Config) -> dict[str, Scalar]:
    """Return the settings that changed something of the row of a run's method.

    Raises:
        FedPFTError: there is no such method or selection.
    """
    used, flat = method_of(config), config.flat()
    row = METHODS[config.method]
    # Without a distillation there is nothing to be patient with.
    idle = {"patience"} if "distill" not in used.before + used.during else set()
    return {
        key: flat[key]
        for part, key in _IN_PLACE.items()
        if getattr(row, part) != getattr(used, part) and part not in idle
    }


def name_of(config: Config, more: Mapping[str, Scalar] | None = None) -> str:
    """Return what a run's method is called, and what settings changed of its row.

    Args:
        config: of the run.
        more: further settings to tell.

    Raises:
        FedPFTError: there is no such method or selection.
    """
    told = changes_of(config) | dict(more or {})
    changed = ", ".join(f"{key} = {value}" for key, value in told.items())
    return f"{config.method} with {changed}" if changed else config.method
