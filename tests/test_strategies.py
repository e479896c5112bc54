"""Every averaging strategy of Flower, by name: it trains, and as its formula says."""

import gc
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from flwr.serverapp import strategy as flower

from fedpft_flower import commands
from fedpft_flower.adapters import attach_adapter, get_adapter
from fedpft_flower.checks import check_run
from fedpft_flower.config import FedPFTError, LoraConfig, TrainConfig, derive_seed
from fedpft_flower.encoding import encode, endless_batches
from fedpft_flower.strategies import (
    _RANGES,
    DECIDED,
    STRATEGIES,
    inner_strategy,
    strategy_of,
)
from fedpft_flower.tasks import load_task
from fedpft_flower.training import train_adapter
from tests.families import CLASSES, tiny_model
from tests.test_federation import broken, results, run

ROOT = Path(__file__).parent.parent
NODES = 7  # what Bulyan needs against one malicious node

# Arguments with which each strategy trains below; docs/methods.md shows the same.
ARGUMENTS = {
    "FedAvg": "",
    "FedProx": '{"proximal_mu": 0.1}',
    "FedAvgM": '{"server_momentum": 0.5}',
    "FedAdam": '{"eta": 0.01}',
    "FedYogi": '{"eta": 0.01}',
    "FedAdagrad": '{"eta": 0.01}',
    "QFedAvg": '{"client_learning_rate": 0.1, "q": 0.2}',
    "FedMedian": "",
    "FedTrimmedAvg": '{"beta": 0.2}',
    "Krum": '{"num_malicious_nodes": 1}',
    "MultiKrum": '{"num_malicious_nodes": 1, "num_nodes_to_select": 4}',
    "Bulyan": '{"num_malicious_nodes": 1}',
}


@pytest.fixture
def short(settings):
    # QFedAvg and Bulyan collect garbage at every reply: spare them what lives anyway.
    gc.freeze()
    yield settings | {
        "method": "fedpft-n",
        "data.max-test-rows": 20,
        "train.clients-per-round": NODES,
        "train.local-steps": 4,
        "train.lr": 0.01,
    }
    gc.unfreeze()


# ------------------------------------------------------------- independent references
#
# Each takes all rounds so far as (x, clients, weights, losses), in float64: the adapter
# sent [D], those received [n, D], rows [n], losses [n]; and gives the next adapter [D].


def mean(x, clients, weights, losses):
    return np.average(clients, axis=0, weights=weights)


def decayed(rounds, beta, power):
    """Return sum_i beta^(r - i) d_i^power over rounds i, d_i the mean update."""
    updates = [mean(*one) - one[0] for one in rounds]
    return sum(beta**age * d**power for age, d in enumerate(reversed(updates)))


def momentum(rounds):
    return rounds[-1][0] + decayed(rounds, 0.5, 1)


def adam(rounds, eta=0.01, one=0.9, two=0.99, tau=1e-3):
    m = (1 - one) * decayed(rounds, one, 1)
    v = (1 - two) * decayed(rounds, two, 2)
    r = len(rounds) + 1  # Flower corrects the bias as of the next round
    rate = eta * np.sqrt(1 - two**r) / (1 - one**r)
    return rounds[-1][0] + rate * m / (np.sqrt(v) + tau)


def adagrad(rounds, eta=0.01, tau=1e-3):
    m, v = decayed(rounds, 0.0, 1), decayed(rounds, 1.0, 2)
    return rounds[-1][0] + eta * m / (np.sqrt(v) + tau)


def yogi(rounds, eta=0.01, one=0.9, two=0.99, tau=1e-3):
    m, v = (1 - one) * decayed(rounds, one, 1), 0.0
    for x, *others in rounds:
        squared = (mean(x, *others) - x) ** 2
        v = v - (1 - two) * squared * np.sign(v - squared)
    return rounds[-1][0] + eta * m / (np.sqrt(v) + tau)


def fair(rounds, rate=0.1, q=0.2):
    x, clients, _, losses = rounds[-1]
    gradients = (x - clients) / rate
    steps = losses[:, None] ** q * gradients
    squares = (gradients**2).sum(axis=1)
    return x - steps.sum(0) / (q * losses ** (q - 1) * squares + losses**q / rate).sum()


def trimmed(rounds):
    return np.sort(rounds[-1][1], axis=0)[1:-1].mean(axis=0)  # 0.2 * 7 = 1.4


def krum_order(clients, malicious=1):
    near = len(clients) - malicious - 2
    gaps = [[((a - b) ** 2).sum() for b in clients] for a in clients]
    return np.argsort([sum(sorted(row)[1 : near + 1]) for row in gaps])


