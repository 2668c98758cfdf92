import pytest
import torch

from kd_det.losses.attention_transfer import attention_map, attention_transfer_loss, gradient_attention_loss

MAPPINGS = [("sum", 2), *(("sum_pow", p) for p in (1, 2, 3.5)), *(("max_pow", p) for p in (1, 2, 4))]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_map(x, mapping, p):
    if mapping == "sum":
        return x.abs().sum(1)
    if mapping == "sum_pow":
        return x.abs().pow(p).sum(1)
    return x.abs().pow(p).amax(1)


def naive_loss(student, teacher, mapping, p):
    q = [naive_map(x, mapping, p).flatten(1) for x in (student, teacher)]
    q_s, q_t = (x / x.square().sum(1, keepdim=True).sqrt() for x in q)
    return (q_s - q_t).square().sum(1).mean()


@pytest.mark.parametrize("mapping, p", MAPPINGS)
def test_map_is_the_definition_with_its_gradient(mapping, p):
    x = randn(2, 5, 4, 7).requires_grad_()
    expected = naive_map(x, mapping, p)
    found = attention_map(x, mapping=mapping, p=p)
    assert found.shape == (2, 4, 7)
    torch.testing.assert_close(found, expected)
    weights = randn(2, 4, 7, seed=1)
    for a, b in zip(torch.autograd.grad(found, x, weights), torch.autograd.grad(expected, x, weights)):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda x: attention_map(x, mapping=mapping, p=p), x)


@pytest.mark.parametrize("mapping, p", MAPPINGS)
def test_loss_is_the_definition_with_its_gradient(mapping, p):
    student, teacher = randn(2, 5, 4, 7).requires_grad_(), randn(2, 9, 4, 7, seed=1)
    expected = naive_loss(student, teacher, mapping, p)
    found = attention_transfer_loss(student, teacher, mapping=mapping, p=p)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])


def test_by_hand():
    # |A|^2 sums to (3^2 + 4^2, 0) = (25, 0) in the student and (0, 4) in the teacher: unit vectors (1, 0) and (0, 1).
    student = torch.tensor([[3.0, 0.0], [-4.0, 0.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([0.0, -2.0]).view(1, 1, 1, 2)
    assert attention_map(student).tolist() == [[[25.0, 0.0]]]
    assert attention_map(student, mapping="sum").tolist() == [[[7.0, 0.0]]]
    assert attention_map(student, mapping="max_pow", p=3).tolist() == [[[64.0, 0.0]]]
    assert attention_transfer_loss(student, teacher) == 2
    assert attention_transfer_loss(student, teacher, reduction="element") == 1  # two positions


def test_equal_attention_costs_nothing_whatever_channels_and_signs():
    x = randn(2, 5, 4, 7)
    assert attention_transfer_loss(x, x) == 0
    torch.testing.assert_close(attention_transfer_loss(x, torch.cat([-x.flip(1), x], 1)), torch.tensor(0.0).double())


def test_element_counts_the_valid_positions():
    student, teacher = randn(2, 5, 4, 7), randn(2, 5, 4, 7, seed=1)
    valid = torch.zeros(2, 1, 4, 7, dtype=torch.bool)
    valid[0, :, :2], valid[1, :, :, :3] = True, True
    per_image = [
        attention_transfer_loss(student[i : i + 1], teacher[i : i + 1], valid=valid[i : i + 1]) / count
        for i, count in enumerate([2 * 7, 4 * 3])
    ]
    found = attention_transfer_loss(student, teacher, valid=valid, reduction="element")
    torch.testing.assert_close(found, sum(per_image) / 2)


@pytest.mark.parametrize("mapping, p", MAPPINGS)
def test_zero_map_is_the_zero_vector_with_zero_gradient(mapping, p):
    student, teacher = randn(2, 5, 4, 7), randn(2, 5, 4, 7, seed=1)
    student[0] = 0
    student.requires_grad_()
    loss = attention_transfer_loss(student, teacher, mapping=mapping, p=p)
    alone = attention_transfer_loss(student[1:], teacher[1:], mapping=mapping, p=p)
    torch.testing.assert_close(loss, (1 + alone) / 2)  # |0 - q_T|^2 = 1
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[0].any() and grad[1].any()


def test_channels_that_tie_for_the_maximum_share_its_gradient():
    x = torch.tensor([2.0, -2.0, 1.0]).view(1, 3, 1, 1).requires_grad_()
    attention_map(x, mapping="max_pow", p=2).sum().backward()
    assert x.grad.flatten().tolist() == [2.0, -2.0, 0.0]  # 2 |x| = 4, by two


def test_map_of_an_empty_batch():
    x = torch.zeros(0, 5, 4, 7, requires_grad=True)
    found = attention_map(x)
    assert found.shape == (0, 4, 7)
    found.sum().backward()


def test_unknown_options():
    x = randn(1, 2, 3, 3)
    for call in (lambda **k: attention_transfer_loss(x, x, **k), lambda **k: attention_map(x, **k)):
        with pytest.raises(ValueError, match="unknown mapping 'mean'. Valid names: sum, sum_pow, max_pow"):
            call(mapping="mean")
        with pytest.raises(ValueError, match="p must be a number >= 1, found 0.5"):
            call(p=0.5)
    with pytest.raises(ValueError, match="unknown reduction 'mean'. Valid names: image, element"):
        attention_transfer_loss(x, x, reduction="mean")
    with pytest.raises(ValueError, match=r"found torch.float64 of shape \(2, 3, 3\)"):
        attention_map(x[0])


def test_gradient_attention_is_differentiated_through_the_task_loss():
    # Task loss (w x)^2 / 2: J = w^2 x. With w = 2, x = 3, J_T = 10: (12 - 10)^2 = 4, d/dw = 2 * 2 * 2 w x = 48.
    w, x = torch.tensor(2.0, requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    (j,) = torch.autograd.grad((w * x).square().sum() / 2, x, create_graph=True)
    loss = gradient_attention_loss(j, torch.tensor([[10.0]]))
    loss.backward()
    assert loss == 4 and w.grad == 48


def test_gradient_attention():
    student, teacher = randn(3, 3, 4, 5).requires_grad_(), randn(3, 3, 4, 5, seed=1).requires_grad_()
    loss = gradient_attention_loss(student, teacher)
    torch.testing.assert_close(loss, sum((s - t).norm() ** 2 for s, t in zip(student, teacher)) / 3)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 / 3 * (student - teacher).detach())
    assert teacher.grad is None
    assert torch.autograd.gradgradcheck(lambda s: gradient_attention_loss(s, teacher), student)
    assert gradient_attention_loss(student[:0], teacher[:0]) == 0
    with pytest.raises(ValueError, match=r"one shape \(N, ...\), found \(3, 3, 4, 5\) and \(3, 3, 4\)"):
        gradient_attention_loss(student, teacher[..., 0])
