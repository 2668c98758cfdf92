"""Weights of positions in every loss on maps, and the option REGIONS that makes them."""

import functools

import pytest
import torch
from detectron2.modeling import build_model

from kd_det import losses
from kd_det.features.context import StepContext
from kd_det.features.position_weights import REGIONS
from kd_det.losses import (
    AttentionTransferLoss,
    CWDLoss,
    FeatureDistillationLoss,
    HintLoss,
    MGDLoss,
    NSTLoss,
    OverhaulLoss,
    PKDLoss,
)
from tests.classification.tiny_classifier import distilled_cfg
from tests.losses.test_accelerator import check
from tests.tiny import batch, distillation_cfg, tiny_retinanet_cfg


def overhaul(student, teacher, **kwargs):
    margin = torch.linspace(-1, 0, teacher.shape[1], dtype=teacher.dtype, device=teacher.device)
    return losses.overhaul_loss(student, teacher, margin, **kwargs)


def mgd(student, teacher, **kwargs):
    return losses.mgd_loss(student, teacher, torch.nn.Identity(), mask_ratio=0.0, **kwargs)


# Each with the most kernels of its forward and backward.
LOSSES = {
    "nst_linear": (functools.partial(losses.nst_loss, kernel="linear"), 70),
    "nst_poly": (losses.nst_loss, 65),
    "nst_gaussian": (functools.partial(losses.nst_loss, kernel="gaussian"), 80),
    "at_sum": (functools.partial(losses.attention_transfer_loss, mapping="sum"), 60),
    "at_sum_pow": (losses.attention_transfer_loss, 60),
    "at_max_pow": (functools.partial(losses.attention_transfer_loss, mapping="max_pow", p=3), 70),
    "at_element": (functools.partial(losses.attention_transfer_loss, reduction="element"), 70),
    "hint": (losses.hint_loss, 35),
    "fd": (losses.feature_distillation_loss, 35),
    "partial_l2": (losses.partial_l2_loss, 35),
    "overhaul": (overhaul, 35),
    "mgd": (mgd, 35),
    "pkd": (losses.pkd_loss, 80),
    "cwd": (losses.cwd_loss, 45),
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_grad(function, student, teacher, **kwargs):
    student = student.clone().requires_grad_()
    loss = function(student, teacher, **kwargs)
    loss.backward()
    return loss.detach(), student.grad


@pytest.fixture(params=LOSSES)
def loss_fn(request):
    return LOSSES[request.param][0]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_equal_weights_are_none(loss_fn, masked):
    student, teacher = randn(2, 6, 5, 7, dtype=torch.float32), randn(2, 6, 5, 7, seed=1, dtype=torch.float32)
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    valid[1, :, 3:] = valid[1, ..., 4:] = False
    valid = valid if masked else None
    expected = value_and_grad(loss_fn, student, teacher, valid=valid)
    # Each image has its own scale, and what lies in the padding does not matter.
    for weights in (torch.ones(2, 1, 5, 7), torch.tensor([1e-4, 30.0])[:, None, None, None].expand(2, 1, 5, 7)):
        weights = weights.clone()
        if masked:
            weights[1, :, 4:] = 1e6
        for found, value in zip(value_and_grad(loss_fn, student, teacher, valid=valid, weights=weights), expected):
            torch.testing.assert_close(found, value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_position_of_weight_k_counts_as_k_positions(name):
    """Whole weights against the loss without weights, on maps where each position stands as often as its weight."""
    function = LOSSES[name][0]
    student, teacher = randn(2, 6, 3, 4), randn(2, 6, 3, 4, seed=1)
    counts = torch.tensor([[0, 1, 2, 0, 3, 1, 1, 0, 2, 2, 0, 1], [1, 0, 2, 1, 0, 1, 0, 3, 2, 1, 2, 0]])
    index = torch.stack([torch.arange(12).repeat_interleave(c) for c in counts])  # (2, 13)

    leaf = student.clone().requires_grad_()
    repeated = [x.flatten(2).gather(2, index[:, None].expand(-1, 6, -1))[:, :, None] for x in (leaf, teacher)]
    expected = function(*repeated)
    # Sums over positions, and means that divide by the number of the map's positions, which are 12 and not 13.
    expected = expected * {"mgd": 12 / 13, "at_element": 13 / 12}.get(name, 1)
    (grad,) = torch.autograd.grad(expected, leaf)

    loss, found = value_and_grad(function, student, teacher, weights=counts.view(2, 1, 3, 4).double())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, grad)
    assert not found.flatten(2).masked_fill(counts[:, None] > 0, 0).any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nst_gaussian"])  # sigma has no gradient
def test_gradcheck(name):
    student, teacher, weights = randn(2, 6, 3, 5), randn(2, 6, 3, 5, seed=1), randn(2, 1, 3, 5, seed=2).abs()
    weights[0, :, 1] = 0
    valid = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    valid[1, ..., -1] = False
    for mask in (None, valid):
        assert torch.autograd.gradcheck(
            lambda s, mask=mask: LOSSES[name][0](s, teacher, valid=mask, weights=weights),
            student.requires_grad_(),
            fast_mode=True,
        )


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_padding_and_positions_without_weight_never_count(loss_fn, garbage):
    student, teacher, weights = randn(2, 6, 5, 7), randn(2, 6, 5, 7, seed=1), randn(2, 1, 5, 7, seed=2).abs()
    valid = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    valid[1, :, 3:] = False
    weights[0, :, 2] = 0
    counts = valid & (weights > 0)
    expected = value_and_grad(loss_fn, student, teacher, valid=valid, weights=weights)
    student, teacher = (x.masked_fill(weights == 0, 1e4).masked_fill(~valid, garbage) for x in (student, teacher))
    loss, grad = value_and_grad(loss_fn, student, teacher, valid=valid, weights=weights)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad, expected[1])
    assert not grad.masked_fill(counts, 0).any()


