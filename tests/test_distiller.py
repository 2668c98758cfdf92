import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import configurable
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det import DISTILLATION_LOSS_REGISTRY, DistillationLoss, Distiller, add_loss_config, build_teacher, student_cfg
from kd_det.features.regions import RegionHead
from kd_det.losses import NSTLoss, nst_loss, soft_target_loss
from tests.tiny import batch, distillation_cfg, tiny_cfg

ALL_LOSSES = ("NSTLoss", "AttentionTransferLoss", "OverhaulLoss", "SimilarityLoss", "HintLoss", "SoftTargetLoss")


def train(model, steps: int, *, reseed: bool = False):
    """Adam on one batch, the same proposals sampled at every step if ``reseed``; the losses of every step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    totals = []
    for _ in range(steps):
        if reseed:
            torch.manual_seed(0)
        losses = model(batch())
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append({key: value.item() for key, value in losses.items()})
    return totals


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestForward:
    def test_adds_weighted_losses_to_the_students(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST", "SoftTarget", KD__NST__WEIGHT=3.0, KD__SOFT_TARGET__WEIGHT=0.5)
        model = build_model(cfg).train()
        torch.manual_seed(3)
        losses = model(batch())

        # The same forward once more, put together by hand from the student and the teacher.
        student, teacher = model.student, model.teacher
        recorded = {}
        predictor = student.roi_heads.box_predictor.register_forward_hook(lambda m, a, o: recorded.update(logits=o[0]))
        pooler = student.roi_heads.box_pooler.register_forward_hook(lambda m, a, o: recorded.update(boxes=a[1]))
        torch.manual_seed(3)
        own = student(batch())
        predictor.remove(), pooler.remove()
        features = student.backbone(student.preprocess_image(batch()).tensor)
        with torch.no_grad():
            expected = teacher.backbone(teacher.preprocess_image(batch()).tensor)
            pooled = teacher.roi_heads.box_pooler([expected[f] for f in ("p2", "p3", "p4", "p5")], recorded["boxes"])
            logits, _ = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
        nst = 0
        for level, stride in (("p2", 4), ("p3", 8), ("p4", 16), ("p5", 32)):
            valid = torch.zeros(2, 1, *features[level].shape[-2:], dtype=torch.bool)
            valid[0] = True  # 64 x 96, the canvas
            valid[1, :, : -(-48 // stride), : -(-64 // stride)] = True
            nst = nst + nst_loss(features[level], expected[level], valid=valid)
        assert {key: losses[key].item() for key in own} == {key: value.item() for key, value in own.items()}
        assert losses["loss_nst"].item() == pytest.approx(3 * nst.item(), rel=1e-5)
        soft = soft_target_loss(recorded["logits"], logits, temperature=2.0)
        assert losses["loss_soft_target"].item() == pytest.approx(0.5 * soft.item(), rel=1e-5)
        assert losses.keys() == own.keys() | {"loss_nst", "loss_soft_target"}

    def test_eval_is_the_students(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "NST")).eval()
        for ours, plain in zip(model(batch()), model.student(batch())):
            assert torch.equal(ours["instances"].pred_boxes.tensor, plain["instances"].pred_boxes.tensor)
            assert torch.equal(ours["instances"].scores, plain["instances"].scores)

    @pytest.mark.parametrize("losses", [(name,) for name in ALL_LOSSES] + [ALL_LOSSES], ids=lambda x: "+".join(x))
    def test_each_loss_and_all_together_fall_in_20_steps(self, tmp_path, losses):
        cfg = distillation_cfg(tmp_path, *losses, KD__SIMILARITY__WEIGHT=100.0)
        model = build_model(cfg).train()
        totals = train(model, 20, reseed=True)
        for key in {loss.key for loss in model.losses.values()}:
            assert 0 < totals[-1][key] < totals[0][key], [t[key] for t in totals]

    def test_gradients_reach_all_of_student_and_connectors_and_nothing_of_the_teacher(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, *ALL_LOSSES)).train()
        sum(model(batch()).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
        assert not any("teacher" in name for name, _ in model.named_modules())

    def test_the_teacher_is_bit_equal_after_training(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, *ALL_LOSSES)).train()
        before = copy.deepcopy(model.teacher.state_dict())
        train(model, 3)
        model.train(), model.half(), model.float()
        after = model.teacher.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not model.teacher.training

    def test_a_tap_in_a_frozen_stage_is_warned_of_once(self, tmp_path, caplog):
        cfg = distillation_cfg(tmp_path, "Hint", KD__HINT__STUDENT_TAPS=["res2", "p3"], MODEL__BACKBONE__FREEZE_AT=2)
        model = build_model(cfg).train()
        model(batch()), model(batch())
        warnings = [r.getMessage() for r in caplog.records if "carry no gradient" in r.getMessage()]
        assert len(warnings) == 1 and "['res2']" in warnings[0]


class TestOff:
    @pytest.mark.parametrize("how", ["no losses", "weight 0"])
    def test_training_is_bit_identical_to_plain_detectron2(self, tmp_path, how):
        losses = () if how == "no losses" else ALL_LOSSES
        cfg = distillation_cfg(tmp_path, *losses)
        for name in ("NST", "AT", "OVERHAUL", "SIMILARITY", "HINT", "SOFT_TARGET"):
            cfg.KD[name].WEIGHT = 0.0
        plain_cfg = student_cfg(cfg)
        models = []
        for c in (cfg, plain_cfg):
            torch.manual_seed(7)
            model = build_model(c).train()
            train(model, 3)
            models.append(model)
        assert isinstance(models[0], Distiller) and not isinstance(models[1], Distiller)
        assert same_weights(*models)

    def test_building_teacher_and_connectors_does_not_advance_the_random_state(self, tmp_path):
        cfg = distillation_cfg(tmp_path, *ALL_LOSSES)
        draws = []
        for c in (cfg, student_cfg(cfg)):
            torch.manual_seed(7)
            build_model(c)
            draws.append(torch.rand(1).item())
        assert draws[0] == draws[1]

    def test_no_teacher_is_asked_for_without_losses(self):
        cfg = tiny_cfg(MODEL__META_ARCHITECTURE="Distiller")
        assert build_model(cfg).teacher is None


class TestSchedule:
    def test_factor(self):
        loss = NSTLoss(student_taps=["p2"], weight=4.0, warmup_iters=4, stop_iter=10)
        assert [loss.factor(i) for i in (0, 1, 2, 3, 4, 9, 10, 11)] == [1, 2, 3, 4, 4, 4, 0, 0]

    @pytest.mark.parametrize(
        "options, expected",
        [
            ({"decay": "linear", "decay_start": 2, "stop_iter": 6}, [4, 4, 4, 3, 2, 1, 0, 0]),
            ({"decay": "linear", "stop_iter": 4, "warmup_iters": 2}, [2, 3, 2, 1, 0, 0, 0, 0]),
            # 2 (1 + cos(x)) at x = 60, 90 and 120 degrees
            ({"decay": "cosine", "decay_start": 1, "stop_iter": 7}, [4, 4, 3.732051, 3, 2, 1, 0.267949, 0]),
        ],
    )
    def test_decay(self, options, expected):
        loss = NSTLoss(student_taps=["p2"], weight=4.0, **options)
        assert [loss.factor(i) for i in range(8)] == pytest.approx(expected, abs=1e-6)
        assert loss.factor(options["stop_iter"]) == 0  # exactly: nothing is computed

    def test_decay_ends_with_the_run(self, tmp_path):
        opts = {"SOLVER__MAX_ITER": 10, "KD__DECAY": "linear", "KD__DECAY_START": 2, "KD__HINT__STOP_ITER": 6}
        cfg = distillation_cfg(tmp_path, "NST", "Hint", "AttentionTransfer", KD__AT__DECAY="", **opts)
        nst, hint, at = (loss.schedule for loss in build_model(cfg).losses.values())
        assert [nst.factor(i) for i in (2, 6, 9, 10)] == [1, 0.5, 0.125, 0]
        assert [hint.factor(i) for i in (2, 4, 6)] == [1, 0.5, 0]
        assert at.is_constant

    def test_a_decayed_loss_is_off_bit_for_bit(self, tmp_path):
        decayed = distillation_cfg(tmp_path, "NST", KD__DECAY="cosine", KD__STOP_ITER=2)
        values = []
        for cfg in (decayed, student_cfg(decayed)):
            torch.manual_seed(0)
            model = build_model(cfg).train()
            with EventStorage(2):
                torch.manual_seed(0)
                values.append(model(batch()))
        distilled, plain = values
        assert distilled.pop("loss_nst") == 0 and distilled.keys() == plain.keys()
        assert all(torch.equal(distilled[key], plain[key]) for key in plain)

    def test_each_loss_has_its_own(self, tmp_path):
        cfg = distillation_cfg(
            tmp_path, "NST", "Hint", KD__STOP_ITER=4, KD__HINT__STOP_ITER=2, KD__HINT__WARMUP_ITERS=2
        )
        model = build_model(cfg).train()
        values = []
        with EventStorage() as storage:
            for _ in range(5):
                torch.manual_seed(0)
                values.append({k: v.item() for k, v in model(batch()).items()})
                storage.step()
        assert values[1]["loss_hint"] == pytest.approx(2 * values[0]["loss_hint"])
        assert [v["loss_hint"] > 0 for v in values] == [True, True, False, False, False]
        assert [v["loss_nst"] > 0 for v in values] == [True, True, True, True, False]

    def test_a_loss_that_is_off_still_gives_its_connectors_a_gradient(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "Hint", KD__STOP_ITER=0)
        model = build_model(cfg).train()
        sum(model(batch()).values()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.losses.parameters())


class TestCheckpoint:
    def test_is_a_plain_students(self, tmp_path):
        cfg = distillation_cfg(tmp_path, *ALL_LOSSES)
        model = build_model(cfg)
        DetectionCheckpointer(model, str(tmp_path)).save("student")
        state = torch.load(tmp_path / "student.pth", weights_only=True)["model"]
        plain = build_model(student_cfg(cfg)).eval()
        plain.load_state_dict(state, strict=True)
        assert list(state) == list(plain.state_dict())
        model.eval()
        for ours, theirs in zip(model(batch()), plain(batch())):
            assert torch.equal(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)

    def test_restores_connectors_and_margins_through_detectron2s_checkpointer(self, tmp_path):
        cfg = distillation_cfg(tmp_path, *ALL_LOSSES)
        model = build_model(cfg).train()
        train(model, 2)
        DetectionCheckpointer(model, str(tmp_path)).save("student")
        torch.manual_seed(99)
        other = build_model(cfg)
        assert not same_weights(model.losses, other.losses)
        DetectionCheckpointer(other).load(str(tmp_path / "student.pth"))
        assert same_weights(model, other) and same_weights(model.losses, other.losses)

    def test_plain_weights_load_into_a_distiller(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "Hint")
        plain = build_model(student_cfg(cfg))
        model = build_model(cfg)
        assert not same_weights(plain, model)
        model.load_state_dict(plain.state_dict())
        assert same_weights(plain, model)

    def test_is_no_larger_than_student_and_connectors(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "Hint", "NST"))
        torch.save(model.state_dict(), tmp_path / "ours.pth")
        torch.save(model.student.state_dict(), tmp_path / "plain.pth")
        connectors = sum(p.numel() * p.element_size() for p in model.losses.parameters())
        sizes = {name: (tmp_path / f"{name}.pth").stat().st_size for name in ("ours", "plain")}
        overhead = 1024 * len(model.losses.state_dict())  # names and headers of the archive
        assert sizes["plain"] + connectors < sizes["ours"] < sizes["plain"] + connectors + overhead

    def test_deepcopy_shares_the_teacher_and_taps_the_copy(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "NST")).train()
        copied = copy.deepcopy(model)
        assert copied.teacher is model.teacher
        with torch.no_grad():
            for p in copied.student.parameters():
                p.mul_(1.5)
        torch.manual_seed(0)
        first = model(batch())["loss_nst"]
        torch.manual_seed(0)
        second = copied(batch())["loss_nst"]
        second.backward()
        assert first.item() != second.item()
        assert copied.student.backbone.fpn_output2.weight.grad is not None
        assert model.student.backbone.fpn_output2.weight.grad is None


class TestExplicitArguments:
    def test_without_a_config(self, tmp_path):
        cfg = distillation_cfg(tmp_path)
        losses = [NSTLoss(student_taps=["p3"], weight=2.0)]
        model = Distiller(student=build_model(tiny_cfg()), teacher=build_teacher(cfg), losses=losses).train()
        assert model(batch())["loss_nst"] > 0

    def test_losses_without_a_teacher(self):
        with pytest.raises(ValueError, match=r"\['nst'\] need a teacher"):
            Distiller(student=build_model(tiny_cfg()), losses=[NSTLoss(student_taps=["p3"])])

    def test_two_losses_of_one_name(self, tmp_path):
        losses = [NSTLoss(student_taps=["p3"]), NSTLoss(student_taps=["p4"])]
        with pytest.raises(ValueError, match="Two losses are named 'nst'"):
            Distiller(student=build_model(tiny_cfg()), teacher=build_model(tiny_cfg()), losses=losses)


@DISTILLATION_LOSS_REGISTRY.register()
class MeanLoss(DistillationLoss):
    """As a user writes one: squared difference of the maps' means behind a scale."""

    name = "mean"
    needs_regions = True

    @configurable
    def __init__(self, *, scale: float, **kwargs):
        super().__init__(**kwargs)
        self.scale = nn.Parameter(torch.tensor(scale))

    @classmethod
    def from_config(cls, cfg, student, teacher):
        return {**super().from_config(cfg, student, teacher), "scale": cfg.KD.MEAN.SCALE}

    def forward(self, student, teacher, context):
        self.seen = context
        return sum((self.scale * s.mean() - t.mean()) ** 2 for s, t, _ in self.pairs(student, teacher, context))


