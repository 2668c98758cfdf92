"""Training steps on a pretend accelerator: devices do not mix, and the host seldom waits for the device."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from kd_det import student_cfg
from tests.pretend_accelerator import Accelerator, place
from tests.tiny import (
    KEYPOINT,
    MASK,
    RCNN_LOSSES,
    batch,
    distillation_cfg,
    tiny_cfg,
    tiny_retinanet_cfg,
    with_keypoints,
    with_masks,
)

FOUNDING = ("NST", "AttentionTransfer", "Overhaul", "Similarity", "Hint", "SoftTarget")
CASCADE = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
# The most that distillation may add to a step. Waits: one for the image sizes, and those of Detectron2's pooler on the
# teacher's regions (one a level and one).
MOST_WAITS, MOST_WAITS_OF_SIX = 6, 12
MOST_KERNELS, MOST_KERNELS_OF_SIX = 300, 740


def empty(inputs):
    for x in inputs:
        x["instances"] = x["instances"][:0]
    return inputs


def step(model, inputs, iterations: int = 1):
    """The losses of the last step with their backward, on the device."""
    with Accelerator() as accelerator, EventStorage() as storage:
        place(model)
        for teacher in getattr(model, "teachers", ()):
            place(teacher)
        for _ in range(iterations):
            model.zero_grad()
            accelerator.reset()
            losses = model(inputs)
            sum(losses.values()).backward()
            storage.step()
    assert all(torch.isfinite(loss.cpu_values) for loss in losses.values())
    return losses, accelerator


def added(tmp_path, losses, inputs, *, dress=lambda cfg: cfg, **opts):
    """Waits and kernels that distillation adds to a step of the same student."""
    # Margins are calibrated in the first step, the second is like all that follow.
    cfg = dress(distillation_cfg(tmp_path, *losses, KD__OVERHAUL__CALIBRATION_IMAGES=1, **opts))
    steps = []
    for config in (cfg, student_cfg(cfg)):
        torch.manual_seed(0)
        model = build_model(config).train()
        steps.append(step(model, inputs(), iterations=2)[1])
    distilled, plain = steps
    extra = sum(distilled.waits.values()) - sum(plain.waits.values())
    return extra, distilled.kernels - plain.kernels, distilled.waits - plain.waits


@pytest.mark.parametrize("name", RCNN_LOSSES)
def test_what_one_loss_adds(tmp_path, name):
    waits, kernels, where = added(tmp_path, [name], batch)
    assert waits <= MOST_WAITS, where
    assert kernels <= MOST_KERNELS + 40 * (name in ("NSTLoss", "AttentionTransferLoss", "PKDLoss")), kernels


@pytest.mark.parametrize("regions", ["gaussian", "proposals", "foreground_background"])
def test_what_regions_add(tmp_path, regions):
    waits, kernels, where = added(tmp_path, ["Hint"], batch, KD__HINT__REGIONS=regions)
    assert waits <= 2, where  # the image sizes, and the boxes
    assert kernels <= MOST_KERNELS


def test_what_the_founding_losses_add(tmp_path):
    waits, kernels, where = added(tmp_path, FOUNDING, batch)
    assert waits <= MOST_WAITS_OF_SIX, where
    assert kernels <= MOST_KERNELS_OF_SIX


def test_waits_do_not_grow_with_images_or_levels(tmp_path):
    many = ((64, 96), (48, 64), (64, 64), (32, 96), (48, 48))
    for losses in (FOUNDING, ("PKD", "FGD", "ReviewKD", "DKD", "BoundedRegression")):
        waits, _, where = added(tmp_path, losses, lambda: batch(many))
        assert waits <= MOST_WAITS_OF_SIX, where
    taps = ["p3", "p4"]
    few, more = (
        added(tmp_path, ["NST"], batch, KD__NST__STUDENT_TAPS=levels)[0] for levels in (taps, ["p2", *taps, "p5", "p6"])
    )
    assert few == more == 1


def test_matching_the_regions_of_a_cascade_waits_for_no_image(tmp_path):
    sizes = ((64, 96), (48, 64), (64, 64), (32, 96))
    waits, _, where = added(tmp_path, ["DKD"], lambda: batch(sizes), **CASCADE)
    assert waits <= MOST_WAITS, where


@pytest.mark.parametrize(
    "opts",
    [
        {"KD__WARMUP_ITERS": 10},
        {"KD__NST__STOP_ITER": 0},  # D2: beside another loss
        {"KD__STOP_ITER": 1},  # D2: all of them
        {"KD__HINT__STOP_ITER": 1, "KD__NST__WARMUP_ITERS": 3},
        {"KD__NST__WEIGHT": 0.0},
    ],
    ids=str,
)
def test_schedules(tmp_path, opts):
    model = build_model(distillation_cfg(tmp_path, "NST", "SoftTarget", "Hint", **opts)).train()
    losses, _ = step(model, batch(), iterations=3)
    assert {"loss_soft_target", "loss_hint", "loss_cls"} <= set(losses)


@pytest.mark.parametrize(
    "inputs", [lambda: batch(((64, 96), (64, 96))), lambda: empty(batch())], ids=["whole", "empty"]
)
def test_images_without_padding_and_without_objects(tmp_path, inputs):
    names = [name for name in RCNN_LOSSES if name != "SimilarityLoss"]
    step(build_model(distillation_cfg(tmp_path, *names)).train(), inputs(), iterations=2)


@pytest.mark.parametrize(
    "name, head, inputs", [("MaskSoftTarget", MASK, with_masks), ("KeypointSoftTarget", KEYPOINT, with_keypoints)]
)
def test_what_a_loss_on_masks_or_keypoints_adds(tmp_path, name, head, inputs):
    teacher = tiny_cfg(depth=50, width=8, **head)
    opts = {"teacher": teacher, **head, "KD__TEACHER__CLASS_MAP": [[0, 2], [2, 0]]}
    many = ((64, 96), (48, 64), (64, 64), (32, 96), (48, 48))
    for images in (lambda: inputs(batch()), lambda: inputs(batch(many)), lambda: empty(inputs(batch()))):
        waits, kernels, where = added(tmp_path, [name], images, **opts)
        assert waits <= 2, where
        assert kernels <= MOST_KERNELS


@pytest.mark.parametrize("loss", ["SoftTarget", "DKD", "DIST", "BoundedRegression"])
def test_shared_classes_add_no_wait(tmp_path, loss):
    opts = {"KD__TEACHER__CLASS_MAP": [[0, 2], [2, 0]], "KD__DIST__TEMPERATURE": 2.0}
    plain, mapped = (added(tmp_path, [loss], batch, **o)[:2] for o in ({}, opts))
    assert mapped[0] == plain[0] and mapped[1] <= plain[1] + 25


@pytest.mark.parametrize(
    "teacher, opts, losses, inputs",
    [
        ({}, CASCADE, ("SoftTarget", "BoundedRegression", "DKD", "NST"), batch),
        (CASCADE, CASCADE, ("SoftTarget", "Similarity"), batch),
        (MASK, MASK, ("SoftTarget", "FGD", "MGD"), lambda: with_masks(batch())),
    ],
    ids=["cascade of standard", "cascade of cascade", "mask"],
)
def test_other_heads(tmp_path, teacher, opts, losses, inputs):
    teacher = tiny_cfg(depth=50, width=8, **teacher)
    step(build_model(distillation_cfg(tmp_path, *losses, teacher=teacher, **opts)).train(), inputs())


def retinanet(cfg):
    """The tiny RetinaNet with a config's KD node."""
    plain = tiny_retinanet_cfg(MODEL__META_ARCHITECTURE="Distiller")
    plain.KD = cfg.KD
    plain.KD.STUDENT.META_ARCHITECTURE = "RetinaNet"
    return plain


