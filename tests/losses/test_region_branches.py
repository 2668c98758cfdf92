"""Soft targets on masks and keypoints: their definitions, the regions they compare, and heads that learn from them."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import tests.classification.tiny_classifier  # noqa: F401  registers the backbone of C4
from kd_det.features.region_branches import RegionBranch
from kd_det.losses import binary_soft_target_loss, keypoint_soft_target_loss
from tests.tiny import KEYPOINT, MASK, batch, distillation_cfg, tiny_cfg, with_keypoints, with_masks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_keypoints(student, teacher, visible, temperature):
    """Region by region, keypoint by keypoint, position by position."""
    total = count = 0
    for s, t, flags in zip(student, teacher, visible):
        for s_map, t_map, flag in zip(s, t, flags):
            if flag:
                p_s, p_t = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (s_map, t_map))
                total += sum(p * torch.log(p / q) for p, q in zip(p_t.flatten(), p_s.flatten()))
                count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_keypoints_value_and_gradient_are_the_definition(temperature):
    student, teacher = randn(3, 2, 4, 4).requires_grad_(), randn(3, 2, 4, 4, seed=1)
    visible = torch.tensor([[True, False], [True, True], [False, False]])
    options = {"temperature": temperature, "visible": visible}
    found, expected = (f(student, teacher, **options) for f in (keypoint_soft_target_loss, naive_keypoints))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: keypoint_soft_target_loss(s, teacher, **options), student)
    everything = torch.ones_like(visible)
    every = keypoint_soft_target_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(every, naive_keypoints(student, teacher, everything, temperature))


def test_keypoints_by_hand():
    # Two positions, softmax(ln 3, 0) = (3/4, 1/4) against (1/2, 1/2); the second keypoint is the student's own.
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    zeros = torch.zeros(1, 2, 1, 2)
    assert keypoint_soft_target_loss(zeros, teacher).item() == pytest.approx(kl / 2)
    visible = torch.tensor([[True, False]])
    assert keypoint_soft_target_loss(zeros, teacher, visible=visible).item() == pytest.approx(kl)
    # A heatmap's softmax does not change by a constant.
    assert keypoint_soft_target_loss(teacher + 7, teacher).item() == pytest.approx(0, abs=1e-6)


def test_keypoints_that_do_not_count_and_wrong_shapes():
    student = torch.randn(2, 3, 4, 4).requires_grad_()
    loss = keypoint_soft_target_loss(student, torch.randn(2, 3, 4, 4), visible=torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not student.grad.any()
    none = torch.zeros(0, 3, 4, 4, requires_grad=True)
    keypoint_soft_target_loss(none, torch.zeros(0, 3, 4, 4), visible=torch.zeros(0, 3, dtype=torch.bool)).backward()
    with pytest.raises(ValueError, match=r"\(R, K, S, S\), found shapes \(2, 3, 4, 4\) and \(2, 3, 8, 8\)"):
        keypoint_soft_target_loss(student, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"visible must be \(2, 3\), found \(2,\)"):
        keypoint_soft_target_loss(student, student, visible=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="positive number, found 0"):
        keypoint_soft_target_loss(student, student, temperature=0)


CASCADE = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
C4 = {
    "MODEL__BACKBONE__NAME": "build_tiny_resnet_backbone",
    "MODEL__RESNETS__WIDTH_PER_GROUP": 4,
    "MODEL__ROI_HEADS__NAME": "Res5ROIHeads",
    "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
    "MODEL__RPN__IN_FEATURES": ["res4"],
    "MODEL__ANCHOR_GENERATOR__SIZES": [[16, 32, 64]],
    "MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION": 6,
}
LARGER = {"MODEL__ROI_MASK_HEAD__POOLER_RESOLUTION": 8}
AGNOSTIC = {"MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True}


def distiller(tmp_path, loss, head, *, teacher=None, **opts):
    teacher = tiny_cfg(depth=50, width=8, **{**head, **(teacher or {})})
    return build_model(distillation_cfg(tmp_path, loss, teacher=teacher, **head, **opts)).train()


def step(model, inputs):
    """What the loss saw in a step, its value, and how often the student's head ran."""
    loss, seen, calls = next(iter(model.losses.values())), [], []
    head = getattr(model.student.roi_heads, f"{loss.branch}_head")
    handles = [
        loss.register_forward_hook(lambda m, args, out: seen.append((args[2], out))),
        next(head.children()).register_forward_hook(lambda m, args, out: calls.append(args[0])),
    ]
    losses = model(inputs)
    for handle in handles:
        handle.remove()
    assert "layers" not in head.__dict__  # the head is as it was
    ((context, value),) = seen
    assert len(calls) == 1 and f"loss_{loss.branch}" in losses
    return context, value, losses


