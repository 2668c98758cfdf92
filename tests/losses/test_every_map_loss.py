"""What holds for every loss on feature maps, whatever its formula."""

import contextlib
import functools

import pytest
import torch

from kd_det.losses import _blocks
from kd_det.losses._spatial import full_precision
from kd_det.losses.attention_transfer import attention_transfer_loss
from kd_det.losses.feature_distillation import feature_distillation_loss
from kd_det.losses.fgd import fgd_loss
from kd_det.losses.hint import hint_loss
from kd_det.losses.mgd import mgd_loss
from kd_det.losses.nst import nst_loss
from kd_det.losses.overhaul import overhaul_loss, partial_l2_loss
from kd_det.losses.review import hierarchical_context_loss


def _overhaul(student, teacher, valid=None):
    return overhaul_loss(student, teacher, torch.linspace(-1, 0, teacher.shape[1]), valid=valid)


def _fgd(student, teacher, valid=None):
    """With one box in each image, at stride 8 of the smaller map."""
    boxes = [torch.tensor([[4.0, 0.0, 20.0, 12.0]])] * len(student)
    canvas = [8 * min(sides) for sides in zip(student.shape[-2:], teacher.shape[-2:])]
    return fgd_loss(student, teacher, boxes, canvas, valid=valid)


LOSSES = {
    "nst_linear": functools.partial(nst_loss, kernel="linear"),
    "nst_poly": nst_loss,
    "nst_cubic": functools.partial(nst_loss, degree=3, offset=0.5),
    "nst_gaussian": functools.partial(nst_loss, kernel="gaussian"),
    "at_sum": functools.partial(attention_transfer_loss, mapping="sum"),
    "at_sum_pow": attention_transfer_loss,
    "at_cubic": functools.partial(attention_transfer_loss, p=3),
    "at_max_pow": functools.partial(attention_transfer_loss, mapping="max_pow"),
    "at_element": functools.partial(attention_transfer_loss, reduction="element"),
    "hint": hint_loss,
    "partial_l2": partial_l2_loss,
    "overhaul": _overhaul,
    "fd": feature_distillation_loss,
    "fgd": _fgd,
    "mgd": lambda s, t, valid=None: mgd_loss(s, t, torch.nn.Identity(), mask_ratio=0.0, valid=valid),
    "review": lambda s, t, valid=None: hierarchical_context_loss([s], [t], valid=[valid]),
}
SCALE_FREE = [name for name in LOSSES if name.startswith(("nst", "at"))]


@pytest.fixture(params=LOSSES)
def loss_fn(request):
    return LOSSES[request.param]


