"""Each loss function gives the CPU's value and gradient on a GPU."""

import functools

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear

from kd_det.losses import (
    attention_transfer_loss,
    bounded_regression_loss,
    cwd_loss,
    dense_box_loss,
    dense_class_loss,
    dist_loss,
    dkd_loss,
    feature_distillation_loss,
    fgd_loss,
    fsp_loss,
    fsp_matrix,
    hierarchical_context_loss,
    hint_loss,
    mgd_loss,
    nst_loss,
    overhaul_loss,
    partial_l2_loss,
    pkd_loss,
    quality_focal_loss,
    similarity_preserving_loss,
    soft_target_loss,
)

pytestmark = pytest.mark.cuda


def _overhaul(s, t, valid=None):
    return overhaul_loss(s, t, torch.linspace(-1, 0, t.shape[1], device=t.device), valid=valid)


def _fgd(s, t, valid=None):
    boxes = torch.tensor([[4.0, 0.0, 20.0, 12.0], [30.0, 20.0, 90.0, 60.0]], device=s.device)
    canvas = (8 * s.shape[2], 8 * s.shape[3])
    return fgd_loss(s, t, [boxes, boxes[:0]], canvas, valid=valid)


ON_MAPS = {
    "nst": nst_loss,
    "nst_linear": functools.partial(nst_loss, kernel="linear"),
    "nst_cubic": functools.partial(nst_loss, degree=3, offset=0.5),
    "nst_gaussian": functools.partial(nst_loss, kernel="gaussian"),
    "at": attention_transfer_loss,
    "at_sum": functools.partial(attention_transfer_loss, mapping="sum"),
    "at_max": functools.partial(attention_transfer_loss, mapping="max_pow"),
    "overhaul": _overhaul,
    "partial_l2": partial_l2_loss,
    "hint": hint_loss,
    "fd": feature_distillation_loss,
    "pkd": pkd_loss,
    "cwd": cwd_loss,
    "fgd": _fgd,
    "mgd": lambda s, t, valid=None: mgd_loss(s, t, torch.nn.Identity(), mask_ratio=0.0, valid=valid),
    "review": lambda s, t, valid=None: hierarchical_context_loss([s], [t], valid=[valid]),
}


def _labelled(s, t):
    return dkd_loss(s, t, torch.arange(len(s), device=s.device) % s.shape[1], beta=2.0)


ON_ROWS = {
    "soft_target": soft_target_loss,
    "dkd": _labelled,
    "dist": dist_loss,
    "similarity": similarity_preserving_loss,
    "bounded_regression": lambda s, t: bounded_regression_loss(s[:, :4], t[:, :4], torch.ones_like(t[:, :4])),
    "dense_class": lambda s, t: dense_class_loss(s.view(4, 7, 40), t.view(4, 7, 40), t[:, None, :40].sigmoid()),
    "dense_box": lambda s, t: dense_box_loss(
        s.view(4, 4, 70), t.view(4, 4, 70), t[:, None, :70].sigmoid(), kind="giou", transform=Box2BoxTransformLinear()
    ),
    "quality_focal": quality_focal_loss,
    "fsp": lambda s, t: fsp_loss(*(fsp_matrix(x.view(4, 8, 5, 7)[:, :4], x.view(4, 8, 5, 7)[:, 4:]) for x in (s, t))),
}


def value_and_gradient(loss, student, teacher, device, **kwargs):
    student = student.detach().to(device).requires_grad_()
    kwargs = {key: value.to(device) for key, value in kwargs.items()}
    value = loss(student, teacher.to(device), **kwargs)
    assert value.device.type == device and value.dtype == torch.float32
    value.backward()
    return value.detach().cpu(), student.grad.cpu()


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
    size = float(expected[1].abs().max())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("size", [(5, 7), (48, 80)])
@pytest.mark.parametrize("name", ON_MAPS)
def test_on_maps(device, name, size):
    student, teacher = torch.randn(2, 16, *size), torch.randn(2, 16, *size)
    valid = torch.ones(2, 1, *size, dtype=torch.bool)
    valid[1, :, 3:], valid[1, :, :, 4:] = False, False
    for kwargs in ({}, {"valid": valid}):
        expected = value_and_gradient(ON_MAPS[name], student, teacher, "cpu", **kwargs)
        assert_same(value_and_gradient(ON_MAPS[name], student, teacher, device, **kwargs), expected)
        channels_last = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
        assert_same(value_and_gradient(ON_MAPS[name], *channels_last, device, **kwargs), expected)


@pytest.mark.parametrize("name", ON_ROWS)
def test_on_rows(device, name):
    student, teacher = torch.randn(4, 280), torch.randn(4, 280)
    expected = value_and_gradient(ON_ROWS[name], student, teacher, "cpu")
    assert_same(value_and_gradient(ON_ROWS[name], student, teacher, device), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ON_MAPS)
def test_half_maps_under_autocast_are_computed_in_float32(device, name, dtype):
    student, teacher = torch.randn(2, 16, 24, 40).to(dtype), torch.randn(2, 16, 24, 40).to(dtype)
    expected = value_and_gradient(ON_MAPS[name], student.float(), teacher.float(), "cpu")
    size = float(expected[1].abs().max())
    scale = 1 / size  # as a gradient scaler: gradients of float16 maps are float16
    with torch.autocast(device, dtype=dtype if device == "cuda" else torch.bfloat16):
        scaled = lambda *maps: scale * ON_MAPS[name](*maps)  # noqa: E731
        value, gradient = value_and_gradient(scaled, student, teacher, device)
    torch.testing.assert_close(value / scale, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient.float() / scale, expected[1], rtol=0.01, atol=0.01 * size)


@pytest.mark.parametrize("name", ON_MAPS)
def test_an_empty_batch_costs_nothing(device, name):
    if name == "fgd":
        pytest.skip("its boxes are two images'")
    value, _ = value_and_gradient(ON_MAPS[name], torch.zeros(0, 16, 5, 7), torch.zeros(0, 16, 5, 7), device)
    assert value == 0
