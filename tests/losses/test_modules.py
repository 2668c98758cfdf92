"""The registered modules: they are their functions, with the connectors, margins and samples that a detector needs."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from kd_det.config import add_kd_config
from kd_det.features.context import StepContext
from kd_det.features.regions import RegionHead, SampledRegions
from kd_det.losses import (
    DISTILLATION_LOSS_REGISTRY,
    AttentionTransferLoss,
    BoundedRegressionLoss,
    CWDLoss,
    DKDLoss,
    HintLoss,
    NSTLoss,
    OverhaulLoss,
    PKDLoss,
    SimilarityLoss,
    SoftTargetLoss,
    attention_transfer_loss,
    bounded_regression_loss,
    cwd_loss,
    dist_loss,
    dkd_loss,
    hint_loss,
    margin_from_norm,
    nst_loss,
    overhaul_loss,
    pkd_loss,
    similarity_preserving_loss,
    soft_target_loss,
)
from tests.tiny import batch, distillation_cfg, tiny_cfg

SIZES, CANVAS = [(64, 96), (48, 64)], (64, 96)


@pytest.fixture
def context():
    return StepContext(SIZES, CANVAS)


@pytest.fixture
def maps():
    """Two levels: student maps of 4 channels, teacher maps of 6."""
    student = [torch.randn(2, 4, 16, 24), torch.randn(2, 4, 8, 12)]
    teacher = [torch.randn(2, 6, 16, 24), torch.randn(2, 6, 8, 12)]
    return student, teacher


TAPS = {"student_taps": ["p2", "p3"]}
CHANNELS = {"student_channels": [4, 4], "teacher_channels": [6, 6]}


class TestAreTheirFunctions:
    def test_nst(self, maps, context):
        options = {"kernel": "poly", "degree": 3, "offset": 0.5}
        expected = sum(nst_loss(s, t, valid=context.valid(s), **options) for s, t in zip(*maps))
        assert NSTLoss(**TAPS, **options)(*maps, context).item() == expected.item()

    def test_attention_transfer(self, maps, context):
        options = {"mapping": "max_pow", "p": 4, "reduction": "element"}
        expected = sum(attention_transfer_loss(s, t, valid=context.valid(s), **options) for s, t in zip(*maps))
        assert AttentionTransferLoss(**TAPS, **options)(*maps, context).item() == expected.item()

    def test_hint(self, maps, context):
        loss = HintLoss(**TAPS, **CHANNELS)
        expected = sum(hint_loss(c(s), t, valid=context.valid(s)) for c, s, t in zip(loss.connectors, *maps))
        assert loss(*maps, context).item() == expected.item()

    def test_overhaul_halves_each_shallower_stage(self, maps, context):
        margins = [(torch.rand(6) + 0.5, torch.randn(6)) for _ in range(2)]
        loss = OverhaulLoss(**TAPS, **CHANNELS, margin=margins, connector_norm="")
        terms = [
            overhaul_loss(c(s), t, margin_from_norm(*m), valid=context.valid(s))
            for c, s, t, m in zip(loss.connectors, *maps, margins)
        ]
        assert loss(*maps, context).item() == pytest.approx(0.5 * terms[0].item() + terms[1].item(), rel=1e-6)

    def test_soft_target_at_a_tap(self, context):
        student, teacher = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12)
        loss = SoftTargetLoss(student_taps=["head.cls_score"], temperature=3.0)
        expected = soft_target_loss(student, teacher, temperature=3.0, valid=context.valid(student))
        assert not loss.needs_regions and loss([student], [teacher], context).item() == expected.item()

    @pytest.mark.parametrize("cls, function", [(PKDLoss, pkd_loss), (CWDLoss, cwd_loss)])
    def test_with_connectors_where_channels_differ(self, maps, context, cls, function):
        student, teacher = maps
        loss = cls(**TAPS, student_channels=[4, 4], teacher_channels=[6, 4])
        assert isinstance(loss.connectors[1], torch.nn.Identity)
        teacher = [teacher[0], teacher[1][:, :4]]
        terms = [function(c(s), t, valid=context.valid(s)) for c, s, t in zip(loss.connectors, student, teacher)]
        assert loss(student, teacher, context).item() == pytest.approx(sum(terms).item(), rel=1e-6)

    def test_levels_that_differ_in_number(self, maps, context):
        with pytest.raises(ValueError, match="gave 2 maps and the teacher taps .* gave 1"):
            NSTLoss(**TAPS)(maps[0], maps[1][:1], context)

    def test_every_registered_loss_has_its_config_node(self):
        cfg = tiny_cfg()
        ours = [cls for name, cls in DISTILLATION_LOSS_REGISTRY if cls.__module__.startswith("kd_det.losses.")]
        assert len(ours) >= 7
        common = {"WEIGHT", "STUDENT_TAPS", "TEACHER_TAPS", "WARMUP_ITERS", "STOP_ITER"}
        for cls in ours:
            assert common <= set(cfg.KD[cls.name.upper()])


def pre_activation_by_hand(block, x):
    out = torch.relu(block.conv1(x))
    out = block.conv3(torch.relu(block.conv2(out)))
    return out + block.shortcut(x)


class TestMargins:
    TAP = "res4.pre_activation"

    def cfg(self, tmp_path, **opts):
        taps = {"KD__OVERHAUL__STUDENT_TAPS": [self.TAP], "KD__OVERHAUL__TEACHER_TAPS": [self.TAP]}
        return distillation_cfg(tmp_path, "Overhaul", **taps, **opts)

    def by_hand(self, teacher, batches):
        """The mean negative response of each channel, position by position, image by image, without padding."""
        values = [[] for _ in range(32)]
        for inputs in batches:
            for x in inputs:
                body = teacher.backbone.bottom_up
                with torch.no_grad():
                    y = body.res3(body.res2(body.stem(teacher.preprocess_image([x]).tensor)))
                    y = pre_activation_by_hand(body.res4[-1], y)[0]
                height, width = x["image"].shape[-2:]
                y = y[:, : -(-height // 16), : -(-width // 16)]
                for c in range(32):
                    values[c] += y[c][y[c] < 0].tolist()
        return torch.tensor([sum(v) / max(len(v), 1) for v in values]), torch.tensor([len(v) for v in values])

    def test_calibrated_is_the_brute_force_mean(self, tmp_path):
        model = build_model(self.cfg(tmp_path))
        # Sizes that need no padding alone, so that by hand is image by image; together, the second is padded.
        batches = [batch(((64, 96), (64, 64)), seed=s) for s in range(3)]
        # Padding changes the values beside it through the 3x3 convolutions, so images are compared one a batch.
        model.calibrate([[x] for inputs in batches for x in inputs])
        value, count = self.by_hand(model.teacher, batches)
        (margin,) = model.losses["overhaul"].margins
        assert torch.equal(margin.count, count) and count.sum() > 100
        torch.testing.assert_close(margin.value, value, rtol=1e-4, atol=1e-6)

    def test_padding_is_not_observed(self, tmp_path):
        model = build_model(self.cfg(tmp_path))
        (margin,) = model.losses["overhaul"].margins
        features = -torch.ones(2, 32, 4, 6)
        features[1, :, 3:] = features[1, :, :, 4:] = -100.0  # the padding of an image of 48 x 64
        model.losses["overhaul"].observe([features], StepContext(SIZES, CANVAS))
        assert (margin.value == -1).all() and (margin.count == 4 * 6 + 3 * 4).all()

    def test_calibrated_on_the_first_training_images(self, tmp_path):  # D16: the batches that the step is given
        model = build_model(self.cfg(tmp_path, KD__OVERHAUL__CALIBRATION_IMAGES=3)).train()
        batches = [batch(((64, 96), (64, 96)), seed=s) for s in range(3)]
        for inputs in batches:
            model(inputs)
        value, count = self.by_hand(model.teacher, batches[:2])  # 4 images: the first two batches
        (margin,) = model.losses["overhaul"].margins
        assert torch.equal(margin.count, count)
        torch.testing.assert_close(margin.value, value, rtol=1e-4, atol=1e-6)

    def test_a_tap_that_is_never_negative_is_calibrated_once_and_warned_of(self, tmp_path, caplog):  # D15
        cfg = self.cfg(tmp_path, KD__OVERHAUL__CALIBRATION_IMAGES=2)
        cfg.KD.OVERHAUL.STUDENT_TAPS = ["res4"]
        model = build_model(cfg).train()
        (margin,) = model.losses["overhaul"].margins
        observed = []
        margin.observe = lambda *a: observed.append(1)
        for _ in range(3):
            model(batch())
        assert len(observed) == 1
        warnings = [r.getMessage() for r in caplog.records if "never negative" in r.getMessage()]
        assert len(warnings) == 1 and "res4" in warnings[0]

    def test_a_state_of_the_first_version_is_calibrated(self, tmp_path):
        model = build_model(self.cfg(tmp_path, KD__OVERHAUL__CALIBRATION_IMAGES=2)).train()
        model(batch())
        state = model.state_dict()
        del state._metadata["kd_det.losses"]["overhaul.observed"], state._metadata["kd_det.teacher"]
        other = build_model(self.cfg(tmp_path, KD__OVERHAUL__CALIBRATION_IMAGES=2)).train()
        other.load_state_dict(state)
        (margin,), (saved,) = other.losses["overhaul"].margins, model.losses["overhaul"].margins
        assert torch.equal(margin.value, saved.value)
        other(batch(seed=5))
        assert torch.equal(margin.value, saved.value)

    def test_running_is_over_all_images_so_far(self, tmp_path):
        model = build_model(self.cfg(tmp_path, KD__OVERHAUL__MARGIN="running")).train()
        first, second = batch(((64, 96),), seed=1), batch(((64, 96),), seed=2)
        model(first), model(second)
        value, count = self.by_hand(model.teacher, [first, second])
        (margin,) = model.losses["overhaul"].margins
        assert torch.equal(margin.count, count)
        torch.testing.assert_close(margin.value, value, rtol=1e-4, atol=1e-6)

    def test_norm_is_the_closed_form(self, tmp_path):
        model = build_model(self.cfg(tmp_path, KD__OVERHAUL__MARGIN="norm"))
        norm = model.teacher.backbone.bottom_up.res4[-1].conv3.norm
        assert torch.equal(model.losses["overhaul"].margins[0].value, margin_from_norm(norm.weight, norm.bias))

    def test_norm_of_a_folded_frozen_batch_norm_is_refused(self, tmp_path):
        teacher = tiny_cfg(depth=50, width=8, MODEL__RESNETS__NORM="FrozenBN")
        with pytest.raises(ValueError, match="folded into weight and bias .* use 'calibrated'"):
            build_model(self.cfg(tmp_path, teacher=teacher, KD__OVERHAUL__MARGIN="norm"))

    def test_norm_without_a_batch_norm(self, tmp_path):
        teacher = tiny_cfg(depth=50, width=8, MODEL__RESNETS__NORM="")
        with pytest.raises(ValueError, match="needs a batch norm before 'res4.pre_activation', found NoneType"):
            build_model(self.cfg(tmp_path, teacher=teacher, KD__OVERHAUL__MARGIN="norm"))

    def test_unknown(self, tmp_path):
        with pytest.raises(ValueError, match="Unknown KD.OVERHAUL.MARGIN 'calibrate'. Did you mean 'calibrated'"):
            build_model(self.cfg(tmp_path, KD__OVERHAUL__MARGIN="calibrate"))

    def test_margins_survive_half_precision(self, tmp_path):
        loss = build_model(self.cfg(tmp_path)).losses["overhaul"]
        loss.observe([torch.randn(2, 32, 4, 6)], StepContext([(64, 96)] * 2, CANVAS))
        count = loss.margins[0].count.clone()
        assert torch.equal(loss.half().margins[0].count, count)


class TestSimilarity:
    def test_over_regions(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "Similarity")).train()
        loss = model.losses["similarity"]
        seen = []
        loss.register_forward_hook(lambda m, args, out: seen.append((args[2], out)))
        model(batch())
        ((context, value),) = seen
        ((s, t),) = context.region_pairs()
        assert len(s.features) == 32
        assert value.item() == similarity_preserving_loss(s.features, t.features).item() > 0

    def test_every_image_brings_as_many_regions_and_all_together_no_more_than_asked(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "Similarity", KD__SIMILARITY__MAX_REGIONS=11)).train()
        loss = model.losses["similarity"]
        seen = []
        loss.register_forward_hook(lambda m, args, out: seen.append((args[2], out)))
        model(batch())  # two images of 16 regions
        ((context, value),) = seen
        ((s, t),) = context.region_pairs()
        index = [*range(5), *range(16, 21)]
        assert value.item() == similarity_preserving_loss(s.features[index], t.features[index]).item() > 0
        with pytest.raises(ValueError, match="max_regions must be at least 2, found 1"):
            SimilarityLoss(max_regions=1)

    def test_over_images_pools_the_valid_part_to_a_grid(self, context):
        loss = SimilarityLoss(student_taps=["p3"], samples="images", grid=2)
        student, teacher = torch.randn(2, 4, 8, 12), torch.randn(2, 6, 8, 12)

        def pooled(x):
            # 8 x 12 positions of the first image, 6 x 8 of the second (48 x 64 pixels at stride 8), in 2 x 2 cells
            first = x[0].unfold(1, 4, 4).unfold(2, 6, 6).mean((-1, -2))
            second = x[1, :, :6, :8].unfold(1, 3, 3).unfold(2, 4, 4).mean((-1, -2))
            return torch.stack([first, second])

        expected = similarity_preserving_loss(pooled(student), pooled(teacher))
        assert loss([student], [teacher], context).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_one_image_is_an_error(self, tmp_path):
        loss = SimilarityLoss(student_taps=["p3"], samples="images")
        with pytest.raises(ValueError, match="at least 2 images in the global batch, found 1"):
            loss([torch.randn(1, 4, 8, 12)], [torch.randn(1, 4, 8, 12)], StepContext([(64, 96)], CANVAS))
        with pytest.raises(ValueError, match="IMS_PER_BATCH must be at least 2, found 1"):
            build_model(
                distillation_cfg(tmp_path, "Similarity", KD__SIMILARITY__SAMPLES="images", SOLVER__IMS_PER_BATCH=1)
            )


class TestLogitsOfRegions:
    def run(self, tmp_path, name):
        model = build_model(distillation_cfg(tmp_path, name)).train()
        (loss,) = model.losses.values()
        seen = []
        loss.register_forward_hook(lambda m, args, out: seen.append((args[2], out)))
        model(batch())
        return seen[0]

    def test_dist(self, tmp_path):
        context, value = self.run(tmp_path, "DIST")
        ((s, t),) = context.region_pairs()
        assert value.item() == dist_loss(s.logits, t.logits).item() > 0

    def test_dkd_takes_the_students_labels(self, tmp_path):
        context, value = self.run(tmp_path, "DKD")
        ((s, t),) = context.region_pairs()
        labels = context.region_targets(0).classes  # 3 is background
        expected = dkd_loss(s.logits, t.logits, labels, beta=0.25, temperature=1.0)
        assert value.item() == expected.item() > 0
        assert 6 <= (labels < 3).sum() < 32

    def test_dkd_reads_no_taps(self):
        with pytest.raises(ValueError, match="reads no taps, found"):
            DKDLoss(student_taps=["linear"])


class TestBoundedRegression:
    def instances(self):
        truth = Instances(CANVAS)
        truth.gt_boxes = Boxes(torch.tensor([[0.0, 0, 40, 40], [50, 10, 90, 60]]))
        truth.gt_classes = torch.tensor([2, 0])
        return truth

    def test_labels_are_the_ones_the_student_was_trained_with(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "BoundedRegression")
        model = build_model(cfg).train()
        labelled = []
        own = model.student.roi_heads.label_and_sample_proposals
        model.student.roi_heads.label_and_sample_proposals = lambda *a: labelled.append(own(*a)) or labelled[-1]
        seen = []
        model.losses["bounded_regression"].register_forward_hook(lambda m, args, out: seen.append(args[2]))
        model(batch())
        targets = seen[0].region_targets(0)
        classes = torch.cat([p.gt_classes for p in labelled[0]])
        foreground = classes < 3
        assert foreground.sum() >= 6  # the ground truth itself is among the samples
        assert torch.equal(targets.foreground, foreground) and torch.equal(targets.classes, classes)
        boxes = torch.cat([p.proposal_boxes.tensor for p in labelled[0]])[foreground]
        truth = torch.cat([p.gt_boxes.tensor for p in labelled[0]])[foreground]
        transform = model.student.roi_heads.box_predictor.box2box_transform
        assert torch.equal(targets.deltas[foreground], transform.get_deltas(boxes, truth))
        assert not targets.deltas[~foreground].any()
        # Matched again, as for heads that do not return their proposals, the labels are the same.
        sampled = SampledRegions([p.proposal_boxes for p in labelled[0]], None)
        again = RegionHead(model.student.roi_heads).label(sampled, seen[0].ground_truth(), 0)
        assert torch.equal(again.classes, classes) and torch.allclose(again.deltas, targets.deltas)

    def test_is_its_function_on_the_regions_class(self):
        model = build_model(tiny_cfg())
        head = RegionHead(model.roi_heads, side="student")
        boxes = [Boxes(torch.tensor([[0.0, 0, 38, 42], [0, 50, 10, 60], [52, 10, 90, 58]]))]
        targets = head.label(SampledRegions(boxes, None), [self.instances()], 0)
        assert targets.foreground.tolist() == [True, False, True] and targets.classes.tolist() == [2, 3, 0]
        deltas = torch.arange(3 * 12.0).view(3, 12)
        assert targets.of_class(deltas).tolist() == [[8, 9, 10, 11], [0] * 4, [24, 25, 26, 27]]
        assert targets.of_class(deltas[:, :4]).tolist() == [[0, 1, 2, 3], [0] * 4, [24, 25, 26, 27]]

    def test_the_teachers_units_are_converted(self, tmp_path):
        teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS=[20.0, 20.0, 10.0, 10.0])
        model = build_model(distillation_cfg(tmp_path, "BoundedRegression", teacher=teacher)).train()
        seen = []
        model.losses["bounded_regression"].register_forward_hook(lambda m, args, out: seen.append((args[2], out)))
        model(batch())
        ((context, value),) = seen
        ((s, t),) = context.region_pairs()
        targets = context.region_targets(0)
        # The student's weights are Detectron2's default (10, 10, 5, 5): half of the teacher's.
        foreground = targets.foreground
        expected = bounded_regression_loss(
            targets.of_class(s.deltas)[foreground],
            targets.of_class(t.deltas)[foreground] / 2,
            targets.deltas[foreground],
        )
        share = foreground.float().mean().item()  # of all regions, by whose number a box loss is divided
        assert value.item() == pytest.approx(share * expected.item(), rel=1e-5) and expected > 0

    def test_images_without_objects(self):
        model = build_model(tiny_cfg())
        empty = Instances(CANVAS)
        empty.gt_boxes, empty.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
        regions = SampledRegions([Boxes(torch.rand(5, 4) + torch.tensor([0.0, 0, 1, 1]))], None)
        targets = RegionHead(model.roi_heads).label(regions, [empty], 0)
        assert not targets.foreground.any() and targets.of_class(torch.ones(5, 12)).tolist() == [[0.0] * 4] * 5

    def test_class_counts_that_differ(self, tmp_path):
        teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_HEADS__NUM_CLASSES=5)
        with pytest.raises(ValueError, match="the student has 3 classes and the teacher 5"):
            build_model(distillation_cfg(tmp_path, "BoundedRegression", teacher=teacher))

    def test_a_negative_margin(self):
        with pytest.raises(ValueError, match="margin must be a number >= 0, found -1"):
            BoundedRegressionLoss(margin=-1.0)


class TestCascade:
    @pytest.mark.parametrize("teacher_is_cascade", [True, False])
    def test_region_losses_of_a_cascade_student(self, tmp_path, teacher_is_cascade):
        opts = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
        teacher = tiny_cfg(depth=50, width=8, **(opts if teacher_is_cascade else {}))
        losses = ("SoftTarget", "Similarity", "BoundedRegression")
        model = build_model(distillation_cfg(tmp_path, *losses, teacher=teacher, **opts)).train()
        seen = []
        model.losses["soft_target"].register_forward_hook(lambda m, args, out: seen.append((args[2], out)))
        losses = model(batch())
        ((context, value),) = seen
        pairs = context.region_pairs()
        assert len(pairs) == 3 and "loss_bounded_regression" in losses
        expected = sum(soft_target_loss(s.logits, t.logits, temperature=2.0) for s, t in pairs) / 3
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_the_teacher_of_a_students_last_stage_is_the_last(self, tmp_path):
        cascade = {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}
        two = {
            "MODEL__ROI_BOX_CASCADE_HEAD__IOUS": [0.5, 0.6],
            "MODEL__ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0]],
        }
        teacher = tiny_cfg(depth=50, width=8, **cascade)
        # Student's stages, and of the three of the teacher those that they are compared with: of units 10, 20 and 30.
        for opts, stages in (({}, [2]), ({**cascade, **two}, [0, 2]), (cascade, [0, 1, 2])):
            losses = ("BoundedRegression", "SoftTarget")
            model = build_model(distillation_cfg(tmp_path, *losses, teacher=teacher, **opts)).train()
            seen = []
            model.losses["bounded_regression"].register_forward_hook(lambda m, args, out: seen.append(args[2]))  # noqa: B023
            model(batch())
            (context,) = seen
            assert len(context.region_pairs()) == len(stages)
            for stage, theirs in enumerate(stages):
                boxes = context.sampled[stage].boxes
                expected = RegionHead(model.teacher.roi_heads)(context.teacher_outputs, boxes, theirs)
                _, found = context.region_pairs()[stage]
                assert torch.equal(found.logits, expected.logits) and torch.equal(found.deltas, expected.deltas)
                units = RegionHead(model.student.roi_heads).delta_weights(stage)[0] / (10 * (theirs + 1))
                assert context.teacher_units(stage) == [units] * 4


def test_add_kd_config_changes_no_key_of_detectron2():
    cfg = get_cfg()
    add_kd_config(cfg)

    def same(ours, plain):
        for key, value in plain.items():
            if isinstance(value, CfgNode):
                same(ours[key], value)
            else:
                assert ours[key] == value, key

    same(cfg, get_cfg())