def randn(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def value_and_grad(loss_fn, student, teacher, **kwargs):
    student = student.clone().requires_grad_()
    loss = loss_fn(student, teacher, **kwargs)
    loss.backward()
    return loss.detach(), student.grad


# The gaussian kernel's sigma moves with the student but has no gradient: test_nst.py has its own test.
DIFFERENTIABLE = [name for name in LOSSES if name != "nst_gaussian"]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("size", [(7, 11), (2, 3)])  # more positions than channels, and fewer
def test_gradcheck(name, size):
    student, teacher = randn(2, 8, *size, dtype=torch.float64), randn(2, 8, *size, seed=1, dtype=torch.float64)
    valid = torch.ones(2, 1, *size, dtype=torch.bool)
    valid[0, :, -1] = False
    for mask in (None, valid):
        assert torch.autograd.gradcheck(
            lambda s, mask=mask: LOSSES[name](s, teacher, valid=mask), student.requires_grad_(), fast_mode=True
        )


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_padding_never_counts(loss_fn, garbage):
    # Two images of different size in one padded batch cost the mean of the two alone, and padding gets no gradient.
    sizes = [(6, 9), (4, 5)]
    alone = [(randn(1, 8, *size, seed=1), randn(1, 8, *size, seed=2)) for size in sizes]
    student, teacher = torch.full((2, 8, 6, 9), garbage), torch.full((2, 8, 6, 9), -garbage)
    valid = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        student[i, :, :h, :w], teacher[i, :, :h, :w] = alone[i]
        valid[i, :, :h, :w] = True

    loss, grad = value_and_grad(loss_fn, student, teacher, valid=valid)
    expected = [value_and_grad(loss_fn, s, t) for s, t in alone]
    torch.testing.assert_close(loss, (expected[0][0] + expected[1][0]) / 2)
    for i, (h, w) in enumerate(sizes):
        torch.testing.assert_close(grad[i, :, :h, :w], expected[i][1][0] / 2)
    assert not grad.masked_fill(valid, 0).any()


@pytest.mark.parametrize("mask_at", ["student", "teacher"])
def test_padding_never_counts_where_sizes_differ(loss_fn, mask_at):
    # The student's maps have twice the teacher's height and width, as res3 has of res4.
    alone = [(randn(1, 8, 2 * h, 2 * w, seed=1), randn(1, 8, h, w, seed=2)) for h, w in [(4, 6), (3, 2)]]
    student, teacher = torch.full((2, 8, 8, 12), 1e6), torch.full((2, 8, 4, 6), -1e6)
    valid = {"student": torch.zeros(2, 1, 8, 12).bool(), "teacher": torch.zeros(2, 1, 4, 6).bool()}
    for i, (s, t) in enumerate(alone):
        (hs, ws), (ht, wt) = s.shape[2:], t.shape[2:]
        student[i, :, :hs, :ws], teacher[i, :, :ht, :wt] = s[0], t[0]
        valid["student"][i, :, :hs, :ws] = valid["teacher"][i, :, :ht, :wt] = True
    loss = loss_fn(student, teacher, valid=valid[mask_at])
    torch.testing.assert_close(loss, sum(loss_fn(s, t) for s, t in alone) / 2)


def test_all_valid_is_no_mask_and_no_valid_position_costs_nothing(loss_fn):
    student, teacher = randn(2, 8, 5, 7), randn(2, 8, 5, 7, seed=1)
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    for found, expected in zip(
        value_and_grad(loss_fn, student, teacher, valid=valid), value_and_grad(loss_fn, student, teacher)
    ):
        torch.testing.assert_close(found, expected)
    loss, grad = value_and_grad(loss_fn, student, teacher, valid=~valid)
    assert loss.isfinite() and not grad.any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "overhaul"])  # its margin comes before pooling
def test_larger_map_is_pooled_to_the_smaller_per_axis(name):
    loss_fn = LOSSES[name]
    student, teacher = randn(2, 4, 6, 5, dtype=torch.float64), randn(2, 4, 3, 10, seed=1, dtype=torch.float64)
    pooled_student = student.reshape(2, 4, 3, 2, 5).mean(3)
    pooled_teacher = teacher.reshape(2, 4, 3, 5, 2).mean(4)
    torch.testing.assert_close(loss_fn(student, teacher), loss_fn(pooled_student, pooled_teacher))
    _, grad = value_and_grad(loss_fn, student, teacher)
    _, pooled_grad = value_and_grad(loss_fn, pooled_student, pooled_teacher)
    torch.testing.assert_close(grad, pooled_grad.repeat_interleave(2, dim=2) / 2)


def test_empty_batch(loss_fn):
    loss, grad = value_and_grad(loss_fn, torch.zeros(0, 8, 5, 7), torch.zeros(0, 8, 3, 7))
    assert loss == 0 and loss.shape == () and grad.shape == (0, 8, 5, 7)


