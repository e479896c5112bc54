"""Find Flower's averaging strategies by name, and check their arguments."""

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedpft_flower.config import FedPFTError, outside

# Beginnings of the names that do not average adapters by themselves, and why.
_NOT_OFFERED = {
    "FedXgb": "it joins decision trees, and adapters are tensors",
    "DifferentialPrivacy": "it wraps another strategy; set privacy.mechanism (adaptive "
    "clipping has no accountant)",
    "Strategy": "it is abstract",
}

STRATEGIES: dict[str, type[FedAvg]] = {
    name: kind
    for name, kind in sorted(vars(flower).items())
    if isinstance(kind, type)
    and issubclass(kind, FedAvg)
    and not name.startswith(tuple(_NOT_OFFERED))
}

# What `strategy-args` may set: name -> (smallest, bound, whether the smallest itself
# is allowed); the bound never is.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "beta": (0, 0.5, True),
    "beta_1": (0, 1, True),
    "beta_2": (0, 1, True),
    "client_learning_rate": (0, 1e9, False),
    "eta": (0, 1e9, False),
    "num_malicious_nodes": (0, 1e9, True),
    "num_nodes_to_select": (1, 1e9, True),
    "proximal_mu": (0, 1e9, True),
    "q": (0, 1e9, True),
    "server_learning_rate": (0, 1e9, False),
    "server_momentum": (0, 1, True),
    "tau": (0, 1e9, False),
}

# The arguments that are decided elsewhere, and where.
_NODES = "train.clients-per-round and train.fraction choose the nodes"
_RECORDS = "this app names its records and metrics itself"
_FUNCTION = "a function cannot be given as JSON"
DECIDED: dict[str, str] = {
    "fraction_train": _NODES,
    "fraction_evaluate": "only the server, which has the FM, evaluates",
    "min_train_nodes": _NODES,
    "min_evaluate_nodes": "only the server, which has the FM, evaluates",
    "min_available_nodes": _NODES,
    "weighted_by_key": _RECORDS,
    "arrayrecord_key": _RECORDS,
    "configrecord_key": _RECORDS,
    "train_loss_key": _RECORDS,
    "train_metrics_aggr_fn": _FUNCTION,
    "evaluate_metrics_aggr_fn": _FUNCTION,
    "selection_rule": _FUNCTION,
    "eta_l": "Flower never uses it; train.lr is the clients' rate",
}

# Arguments without which a strategy is FedAvg by another name.
_NEEDED = {"FedProx": "proximal_mu", "FedAvgM": "server_momentum"}

# How many replies (n) keep a strategy's promise. Flower itself checks Bulyan's only:
# with fewer, Krum scores by one neighbour and the trimmed mean trims nothing.
_ENOUGH: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    # El Mhamdi et al. 2018, arXiv 1802.07927
    "Bulyan": (
        "n >= 4 * num_malicious_nodes + 3",
        lambda s, n: n >= 4 * s.num_malicious_nodes + 3,
    ),
    "FedTrimmedAvg": (
        "n >= 1 / beta, to trim anything",
        lambda s, n: s.beta == 0 or int(s.beta * n) >= 1,
    ),
    # Blanchard et al. 2017, arXiv 1703.02757
    "Krum": (
        "n >= 2 * num_malicious_nodes + 3",
        lambda s, n: n >= 2 * s.num_malicious_nodes + 3,
    ),
    # Of more than n - f selected replies one is malicious for certain.
    "MultiKrum": (
        "n >= 2 * num_malicious_nodes + 3 and "
        "n >= num_malicious_nodes + num_nodes_to_select",
        lambda s, n: (
            n - s.num_malicious_nodes
            >= max(s.num_malicious_nodes + 3, s.num_nodes_to_select)
        ),
    ),
}


def strategy_of(name: str, args_json: str) -> tuple[type[FedAvg], dict[str, Any]]:
    """Return a strategy's class and the arguments that a run gives it.

    Args:
        name: an averaging strategy of `flwr.serverapp.strategy`.
        args_json: one JSON object, or "" for none.

    Raises:
        FedPFTError: there is no such strategy, or an argument is unknown, missing, not
            the user's to set, of a wrong type or outside its range.
    """
    if name not in STRATEGIES:
        raise FedPFTError(
            f"strategy = {name!r}{_why_not(name)}; choose one of "
            f"{', '.join(STRATEGIES)}"
        )
    kind, given = STRATEGIES[name], _object(args_json)
    known = _arguments(kind)
    for argument, value in given.items():
        problem = _problem(name, known, argument, value)
        if problem:
            raise FedPFTError(f"strategy-args: {problem}")
    for argument, parameter in known.items():
        needed = parameter.default is parameter.empty or _NEEDED.get(name) == argument
        if needed and argument not in given:
            raise FedPFTError(
                f"strategy-args: {name} needs {argument}; give "
                f"'{json.dumps({argument: 0.1})}' or another value"
            )
    return kind, {a: known[a].annotation(value) for a, value in given.items()}


