"""Training steps of tiny detectors on a GPU: every loss on and off, every architecture, every way to run a network."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kd_det import Distiller, student_cfg
from kd_det.features.position_weights import REGIONS
from kd_det.losses import CrossKDLoss, DenseSoftTargetLoss, NSTLoss, PKDLoss, loss_class
from tests.classification.tiny_classifier import distilled_cfg, images, unlabelled_cfg
from tests.cuda.tiny_cuda import (
    DETECTOR_LOSSES,
    DETECTORS,
    MAP_LOSSES,
    assert_fine,
    batch_with_an_empty_image,
    build,
    detector_cfg,
    distillation_losses,
    faster_cfg,
    losses_of,
    train,
)
from tests.test_unlabelled import ON, mixed
from tests.tiny import batch, tiny_fcos, with_keypoints, with_masks
from tests.tiny_run import ALL_LOSSES

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", DETECTOR_LOSSES)
def test_a_loss_warms_up_is_on_and_stops(tmp_path, device, name):
    key = f"loss_{loss_class(name).name}"
    node = f"KD__{loss_class(name).name.upper()}"
    schedule = {f"{node}__WARMUP_ITERS": 2, f"{node}__STOP_ITER": 3}
    history = train(build(faster_cfg(tmp_path, device, name, "SoftTarget" if "NST" in name else "NST", **schedule)), 5)
    assert_fine(history, device)
    assert [bool(losses[key] != 0) for losses in history] == [True, True, True, False, False]


def test_all_losses_stop_together(tmp_path, device):
    history = train(build(faster_cfg(tmp_path, device, *DETECTOR_LOSSES, KD__STOP_ITER=1)), 2)
    assert_fine(history, device)


def test_no_loss_and_weights_of_0_are_plain_training(tmp_path, device):
    """Bit-identical on the CPU; on a GPU up to the order in which kernels add."""
    off = {f"KD__{loss_class(name).name.upper()}__WEIGHT": 0.0 for name in ALL_LOSSES}
    off_cfg = faster_cfg(tmp_path, device, *ALL_LOSSES, **off)
    expected = losses_of(build(student_cfg(off_cfg)))
    for cfg in (off_cfg, faster_cfg(tmp_path, device)):
        found = losses_of(build(cfg))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


# What else a detector's images need, and its own losses.
BRANCHES = {
    "Mask R-CNN": (with_masks, ("MaskSoftTarget",)),
    "Keypoint R-CNN": (with_keypoints, ("KeypointSoftTarget",)),
}


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector(tmp_path, device, detector, amp):
    if device == "cpu" and amp == torch.float16:
        pytest.skip("float16 is for GPUs")
    losses = ("NST", "SoftTarget", "DKD", "BoundedRegression", "RPNSoftTarget")
    if detector == "RetinaNet":
        losses = ("NST", "PKD", "FGD", "DenseSoftTarget", "CrossKD")
    label, of_the_branch = BRANCHES.get(detector, (lambda inputs: inputs, ()))
    model = build(detector_cfg(tmp_path, detector, device, *losses, *of_the_branch, KD__CROSS_KD__CUT=1))
    for inputs in (batch(), batch(((64, 64), (64, 64)))):
        assert_fine(train(model, 2, label(inputs), amp=amp), device)
    if detector not in BRANCHES:
        assert_fine(train(model, 1, batch_with_an_empty_image(), amp=amp), device)
    with torch.no_grad():
        assert len(model.eval()(batch())) == 2


def test_fcos(device):
    """In float32: under autocast, fvcore's giou_loss mixes types."""
    on_maps = [NSTLoss(student_taps=["p3", "p4"]), PKDLoss(student_taps=["p3"])]
    losses = [*on_maps, DenseSoftTargetLoss(), CrossKDLoss(cut=1)]
    model = Distiller(student=tiny_fcos(), teacher=tiny_fcos(depth=50, width=8), losses=losses).to(device).train()
    assert_fine(train(model, 2), device)


def test_map_losses_of_a_step_are_the_cpus(tmp_path, device):
    found, expected = (distillation_losses(build(faster_cfg(tmp_path, d, *MAP_LOSSES))) for d in (device, "cpu"))
    assert len(expected) == len(MAP_LOSSES)
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=2e-3, abs=1e-6), key


@pytest.mark.parametrize("regions", REGIONS[1:])
def test_map_losses_on_regions_are_the_cpus(tmp_path, device, regions):
    names = ("AttentionTransfer", "Hint", "PKD")
    options = {f"KD__{loss_class(name).name.upper()}__REGIONS": regions for name in names}
    model = build(faster_cfg(tmp_path, device, *names, **options))
    found = distillation_losses(model)
    if regions == "proposals":  # whose order may change with rounding
        return assert_fine([found], device)
    expected = distillation_losses(build(faster_cfg(tmp_path, "cpu", *names, **options)))
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=2e-3, abs=1e-6), key


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
def test_unlabelled_images(tmp_path, device, amp):
    if device == "cpu" and amp == torch.float16:
        pytest.skip("float16 is for GPUs")
    model = build(faster_cfg(tmp_path, device, "NST", "SoftTarget", "Hint", **ON))
    history = train(model, 3, mixed(), amp=amp)
    assert_fine(history, device)
    assert all(losses["loss_cls_pseudo"] > 0 and losses["loss_nst"] > 0 for losses in history)


