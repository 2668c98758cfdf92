import math

import mpmath  # comes with torch, by sympy
import pytest
import torch

from kd_det.losses.margin import margin_from_norm, margin_relu
from kd_det.losses.overhaul import overhaul_loss, partial_l2_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_partial_l2(student, target):
    """Equation 3, per element."""
    return torch.where((student <= target) & (target <= 0), 0, (target - student).square())


def exact_margin(b, w):
    """E[x | x < 0] for x ~ N(b, w^2), in 60 digits."""
    with mpmath.workdps(60):
        z = mpmath.mpf(b) / mpmath.mpf(w)
        return float(b - w * mpmath.npdf(z) / (mpmath.erfc(z / mpmath.sqrt(2)) / 2))


@pytest.mark.parametrize("w", [1e-6, 0.3, 1.0, 50.0])
def test_margin_from_norm_is_the_expectation(w):
    zs = [-40, -8, -3, -1, -1e-3, 0, 1e-3, 1, 2.9, 3.1, 5, 9.99, 10, 10.01, 20, 40, 300, 1e4]
    bias = torch.tensor([z * w for z in zs], dtype=torch.float64)
    expected = torch.tensor([exact_margin(b, w) for b in bias.tolist()], dtype=torch.float64)
    found = margin_from_norm(torch.full_like(bias, w), bias)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    single = margin_from_norm(-torch.full_like(bias, w).float(), bias.float())  # the sign of w does not matter
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)


def test_margin_from_norm_by_hand():
    # z = 0: half a normal distribution has the mean -sqrt(2 / pi). w = 0: the channel is the constant b.
    weight, bias = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, -3.0, 3.0, 0.0])
    half = -math.sqrt(2 / math.pi)
    torch.testing.assert_close(margin_from_norm(weight, bias), torch.tensor([half, 2 * half, -3.0, 0.0, 0.0]))


def test_margin_from_norm_is_the_mean_of_negative_samples():
    x = 0.7 * randn(200_000) + 0.4
    found = margin_from_norm(torch.tensor([0.7]), torch.tensor([0.4]))
    assert abs(found.item() - x[x < 0].mean().item()) < 0.01


def test_margin_from_norm_needs_matching_shapes():
    with pytest.raises(ValueError, match=r"one shape, found \(3,\) and \(2,\)"):
        margin_from_norm(torch.ones(3), torch.zeros(2))


def test_margin_relu():
    x = torch.tensor([[-3.0, -0.5, 2.0], [-3.0, -0.5, 2.0]]).view(1, 2, 1, 3)
    found = margin_relu(x, torch.tensor([-1.0, 0.0]))
    assert found.flatten(2).tolist() == [[[-1.0, -0.5, 2.0], [0.0, 0.0, 2.0]]]
    assert margin_relu(x.half(), torch.tensor([-1.0, 0.0])).dtype == torch.float32
    with pytest.raises(ValueError, match=r"margins of shape \(3,\) for features of shape \(1, 2, 1, 3\)"):
        margin_relu(x, torch.zeros(3))


def test_partial_l2_by_hand():
    #            S <= T <= 0: 0 | S > T, T <= 0 | T > 0 counts both ways | at T = 0 only what is above
    student = torch.tensor([-3.0, -1.0, 0.5, -1.0, 3.0, -2.0, 2.0]).view(1, 1, 1, 7)
    target = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 7)
    student.requires_grad_()
    loss = partial_l2_loss(student, target, reduction="sum")
    assert loss == 0 + 0 + 2.25 + 4 + 4 + 0 + 4
    loss.backward()
    assert student.grad.flatten().tolist() == [0, 0, 3, -4, 4, 0, 4]
    torch.testing.assert_close(partial_l2_loss(student, target), loss / 7)


@pytest.mark.parametrize("reduction", ["position", "sum"])
def test_overhaul_is_the_definition_with_its_gradient(reduction):
    student, teacher, margin = randn(2, 5, 4, 7).requires_grad_(), randn(2, 5, 4, 7, seed=1), -randn(5, seed=2).abs()
    teacher[:, :, 0, 0] = 0
    target = torch.maximum(teacher, margin.view(1, 5, 1, 1))
    expected = naive_partial_l2(student, target).sum() / (1 if reduction == "sum" else 2 * 4 * 7)
    (expected_grad,) = torch.autograd.grad(expected, student)
    for found in (
        overhaul_loss(student, teacher, margin, reduction=reduction),
        partial_l2_loss(student, margin_relu(teacher, margin), reduction=reduction),
    ):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, student)[0], expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_positive_targets_count_both_ways(dtype):
    student, target = torch.full((1, 1, 1, 1), -5.0, dtype=dtype), torch.full((1, 1, 1, 1), 1e-30, dtype=dtype)
    assert partial_l2_loss(student, target, reduction="sum") == 25


def test_overhaul_is_both_together_where_sizes_differ():
    student, teacher, margin = randn(2, 5, 4, 6).requires_grad_(), randn(2, 5, 8, 3, seed=1), -randn(5, seed=2).abs()
    found = overhaul_loss(student, teacher, margin)
    torch.testing.assert_close(found, partial_l2_loss(student, margin_relu(teacher, margin)))
    assert torch.autograd.gradcheck(lambda s: overhaul_loss(s, teacher, margin), student, fast_mode=True)


def test_sum_counts_only_valid_positions():
    student, teacher, margin = randn(2, 5, 4, 7), randn(2, 5, 4, 7, seed=1), -randn(5, seed=2).abs()
    valid = randn(2, 1, 4, 7, seed=3) > 0
    expected = (naive_partial_l2(student, margin_relu(teacher, margin)) * valid).sum()
    torch.testing.assert_close(overhaul_loss(student, teacher, margin, reduction="sum", valid=valid), expected)


def test_a_student_below_the_margin_everywhere_costs_nothing():
    teacher, margin = -randn(1, 3, 4, 5).abs(), torch.tensor([-1.0, -0.5, -0.1])
    student = torch.full((1, 3, 4, 5), -1.0, dtype=torch.float64)
    assert overhaul_loss(student, teacher, margin) == 0


def test_unknown_options():
    x = randn(1, 2, 3, 3)
    with pytest.raises(ValueError, match="overhaul_loss: unknown reduction 'mean'. Valid names: position, sum"):
        overhaul_loss(x, x, torch.zeros(2), reduction="mean")
    with pytest.raises(ValueError, match="partial_l2_loss: unknown reduction"):
        partial_l2_loss(x, x, reduction="mean")
    with pytest.raises(ValueError, match=r"one margin for each of 2 channels, found margins of shape \(3,\)"):
        overhaul_loss(x, x, torch.zeros(3))
