import pytest
import torch
from detectron2.modeling import build_model

from kd_det.features.context import StepContext
from kd_det.losses import FSPLoss, fsp_loss, fsp_matrix
from tests.tiny import batch, distillation_cfg


def naive(first, second):
    n, ci, h, w = first.shape
    out = torch.zeros(n, ci, second.shape[1], dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            out += first[:, :, None, y, x].double() * second[:, None, :, y, x].double() / (h * w)
    return out


def test_the_matrix_is_the_mean_product_of_channels():
    # Two positions: (1, 2) . (10, 30) / 2 = 35; the second channel is the first's negative.
    first = torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).view(1, 2, 1, 2)
    second = torch.tensor([10.0, 30.0]).view(1, 1, 1, 2)
    assert fsp_matrix(first, second).tolist() == [[[35], [-35]]]
    first, second = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    assert torch.allclose(fsp_matrix(first, second).double(), naive(first, second), atol=1e-6)


def test_the_larger_map_is_pooled():
    first, second = torch.randn(2, 3, 8, 12), torch.randn(2, 6, 4, 6)
    pooled = first.view(2, 3, 4, 2, 6, 2).mean((3, 5))
    assert torch.allclose(fsp_matrix(first, second).double(), naive(pooled, second), atol=1e-6)
    assert torch.allclose(fsp_matrix(second, first).double(), naive(second, pooled), atol=1e-6)


def test_padding_does_not_count():
    first, second = torch.randn(1, 3, 8, 12), torch.randn(1, 5, 4, 6)
    valid = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    valid[..., :6, :8] = True
    expected = fsp_matrix(first[..., :6, :8], second[..., :3, :4])
    assert torch.allclose(fsp_matrix(first, second, valid=valid), expected, atol=1e-5)
    garbage = torch.where(valid, first, torch.full_like(first, 1e4))
    assert torch.allclose(fsp_matrix(garbage, second, valid=valid), expected, atol=1e-5)


def test_the_loss_is_the_squared_distance_per_image():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = sum((s.double() - t.double()).norm() ** 2 for s, t in zip(student, teacher)) / 3
    assert fsp_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert fsp_loss(student, student).item() == 0


def test_gradients():
    maps = [torch.randn(2, c, h, w, dtype=torch.float64, requires_grad=True) for c, h, w in ((2, 4, 6), (3, 2, 3))]
    teacher = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: fsp_loss(fsp_matrix(a, b), teacher), maps)
    fsp_loss(fsp_matrix(*maps), teacher).backward()
    assert teacher.grad is None


def test_an_empty_batch_costs_nothing():
    maps = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = fsp_loss(fsp_matrix(maps, maps), torch.zeros(0, 3, 3))
    loss.backward()
    assert loss.item() == 0 and maps.grad.shape == maps.shape


def test_half_precision_maps_are_summed_in_float32():
    first = torch.full((1, 1, 64, 64), 100.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fsp_matrix(first, first).item() == 10000


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: fsp_matrix(torch.zeros(2, 3), torch.zeros(2, 3)),
            "floating-point .N, C, H, W., found torch.float32 of",
        ),
        (lambda: fsp_matrix(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)), "batches of 2 and 1"),
        (lambda: fsp_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), "one shape .N, Ci, Cj., found .2, 3, 4. and"),
        (lambda: FSPLoss(student_taps=("a",), student_channels=[1], teacher_channels=[1]), "two by two.*found 1: a"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_module_sums_flows_and_connects_only_other_widths():
    taps = ("res2", "res3", "res3", "res4")
    loss = FSPLoss(student_taps=taps, student_channels=[2, 4, 4, 6], teacher_channels=[2, 8, 8, 6])
    assert [isinstance(c, torch.nn.Identity) for c in loss.connectors] == [True, False, False, True]
    student = [torch.randn(2, c, 8 // s, 8 // s) for c, s in ((2, 1), (4, 2), (4, 2), (6, 4))]
    teacher = [torch.randn(2, c, 8 // s, 8 // s) for c, s in ((2, 1), (8, 2), (8, 2), (6, 4))]
    connected = [c(s) for c, s in zip(loss.connectors, student)]
    expected = sum(
        fsp_loss(fsp_matrix(connected[i], connected[i + 1]), fsp_matrix(teacher[i], teacher[i + 1])) for i in (0, 2)
    )
    assert loss(student, teacher, StepContext([(8, 8)] * 2, (8, 8))).item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_runs_in_a_detector(tmp_path):
    model = build_model(distillation_cfg(tmp_path, "FSPLoss")).train()
    loss = model(batch())["loss_fsp"]
    loss.backward()
    assert loss.item() > 0 and model.student.backbone.bottom_up.res2[0].conv1.weight.grad.any()