def test_an_image_without_weight_costs_nothing(loss_fn):
    student, teacher, weights = randn(2, 6, 5, 7), randn(2, 6, 5, 7, seed=1), randn(2, 1, 5, 7, seed=2).abs()
    weights[1] = 0
    loss, grad = value_and_grad(loss_fn, student, teacher, weights=weights)
    assert loss > 0 and grad[0].any() and grad[1].abs().max() < 1e-15
    loss, grad = value_and_grad(loss_fn, student, teacher, weights=torch.zeros(2, 1, 5, 7))
    assert loss.item() == pytest.approx(0, abs=1e-12) and grad.abs().max() < 1e-15


def test_weights_are_pooled_with_the_maps(loss_fn):
    student, teacher = randn(1, 6, 4, 6), randn(1, 6, 2, 3, seed=1)
    weights = randn(1, 1, 4, 6, seed=2).abs()
    pooled = weights.reshape(1, 1, 2, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(loss_fn(student, teacher, weights=weights), loss_fn(student, teacher, weights=pooled))


@pytest.mark.parametrize("name", LOSSES)
def test_on_an_accelerator(name):
    function, most_kernels = LOSSES[name]
    student, teacher, weights = (randn(2, c, 8, 12, seed=c, dtype=torch.float32) for c in (6, 6, 1))
    valid = torch.ones(2, 1, 8, 12, dtype=torch.bool)
    valid[1, :, 6:] = False
    check(function, most_kernels, student, teacher.flip(3), valid=valid, weights=weights.relu())


def test_what_does_not_fit(loss_fn):
    x = randn(2, 6, 5, 7)
    with pytest.raises(ValueError, match=r"weights must be a float map of shape \(2, 1, 5, 7\), found .* \(2, 5, 7\)"):
        loss_fn(x, x, weights=torch.ones(2, 5, 7))
    with pytest.raises(ValueError, match="weights must be a float map of shape .* found torch.bool"):
        loss_fn(x, x, weights=torch.ones(2, 1, 5, 7, dtype=torch.bool))


NAMES = {
    "NST": NSTLoss,
    "AttentionTransfer": AttentionTransferLoss,
    "Overhaul": OverhaulLoss,
    "Hint": HintLoss,
    "FeatureDistillation": FeatureDistillationLoss,
    "PKD": PKDLoss,
    "CWD": CWDLoss,
    "MGD": MGDLoss,
}


def node_of(name):
    return f"KD__{NAMES[name].name.upper()}"


@pytest.mark.parametrize("regions", REGIONS)
def test_a_training_step(tmp_path, regions):
    opts = {f"{node_of(name)}__REGIONS": regions for name in NAMES}
    model = build_model(distillation_cfg(tmp_path, *NAMES, **opts)).train()
    inputs = batch()
    inputs[1]["instances"] = inputs[1]["instances"][:0]
    calls = []
    model.teacher.roi_heads.box_head.register_forward_hook(lambda *_: calls.append("the teacher's box head"))
    found = model(inputs)
    sum(found.values()).backward()
    assert all(0 < found[loss.key] < float("inf") for loss in model.losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(loss.needs_proposals == (regions == "proposals") for loss in model.losses.values())
    assert not calls  # proposals are the student's


@pytest.mark.parametrize("name", NAMES)
def test_the_option_weighs_the_function(tmp_path, name):
    cfg = distillation_cfg(tmp_path, name)
    values = {}
    for regions, share in (("boxes", 0.2), ("foreground_background", 1.0), ("all", 0.2), ("gaussian", 0.2)):
        node = cfg.KD[NAMES[name].name.upper()]
        node.REGIONS, node.FOREGROUND_SHARE = regions, share
        torch.manual_seed(0)
        model = build_model(cfg).train()
        torch.manual_seed(0)
        values[regions] = model(batch())[f"loss_{NAMES[name].name}"].item()
    assert values["boxes"] == pytest.approx(values["foreground_background"], rel=1e-4)
    assert len({round(v, 12) for v in (values["boxes"], values["all"], values["gaussian"])}) == 3


class TestErrors:
    @pytest.mark.parametrize(
        "opts, message",
        [
            ({"KD__NST__REGIONS": "boxs"}, "Unknown KD.NST.REGIONS 'boxs'. Did you mean 'boxes'"),
            ({"KD__NST__FOREGROUND_SHARE": 1.5}, "KD.NST.FOREGROUND_SHARE must be in 0 to 1, found 1.5"),
        ],
    )
    def test_before_training(self, tmp_path, opts, message):
        with pytest.raises(ValueError, match=message):
            build_model(distillation_cfg(tmp_path, "NST", **opts))

    def test_a_detector_without_proposals(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST", KD__NST__REGIONS="proposals", KD__NST__STUDENT_TAPS=["p3"])
        retinanet = tiny_retinanet_cfg()
        cfg.KD.STUDENT.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RETINANET = retinanet.MODEL.BACKBONE.NAME, retinanet.MODEL.RETINANET
        with pytest.raises(ValueError, match="the student has no roi_heads"):
            build_model(cfg)

    def test_unlabelled_images(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "Hint", KD__HINT__REGIONS="boxes")).train()
        inputs = batch()
        del inputs[1]["instances"]
        maps = [torch.zeros(2, 8, 8, 12)] * 3
        with pytest.raises(ValueError, match="needs ground truth: the batch has no 'instances'"):
            model.losses["hint"](maps, maps, StepContext([(64, 96), (48, 64)], (64, 96), batched_inputs=inputs))

    def test_classifiers(self, tmp_path):
        with pytest.raises(ValueError, match="KD.AT.REGIONS is 'boxes', and ImageClassifier has images without boxes"):
            build_model(distilled_cfg(tmp_path, "AttentionTransfer", KD__AT__REGIONS="boxes"))