def add_mean_loss_config(cfg):
    node = add_loss_config(cfg, "MEAN", weight=1.0, taps=("p3",))
    node.SCALE = 1.0


class TestOwnLoss:
    def test_one_class_and_one_config_function(self, tmp_path):
        cfg = distillation_cfg(tmp_path)
        add_mean_loss_config(cfg)
        cfg.merge_from_list(["KD.LOSSES", ["Mean", "NST"], "KD.MEAN.SCALE", 0.5])
        model = build_model(cfg).train()
        optimizer = build_optimizer(cfg, model)
        assert any(p is model.losses["mean"].scale for group in optimizer.param_groups for p in group["params"])
        assert model(batch())["loss_mean"] >= 0

    def test_regions_are_the_students_samples_asked_of_the_teacher_once(self, tmp_path):
        cfg = distillation_cfg(tmp_path)
        add_mean_loss_config(cfg)
        cfg.merge_from_list(["KD.LOSSES", ["Mean"]])
        model = build_model(cfg).train()
        model(batch())
        ((student, teacher),) = model.losses["mean"].seen.region_pairs()
        assert student.logits.shape == teacher.logits.shape == (2 * 16, 4)
        assert student.features.shape == teacher.features.shape == (32, 8, 3, 3)
        assert student.logits.requires_grad and not teacher.logits.requires_grad
        assert model.losses["mean"].seen.region_pairs()[0][1] is teacher

    def test_without_its_config_node(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "Mean")
        with pytest.raises(ValueError, match="configured by KD.MEAN, which the config lacks"):
            build_model(cfg)


