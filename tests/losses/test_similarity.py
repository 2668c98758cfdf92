import pytest
import torch

from kd_det.losses.similarity import similarity_preserving_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(student, teacher):
    grams = []
    for x in (teacher, student):
        q = x.flatten(1)
        g = torch.stack([torch.stack([a @ b for b in q]) for a in q])
        grams.append(torch.stack([row / row.norm() for row in g]))
    return (grams[0] - grams[1]).square().sum() / len(student) ** 2


@pytest.mark.parametrize("shape", [(3, 4, 5), (9,)])
def test_value_and_gradient_are_the_definition(shape):
    student, teacher = randn(6, *shape).requires_grad_(), randn(6, 2, 7, 3, seed=1)
    expected, found = naive(student, teacher), similarity_preserving_loss(student, teacher)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: similarity_preserving_loss(s, teacher), student, fast_mode=True)


def test_by_hand():
    # Orthogonal samples: G = I. Equal samples: each row (1, 1) / sqrt 2. Four entries, b^2 = 4.
    teacher, student = torch.eye(2), torch.ones(2, 3)
    r = 2**-0.5
    expected = (2 * (1 - r) ** 2 + 2 * r**2) / 4
    torch.testing.assert_close(similarity_preserving_loss(student, teacher), torch.tensor(expected))


def test_invariances():
    student, teacher = randn(6, 3, 4), randn(6, 5, seed=1)
    expected = similarity_preserving_loss(student, teacher)
    order = torch.randperm(6)
    torch.testing.assert_close(similarity_preserving_loss(student[order], teacher[order]), expected)
    rotation = torch.linalg.qr(randn(12, 12, seed=2))[0]
    torch.testing.assert_close(similarity_preserving_loss(3 * student.flatten(1) @ rotation, 0.1 * teacher), expected)
    assert similarity_preserving_loss(student, -2 * student) < 1e-20


def test_one_sample_is_similar_to_itself_and_none_cost_nothing():
    student = randn(1, 4).requires_grad_()
    loss = similarity_preserving_loss(student, randn(1, 7, seed=1))
    loss.backward()
    assert loss == 0 and student.grad.abs().max() < 1e-12
    empty = torch.zeros(0, 4, 7, 7, requires_grad=True)
    loss = similarity_preserving_loss(empty, torch.zeros(0, 9))
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


def test_zero_sample_is_a_zero_row_with_zero_gradient():
    student, teacher = randn(5, 4), randn(5, 7, seed=1)
    student[2] = 0
    student.requires_grad_()
    loss = similarity_preserving_loss(student, teacher)
    loss.backward()
    assert not student.grad[2].any() and student.grad.isfinite().all() and student.grad[0].any()
    # Its row and column in G_S are zero, so what is there of G_T is the cost.
    g_t = teacher @ teacher.T
    g_t = g_t / g_t.norm(dim=1, keepdim=True)
    rest = [0, 1, 3, 4]
    g_s = student.detach()[rest] @ student.detach()[rest].T
    g_s = g_s / g_s.norm(dim=1, keepdim=True)
    others = (g_t[rest][:, rest] - g_s).square().sum() + g_t[2].square().sum() + g_t[rest, 2].square().sum()
    torch.testing.assert_close(loss.detach(), others / 25)


@pytest.mark.parametrize("scale", [1e-20, 1e4, 1e15])
def test_scale_does_not_matter(scale):
    student, teacher = randn(6, 3, 4).float(), randn(6, 5, seed=1).float()
    expected, x = similarity_preserving_loss(student, teacher), (student * scale).requires_grad_()
    found = similarity_preserving_loss(x, teacher * scale)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found, x)[0].isfinite().all()


def test_all_zero_and_constant_samples_are_finite():
    for student in (torch.zeros(3, 4), torch.full((3, 4), 1e4), torch.full((3, 4), 1e-20)):
        student.requires_grad_()
        loss = similarity_preserving_loss(student, randn(3, 4))
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


def test_float32_under_autocast_with_a_detached_teacher():
    student, teacher = randn(6, 12).bfloat16().requires_grad_(), randn(6, 5).bfloat16().requires_grad_()
    expected = similarity_preserving_loss(student.detach().float(), teacher.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = similarity_preserving_loss(student, teacher)
        loss.backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16 and teacher.grad is None
    torch.testing.assert_close(loss, expected)


def test_samples_must_be_the_same():
    with pytest.raises(ValueError, match=r"same samples, found shapes \(3, 4\) and \(2, 4\)"):
        similarity_preserving_loss(torch.zeros(3, 4), torch.zeros(2, 4))