def test_retinanet_with_taps_in_the_head(tmp_path):
    taps = {"KD__SOFT_TARGET__STUDENT_TAPS": ["head.cls_score"], "KD__NST__STUDENT_TAPS": ["p3", "p7"]}
    cfg = distillation_cfg(tmp_path, "NST", "SoftTarget", teacher=tiny_retinanet_cfg(depth=50, width=8), **taps)
    step(build_model(retinanet(cfg)).train(), batch())


@pytest.mark.parametrize("name, most_kernels", [("DenseSoftTarget", 430), ("CrossKD", 720)])
def test_what_a_loss_on_dense_heads_adds(tmp_path, name, most_kernels):
    many = ((64, 96), (48, 64), (64, 64), (32, 96), (48, 48))
    teacher = tiny_retinanet_cfg(depth=50, width=8)
    waits, kernels, where = added(
        tmp_path, [name], lambda: batch(many), dress=retinanet, teacher=teacher, KD__CROSS_KD__CUT=1
    )
    assert waits <= 1, where  # the image sizes
    assert kernels <= most_kernels


def test_a_box_on_the_host_is_no_mix_of_devices(tmp_path):
    inputs = batch()
    assert isinstance(inputs[0]["instances"].gt_boxes, Boxes)
    model = build_model(distillation_cfg(tmp_path, "FGD", "DKD")).train()
    step(model, inputs)


def test_weights_that_set_themselves_wait_once_for_each_batch_they_measure(tmp_path):
    opts = {"KD__AUTO_WEIGHT": 0.5, "KD__AUTO_WEIGHT_BATCHES": 2}
    for iterations, expected in ((1, 1), (2, 1), (3, 0)):
        model = build_model(distillation_cfg(tmp_path, "NST", "SoftTarget", **opts)).train()
        waits = step(model, batch(), iterations)[1].waits
        # Besides those of Detectron2's own backward, which runs once more for each loss.
        assert sum(n for where, n in waits.items() if "auto_weight" in where and "index_put" not in where) == expected


def test_the_students_average_teaches_without_waits(tmp_path):
    ema = {"KD__TEACHER__CONFIG_FILE": "ema", "KD__TEACHER__WEIGHTS": ""}
    waits, kernels, where = added(tmp_path, ["NST", "SoftTarget"], batch, **ema)
    # Two losses, and the update of the average.
    assert waits <= MOST_WAITS and kernels <= MOST_KERNELS + 40, (where, kernels)


def test_teachers_beside_each_other(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", "SoftTarget", "BoundedRegression")
    files = {"CONFIG_FILE": cfg.KD.TEACHER.CONFIG_FILE, "WEIGHTS": cfg.KD.TEACHER.WEIGHTS}
    cfg.KD.TEACHERS = [files, {**files, "NAME": "b", "LOSSES": ["Hint", "SoftTarget"]}]
    losses, _ = step(build_model(cfg).train(), batch(), iterations=2)
    assert {"loss_nst", "loss_hint_b", "loss_soft_target_b"} < set(losses)