@pytest.mark.parametrize(
    "opts, teacher",
    [({}, {}), (CASCADE, {}), ({}, CASCADE), (C4, C4), (C4, LARGER), ({}, LARGER), (AGNOSTIC, {}), ({}, AGNOSTIC)],
    ids=["standard", "cascade", "of cascade", "C4", "C4 of standard", "of larger", "agnostic", "of agnostic"],
)
def test_masks_are_those_of_the_ground_truths_class(tmp_path, opts, teacher):
    model = distiller(tmp_path, "MaskSoftTarget", MASK, teacher=teacher, **opts)
    context, value, _ = step(model, with_masks(batch()))
    regions, theirs = context.branch_pair("mask")
    classes = torch.cat([x.gt_classes for x in regions.instances])
    assert (classes < 3).all() and len(classes) >= 6
    # By the teacher's own heads, on its own features.
    heads = model.teacher.roi_heads
    maps = [context.teacher_outputs[f] for f in heads.in_features]
    with torch.no_grad():
        if hasattr(heads, "res5"):
            expected = heads.mask_head.layers(heads.res5(heads.pooler(maps, regions.boxes)))
        else:
            expected = heads.mask_head.layers(heads.mask_pooler(maps, regions.boxes))
    torch.testing.assert_close(theirs, expected)
    side = regions.logits.shape[-1]
    if theirs.shape[-1] != side:
        theirs = torch.nn.functional.interpolate(theirs, size=(side, side), mode="bilinear", antialias=True)
    pixels = [
        [(x[i, c] if x.shape[1] > 1 else x[i, 0]).flatten() for i, c in enumerate(classes)]
        for x in (regions.logits, theirs)
    ]
    s, t = (torch.cat(x)[:, None] for x in pixels)
    torch.testing.assert_close(value, binary_soft_target_loss(s, t, temperature=1.0))
    assert value > 0


def test_masks_of_classes_that_the_teacher_does_not_know_are_left_out(tmp_path):
    teacher = {"MODEL__ROI_HEADS__NUM_CLASSES": 5}
    model = distiller(tmp_path, "MaskSoftTarget", MASK, teacher=teacher, KD__TEACHER__CLASS_MAP=[[2, 1], [0, 4]])
    context, value, _ = step(model, with_masks(batch()))
    regions, theirs = context.branch_pair("mask")
    rows = [(i, c) for i, c in enumerate(regions.classes.tolist()) if c != 1]
    assert 0 < len(rows) < len(theirs)
    s = torch.stack([regions.logits[i, c] for i, c in rows])[:, None]
    t = torch.stack([theirs[i, {2: 1, 0: 4}[c]] for i, c in rows])[:, None]
    torch.testing.assert_close(value, binary_soft_target_loss(s, t, temperature=1.0))


@pytest.mark.parametrize("opts", [{}, CASCADE], ids=["standard", "cascade"])
def test_keypoints_count_where_the_students_own_loss_counts_them(tmp_path, opts):
    model = distiller(tmp_path, "KeypointSoftTarget", KEYPOINT, **opts)
    context, value, _ = step(model, with_keypoints(batch()))
    regions, theirs = context.branch_pair("keypoint")
    counted = [x.gt_keypoints.to_heatmap(x.proposal_boxes.tensor, 16)[1] > 0 for x in regions.instances]
    visible = torch.cat(counted)
    assert theirs.shape == regions.logits.shape and 0 < visible.sum() < visible[:, 1:].numel()
    torch.testing.assert_close(value, keypoint_soft_target_loss(regions.logits, theirs, visible=visible))
    assert value > 0


