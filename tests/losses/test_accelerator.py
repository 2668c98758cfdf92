"""Loss functions on a pretend accelerator: devices do not mix, the host never waits, kernels are few."""

import functools

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from kd_det import losses
from tests.pretend_accelerator import Accelerator, DeviceTensor, on_device

N, C, H, W = 2, 6, 8, 12


def maps(channels=C, seed=0, size=(H, W), images=N):
    return torch.randn(images, channels, *size, generator=torch.Generator().manual_seed(seed))


def with_margin(student, teacher, **kwargs):
    margin = torch.full((teacher.shape[1],), -0.5, device=teacher.device)
    return losses.overhaul_loss(student, teacher, margin, **kwargs)


# Each with the most kernels of its forward and backward.
ON_MAPS = {
    "nst_linear": (functools.partial(losses.nst_loss, kernel="linear"), 60),
    "nst_poly": (losses.nst_loss, 45),
    "nst_cubic": (functools.partial(losses.nst_loss, degree=3, offset=0.5), 45),
    "nst_gaussian": (functools.partial(losses.nst_loss, kernel="gaussian"), 60),
    "at_sum": (functools.partial(losses.attention_transfer_loss, mapping="sum"), 50),
    "at_sum_pow": (losses.attention_transfer_loss, 45),
    "at_max_pow": (functools.partial(losses.attention_transfer_loss, mapping="max_pow"), 60),
    "at_element": (functools.partial(losses.attention_transfer_loss, reduction="element"), 50),
    "hint": (losses.hint_loss, 20),
    "fd": (losses.feature_distillation_loss, 20),
    "partial_l2": (losses.partial_l2_loss, 25),
    "overhaul": (with_margin, 25),
    "overhaul_sum": (functools.partial(with_margin, reduction="sum"), 25),
}


def run(function, student, *others, **kwargs):
    """The value and the student's gradient on the device, and what it took."""
    with Accelerator() as accelerator:
        student = on_device(student.clone().requires_grad_())
        others = [on_device(x) for x in others]
        kwargs = {key: on_device(value) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        accelerator.reset()
        loss = function(student, *others, **kwargs)
        loss.backward()
    assert isinstance(loss, DeviceTensor)
    return loss.cpu_values.detach(), student.grad.cpu_values, accelerator


def check(function, most_kernels, student, *others, **kwargs):
    value, grad, accelerator = run(function, student, *others, **kwargs)
    assert not accelerator.waits
    assert accelerator.kernels <= most_kernels, accelerator.kernels
    leaf = student.clone().requires_grad_()
    expected = function(leaf, *others, **kwargs)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ON_MAPS)
def test_losses_on_maps(name, masked):
    function, most_kernels = ON_MAPS[name]
    valid = torch.ones(N, 1, H, W, dtype=torch.bool)
    valid[1, :, 6:] = valid[1, :, :, 8:] = False
    check(function, most_kernels, maps(), maps(seed=1), valid=valid if masked else None)


@pytest.mark.parametrize("name", ON_MAPS)
def test_more_images_or_other_sizes_take_no_more_kernels(name):
    function, most_kernels = ON_MAPS[name]
    check(function, most_kernels, maps(images=5, size=(20, 24)), maps(seed=1, images=5, size=(20, 24)))
    check(function, most_kernels + 5, maps(size=(16, 12)), maps(seed=1))  # one side is pooled


@pytest.mark.parametrize("name", ON_MAPS)
def test_an_empty_batch(name):
    value, grad, accelerator = run(ON_MAPS[name][0], maps(images=0), maps(images=0))
    assert value == 0 and grad.shape == (0, C, H, W) and not accelerator.waits


@pytest.mark.parametrize("name", [name for name in ON_MAPS if name.startswith(("nst", "at"))])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_extreme_values_and_dead_channels_need_no_look(name, scale):
    student = maps() * scale
    student[0, 1] = 0
    value, grad, accelerator = run(ON_MAPS[name][0], student, maps(seed=1))
    assert value.isfinite() and grad.isfinite().all() and not grad[0, 1].any()
    assert not accelerator.waits


def test_positions_where_they_are_cheaper():
    check(losses.nst_loss, 60, maps(40, size=(2, 3)), maps(24, seed=1, size=(2, 3)))


@pytest.mark.parametrize("shapes", [((32, 4, 3, 3), (32, 6, 3, 3)), ((5, 7), (5, 3))])
def test_similarity(shapes):
    student, teacher = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes)
    student[1] = 0
    check(losses.similarity_preserving_loss, 65, student, teacher)
    value, _, _ = run(losses.similarity_preserving_loss, student[:0], teacher[:0])
    assert value == 0


@pytest.mark.parametrize("shape", [(32, 5), (2, 5, 4, 6)])
def test_soft_targets(shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    check(losses.soft_target_loss, 20, student, teacher)
    value, _, _ = run(losses.soft_target_loss, student[:0], teacher[:0])
    assert value == 0


@pytest.mark.parametrize(
    "name, most_kernels, options",
    [
        ("dense_class_loss", 35, {}),
        ("dense_box_loss", 25, {}),
        ("dense_box_loss", 230, {"kind": "giou", "transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0))}),
    ],
)
def test_dense_heads(name, most_kernels, options):
    student, teacher, weights = torch.randn(6, 4, 20), torch.randn(6, 4, 20), torch.rand(6, 1, 20)
    check(functools.partial(getattr(losses, name), **options), most_kernels, student, teacher, weights)


def test_crossed_heads():
    valid = torch.arange(W).expand(N, 1, H, W) < 9
    check(lambda s, t, **kw: losses.align_scale(s, t, **kw).square().sum(), 60, maps(), maps(seed=1), valid=valid)
    valid = valid.flatten(2)
    check(losses.quality_focal_loss, 35, maps().flatten(2), maps(seed=1).flatten(2), valid=valid)
    with Accelerator() as accelerator:
        found = losses.confidence_weights(on_device(maps().flatten(2)), valid=on_device(valid))
    assert torch.equal(found.cpu_values, losses.confidence_weights(maps().flatten(2), valid=valid))
    assert not accelerator.waits


def test_gradient_attention():
    check(losses.gradient_attention_loss, 10, maps(), maps(seed=1))


def test_attention_map():
    with Accelerator() as accelerator:
        found = losses.attention_map(on_device(maps()))
    assert torch.equal(found.cpu_values, losses.attention_map(maps())) and not accelerator.waits