@pytest.mark.parametrize("scale", [1e-20, 1e4])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 8, 5, 7), (2, 1, 5, 7), (1, 40, 3, 5)])
def test_extreme_inputs_are_finite(loss_fn, scale, shape):
    for student, teacher in [
        (randn(*shape) * scale, randn(*shape, seed=1) * scale),
        (torch.full(shape, scale), torch.full(shape, scale)),
        (torch.full(shape, scale), -torch.full(shape, scale)),
        (torch.zeros(shape), randn(*shape) * scale),
        (randn(*shape) * scale, torch.zeros(shape)),
    ]:
        loss, grad = value_and_grad(loss_fn, student, teacher)
        assert loss.isfinite() and loss >= 0 and grad.isfinite().all()


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("size", [(5, 7), (2, 2)])
def test_scale_of_either_side_does_not_matter(name, size):
    student, teacher = randn(2, 8, *size), randn(2, 8, *size, seed=1)
    loss, grad = value_and_grad(LOSSES[name], student, teacher)
    for a, b in [(1e-20, 1e4), (1e12, 1e-20), (1e4, 1e15)]:
        scaled_loss, scaled_grad = value_and_grad(LOSSES[name], student * a, teacher * b)
        torch.testing.assert_close(scaled_loss, loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scaled_grad * a, grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_under_autocast_and_for_half_inputs(loss_fn, dtype):
    student, teacher = randn(2, 8, 5, 7).to(dtype), randn(2, 8, 5, 7, seed=1).to(dtype)
    expected, expected_grad = value_and_grad(loss_fn, student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad = value_and_grad(loss_fn, student, teacher)  # its backward runs under autocast as well
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad.to(dtype))


def test_teacher_is_detached_and_the_student_need_not_require_grad(loss_fn):
    student, teacher = randn(1, 8, 5, 7), randn(1, 8, 5, 7, seed=1).requires_grad_()
    assert not loss_fn(student, teacher).requires_grad
    loss_fn(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None and student.grad.any()


def test_backward_twice_gives_the_same_and_scales_with_the_weight(loss_fn):
    student, teacher = randn(2, 8, 5, 7).requires_grad_(), randn(2, 8, 5, 7, seed=1)
    loss = loss_fn(student, teacher)
    first, second, third = (torch.autograd.grad(weight * loss, student, retain_graph=True)[0] for weight in (1, 1, 3))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(3 * first, third)


def test_channels_last_costs_the_same(loss_fn):
    student, teacher = randn(2, 8, 5, 7), randn(2, 8, 5, 7, seed=1)
    expected = value_and_grad(loss_fn, student, teacher)
    layout = {"memory_format": torch.channels_last}
    for found, value in zip(value_and_grad(loss_fn, student.to(**layout), teacher.to(**layout)), expected):
        torch.testing.assert_close(found, value)


@pytest.mark.parametrize("elements", [1, 150])
def test_blocks_of_any_size_give_the_same(loss_fn, elements, monkeypatch):
    student, teacher = randn(3, 8, 5, 7), randn(3, 8, 5, 7, seed=1)
    valid = randn(3, 1, 5, 7, seed=2) > 0
    expected = value_and_grad(loss_fn, student, teacher, valid=valid)
    monkeypatch.setattr(_blocks, "_BLOCK_ELEMENTS", elements)
    for found, value in zip(value_and_grad(loss_fn, student, teacher, valid=valid), expected):
        torch.testing.assert_close(found, value)


def test_what_does_not_fit_is_an_error_that_says_so(loss_fn):
    x = randn(2, 8, 5, 7)
    with pytest.raises(ValueError, match="same images, found batches of 2 and 1"):
        loss_fn(x, x[:1])
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), found shape \(2, 8, 5\)"):
        loss_fn(x[..., 0], x)
    with pytest.raises(ValueError, match="floating-point tensor, found torch.int64"):
        loss_fn(x.long(), x)
    with pytest.raises(ValueError, match=r"bool mask of shape \(2, 1, 5, 7\), found torch.bool \(2, 5, 7\)"):
        loss_fn(x, x, valid=torch.ones(2, 5, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool mask of shape .* found torch.float32"):
        loss_fn(x, x, valid=torch.ones(2, 1, 5, 7))


@pytest.mark.parametrize("name", ["hint", "partial_l2", "overhaul", "fgd", "mgd", "review"])
def test_channels_that_differ_need_a_connector(name):
    with pytest.raises(ValueError, match="found 4 and 8; put a connector on the student"):
        LOSSES[name](randn(2, 4, 5, 7), randn(2, 8, 5, 7))


@pytest.mark.parametrize("name", [name for name in SCALE_FREE if name in DIFFERENTIABLE])
def test_channels_may_differ(name):
    student, teacher = randn(2, 5, 4, 6, dtype=torch.float64), randn(2, 9, 4, 6, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student.requires_grad_(), fast_mode=True)


# Plain autograd has a second derivative.
HAND_WRITTEN = [n for n in LOSSES if n not in ("fd", "nst_linear", "at_sum", "at_cubic", "at_max_pow")]


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_second_derivative_is_refused(name):
    loss_fn = LOSSES[name]
    student, teacher = randn(1, 8, 5, 7).requires_grad_(), randn(1, 8, 5, 7, seed=1)
    weight = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(weight * loss_fn(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("nest", [lambda x: x, lambda x: [x], lambda x: ((x,), 1)], ids=["tensor", "list", "tuples"])
def test_autocast_is_off_on_the_device_of_the_tensors(monkeypatch, nest):
    devices = []
    monkeypatch.setattr(torch, "autocast", lambda device, **_: devices.append(device) or contextlib.nullcontext())
    full_precision(lambda *args: None)("name", nest(torch.empty(1, device="meta")))
    assert devices == ["meta"]