class TestErrors:
    @pytest.mark.parametrize(
        "opts, message",
        [
            ({"KD__LOSSES": ["NSTT"]}, "Unknown distillation loss 'NSTT'. Did you mean 'NST'"),
            ({"KD__LOSSES": ["NST", "NSTLoss"]}, "names NSTLoss more than once"),
            ({"KD__NST__STUDENT_TAPS": ["p9"]}, "Unknown tap of the student 'p9'"),
            ({"KD__NST__TEACHER_TAPS": ["p2", "p3", "p4", "p55"]}, "tap of the teacher 'p55'. Did you mean 'p5'"),
            ({"KD__NST__TEACHER_TAPS": ["p2"]}, "4 student taps .* paired with 1 teacher taps"),
            ({"KD__NST__WEIGHT": -1.0}, "weight must be a finite number >= 0, found -1.0"),
            ({"KD__NST__KERNEL": "polynomial"}, "Unknown kernel 'polynomial'. Did you mean 'poly'"),
            ({"KD__STOP_ITER": -3}, "keys of KD.NST or of KD: .* STOP_ITER >= -1"),
            ({"KD__DECAY": "cosin"}, "keys of KD.NST or of KD: Unknown DECAY 'cosin'. Did you mean 'cosine'"),
            ({"KD__DECAY": "linear", "KD__DECAY_START": -1}, "DECAY_START must be a whole iteration >= 0 .* found -1"),
            (
                {"KD__DECAY": "linear", "KD__STOP_ITER": 5, "KD__NST__DECAY_START": 5},
                "DECAY_START .* STOP_ITER.* found 5 and 5",
            ),
            ({"KD__TEACHER__CONFIG_FILE": ""}, "KD.TEACHER.CONFIG_FILE is empty"),
            ({"KD__STUDENT__META_ARCHITECTURE": "GeneralisedRCNN"}, "Did you mean 'GeneralizedRCNN'"),
        ],
    )
    def test_before_training(self, tmp_path, opts, message):
        with pytest.raises(ValueError, match=message):
            build_model(distillation_cfg(tmp_path, "NST", **opts))

    @pytest.mark.parametrize(
        "key, value, message",
        [
            (
                "CONFIG_FILE",
                "COCO-Detection/faster_rcnn_R_110_FPN_3x.yaml",
                "Did you mean 'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'",
            ),
            ("WEIGHTS", "gone.pth", "weights of the teacher .* do not exist: 'gone.pth'"),
        ],
    )
    def test_without_its_teachers_file_it_infers_and_does_not_train(self, tmp_path, key, value, message):  # D19
        cfg = distillation_cfg(tmp_path, "NST")
        weights = build_model(cfg).state_dict()
        cfg.merge_from_list([f"KD.TEACHER.{key}", value])
        model = build_model(cfg)
        model.load_state_dict(weights)
        plain = build_model(student_cfg(cfg))
        plain.load_state_dict(weights)
        found, expected = (network.eval()(batch())[0]["instances"] for network in (model, plain))
        assert torch.equal(found.scores, expected.scores) and len(found)
        with pytest.raises(FileNotFoundError, match=message):
            model.train()(batch())

    def test_class_counts_that_differ(self, tmp_path):
        teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_HEADS__NUM_CLASSES=5)
        with pytest.raises(ValueError, match="the student has 3 classes and the teacher 5"):
            build_model(distillation_cfg(tmp_path, "SoftTarget", teacher=teacher))

    @pytest.mark.parametrize("side", ["STUDENT", "TEACHER"])
    def test_taps_on_each_networks_own_regions(self, tmp_path, side):
        cfg = distillation_cfg(tmp_path, "Hint", KD__HINT__STUDENT_TAPS=("p3",))
        cfg.KD.HINT[f"{side}_TAPS"] = ("roi_heads.box_head.fc1",)
        with pytest.raises(ValueError, match="box_head.fc1 on regions of its own, which do not correspond"):
            build_model(cfg)

    def test_classes_do_not_matter_to_nst(self, tmp_path):
        teacher = tiny_cfg(depth=50, width=8, MODEL__ROI_HEADS__NUM_CLASSES=5)
        assert build_model(distillation_cfg(tmp_path, "NST", teacher=teacher)).train()(batch())["loss_nst"] > 0

    def test_region_head_of_a_network_without_one(self):
        with pytest.raises(ValueError, match="the student has no roi_heads"):
            RegionHead(None, side="student")
