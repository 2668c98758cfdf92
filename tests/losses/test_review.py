import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

from kd_det.features.context import StepContext
from kd_det.losses.review import ReviewKDLoss, hierarchical_context_loss
from tests.tiny import batch, distillation_cfg


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(student, teacher):
    total, weights = F.mse_loss(student, teacher), 1.0
    for size, weight in ((4, 1 / 2), (2, 1 / 4), (1, 1 / 8)):
        if size < student.shape[2] and size < student.shape[3]:
            pooled = [F.adaptive_avg_pool2d(x, (size, size)) for x in (student, teacher)]
            total, weights = total + weight * F.mse_loss(*pooled), weights + weight
    return total / weights


def test_value_and_gradient_are_the_definition():
    sizes = [(9, 13), (5, 7), (3, 4), (1, 6)]
    student = [randn(2, 3, *size, seed=i).requires_grad_() for i, size in enumerate(sizes)]
    teacher = [randn(2, 3, *size, seed=10 + i) for i, size in enumerate(sizes)]
    found = hierarchical_context_loss(student, teacher)
    expected = sum(naive(s, t) for s, t in zip(student, teacher))
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student)):
        torch.testing.assert_close(a, b)
    assert hierarchical_context_loss(teacher, teacher) == 0


def test_by_hand():
    # 2 x 2 with the errors 2, 0, 0, 0: mean square 1; of the mean (0.5), 0.25 with weight 1/8.
    student = torch.zeros(1, 1, 2, 2)
    student[..., 0, 0] = 2
    loss = hierarchical_context_loss([student], [torch.zeros(1, 1, 2, 2)])
    assert loss == pytest.approx((1 + 0.25 / 8) / (1 + 1 / 8))


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_padding_never_counts(garbage):
    sizes = [(9, 13), (5, 7)]
    alone = [[randn(1, 3, *size, seed=i) for i in range(2)] for size in sizes]
    student, teacher = (torch.full((2, 3, 9, 13), garbage).double() for _ in range(2))
    valid = torch.zeros(2, 1, 9, 13, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        student[i, :, :h, :w], teacher[i, :, :h, :w] = alone[i][0][0], alone[i][1][0]
        valid[i, :, :h, :w] = True
    loss = hierarchical_context_loss([student], [teacher], valid=[valid])
    torch.testing.assert_close(loss, sum(naive(*pair) for pair in alone) / 2)


def test_unequal_sizes_and_empty_batches():
    student, teacher = randn(2, 3, 8, 6).requires_grad_(), randn(2, 3, 4, 12, seed=1)
    pooled = [F.adaptive_avg_pool2d(x, (4, 6)) for x in (student, teacher)]
    torch.testing.assert_close(hierarchical_context_loss([student], [teacher]), naive(*pooled))
    empty = torch.zeros(0, 3, 8, 6, requires_grad=True)
    loss = hierarchical_context_loss([empty], [torch.zeros(0, 3, 8, 6)])
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


def test_numbers_of_levels_must_agree():
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="found 2 of the student, 1 of the teacher and 2 masks"):
        hierarchical_context_loss([x, x], [x])
    with pytest.raises(ValueError, match="found 0 of the student"):
        hierarchical_context_loss([], [])


def test_a_level_is_fused_with_the_deeper_ones():
    loss = ReviewKDLoss(
        student_taps=["p3", "p4"], student_channels=[2, 2], teacher_channels=[3, 4], mid_channels=5, connector_norm=""
    )
    maps = [torch.randn(2, 2, 6, 8), torch.randn(2, 2, 3, 4)]
    shallow, deep = loss.fusions
    level4, fused = deep(maps[1], None)
    assert level4.shape == (2, 4, 3, 4) and torch.equal(level4, deep.expand(deep.reduce(maps[1])))
    level3, _ = shallow(maps[0], fused)
    own, up = shallow.reduce(maps[0]), fused.repeat_interleave(2, 2).repeat_interleave(2, 3)
    gates = shallow.attention(torch.cat([own, up], 1)).sigmoid()
    torch.testing.assert_close(level3, shallow.expand(own * gates[:, :1] + up * gates[:, 1:]))
    teacher = [torch.randn(2, 3, 6, 8), torch.randn(2, 4, 3, 4)]
    total = loss(maps, teacher, StepContext([(48, 64)] * 2, (48, 64)))
    torch.testing.assert_close(total, hierarchical_context_loss([level3, level4], teacher))


def test_in_a_detector_every_parameter_is_trained(tmp_path):
    model = build_model(distillation_cfg(tmp_path, "ReviewKD", KD__REVIEW_KD__MID_CHANNELS=8)).train()
    assert len(model.losses["review_kd"].fusions) == 5  # D43: the published weight is for p2 to p6
    model(batch())["loss_review_kd"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.losses["review_kd"].parameters())
    with pytest.raises(ValueError, match="mid_channels must be at least 1, found 0"):
        ReviewKDLoss(student_taps=["p3"], student_channels=[2], teacher_channels=[2], mid_channels=0)