def inner_strategy(name: str, args_json: str, nodes_per_round: int) -> FedAvg:
    """Build the strategy that averages; it takes all nodes that it is shown.

    Args:
        name: an averaging strategy of `flwr.serverapp.strategy`.
        args_json: one JSON object, or "" for none.
        nodes_per_round: how many clients train in a round.

    Raises:
        FedPFTError: as `strategy_of`, or there are too few clients for the strategy.
    """
    kind, arguments = strategy_of(name, args_json)
    everyone: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 0,
        "min_available_nodes": 1,
    }
    strategy = kind(**everyone, **arguments)
    lacking = shortage(strategy, nodes_per_round)
    if lacking:
        raise FedPFTError(
            f"{lacking} clients a round; raise train.clients-per-round or change "
            "strategy-args"
        )
    return strategy


def shortage(strategy: FedAvg, replies: int) -> str:
    """Return that a strategy needs more replies than these, or nothing."""
    name = type(strategy).__name__
    rule, enough = _ENOUGH.get(name, ("", lambda s, n: True))
    if enough(strategy, replies):
        return ""
    given = ", ".join(
        f"{a} = {getattr(strategy, a)}" for a in _arguments(type(strategy))
    )
    return f"{name} with {given} needs {rule}, and n = {replies}"


# The attributes in which Flower's strategies remember earlier rounds.
MEMORY = ("current_arrays", "m_t", "v_t", "momentum_vector")


def memory_of(strategy: FedAvg) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a strategy remembers of earlier rounds.

    Returns:
        Tensors by name, and JSON that says how `remember` puts them together again.
    """
    tensors: dict[str, Tensor] = {}
    form: dict[str, Any] = {}
    for attribute in MEMORY:
        value = getattr(strategy, attribute, None)
        if value is None:
            continue
        if isinstance(value, ArrayRecord):
            kind, arrays = "record", {n: a.numpy() for n, a in value.items()}
        elif isinstance(value, dict):
            kind, arrays = "dict", value
        else:
            kind, arrays = "list", {str(i): array for i, array in enumerate(value)}
        form[attribute] = {"kind": kind, "names": list(arrays)}
        for name, array in arrays.items():
            tensors[f"{attribute}/{name}"] = torch.from_numpy(np.array(array))
    return tensors, form


def remember(
    strategy: FedAvg, tensors: Mapping[str, Tensor], form: Mapping[str, Any]
) -> None:
    """Give a strategy back what `memory_of` returned."""
    for attribute, parts in form.items():
        names = parts["names"]
        arrays = {name: tensors[f"{attribute}/{name}"].numpy() for name in names}
        whole: Any = arrays
        if parts["kind"] == "record":
            whole = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        elif parts["kind"] == "list":
            whole = [arrays[name] for name in names]
        setattr(strategy, attribute, whole)


def _why_not(name: str) -> str:
    for beginning, reason in _NOT_OFFERED.items():
        if name.startswith(beginning):
            return f" is refused: {reason}"
    close = difflib.get_close_matches(name, STRATEGIES, n=1)
    return f" is unknown (did you mean {close[0]!r}?)" if close else " is unknown"


def _object(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise FedPFTError(
            f"strategy-args = {text[:80]!r} is not JSON ({error}); write it like "
            "'{\"eta\": 0.01}'"
        ) from error
    if not isinstance(given, dict):
        raise FedPFTError(
            f"strategy-args = {text[:80]!r} is not an object; write it like "
            "'{\"eta\": 0.01}'"
        )
    return given


def _arguments(kind: type[FedAvg]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a strategy that `strategy-args` may set."""
    signature = inspect.signature(kind, eval_str=True)
    return {name: p for name, p in signature.parameters.items() if name in _RANGES}


def _problem(
    strategy: str, known: dict[str, inspect.Parameter], argument: str, value: Any
) -> str:
    """Return why an argument cannot be taken, or nothing."""
    if argument in DECIDED:
        return f"{argument} cannot be set: {DECIDED[argument]}"
    if argument not in known:
        takes = ", ".join(known) or "no arguments"
        return f"{strategy} has no argument {argument!r}; it takes {takes}"
    wanted = known[argument].annotation
    if type(value) not in ({float, int} if wanted is float else {wanted}):
        found = type(value).__name__
        return f"{argument} = {value!r} is {found}; give one {wanted.__name__}"
    low, bound, closed = _RANGES[argument]
    return next(outside(argument, value, low, bound, (closed, False)), "")