def krum(rounds):
    clients = rounds[-1][1]
    return clients[krum_order(clients)[0]]


def multi_krum(rounds):
    x, clients, weights, losses = rounds[-1]
    best = krum_order(clients)[:4]
    return mean(x, clients[best], weights[best], losses)


def bulyan(rounds):
    clients = rounds[-1][1]
    chosen = clients[krum_order(clients)[:5]]  # n - 2f
    near = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0)[:3]
    return np.take_along_axis(chosen, near, axis=0).mean(axis=0)


REFERENCES = {
    "FedAvg": lambda rounds: mean(*rounds[-1]),
    "FedProx": lambda rounds: mean(*rounds[-1]),
    "FedAvgM": momentum,
    "FedAdam": adam,
    "FedYogi": yogi,
    "FedAdagrad": adagrad,
    "QFedAvg": fair,
    "FedMedian": lambda rounds: np.median(rounds[-1][1], axis=0),
    "FedTrimmedAvg": trimmed,
    "Krum": krum,
    "MultiKrum": multi_krum,
    "Bulyan": bulyan,
}


def vector(record):
    return np.concatenate([a.numpy().ravel() for a in record.values()]).astype("f8")


def recorder():
    """Return a fault that keeps what is sent and received, and what it keeps."""
    kept = {}

    def keep(message, reply):
        if message.metadata.message_type == "train":
            metrics = reply.content["metrics"]
            round_ = kept.setdefault(
                message.content["config"]["server-round"],
                (vector(message.content["arrays"]), {}),
            )
            round_[1][message.metadata.dst_node_id] = (
                vector(reply.content["arrays"]),
                metrics["num-examples"],
                metrics["train_loss"],
            )
        return reply

    return keep, kept


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_averaging_strategy_trains_and_gives_what_its_formula_says(
    local_grid, short, name
):
    keep, kept = recorder()
    short |= {"strategy": name, "strategy-args": ARGUMENTS[name]}
    run(local_grid, short, dict.fromkeys(range(NODES), keep), nodes=NODES)
    _, rounds, summary, _ = results(short)
    assert rounds[-1]["fm-loss"] < rounds[0]["fm-loss"] - 0.02
    assert summary["failures"] == 0
    assert all(np.isfinite(r["train-loss"]) for r in rounds[1:])
    history = [
        (x, *map(np.array, zip(*replies.values(), strict=True)))
        for _, (x, replies) in sorted(kept.items())
    ]
    assert [clients.shape[0] for _, clients, *_ in history] == [NODES] * 3
    for r in (1, 2):
        expected = REFERENCES[name](history[:r])
        np.testing.assert_allclose(history[r][0], expected, atol=2e-6, rtol=2e-5)


def test_fedavg_by_name_and_fedprox_without_mu_give_the_default_bit_for_bit(
    local_grid, short
):
    hashes = []
    for change in (
        {},
        {"strategy": "FedAvg", "strategy-args": "{}"},
        {"strategy": "FedProx", "strategy-args": '{"proximal_mu": 0}'},
        {"strategy": "FedProx", "strategy-args": '{"proximal_mu": 0.1}'},
    ):
        run(local_grid, short | {"rounds": 1} | change, nodes=NODES)
        hashes.append(results(short)[3]["adapter-sha256"])
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


@pytest.mark.parametrize(
    ("name", "arguments", "rule"),
    [
        ("Bulyan", '{"num_malicious_nodes": 1}', "n >= 4 * num_malicious_nodes + 3"),
        ("Krum", '{"num_malicious_nodes": 2}', "n >= 2 * num_malicious_nodes + 3"),
    ],
)
def test_too_few_replies_in_mid_run_end_it_in_one_line(
    local_grid, short, name, arguments, rule
):
    def lose(message, reply):
        second = message.content["config"]["server-round"] == 2
        return Message(Error(2, "no memory"), reply_to=message) if second else reply

    short |= {"strategy": name, "strategy-args": arguments}
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, short, {3: broken(lose)}, nodes=NODES)
    said = str(caught.value)
    assert said.startswith(f"round 2: {name} with num_malicious_nodes")
    assert f"{rule}, and n = 6 usable replies; partition-000003: no memory" in said
    assert "\n" not in said


