import pytest
import torch
import torch.nn.functional as F

from kd_det.losses.nst import nst_loss

KERNELS = [
    {"kernel": "linear"},
    {"kernel": "poly"},
    {"kernel": "poly", "degree": 3, "offset": 0.5},
    {"kernel": "poly", "degree": 1, "offset": 0.5},
    {"kernel": "gaussian"},
]
# More channels than positions, and fewer: both sides of the Grams, whole and by rows.
SHAPES = [((2, 5, 4, 7), (2, 3, 4, 7)), ((2, 40, 2, 3), (2, 24, 2, 3)), ((1, 9, 1, 2), (1, 70, 1, 2))]


def rand(shape, seed):
    # post-ReLU, about half of the entries zero
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


def naive_nst(student, teacher, kernel="poly", degree=2, offset=0.0):
    """Equation 4 pair by pair: every sample written out, as (N, C, C, HW)."""

    def mean_kernel(x, y, sigma2):
        products = (x[:, :, None] * y[:, None]).sum(-1)
        if kernel == "linear":
            values = products
        elif kernel == "poly":
            values = (products + offset) ** degree
        else:
            values = torch.exp(-(x[:, :, None] - y[:, None]).square().sum(-1) / (2 * sigma2))
        return values.mean((1, 2))

    s, t = (F.normalize(x.flatten(2), dim=2, eps=1e-30) for x in (student, teacher))
    sigma2 = (t[:, :, None] - s[:, None]).square().sum(-1).mean((1, 2), keepdim=True).detach()
    return (mean_kernel(t, t, sigma2) + mean_kernel(s, s, sigma2) - 2 * mean_kernel(t, s, sigma2)).mean()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", KERNELS)
def test_value_and_gradient_are_the_definition(options, shapes):
    student, teacher = rand(shapes[0], 0) + 1e-3, rand(shapes[1], 1) + 1e-3
    student.requires_grad_()
    expected = naive_nst(student, teacher, **options)
    (expected_grad,) = torch.autograd.grad(expected, student)
    found = nst_loss(student, teacher, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], expected_grad, rtol=1e-9, atol=1e-12)


def test_by_hand():
    # One position: every live channel is the sample 1 or -1. Poly d=2: all kernels are 1, so 1 + 1 - 2 = 0.
    student, teacher = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1), torch.tensor([5.0]).view(1, 1, 1, 1)
    assert nst_loss(student, teacher) < 1e-12
    # Linear: the means are 0 and 1, so |1 - 0|^2 = 1.
    torch.testing.assert_close(nst_loss(student, teacher, kernel="linear"), torch.tensor(1.0))
    # Two orthogonal samples against one of them, d=2: 1 + (1+1)/4 - 2 (1+0)/2 = 0.5.
    student, teacher = torch.eye(2).view(1, 2, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(nst_loss(student, teacher), torch.tensor(0.5))


def test_linear_is_the_squared_distance_of_the_means():
    student, teacher = rand((2, 5, 4, 7), 0), rand((2, 3, 4, 7), 1)
    s, t = (F.normalize(x.flatten(2), dim=2).mean(1) for x in (student, teacher))
    expected = (s - t).square().sum(1).mean()
    torch.testing.assert_close(nst_loss(student, teacher, kernel="linear"), expected)
    torch.testing.assert_close(nst_loss(student, teacher, kernel="poly", degree=1), expected)


@pytest.mark.parametrize("shapes", SHAPES)
def test_poly_is_the_distance_of_the_grams_of_positions(shapes):
    student, teacher = rand(shapes[0], 0), rand(shapes[1], 1)
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    difference = s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]
    torch.testing.assert_close(nst_loss(student, teacher), difference.square().sum((1, 2)).mean())


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", KERNELS)
def test_order_and_scale_of_channels_do_not_matter(options, shapes):
    student, teacher = rand(shapes[0], 0), rand(shapes[1], 1)
    expected = nst_loss(student, teacher, **options)
    factors = torch.linspace(0.1, 10, student.shape[1], dtype=torch.float64).view(1, -1, 1, 1)
    torch.testing.assert_close(nst_loss(student.flip(1) * factors, teacher.roll(1, 1), **options), expected)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", KERNELS)
def test_equal_sets_cost_nothing_and_never_less(options, shapes):
    x = rand(shapes[0], 0).float().requires_grad_()
    shuffled = x.detach()[:, torch.randperm(x.shape[1])]
    loss = nst_loss(x, shuffled, **options)
    assert 0 <= loss < 1e-6
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.abs().max() < 1e-5


def test_gradient_is_not_clamped_with_the_value():
    # So close to the teacher that rounding decides the value in float32, the gradient is still the float64 one.
    teacher = rand((1, 6, 8, 9), 0) + 0.1
    student = (teacher + 3e-4 * rand(teacher.shape, 1)).requires_grad_()
    (expected,) = torch.autograd.grad(nst_loss(student, teacher, degree=2, offset=0.1), student)
    single = student.detach().float().requires_grad_()
    loss = nst_loss(single, teacher.float(), degree=2, offset=0.1)
    (grad,) = torch.autograd.grad(loss, single)
    assert 0 <= loss < 1e-6 and grad.any()
    cosine = F.cosine_similarity(grad.double().flatten(), expected.flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("options", KERNELS)
def test_dead_channel_is_the_zero_vector_with_zero_gradient(options, shapes):
    student, teacher = rand(shapes[0], 0) + 1e-3, rand(shapes[1], 1) + 1e-3
    student[:, 1], teacher[:, 0] = 0, 0
    student.requires_grad_()
    loss = nst_loss(student, teacher, **options)
    torch.testing.assert_close(loss, naive_nst(student, teacher, **options))
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[:, 1].any() and grad[:, 0].any()


def test_half_precision_maps_with_dead_channels():
    # The published code, run in float16, gives NaN here.
    student = rand((2, 8, 6, 5), 0).half()
    student[:, :4] = 0
    student.requires_grad_()
    for options in KERNELS:
        nst_loss(student, rand((2, 8, 6, 5), 1).half(), **options).backward()
        assert student.grad.isfinite().all() and not student.grad[:, :4].any()


def test_unknown_options():
    x = rand((1, 2, 3, 3), 0)
    with pytest.raises(ValueError, match="Unknown kernel 'gausian'.*Did you mean 'gaussian'"):
        nst_loss(x, x, kernel="gausian")
    for degree in (0, 1.5, -2):
        with pytest.raises(ValueError, match=f"positive integer, found {degree}"):
            nst_loss(x, x, degree=degree)