def gradients(model) -> dict:
    sum(distillation_losses(model).values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["activation checkpointing", "channels_last"])
def test_other_ways_to_run_the_student_give_the_same(tmp_path, device, how):
    if (device, how) == ("cpu", "channels_last"):
        pytest.skip("a plain student's backward crashes in PyTorch 2.14")
    cfg = faster_cfg(tmp_path, device, *MAP_LOSSES)
    expected = gradients(build(cfg))
    model = build(cfg)
    if how == "channels_last":
        model.student.to(memory_format=torch.channels_last)
    else:
        for block in (block for stage in model.student.backbone.bottom_up.stages for block in stage):
            block.forward = _checkpointed(block.forward)
    found = gradients(model)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-3 * largest, msg=lambda m, n=name: n + m)


def _checkpointed(forward):
    return lambda x: checkpoint(forward, x, use_reentrant=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision_teaches_the_same(tmp_path, device, dtype):
    cfg = faster_cfg(tmp_path, device, *MAP_LOSSES, "SoftTarget")
    if device == "cpu" and dtype == "float16":
        pytest.skip("float16 is for GPUs")
    expected = distillation_losses(build(cfg))
    cfg.KD.TEACHER.DTYPE = dtype
    model = build(cfg)
    found = distillation_losses(model)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert found[key].item() == pytest.approx(value.item(), rel=0.1, abs=1e-3), key
    assert_fine(train(model, 2), device)
    assert_fine(train(model, 2, amp=getattr(torch, dtype)), device)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_compiled_backbone_gives_the_same(tmp_path, device, which):
    losses = [name for name in MAP_LOSSES if name != "Overhaul"]
    cfg = faster_cfg(tmp_path, device, *losses, "SoftTarget")
    expected = gradients(build(cfg))
    torch._dynamo.reset()
    model = build(cfg)
    getattr(model, which).backbone.compile(backend="inductor" if device == "cuda" else "eager")
    found = gradients(model)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=2e-3 * largest, msg=lambda m, n=name: n + m)
    assert_fine(train(model, 2), device)


def test_pre_activations_of_a_compiled_backbone_are_right_or_refused(tmp_path, device):
    """Whether torch.compile lets a mode see its ReLUs depends on the version of PyTorch and on the backend."""
    cfg = faster_cfg(tmp_path, device, "Overhaul")
    expected = losses_of(build(cfg))["loss_overhaul"].item()
    torch._dynamo.reset()
    model = build(cfg)
    model.student.backbone.compile(backend="inductor" if device == "cuda" else "eager")
    try:
        found = losses_of(model)["loss_overhaul"].item()
    except RuntimeError as e:
        assert "torch.compile hides the ReLUs" in str(e)
    else:
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("losses", [("NST", "AttentionTransfer", "SoftTarget"), ("GradientAttention",)])
def test_the_classification_stage(tmp_path, device, losses):
    model = build(distilled_cfg(tmp_path, *losses, MODEL__DEVICE=device))
    assert_fine(train(model, 2, images()), device)
    if device == "cuda" and losses != ("GradientAttention",):  # whose second derivative stays in float32
        assert_fine(train(model, 2, images(), amp=torch.float16), device)


def test_backbones_without_labels(tmp_path, device):
    losses = ("FeatureDistillation", "Hint", "NST", "Similarity")
    inputs = [{"image": x["image"]} for x in images()]
    found = losses_of(build(unlabelled_cfg(tmp_path, *losses, MODEL__DEVICE=device)), inputs)
    expected = losses_of(build(unlabelled_cfg(tmp_path, *losses)), inputs)
    assert len(expected) == len(losses)
    for key, value in expected.items():
        assert found[key].device.type == device and found[key].item() == pytest.approx(value.item(), rel=2e-3), key
    amp = torch.float16 if device == "cuda" else torch.bfloat16
    assert_fine(train(build(unlabelled_cfg(tmp_path, *losses, MODEL__DEVICE=device)), 2, inputs, amp=amp), device)


def test_memory_is_flat(tmp_path, gpu):
    model = build(faster_cfg(tmp_path, gpu, *ALL_LOSSES))
    used = []
    for _ in range(6):
        train(model, 10)
        model.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[1] == used[-1], used


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
def test_several_teachers_and_weights_that_set_themselves(tmp_path, device, amp):
    if device == "cpu" and amp == torch.float16:
        pytest.skip("float16 is for GPUs")
    options = {"KD__AUTO_WEIGHT": 0.5, "KD__AUTO_WEIGHT_BATCHES": 2}
    cfg = detector_cfg(tmp_path, "Faster R-CNN", device, "NST", "SoftTarget", **options)
    files = {key: cfg.KD.TEACHER[key] for key in ("CONFIG_FILE", "WEIGHTS")}
    own = {"CONFIG_FILE": "ema", "NAME": "self", "LOSSES": ["Hint"], "LOSS_OPTS": ["KD.HINT.AUTO_WEIGHT", 0.0]}
    cfg.KD.TEACHERS = [files, own]
    model = build(cfg)
    assert_fine(train(model, 4, amp=amp), device)
    in_float32 = build(cfg)
    train(in_float32, 4)
    weights = [[network.losses[name].weight for name in ("nst", "soft_target")] for network in (model, in_float32)]
    assert weights[0] == pytest.approx(weights[1], rel=0.3) and weights[0][0] != 20