def test_too_few_clients_a_round_are_refused_before_training(local_grid, short):
    short |= {"strategy": "Bulyan", "train.clients-per-round": 2}
    with pytest.raises(FedPFTError, match="n = 2 clients a round; raise train"):
        run(local_grid, short, nodes=NODES)
    assert not (Path(short["out-dir"]) / "7" / "metrics.jsonl").exists()


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("FedAdm", "", "strategy = 'FedAdm' is unknown (did you mean 'FedAdam'?)"),
        ("", "", "strategy = '' is unknown; choose one of Bulyan, FedAdagrad"),
        ("Result", "", "is unknown"),
        ("FedOpt", "", "is unknown"),
        ("FedXgbBagging", "", "is refused: it joins decision trees"),
        ("FedXgbCyclic", "", "is refused: it joins decision trees"),
        ("DifferentialPrivacyServerSideFixedClipping", "", "wraps another strategy"),
        ("Strategy", "", "is refused: it is abstract"),
        ("FedAdam", "eta=0.1", "is not JSON"),
        ("FedAdam", "eta\n= 0.1", "is not JSON"),
        ("FedAdam", "[" * 100_000, "is not JSON"),
        ("FedAdam", "[0.1]", "is not an object"),
        ("FedAdam", '{"etta": 1}', "no argument 'etta'; it takes eta, beta_1, beta_2"),
        ("FedAvg", '{"eta": 1}', "it takes no arguments"),
        ("FedAdam", '{"eta": "1"}', "eta = '1' is str; give one float"),
        ("FedAdam", '{"eta": true}', "eta = True is bool; give one float"),
        ("FedAdam", '{"eta": null}', "eta = None is NoneType"),
        ("FedAdam", '{"eta": NaN}', "eta = nan is outside (0, 1e+09)"),
        ("FedAdam", '{"eta": 1e999}', "eta = inf is outside"),
        ("FedAdam", '{"eta": 0}', "eta = 0 is outside (0, 1e+09)"),
        ("FedAdam", '{"beta_1": 1.0}', "beta_1 = 1.0 is outside [0, 1)"),
        ("FedYogi", '{"beta_2": -0.1}', "beta_2 = -0.1 is outside [0, 1)"),
        ("FedYogi", '{"tau": 0}', "tau = 0 is outside (0"),
        ("FedAdam", '{"eta_l": 0.1}', "Flower never uses it; train.lr"),
        ("FedTrimmedAvg", '{"beta": 0.5}', "beta = 0.5 is outside [0, 0.5)"),
        ("FedProx", "", "FedProx needs proximal_mu; give"),
        ("FedAvgM", '{"server_learning_rate": 0.5}', "FedAvgM needs server_momentum"),
        ("FedProx", '{"proximal_mu": -1}', "proximal_mu = -1 is outside [0"),
        ("FedAvgM", '{"server_learning_rate": 0}', "server_learning_rate = 0 is"),
        ("FedAvgM", '{"server_momentum": 1}', "server_momentum = 1 is outside [0, 1)"),
        ("QFedAvg", "", "QFedAvg needs client_learning_rate; give"),
        ("QFedAvg", '{"client_learning_rate": 1, "q": -1}', "q = -1 is outside [0"),
        ("QFedAvg", '{"train_loss_key": "x"}', "train_loss_key cannot be set"),
        ("Krum", '{"num_malicious_nodes": 1.0}', "is float; give one int"),
        ("Krum", '{"num_malicious_nodes": -1}', "is outside [0"),
        ("MultiKrum", '{"num_nodes_to_select": 0}', "is outside [1"),
        ("Bulyan", '{"selection_rule": "x"}', "a function cannot be given as JSON"),
        ("FedAvg", '{"fraction_train": 0.5}', "clients-per-round and train.fraction"),
        ("FedAvg", '{"arrayrecord_key": "x"}', "arrayrecord_key cannot be set"),
    ],
)
def test_a_bad_strategy_is_refused_in_one_line_before_anything_is_loaded(
    local_grid, short, tmp_path, name, arguments, said
):
    short |= {"strategy": name, "strategy-args": arguments, "data.task": "no such task"}
    with pytest.raises(FedPFTError) as caught:
        run(local_grid, short)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not Path(short["out-dir"]).exists()
    conf = tmp_path / "x.toml"
    conf.write_text("")
    pairs = [f"strategy={name}", f"strategy-args={json.dumps(arguments)}"]
    with pytest.raises(FedPFTError, match=re.escape(said)):
        check_run(commands.read_config(conf, pairs))  # as fedpft-run does