@pytest.mark.parametrize(
    "loss, head, inputs",
    [("MaskSoftTarget", MASK, with_masks), ("KeypointSoftTarget", KEYPOINT, with_keypoints)],
    ids=["mask", "keypoint"],
)
class TestBoth:
    def test_images_without_objects(self, tmp_path, loss, head, inputs):
        model = distiller(tmp_path, loss, head)
        images = inputs(batch())
        for x in images[1:]:
            x["instances"] = x["instances"][:0]
        assert step(model, images)[1] > 0  # one image of two
        images[0]["instances"] = images[0]["instances"][:0]
        context, value, losses = step(model, images)
        sum(losses.values()).backward()
        assert value == 0
        ((name, _),) = context.branch_regions.items()
        assert all(p.grad is not None for p in getattr(model.student.roi_heads, f"{name}_head").parameters())

    def test_what_is_recorded_is_what_the_head_predicts(self, tmp_path, loss, head, inputs):
        model = distiller(tmp_path, loss, head, MODEL__RESNETS__NORM="FrozenBN")
        context, _, _ = step(model, inputs(batch()))
        ((name, regions),) = context.branch_regions.items()
        features = model.student.backbone(model.student.preprocess_image(batch()).tensor)
        own = RegionBranch(model.student.roi_heads, name)(features, regions.boxes)
        assert regions.logits.requires_grad
        torch.testing.assert_close(own, regions.logits)

    def test_the_head_learns_from_the_teachers(self, tmp_path, loss, head, inputs):
        """The task's own loss is left out, so what falls is what the head learns from the teacher."""
        model = distiller(tmp_path, loss, head)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        images, key, values = inputs(batch()), f"loss_{loss_name(loss)}", []
        with EventStorage() as storage:
            for _ in range(40):
                value = model(images)[key]
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                storage.step()
                values.append(value.item())
        assert sum(values[-5:]) < 0.6 * sum(values[:5]), values

    def test_heads_that_are_missing(self, tmp_path, loss, head, inputs):
        plain = tiny_cfg(depth=50, width=8)
        with pytest.raises(ValueError, match="needs a Base.*RCNNHead .* on both sides .*the teacher has none"):
            build_model(distillation_cfg(tmp_path, loss, teacher=plain, **head))
        with pytest.raises(ValueError, match="on both sides .*; the student has none"):
            build_model(distillation_cfg(tmp_path, loss, teacher=tiny_cfg(depth=50, width=8, **head)))

    def test_a_head_on_whole_maps_and_wrong_options(self, tmp_path, loss, head, inputs):
        key = loss_name(loss).upper()
        for opts, message in (
            ({f"KD__{key}__TEMPERATURE": 0.0}, "temperature must be a positive number, found 0"),
            ({f"KD__{key}__STUDENT_TAPS": ["p3"]}, "reads no taps, found"),
        ):
            with pytest.raises(ValueError, match=message):
                distiller(tmp_path, loss, head, **opts)
        heads = build_model(tiny_cfg(**head)).roi_heads
        branch = {"MaskSoftTarget": "mask", "KeypointSoftTarget": "keypoint"}[loss]
        setattr(heads, f"{branch}_pooler", None)
        with pytest.raises(ValueError, match="the teacher's reads whole maps"):
            RegionBranch(heads, branch, side="teacher")


def loss_name(loss: str) -> str:
    return {"MaskSoftTarget": "mask_soft_target", "KeypointSoftTarget": "keypoint_soft_target"}[loss]


def test_numbers_of_keypoints_that_differ(tmp_path):
    with pytest.raises(ValueError, match="the student has 5 and the teacher 17"):
        distiller(tmp_path, "KeypointSoftTarget", KEYPOINT, teacher={"MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 17})


def test_class_agnostic_heads_compare_all_classes(tmp_path):
    head = {**MASK, **AGNOSTIC}
    model = distiller(tmp_path, "MaskSoftTarget", head, teacher={"MODEL__ROI_HEADS__NUM_CLASSES": 80})
    context, value, _ = step(model, with_masks(batch()))
    regions, theirs = context.branch_pair("mask")
    torch.testing.assert_close(value, binary_soft_target_loss(regions.logits, theirs, temperature=1.0))
    with pytest.raises(ValueError, match="MaskSoftTargetLoss compares class by class: the student has 3 .* 80"):
        distiller(tmp_path, "MaskSoftTarget", MASK, teacher={"MODEL__ROI_HEADS__NUM_CLASSES": 80})


def test_a_branch_that_no_loss_declares(tmp_path):
    context = step(distiller(tmp_path, "MaskSoftTarget", MASK), with_masks(batch()))[0]
    with pytest.raises(RuntimeError, match="the loss must declare branch = 'keypoint'"):
        context.branch_pair("keypoint")
