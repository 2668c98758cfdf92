import pytest
import torch

from kd_det.losses.dist import dist_loss
from kd_det.losses.dkd import dkd_loss
from kd_det.losses.soft_target import soft_target_loss

LABELS = torch.tensor([0, 3, 4, 1, 1, 2])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_dkd_parts(student, teacher, labels, temperature):
    target = others = 0.0
    for s, t, label in zip(student, teacher, labels):
        p_s, p_t = torch.softmax(s / temperature, 0), torch.softmax(t / temperature, 0)
        target += p_t[label] * (p_t[label] / p_s[label]).log()
        target += (1 - p_t[label]) * ((1 - p_t[label]) / (1 - p_s[label])).log()
        rest = [k for k in range(len(s)) if k != label]
        q_s, q_t = p_s[rest] / p_s[rest].sum(), p_t[rest] / p_t[rest].sum()
        others += (q_t * (q_t / q_s).log()).sum()
    return temperature**2 * target / len(student), temperature**2 * others / len(student)


def naive_dist_parts(student, teacher, temperature):
    def one_minus(x, y):
        return 1 - sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x, y)) / len(x)

    s, t = (torch.softmax(x / temperature, 1) for x in (student, teacher))
    return temperature**2 * one_minus(s, t), temperature**2 * one_minus(s.T, t.T)


def test_dkd_is_the_definition_with_its_gradient():
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    target, others = naive_dkd_parts(student, teacher, LABELS, 2.0)
    expected = 0.5 * target + 3 * others
    found = dkd_loss(student, teacher, LABELS, alpha=0.5, beta=3.0, temperature=2.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: dkd_loss(s, teacher, LABELS), student)


def test_dkd_is_soft_targets_where_beta_is_the_rest_of_the_teacher():
    student, teacher = randn(1, 5), randn(1, 5, seed=1)
    label = LABELS[1:2]
    rest = 1 - torch.softmax(teacher / 4, 1)[0, label].item()
    found = dkd_loss(student, teacher, label, alpha=1.0, beta=rest)
    torch.testing.assert_close(found, soft_target_loss(student, teacher))


def test_dkd_of_a_single_class_costs_nothing():
    student = randn(3, 1).requires_grad_()
    loss = dkd_loss(student, randn(3, 1, seed=1), torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_dist_is_the_definition_with_its_gradient():
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    inter, intra = naive_dist_parts(student, teacher, 2.0)
    expected = 0.5 * inter + 3 * intra
    found = dist_loss(student, teacher, beta=0.5, gamma=3.0, temperature=2.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: dist_loss(s, teacher), student)


def test_dist_is_not_biased_by_many_classes():
    # Of 100,000 equal classes, each probability is about 1e-5 and the denominators about 1e-10.
    student = 0.1 * randn(4, 100_000).float()
    assert dist_loss(student, student).abs() < 1e-3


def test_dist_of_one_sample_is_the_correlation_over_classes():
    # Over a single sample nothing varies: intra counts 1 without gradient.
    student, teacher = randn(1, 5).requires_grad_(), randn(1, 5, seed=1)
    s, t = torch.softmax(student, 1), torch.softmax(teacher, 1)
    inter = 1 - torch.corrcoef(torch.cat([s, t]))[0, 1]
    found = dist_loss(student, teacher)
    torch.testing.assert_close(found, inter + 1)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(inter, student)[0])


CALLS = {"dkd": lambda s, t: dkd_loss(s, t, LABELS[: len(s)]), "dist": dist_loss}


@pytest.mark.parametrize("name", CALLS)
def test_equality_types_empty_and_extreme_inputs(name):
    loss_fn = CALLS[name]
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    assert loss_fn(student, student + 1).abs() < 1e-12
    for scale in (0, 1e-20, 1e4):
        s = (student * scale).float().requires_grad_()
        loss = loss_fn(s, (teacher * scale).float())
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss_fn(student.half(), teacher.half())
    torch.testing.assert_close(half, loss_fn(student.half().float(), teacher.half().float()))
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = loss_fn(empty, torch.zeros(0, 5))
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)


def test_errors():
    x = randn(6, 5)
    with pytest.raises(ValueError, match=r"labels \(N,\), found shapes \(6, 5\), \(6, 5\) and \(5,\)"):
        dkd_loss(x, x, LABELS[:5])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        dkd_loss(x[:, :4], x[:, :4], LABELS)
    with pytest.raises(ValueError, match=r"both logits must be \(N, K\), found shapes \(6, 5\) and \(6, 4\)"):
        dist_loss(x, x[:, :4])
    with pytest.raises(ValueError, match="positive number, found 0"):
        dkd_loss(x, x, LABELS, temperature=0)
    with pytest.raises(ValueError, match="positive number, found 0"):
        dist_loss(x, x, temperature=0)
