import math

import pytest
import torch

from kd_det.losses import bounded_regression_loss, soft_target_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_kl(student, teacher, temperature):
    """Sample by sample, class by class."""
    total = 0.0
    for s, t in zip(student, teacher):
        p_s, p_t = torch.exp(s / temperature), torch.exp(t / temperature)
        p_s, p_t = p_s / p_s.sum(), p_t / p_t.sum()
        total += (p_t * torch.log(p_t / p_s)).sum()
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_value_and_gradient_are_the_definition(temperature):
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    expected, found = (f(student, teacher, temperature=temperature) for f in (naive_kl, soft_target_loss))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: soft_target_loss(s, teacher, temperature=temperature), student)


def test_by_hand():
    # softmax(ln 3, 0) = (3/4, 1/4) against (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2; with logits and T doubled 4 times that.
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature=1), torch.tensor(kl))
    torch.testing.assert_close(soft_target_loss(student, 2 * teacher, temperature=2), torch.tensor(4 * kl))


def test_dense_logits_are_averaged_over_positions():
    student, teacher = randn(2, 5, 3, 4), randn(2, 5, 3, 4, seed=1)
    flat = (x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher))
    torch.testing.assert_close(soft_target_loss(student, teacher), soft_target_loss(*flat))


def test_shift_and_equality():
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    expected = soft_target_loss(student, teacher)
    torch.testing.assert_close(soft_target_loss(student + randn(6, 1, seed=2), teacher - 3), expected)
    assert soft_target_loss(student, student + 1).abs() < 1e-12
    # At a high temperature it tends to the squared distance of the centred logits over 2 K (section 2.1).
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    limit = (centred[0] - centred[1]).square().sum(1).mean() / 10
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature=1e3), limit, rtol=1e-2, atol=0)


def test_extreme_empty_and_half_inputs():
    for scale in (1e4, 1e-20, 0):
        student = (randn(3, 5) * scale).float().requires_grad_()
        loss = soft_target_loss(student, (randn(3, 5, seed=1) * scale).float())
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = soft_target_loss(empty, torch.zeros(0, 5))
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)
    student, teacher = randn(3, 5).half().requires_grad_(), randn(3, 5, seed=1).half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_target_loss(student, teacher)
    torch.testing.assert_close(loss, soft_target_loss(student.float(), teacher.float()))
    loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.float16 and teacher.grad is None


def test_soft_target_errors():
    with pytest.raises(ValueError, match=r"same classes, found shapes \(3, 5\) and \(3, 6\)"):
        soft_target_loss(torch.zeros(3, 5), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="positive number, found 0"):
        soft_target_loss(torch.zeros(3, 5), torch.zeros(3, 5), temperature=0)


def test_bounded_regression_by_hand():
    target = torch.zeros(3, 4)
    student = torch.tensor([[2.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 1.0, 0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [0, 0, 1.0, 1.0]], requires_grad=True)
    # Squared errors 4 > 1 counts; 1 < 4 does not; 2 = 2 only with a margin.
    loss = bounded_regression_loss(student, teacher, target)
    torch.testing.assert_close(loss, torch.tensor(4 / 3))
    loss.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[4.0, 0, 0, 0], [0] * 4, [0] * 4]) / 3)
    assert teacher.grad is None
    torch.testing.assert_close(bounded_regression_loss(student, teacher, target, margin=1), torch.tensor(6 / 3))
    torch.testing.assert_close(bounded_regression_loss(student, teacher, target, margin=3.5), torch.tensor(7 / 3))


def test_bounded_regression_is_divided_by_all_regions_as_a_box_loss():
    target, student = torch.zeros(4, 4), torch.tensor([[2.0, 0, 0, 0]]).expand(4, 4)
    foreground = torch.tensor([True, False, False, False])
    loss = bounded_regression_loss(student, target, target, foreground=foreground)
    torch.testing.assert_close(loss, torch.tensor(4 / 4))
    none = bounded_regression_loss(student, target, target, foreground=torch.zeros(4, dtype=torch.bool))
    assert none == 0


def test_bounded_regression_gradcheck_and_empty():
    student, teacher, target = (randn(7, 4, seed=i) for i in range(3))
    assert torch.autograd.gradcheck(lambda s: bounded_regression_loss(s, teacher, target), student.requires_grad_())
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = bounded_regression_loss(empty, empty, empty)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 4)


def test_bounded_regression_errors():
    with pytest.raises(ValueError, match=r"all be \(R, 4\), found shapes \(3, 4\), \(3, 4\) and \(2, 4\)"):
        bounded_regression_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="number >= 0, found -1"):
        bounded_regression_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), margin=-1)
