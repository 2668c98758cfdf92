import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from kd_det.features.context import StepContext
from kd_det.losses.fgd import FGDLoss, fgd_loss
from kd_det.losses.mgd import MGDLoss, mgd_loss
from tests.tiny import batch, distillation_cfg

CANVAS = (48, 80)
BOXES = [torch.tensor([[9.0, 9.0, 30.0, 25.0], [20.0, 8.0, 70.0, 40.0]]), torch.zeros(0, 4)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_fgd(student, teacher, boxes, *, temperature=0.5, alpha=5e-5, beta=2.5e-5, gamma=5e-5):
    """Position by position, at stride 8."""
    n, c, h, w = student.shape
    total = 0.0
    for s, t, image_boxes in zip(student, teacher, boxes):
        spatial = [h * w * F.softmax(x.abs().mean(0).flatten() / temperature, 0).view(h, w) for x in (s, t)]
        channel = [c * F.softmax(x.abs().mean((1, 2)) / temperature, 0) for x in (s, t)]
        scale = torch.zeros(h, w, dtype=torch.float64)
        for y in range(h):
            for x in range(w):
                for x1, y1, x2, y2 in (image_boxes / 8).tolist():
                    x1, y1, x2, y2 = int(x1), int(y1), -int(-x2 // 1), -int(-y2 // 1)
                    if x1 <= x <= x2 and y1 <= y <= y2:
                        scale[y, x] = max(scale[y, x], 1 / ((x2 - x1 + 1) * (y2 - y1 + 1)))
        outside = (scale == 0).sum()
        for y in range(h):
            for x in range(w):
                weight = alpha * scale[y, x] if scale[y, x] > 0 else beta / outside
                total += weight * spatial[1][y, x] * (channel[1] * (s[:, y, x] - t[:, y, x]) ** 2).sum()
        total += gamma * ((spatial[0] - spatial[1]).abs().sum() + (channel[0] - channel[1]).abs().sum())
    return total / n


def test_fgd_is_its_definition():
    student, teacher = randn(2, 4, 6, 10).requires_grad_(), 2 * randn(2, 4, 6, 10, seed=1)
    found, expected = fgd_loss(student, teacher, BOXES, CANVAS), naive_fgd(student, teacher, BOXES)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert fgd_loss(teacher, teacher, BOXES, CANVAS) == 0


def test_each_part_of_fgd_by_hand():
    # Two equal channels of ones and zeros: all attentions are 1. The box covers 2 x 2 of 3 x 4 positions.
    teacher, student = torch.ones(1, 2, 3, 4), torch.full((1, 2, 3, 4), -1.0)
    boxes, off = [torch.tensor([[0.0, 0.0, 7.9, 7.9]])], {"alpha": 0, "beta": 0, "gamma": 0}
    # squared errors of 4, two channels: the mean over the 4 positions inside, and over the 8 outside
    assert fgd_loss(student, teacher, boxes, (24, 32), **{**off, "alpha": 1}) == pytest.approx(8)
    assert fgd_loss(student, teacher, boxes, (24, 32), **{**off, "beta": 1}) == pytest.approx(8)
    assert fgd_loss(student, teacher, boxes, (24, 32), **{**off, "gamma": 1}) == 0
    student[:, :, :2, :2] = 1  # right inside the box
    assert fgd_loss(student, teacher, boxes, (24, 32), **{**off, "alpha": 1}) == 0
    assert fgd_loss(student, teacher, boxes, (24, 32), **{**off, "beta": 1}) == pytest.approx(8)


def test_fgd_of_a_padded_batch_is_the_mean_of_its_images():
    sizes = [(6, 10), (4, 5)]
    boxes = [BOXES[0], torch.tensor([[3.0, 5.0, 37.0, 32.0]])]
    alone = [[randn(1, 4, *size, seed=i) for i in range(2)] for size in sizes]
    student, teacher = torch.full((2, 4, 6, 10), 1e6).double(), torch.full((2, 4, 6, 10), float("nan")).double()
    valid = torch.zeros(2, 1, 6, 10, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        student[i, :, :h, :w], teacher[i, :, :h, :w] = alone[i][0][0], alone[i][1][0]
        valid[i, :, :h, :w] = True
    student.requires_grad_()
    loss = fgd_loss(student, teacher, boxes, CANVAS, valid=valid)
    expected = [fgd_loss(s, t, [b], (8 * h, 8 * w)) for (s, t), b, (h, w) in zip(alone, boxes, sizes)]
    torch.testing.assert_close(loss, sum(expected) / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient.masked_select(~valid).any() and gradient.masked_select(valid).all()


@pytest.mark.parametrize("channels", [(4, 4, 4), (4, 6, 4)])  # of an FPN, and of a backbone
def test_fgd_of_levels_is_the_sum_of_each_with_its_global_relation(channels):
    taps = [f"p{i}" for i in range(3)]
    loss = FGDLoss(student_channels=channels, teacher_channels=channels, student_taps=taps, relation=0.1, alpha=1.0)
    loss = loss.double()
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    # The second image ends within the first two levels and fills the last.
    image_sizes, levels = [CANVAS, (25, 41)], list(zip(channels, [(12, 20), (6, 10), (2, 2)]))
    student, teacher = ([randn(2, c, *size, seed=seed) for c, size in levels] for seed in range(2))
    inputs = [{"instances": Instances(s, gt_boxes=Boxes(b))} for s, b in zip(image_sizes, BOXES)]
    context = StepContext(image_sizes, CANVAS, batched_inputs=inputs)
    variables = [*(x.requires_grad_() for x in student), *loss.parameters()]
    expected = 0.0
    for s, t, *blocks in zip(student, teacher, loss.student_contexts, loss.teacher_contexts):
        valid = context.valid(s)
        expected = expected + fgd_loss(s, t, BOXES, CANVAS, valid=valid, **loss.options)
        for i in range(2):
            inside = slice(None) if valid is None else valid[i, 0].flatten()
            maps = [x[i].flatten(1)[:, inside] for x in (s, t)]
            added = [b.transform((x * b.attention(x.T)[:, 0].softmax(0)).sum(1)) for b, x in zip(blocks, maps)]
            expected = expected + 0.1 / 2 * (maps[0] - maps[1] + (added[0] - added[1])[:, None]).square().sum()
    found = loss(student, teacher, context)
    torch.testing.assert_close(found, expected)
    for gradients in zip(torch.autograd.grad(found, variables), torch.autograd.grad(expected, variables)):
        torch.testing.assert_close(*gradients)


def test_fgd_in_a_detector_adds_the_global_relation(tmp_path):
    off = {f"KD__FGD__{name}": 0.0 for name in ("ALPHA", "BETA", "GAMMA")}
    model = build_model(distillation_cfg(tmp_path, "FGD", KD__FGD__STUDENT_TAPS=("p3",), **off)).train()
    loss, seen = model.losses["fgd"], []
    loss.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model(batch(sizes=((64, 64),) * 2))
    (((student,), (teacher,), _), value) = seen[0]
    # The contexts start as the identity, and the tiny networks have equal channels.
    expected = loss.relation * (loss.connectors[0](student) - teacher).square().sum() / 2
    torch.testing.assert_close(value, expected)
    images = batch()
    for image in images:
        del image["instances"]
    with pytest.raises(ValueError, match="needs ground truth: the batch has no 'instances'"):
        loss([student], [teacher], StepContext([(64, 64)] * 2, (64, 64)))


def test_mgd_hides_a_share_of_the_positions():
    student, teacher, seen = torch.ones(2, 3, 40, 60), torch.zeros(2, 3, 40, 60), []

    def generation(x):
        seen.append(x)
        return x

    loss = mgd_loss(student, teacher, generation, mask_ratio=0.65)
    (shown,) = seen
    # A position is hidden in all channels or in none; 35 % of 4800 are shown, with a standard deviation of 33.
    assert torch.equal(shown[:, 0], shown[:, 1]) and torch.equal(shown[:, 0], shown[:, 2])
    assert abs(shown[:, 0].sum() - 0.35 * 4800) < 150
    torch.testing.assert_close(loss, shown.sum() / 2)
    torch.manual_seed(1)
    first = mgd_loss(student, teacher, generation)
    torch.manual_seed(1)
    assert mgd_loss(student, teacher, generation) == first


def test_mgd_is_its_definition_without_hidden_positions():
    generation = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).double()
    student, teacher = randn(2, 4, 6, 10).requires_grad_(), randn(2, 4, 6, 10, seed=1)
    loss = mgd_loss(student, teacher, generation, mask_ratio=0.0)
    expected = F.mse_loss(generation(student), teacher, reduction="sum") / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_mgd_hides_the_padding(garbage):
    valid = torch.zeros(1, 1, 6, 10, dtype=torch.bool)
    valid[..., :4, :5] = True
    student, teacher = randn(1, 4, 6, 10), randn(1, 4, 6, 10, seed=1)
    alone = mgd_loss(student[..., :4, :5], teacher[..., :4, :5], nn.Identity(), mask_ratio=0.0)
    padded = (x.masked_fill(~valid, garbage) for x in (student, teacher))
    torch.testing.assert_close(mgd_loss(*padded, nn.Identity(), mask_ratio=0.0, valid=valid), alone)


def test_empty_batches_cost_nothing():
    student = torch.zeros(0, 4, 6, 10, requires_grad=True)
    for loss in (fgd_loss(student, student, [], CANVAS), mgd_loss(student, student, nn.Identity())):
        loss.backward()
        assert loss == 0 and student.grad.shape == student.shape


def test_what_does_not_fit_is_named():
    x = torch.zeros(2, 4, 6, 10)
    with pytest.raises(ValueError, match="needs the boxes of 2 images, found those of 1"):
        fgd_loss(x, x, BOXES[:1], CANVAS)
    with pytest.raises(ValueError, match="temperature must be a positive number, found 0"):
        fgd_loss(x, x, BOXES, CANVAS, temperature=0)
    with pytest.raises(ValueError, match="0 <= ratio < 1, found 1"):
        MGDLoss(student_channels=[4], teacher_channels=[4], student_taps=["p3"], mask_ratio=1)
    with pytest.raises(ValueError, match=r"must give maps of shape \(2, 4, 6, 10\), found \(2, 4, 3, 10\)"):
        mgd_loss(x, x, lambda x: x[:, :, ::2])
    with pytest.raises(ValueError, match="needs as many student as teacher channels, found 3 and 4"):
        fgd_loss(x[:, :3], x, BOXES, CANVAS)