@pytest.mark.parametrize(
    ("name", "arguments", "enough"),
    [
        ("FedAvg", "", 1),
        ("FedMedian", "", 1),
        ("Krum", '{"num_malicious_nodes": 2}', 7),
        ("MultiKrum", '{"num_malicious_nodes": 1, "num_nodes_to_select": 2}', 5),
        ("MultiKrum", '{"num_malicious_nodes": 1, "num_nodes_to_select": 8}', 9),
        ("Bulyan", '{"num_malicious_nodes": 2}', 11),
        ("FedTrimmedAvg", '{"beta": 0.2}', 5),
        ("FedTrimmedAvg", '{"beta": 0}', 1),
    ],
)
def test_clients_a_round_that_a_strategy_needs(name, arguments, enough):
    inner_strategy(name, arguments, enough)
    if enough > 1:
        with pytest.raises(FedPFTError, match=f"{name} with .* n = {enough - 1} "):
            inner_strategy(name, arguments, enough - 1)


def test_all_that_flower_offers_is_offered_here_or_refused_for_a_reason():
    for name in flower.__all__:
        if name not in STRATEGIES and name != "Result":
            with pytest.raises(FedPFTError, match="is refused: it"):
                strategy_of(name, "")
    for kind in STRATEGIES.values():
        for argument, parameter in inspect.signature(kind).parameters.items():
            assert (argument in _RANGES) != (argument in DECIDED)
            if argument in _RANGES:
                assert parameter.annotation in (int, float)


def test_the_command_line_takes_arguments_as_the_documents_write_them():
    shown = (ROOT / "docs/methods.md").read_text()
    assert "strategy=FedAdam 'strategy-args={\"eta\": 0.01}'" in shown
    pairs = ["strategy=FedAdam", 'strategy-args={"eta": 0.01}']
    config = commands.read_config(ROOT / "conf/demo.toml", pairs)
    kind, arguments = strategy_of(config.strategy, config.strategy_args)
    assert (kind, arguments) == (flower.FedAdam, {"eta": 0.01})


def test_the_documents_show_the_arguments_that_train_here():
    shown = (ROOT / "docs/methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (?:`([^`]*)`|-) \|", shown, re.MULTILINE)
    assert {name: text for name, text in rows if name in STRATEGIES} == ARGUMENTS


# --------------------------------------------------------------------------- FedProx


@pytest.fixture
def digits(vit_directory):
    from transformers import AutoImageProcessor

    from fedpft_flower.config import DataConfig

    task = load_task(DataConfig(task="digits", max_train_rows=80), 0)
    processor = AutoImageProcessor.from_pretrained(vit_directory)
    few = task.train.filter(lambda row: row["label"] < CLASSES)
    return encode(few, processor, "image", DataConfig())


def adapted():
    model = tiny_model("vit")
    lora = LoraConfig(r=2, alpha=8, dropout=0.0)
    return attach_adapter(model, lora, ("classifier",), seed=0)


def proximal_loop(model, rows, config, lr, seed, mu):
    """Train by the gradient written out: g + mu (w - w_0), clipped, then AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    origin = [p.detach().clone() for p in trained]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
    batches, losses = endless_batches(rows, config.batch_size, seed), []
    for step in range(1, config.local_steps + 1):
        loss = model(**next(batches)).loss
        losses.append(float(loss.detach()))
        gradients = [
            g + mu * (p.detach() - o)
            for g, p, o in zip(
                torch.autograd.grad(loss, trained), trained, origin, strict=True
            )
        ]
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        scale = min(1.0, config.clip_norm / (float(norm) + 1e-6))
        for p, g, (m, v) in zip(trained, gradients, moments, strict=True):
            g = g * scale
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            first, second = m / (1 - 0.9**step), v / (1 - 0.999**step)
            with torch.no_grad():
                p.mul_(1 - lr * config.weight_decay)
                p.sub_(lr * first / (second.sqrt() + 1e-8))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("mu", [0.0, 0.5, 20.0])
def test_the_proximal_term_is_that_of_a_loop_written_out(digits, mu):
    config = TrainConfig(local_steps=4, batch_size=8, clip_norm=0.5)
    seed = derive_seed(0, "x")
    model, slow = adapted(), adapted()
    report = train_adapter(model, digits, config, 0.01, seed, proximal_mu=mu)
    loss = proximal_loop(slow, digits, config, 0.01, seed, mu)
    expected = get_adapter(slow)
    for name, tensor in get_adapter(model).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-4)
    assert report.loss == pytest.approx(loss, rel=1e-5)  # without the term


def test_a_large_mu_keeps_the_adapter_near_where_it_started(digits):
    config = TrainConfig(local_steps=12, batch_size=8, weight_decay=0.0)
    gaps = []
    for mu in (0.0, 1.0, 100.0):
        model = adapted()
        before = get_adapter(model)
        train_adapter(model, digits, config, 0.01, 0, proximal_mu=mu)
        after = get_adapter(model)
        gaps.append(sum(float((after[n] - before[n]).square().sum()) for n in before))
    assert gaps[0] > gaps[1] > gaps[2]
