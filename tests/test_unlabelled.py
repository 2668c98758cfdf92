"""A Distiller's batches with images that are marked as unlabelled."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from kd_det import Distiller
from kd_det.features.classes import match_classes
from kd_det.features.unlabelled import PseudoLabels, pseudo_labels, split_unlabelled
from kd_det.losses import FGDLoss, NSTLoss
from kd_det.losses.build import build_losses
from kd_det.teachers.feature_teacher import FeatureTeacher
from tests.engine.test_distributed import on_two_ranks
from tests.teachers.test_feature_teacher import Strides
from tests.test_accelerator import step
from tests.tiny import (
    KEYPOINT,
    MASK,
    batch,
    distillation_cfg,
    tiny_cfg,
    tiny_retinanet_cfg,
    with_keypoints,
    with_masks,
)

ON = {"KD__UNLABELLED__RATIO": 1.0, "KD__UNLABELLED__THRESHOLD": 0.3}


def mixed(sizes=((64, 96), (48, 64)), unlabelled=((56, 80), (64, 64)), seed: int = 0) -> list:
    """Labelled images, and others without instances that are marked; in files they were larger."""
    others = batch(unlabelled, seed=seed + 1)
    for x in others:
        del x["instances"]
        x.update(unlabelled=True, height=2 * x["height"], width=2 * x["width"])
    return batch(sizes, seed=seed) + others


def build(cfg):
    torch.manual_seed(3)
    return build_model(cfg).train()


def losses_of(model, inputs) -> dict:
    torch.manual_seed(5)
    return model(inputs)


def found(boxes, classes, scores) -> Instances:
    return Instances((40, 60), pred_boxes=Boxes(boxes), pred_classes=torch.tensor(classes), scores=torch.tensor(scores))


def test_detections_above_the_threshold_become_labels():
    boxes = torch.arange(12.0).reshape(3, 4)
    labels = pseudo_labels(found(boxes, [2, 0, 1], [0.69, 0.7, 0.9]), 0.7)
    assert labels.image_size == (40, 60)
    assert torch.equal(labels.gt_boxes.tensor, boxes[1:])
    assert labels.gt_classes.tolist() == [0, 1]
    assert set(labels.get_fields()) == {"gt_boxes", "gt_classes"}
    assert len(pseudo_labels(found(boxes, [2, 0, 1], [0.1, 0.2, 0.3]), 0.7)) == 0


def test_classes_are_matched_by_name():
    # The teacher's 0 and 2 are the student's 1 and 0; it also knows trees, and the student lamps.
    match = match_classes(3, 3, student_classes=("car", "dog", "lamp"), teacher_classes=("dog", "tree", "car"))
    labels = pseudo_labels(found(torch.zeros(4, 4), [0, 1, 2, 2], [0.9, 0.9, 0.9, 0.2]), 0.5, match)
    assert labels.gt_classes.tolist() == [1, 0]


def test_masks_and_keypoints():
    detections = found(torch.zeros(2, 4), [0, 1], [0.9, 0.1])
    detections.pred_masks = torch.rand(2, 40, 60) > 0.5
    detections.pred_keypoints = torch.rand(2, 5, 3)
    labels = pseudo_labels(detections, 0.5, branches=("mask", "keypoint"))
    assert torch.equal(labels.gt_masks.tensor, detections.pred_masks[:1])
    assert torch.equal(labels.gt_keypoints.tensor[..., :2], detections.pred_keypoints[:1, :, :2])
    assert (labels.gt_keypoints.tensor[..., 2] == 2).all()


def test_without_unlabelled_images_nothing_changes(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", "SoftTarget", "FGD")
    plain = losses_of(build(cfg), batch())
    for key, value in ON.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    on = losses_of(build(cfg), batch())
    assert {k: v.item() for k, v in plain.items()} == {k: v.item() for k, v in on.items()}


def test_a_distillation_loss_is_the_mean_over_all_images(tmp_path):
    opts = {"MODEL__RESNETS__NORM": "FrozenBN", **ON, "KD__UNLABELLED__WEIGHT": 0.0}
    model = build(distillation_cfg(tmp_path, "NST", teacher=tiny_cfg(depth=50, width=8), **opts))
    inputs = mixed(sizes=((64, 96),), unlabelled=((64, 96), (64, 96)))
    got = losses_of(model, inputs)
    labels = batch(((64, 96), (64, 96)), seed=9)  # whatever they are, NST does not read them
    alone = [{**x, "instances": y["instances"], "unlabelled": False} for x, y in zip(inputs[1:], labels)]
    first, others = losses_of(model, inputs[:1]), losses_of(model, alone)
    torch.testing.assert_close(got["loss_nst"], (first["loss_nst"] + 2 * others["loss_nst"]) / 3)
    assert set(got) == set(first)  # the student's own losses are those of the labelled image
    for key in set(first) - {"loss_nst"}:
        torch.testing.assert_close(got[key], first[key])


def test_the_students_losses_act_on_what_the_teacher_finds(tmp_path):
    cfg = distillation_cfg(tmp_path, **ON, KD__UNLABELLED__WEIGHT=0.5)
    model = build(cfg)
    inputs = mixed()
    got = losses_of(model, inputs)
    with torch.no_grad():
        detections = model.teacher([{"image": x["image"]} for x in inputs[2:]])
    labelled = [{**x, "instances": pseudo_labels(y["instances"], 0.3)} for x, y in zip(inputs[2:], detections)]
    assert sum(len(x["instances"]) for x in labelled)
    torch.manual_seed(5)
    student = build(cfg).student
    student(inputs[:2])  # draws its samples first, and moves the batch norms
    torch.manual_seed(5)
    student(inputs[:2])
    for key, value in student(labelled).items():
        torch.testing.assert_close(got[f"{key}_pseudo"], 0.5 * value)
    sum(got.values()).backward()


@pytest.mark.parametrize("loss", ["FGD", "DKD", "SoftTarget", "BoundedRegression", "Hint"])
def test_losses_that_read_labels(tmp_path, loss):
    opts = {"KD__HINT__REGIONS": "boxes"} if loss == "Hint" else {}
    model = build(distillation_cfg(tmp_path, loss, **ON, KD__UNLABELLED__WEIGHT=0.0, **opts))
    total = sum(losses_of(model, mixed()).values())
    total.backward()
    assert total.isfinite()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_all_or_none_of_the_boxes(tmp_path, threshold):
    model = build(distillation_cfg(tmp_path, "NST", "FGD", **{**ON, "KD__UNLABELLED__THRESHOLD": threshold}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, mixed())
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("heads", [MASK, KEYPOINT], ids=["masks", "keypoints"])
def test_masks_and_keypoints_of_the_teacher(tmp_path, heads):
    teacher = tiny_cfg(depth=50, width=8, **heads)
    model = build(distillation_cfg(tmp_path, "NST", teacher=teacher, **ON, **heads))
    inputs = mixed()
    inputs[:2] = (with_masks if heads is MASK else with_keypoints)(inputs[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, inputs)
    assert losses["loss_mask_pseudo" if heads is MASK else "loss_keypoint_pseudo"] > 0
    sum(losses.values()).backward()


def test_a_dense_detector(tmp_path):
    teacher = tiny_retinanet_cfg(depth=50, width=8)
    cfg = distillation_cfg(tmp_path, "DenseSoftTarget", teacher=teacher, **{**ON, "KD__UNLABELLED__THRESHOLD": 0.0})
    student = tiny_retinanet_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RETINANET = student.MODEL.BACKBONE.NAME, student.MODEL.RETINANET
    cfg.KD.STUDENT.META_ARCHITECTURE = "RetinaNet"
    losses = losses_of(build(cfg), mixed())
    assert {"loss_cls_pseudo", "loss_box_reg_pseudo", "loss_dense_soft_target"} <= set(losses)
    sum(losses.values()).backward()


def test_the_students_average_as_teacher(tmp_path):
    cfg = distillation_cfg(tmp_path, **ON, KD__TEACHER__CONFIG_FILE="ema", KD__TEACHER__WEIGHTS="")
    model = build(cfg)
    for _ in range(2):
        sum(losses_of(model, mixed()).values()).backward()


def test_several_teachers_the_first_labels(tmp_path):
    teacher = {"CONFIG_FILE": str(tmp_path / "teacher.yaml"), "WEIGHTS": str(tmp_path / "teacher.pth")}
    cfg = distillation_cfg(tmp_path, "NST", **ON, KD__TEACHERS=[teacher, {**teacher, "NAME": "b", "LOSSES": ["Hint"]}])
    one = distillation_cfg(tmp_path, "NST", **ON)
    got, alone = (losses_of(build(c), mixed()) for c in (cfg, one))
    assert got["loss_cls_pseudo"].item() == alone["loss_cls_pseudo"].item()
    torch.testing.assert_close(got["loss_nst"], alone["loss_nst"])  # the average of a teacher and itself


def test_unnamed_teachers_label_without_losses(tmp_path):
    teacher = {"CONFIG_FILE": str(tmp_path / "teacher.yaml"), "WEIGHTS": str(tmp_path / "teacher.pth")}
    opts = {"KD__TEACHER__CONFIG_FILE": "", "KD__TEACHER__WEIGHTS": "", "KD__TEACHERS": [teacher, teacher]}
    assert "loss_cls_pseudo" in losses_of(build(distillation_cfg(tmp_path, **ON, **opts)), mixed())


def test_labels_that_come_with_the_images(tmp_path):
    """As from a file of results, without any teacher."""
    cfg = distillation_cfg(
        tmp_path, **ON, KD__TEACHER__CONFIG_FILE="", KD__TEACHER__WEIGHTS="", KD__UNLABELLED__RESULTS="a.json"
    )
    inputs = mixed()
    for x, y in zip(inputs[2:], batch(((56, 80), (64, 64)), seed=4)):
        x["instances"] = y["instances"]
    assert losses_of(build(cfg), inputs)["loss_cls_pseudo"] > 0
    empty = [{**x, "instances": x["instances"][:0]} if "unlabelled" in x else x for x in inputs]
    sum(losses_of(build(cfg), empty).values()).backward()
    with pytest.raises(ValueError, match="An unlabelled image has no 'instances'"):
        build(cfg)(mixed())


def test_without_a_config(tmp_path):
    cfg = tiny_cfg()
    student, teacher = (build_model(c) for c in (cfg, tiny_cfg(depth=50, width=8)))
    model = Distiller(student=student, teacher=teacher, pseudo_labels=PseudoLabels(threshold=0.0)).train()
    assert "loss_cls_pseudo" in model(mixed())
    cfg.KD.LOSSES = ("NST",)
    losses = build_losses(cfg, student, teacher)
    model = Distiller(student=build_model(tiny_cfg()), teacher=teacher, losses=losses).train()
    assert not any(key.endswith("_pseudo") for key in model(mixed()))


BAD = {
    "no teacher": ({"KD__TEACHER__CONFIG_FILE": ""}, "need a teacher that labels them: set KD.TEACHER.CONFIG_FILE"),
    "no masks": (MASK, "The student has a mask head, and the teacher GeneralizedRCNN"),
    "threshold": ({"KD__UNLABELLED__THRESHOLD": 1.5}, "KD.UNLABELLED.THRESHOLD must be a score in 0..1, found 1.5"),
    "weight": ({"KD__UNLABELLED__WEIGHT": -1.0}, "KD.UNLABELLED.WEIGHT must be a finite number >= 0, found -1.0"),
    "classes": ({"MODEL__ROI_HEADS__NUM_CLASSES": 5}, "cannot label unlabelled images: the student has 5 classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_when_built(tmp_path, case):
    opts, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build(distillation_cfg(tmp_path, **{**ON, **opts}))


def test_a_teacher_of_maps_labels_nothing():
    teacher = FeatureTeacher(network=Strides())
    for options in ({}, {"weight": 0.0}):
        losses = [FGDLoss(student_taps=["p4"], teacher_taps=["s14"])]
        with pytest.raises(ValueError, match="gives feature maps and no detections"):
            Distiller(
                student=build_model(tiny_cfg()), teacher=teacher, losses=losses, pseudo_labels=PseudoLabels(**options)
            )
    losses = [NSTLoss(student_taps=["p4"], teacher_taps=["s16"])]
    pseudo = PseudoLabels(weight=0.0)
    model = Distiller(student=build_model(tiny_cfg()), teacher=teacher, losses=losses, pseudo_labels=pseudo).train()
    assert not any(key.endswith("_pseudo") for key in model(mixed()))


def test_a_batch_without_labelled_images():
    with pytest.raises(ValueError, match="All 2 images of a batch are unlabelled"):
        split_unlabelled(mixed()[2:])


def step_of_a_rank(folder):
    cfg = distillation_cfg(folder, "NST", "SoftTarget", "FGD", **{**ON, "KD__UNLABELLED__THRESHOLD": 0.0})
    model = build(cfg)
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    torch.manual_seed(comm.get_rank())
    for _ in range(2):
        sum(ddp(mixed(seed=comm.get_rank())).values()).backward()
    return [p.grad for p in model.parameters()]


def test_two_ranks(tmp_path):
    ours, theirs = on_two_ranks(tmp_path, step_of_a_rank, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_on_an_accelerator(tmp_path, weight):
    opts = {"KD__UNLABELLED__WEIGHT": weight, "KD__TEACHER__CLASS_MAP": [[0, 1], [1, 0], [2, 2]]}
    losses, _ = step(build(distillation_cfg(tmp_path, "NST", **ON, **opts)), mixed())
    assert ("loss_cls_pseudo" in losses) == (weight > 0)
