import math

import numpy as np
import pytest
import torch
from torch import nn

from fedpft_flower.activity import average_rates
from fedpft_flower.alignment import (
    most_inactive,
    product_loss,
    state_loss,
    weight_products,
)
from fedpft_flower.architectures import FFN
from fedpft_flower.batches import real_tokens
from fedpft_flower.descent import Schedule
from fedpft_flower.fidelity import compare_gradients


def ffn(seed, dim=4, width=6, gates=1, blocks=1):
    torch.manual_seed(seed)
    up = tuple((nn.Linear(dim, blocks * width), blocks) for _ in range(gates))
    return FFN(up, nn.Linear(width, dim), None)


def test_state_loss_against_numpy_without_padding():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(2, 3, 5, 4))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    expected = []
    for h_fm, h_sub in zip(teacher, student, strict=True):
        pairs = [
            (h_fm[b, t], h_sub[b, t]) for b in range(3) for t in range(5) if mask[b, t]
        ]
        error = np.mean([np.mean((x - y) ** 2) for x, y in pairs])
        expected.append(error / np.mean([np.mean(x**2) for x, _ in pairs]))
    found = state_loss(
        *(
            [real_tokens(torch.tensor(h), torch.tensor(mask)) for h in states]
            for states in (teacher, student)
        )
    )
    assert float(found) == pytest.approx(np.mean(expected))


def test_the_gradient_error_against_numpy():
    """Tensors without a gradient in the FM are left out of both sides."""
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (4,), (5,)]
    fm = [[rng.normal(size=shape) for shape in shapes] for _ in range(3)]
    sub = [[g + 0.3 * rng.normal(size=g.shape) for g in batch] for batch in fm]
    for batch in fm:
        batch[1] = np.zeros(4)
    relative, cosine = [], []
    for ones, others in zip(fm, sub, strict=True):
        g, h = (np.concatenate([b[0].ravel(), b[2]]) for b in (ones, others))
        relative.append(np.linalg.norm(h - g) / np.linalg.norm(g))
        cosine.append(g @ h / np.linalg.norm(g) / np.linalg.norm(h))
    found = compare_gradients(
        *([[torch.tensor(g) for g in batch] for batch in side] for side in (fm, sub))
    )
    assert found.relative == pytest.approx(np.mean(relative))
    assert found.relative_spread == pytest.approx(np.std(relative, ddof=1))
    assert found.cosine == pytest.approx(np.mean(cosine))
    assert found.cosine_spread == pytest.approx(np.std(cosine, ddof=1))


def test_rates_are_averaged_by_examples():
    rng = np.random.default_rng(0)
    clients, weights = rng.random((3, 2, 4)), [1, 5, 10]
    rates = [[torch.tensor(layer).float() for layer in one] for one in clients]
    for i, found in enumerate(average_rates(rates, weights)):
        expected = np.average(clients[:, i], axis=0, weights=weights)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_state_loss_weighs_tokens_in_both_means():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 3, 5, 4))
    weights = rng.random((3, 5))
    expected = np.mean(
        [
            sum(w * np.sum((x - y) ** 2) for w, x, y in zip(*layer, strict=True))
            / sum(w * np.sum(x**2) for w, x, _ in zip(*layer, strict=True))
            for layer in zip(weights, teacher, student, strict=True)
        ]
    )
    tensors = [
        torch.tensor(h, dtype=torch.float32) for h in (teacher, student, weights)
    ]
    found = state_loss(*map(list, tensors))
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("gates", "blocks"), [(1, 1), (2, 1), (1, 2)])
def test_product_loss_against_numpy(gates, blocks):
    teacher = ffn(0, gates=gates, blocks=blocks)
    student = ffn(1, gates=gates, blocks=blocks)

    def products(one):
        down = one.down.weight.detach().numpy()
        rows = [linear.weight.detach().numpy() for linear, _ in one.up]
        parts = [part for matrix in rows for part in np.split(matrix, blocks)]
        return [down @ part for part in parts]

    expected = np.mean(
        [
            np.mean((p - q) ** 2) / np.mean(p**2)
            for p, q in zip(products(teacher), products(student), strict=True)
        ]
    )
    found = product_loss([weight_products(teacher)], [weight_products(student)])
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_product_loss_has_a_gradient_in_all_its_weights():
    teacher, student = ffn(0), ffn(1)
    loss = product_loss([weight_products(teacher)], [weight_products(student)])
    loss.backward()
    (up, _), *_ = student.up
    assert bool(up.weight.grad.any())
    assert bool(student.down.weight.grad.any())
    # Against finite differences in one entry.
    with torch.no_grad():
        up.weight[0, 0] += 1e-3
        higher = product_loss([weight_products(teacher)], [weight_products(student)])
    slope = (higher - loss).item() / 1e-3
    assert slope == pytest.approx(float(up.weight.grad[0, 0]), rel=0.05, abs=1e-4)


def test_losses_are_zero_for_equal_models():
    one, states = ffn(0), [torch.randn(2, 3, 4)]
    assert state_loss(states, states) == 0
    assert product_loss([weight_products(one)], [weight_products(one)]).item() == 0


def test_most_inactive_takes_the_least_used_and_lower_positions_at_ties():
    rates = [torch.tensor([0.1, 0.9, 0.5, 0.9]), torch.zeros(4)]
    chosen = most_inactive(rates, 0.5)
    assert [c.tolist() for c in chosen] == [[1, 3], [0, 1]]
    assert [len(c) for c in most_inactive(rates, 0.01)] == [1, 1]
    assert most_inactive(rates, 1.0)[0].tolist() == [0, 1, 2, 3]


def test_budget_ends_at_the_closest_limit():
    schedule = Schedule(1.0, steps=10, tokens=100, seconds=50)
    assert schedule.used(1, 50, 5) == 0.5
    assert schedule.used(9, 10, 100) == 1.0
    assert Schedule(1.0, seconds=4).used(1000, 10**9, 1) == 0.25
    assert math.isclose(Schedule(1.0, tokens=10).used(0, 3, 0), 0.3)


def test_fused_gate_places_its_rows_in_both_blocks():
    one = ffn(0, blocks=2)
    places = {
        tuple(parameter.shape): (axis, indices.tolist())
        for parameter, axis, indices in one.parameters_by_axis(torch.tensor([1, 4]))
    }
    assert places[(12, 4)] == (0, [1, 4, 7, 10])
    assert places[(12,)] == (0, [1, 4, 7, 10])
    assert places[(4, 6)] == (1, [1, 4])
