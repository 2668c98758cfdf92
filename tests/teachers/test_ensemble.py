"""Several teachers of one student: averaged, or each with losses of its own."""

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from kd_det import Distiller, add_kd_config, student_cfg
from kd_det.config_file import merge_config_file
from kd_det.features.regions import RegionHead
from kd_det.losses import HintLoss, NSTLoss, OverhaulLoss, SoftTargetLoss, soft_target_loss
from kd_det.teachers import OtherTeacher, TeacherAverage
from kd_det.teachers.ensemble import AveragedHead
from tests.engine.test_resume import load, resume_from
from tests.test_accelerator import retinanet
from tests.tiny import batch, distillation_cfg, tiny_cfg, tiny_retinanet_cfg
from tests.tiny_run import differing, run_cfg, train


def write_teacher(tmp_path, name: str, seed: int = 5, **opts) -> dict:
    """A teacher's files; its entry in KD.TEACHERS."""
    cfg = tiny_cfg(depth=50, width=8, **opts)
    torch.manual_seed(seed)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / f"{name}.pth")
    (tmp_path / f"{name}.yaml").write_text(cfg.dump())
    return {"CONFIG_FILE": str(tmp_path / f"{name}.yaml"), "WEIGHTS": str(tmp_path / f"{name}.pth")}


def cfg_of(tmp_path, *losses, teachers, **opts):
    return distillation_cfg(tmp_path, *losses, KD__TEACHERS=teachers, **opts)


def values(model, seed: int = 0):
    torch.manual_seed(seed)
    return {key: value.item() for key, value in model.train()(batch()).items()}


class TestAveraged:
    def test_maps_logits_and_deltas_are_weighted_means(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "WEIGHT": 3.0}
        taps = {"KD__HINT__STUDENT_TAPS": ["p3"]}
        model = build_model(cfg_of(tmp_path, "Hint", "SoftTarget", teachers=[entry], **taps)).train()
        seen = {}
        hint, soft = model.losses["hint"], model.losses["soft_target"]
        hint.register_forward_pre_hook(lambda m, args: seen.update(theirs=args[1], context=args[2]))
        losses = values(model)
        first, second = model.teachers
        images = model.student.preprocess_image(batch()).tensor
        maps = [network.backbone(images) for network in (first, second)]
        torch.testing.assert_close(seen["theirs"][0], 0.25 * maps[0]["p3"] + 0.75 * maps[1]["p3"])
        ((own, theirs),) = seen["context"].region_pairs()
        boxes = seen["context"].sampled[0].boxes
        found = [RegionHead(n.roi_heads)(x, boxes, 0) for n, x in zip((first, second), maps)]
        for field in ("features", "logits", "deltas"):
            expected = 0.25 * getattr(found[0], field) + 0.75 * getattr(found[1], field)
            torch.testing.assert_close(getattr(theirs, field), expected)
        # The mean of logits is the geometric mean of distributions, at any temperature.
        geometric = [w * f.logits.double().div(soft.temperature).log_softmax(1) for w, f in zip((0.25, 0.75), found)]
        targets = sum(geometric) * soft.temperature
        expected = soft_target_loss(own.logits.double(), targets, temperature=soft.temperature)
        assert losses["loss_soft_target"] == pytest.approx(expected.item(), rel=1e-4)

    def test_of_one_network_twice_is_that_network(self, tmp_path):
        names = ("NST", "SoftTarget", "BoundedRegression", "Similarity")
        cfg = distillation_cfg(tmp_path, *names)
        alone = values(build_model(cfg))
        node = cfg.KD.TEACHER
        cfg.KD.TEACHERS = [{"CONFIG_FILE": node.CONFIG_FILE, "WEIGHTS": node.WEIGHTS}]
        torch.manual_seed(1)
        assert cfg.KD.TEACHERS and values(build_model(cfg)).keys() == alone.keys()
        model = build_model(cfg)
        model.load_state_dict(build_model(distillation_cfg(tmp_path, *names)).state_dict())
        cfg.KD.TEACHERS = []
        single = build_model(cfg)
        single.load_state_dict(model.state_dict())
        assert values(model) == pytest.approx(values(single), rel=1e-5)

    def test_deltas_come_in_the_first_ones_units(self):
        other = {"MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS": (20.0, 20.0, 10.0, 10.0)}
        networks = [build_model(tiny_cfg()).eval(), build_model(tiny_cfg(**other)).eval()]
        networks[1].load_state_dict(networks[0].state_dict())
        maps = networks[0].backbone(networks[0].preprocess_image(batch()).tensor)
        boxes = [x["instances"].gt_boxes for x in batch()]
        heads = [RegionHead(network.roi_heads) for network in networks]
        mean = AveragedHead(heads, [0.5, 0.5])([maps, maps], boxes, 0)
        single = heads[0](maps, boxes, 0).deltas
        torch.testing.assert_close(mean.deltas, 0.5 * (single + single / 2))  # 2x the units: half of each delta

    def test_without_a_first_one_and_in_python(self, tmp_path):
        entries = [write_teacher(tmp_path, "b"), write_teacher(tmp_path, "c", seed=6)]
        opts = {"KD__TEACHER__CONFIG_FILE": "", "KD__TEACHER__WEIGHTS": ""}
        model = build_model(cfg_of(tmp_path, "NST", teachers=entries, **opts))
        taps = ("p2", "p3", "p4", "p5")
        same = Distiller(
            student=model.student,
            teacher=TeacherAverage([build_model(tiny_cfg(depth=50, width=8)) for _ in entries]),
            losses=[NSTLoss(student_taps=taps, weight=20.0)],
        )
        for ours, theirs in zip(same.teachers, model.teachers):
            ours.load_state_dict(theirs.state_dict())
        assert values(same)["loss_nst"] == pytest.approx(values(model)["loss_nst"], rel=1e-5)

    def test_every_loss_but_those_that_read_the_network(self, tmp_path):
        entry = write_teacher(tmp_path, "b")
        names = ("AttentionTransfer", "Overhaul", "PKD", "CWD", "FGD", "MGD", "ReviewKD", "DKD", "DIST", "FSP", "Hint")
        losses = values(build_model(cfg_of(tmp_path, *names, teachers=[entry])))
        assert len(losses) == 4 + len(names)
        for loss in (OverhaulLoss(student_taps=["res4.pre_activation"], margin=[(torch.ones(32), torch.ones(32))]),):
            networks = [build_model(tiny_cfg(depth=50, width=8)) for _ in range(2)]
            with pytest.raises(ValueError, match="OverhaulLoss reads the teacher's network itself"):
                Distiller(student=build_model(tiny_cfg()), teacher=TeacherAverage(networks), losses=[loss])

    def test_of_other_classes(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "CLASSES": ["dog", "cat", "cow"]}
        cfg = cfg_of(tmp_path, "NST", teachers=[entry], KD__TEACHER__CLASSES=["cat", "dog", "cow"])
        build_model(cfg)
        cfg.KD.LOSSES = ("SoftTarget",)
        with pytest.raises(ValueError, match="know different classes, .*: cat, dog, cow and dog, cat, cow"):
            build_model(cfg)

    def test_of_dense_heads(self, tmp_path):
        teacher = tiny_retinanet_cfg(depth=50, width=8)
        opts = {"KD__CROSS_KD__CUT": 1, "KD__NST__STUDENT_TAPS": ["p3"]}
        cfg = retinanet(distillation_cfg(tmp_path, "DenseSoftTarget", "NST", teacher=teacher, **opts))
        cfg.KD.TEACHERS = [{key: cfg.KD.TEACHER[key] for key in ("CONFIG_FILE", "WEIGHTS")}]
        model = build_model(cfg)
        twice = values(model)
        cfg.KD.TEACHERS = []
        single = build_model(cfg)
        single.load_state_dict(model.state_dict())
        assert twice == pytest.approx(values(single), rel=1e-5)
        cfg.KD.TEACHERS, cfg.KD.LOSSES = [dict(cfg.KD.TEACHER)], ("CrossKD",)
        with pytest.raises(ValueError, match="CrossKDLoss reads the teacher's network itself"):
            build_model(cfg)

    @pytest.mark.parametrize(
        "losses, opts, message",
        [
            (("NST",), {"MODEL__FPN__OUT_CHANNELS": 12}, r"agree at 'p2': they have .* \[\(8, 4\), \(12, 4\)"),
            (("SoftTarget",), {"MODEL__ROI_HEADS__NUM_CLASSES": 5}, "must agree in their classes"),
        ],
    )
    def test_those_that_differ_are_refused(self, tmp_path, losses, opts, message):
        entry = write_teacher(tmp_path, "b", **opts)
        with pytest.raises(ValueError, match=message):
            build_model(cfg_of(tmp_path, *losses, teachers=[entry]))


class TestOwnLosses:
    def test_each_is_what_it_is_alone(self, tmp_path):
        entry = write_teacher(tmp_path, "b", MODEL__FPN__OUT_CHANNELS=12, MODEL__ROI_HEADS__NUM_CLASSES=5)
        own = {"NAME": "b", "LOSSES": ["NST"], "LOSS_OPTS": ["KD.NST.WEIGHT", 5.0, "KD.NST.STUDENT_TAPS", ["p3"]]}
        model = build_model(cfg_of(tmp_path, "NST", "SoftTarget", teachers=[{**entry, **own}]))
        found = values(model)
        first = distillation_cfg(tmp_path, "NST", "SoftTarget")
        alone = build_model(first)
        alone.load_state_dict(model.state_dict())
        expected = values(alone)
        second = distillation_cfg(tmp_path, "NST", KD__NST__WEIGHT=5.0, KD__NST__STUDENT_TAPS=["p3"])
        second.merge_from_list([x for key, value in entry.items() for x in (f"KD.TEACHER.{key}", value)])
        alone = build_model(second)
        alone.load_state_dict(model.state_dict())
        expected["loss_nst_b"] = values(alone)["loss_nst"]
        assert found == pytest.approx(expected, rel=1e-5)

    def test_regions_are_asked_of_each_teacher(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "NAME": "b", "LOSSES": ["SoftTarget"]}
        losses = values(build_model(cfg_of(tmp_path, "SoftTarget", "NST", teachers=[entry])))
        assert losses["loss_soft_target"] != losses["loss_soft_target_b"]

    def test_only_a_teacher_whose_losses_act_runs(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "NAME": "b", "LOSSES": ["Hint"], "LOSS_OPTS": ["KD.HINT.STOP_ITER", 0]}
        model = build_model(cfg_of(tmp_path, "NST", teachers=[entry]))
        runs = []
        for network in model.teachers:
            network.backbone.register_forward_pre_hook(lambda m, args: runs.append(m))
        losses = values(model)
        assert runs == [model.teachers[0].backbone] and losses["loss_hint_b"] == 0

    def test_off_is_off(self, tmp_path):
        entry = {"CONFIG_FILE": "gone.yaml", "NAME": "b", "LOSSES": ["NST"], "LOSS_OPTS": ["KD.NST.WEIGHT", 0.0]}
        model = build_model(cfg_of(tmp_path, teachers=[entry]))
        plain = build_model(student_cfg(distillation_cfg(tmp_path)))
        plain.load_state_dict(model.state_dict())
        assert model.teacher is None and values(model) == values(plain)

    def test_alone(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "NAME": "b", "LOSSES": ["NST"]}
        opts = {"KD__TEACHER__CONFIG_FILE": "", "KD__TEACHER__WEIGHTS": ""}
        model = build_model(cfg_of(tmp_path, teachers=[entry], **opts))
        assert list(model.losses) == ["nst_b"] and len(model.teachers) == 1
        again = build_model(cfg_of(tmp_path, teachers=[entry], **opts))
        again.load_state_dict(model.state_dict())

    def test_in_python(self):
        networks = [build_model(tiny_cfg(depth=50, width=8)) for _ in range(2)]
        model = Distiller(
            student=build_model(tiny_cfg()),
            teacher=networks[0],
            losses=[HintLoss(student_taps=["p3"])],
            other_teachers=[OtherTeacher("b", networks[1], [HintLoss(student_taps=["p4"]), SoftTargetLoss()])],
        )
        assert {"loss_hint", "loss_hint_b", "loss_soft_target_b"} < values(model).keys()
        assert model.teacher_of(model.losses["hint_b"]) is networks[1]

    def test_with_the_students_average(self, tmp_path):
        entry = {"CONFIG_FILE": "ema", "NAME": "self", "LOSSES": ["SoftTarget"]}
        model = build_model(cfg_of(tmp_path, "NST", teachers=[entry]))
        values(model)
        saved = model.state_dict()._metadata["kd_det.teacher_averages"]
        assert list(saved) == ["self"] and saved["self"]["updates"] == 1
        with pytest.raises(ValueError, match="The student's own average teaches by losses of its own"):
            build_model(cfg_of(tmp_path, "NST", teachers=[{"CONFIG_FILE": "ema"}]))


class TestCheckpoint:
    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path):
        entries = [write_teacher(tmp_path, "b"), {**write_teacher(tmp_path, "c"), "NAME": "c", "LOSSES": ["Hint"]}]
        cfg = run_cfg(tmp_path, "Hint", "Overhaul", KD__TEACHERS=entries)
        train(cfg)
        resumed = resume_from(cfg, "model_0000003.pth", "resumed")
        train(resumed, resume=True)
        assert differing(load(resumed.OUTPUT_DIR), load(cfg.OUTPUT_DIR)) == []

    def test_states_belong_to_their_own_teacher(self, tmp_path, caplog):
        def build(seed):
            entry = {**write_teacher(tmp_path, "b", seed=seed), "NAME": "b", "LOSSES": ["Hint"]}
            torch.manual_seed(seed)
            return build_model(cfg_of(tmp_path, "Hint", teachers=[entry]))

        state, other = build(5).state_dict(), build(6)
        fresh = {key: value.clone() for key, value in other.losses["hint_b"].state_dict().items()}
        other.load_state_dict(state)
        saved = state._metadata["kd_det.losses"]
        assert "another teacher" in caplog.text
        for key, value in other.losses["hint_b"].state_dict().items():
            assert torch.equal(fresh[key], value)
        for key, value in other.losses["hint"].state_dict().items():
            assert torch.equal(saved[f"hint.{key}"], value)

    def test_one_of_a_single_teacher_loads_beside_a_second(self, tmp_path):
        old = build_model(distillation_cfg(tmp_path, "Hint")).state_dict()
        entry = {**write_teacher(tmp_path, "b"), "NAME": "b", "LOSSES": ["Hint"]}
        model = build_model(cfg_of(tmp_path, "Hint", teachers=[entry]))
        model.load_state_dict(old)
        for key, value in model.losses["hint"].state_dict().items():
            assert torch.equal(old._metadata["kd_det.losses"][f"hint.{key}"], value)


class TestConfig:
    def test_a_list_of_teachers_goes_through_files(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "OPTS": ["TEST.DETECTIONS_PER_IMAGE", 50], "WEIGHT": 2.0}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"KD": {"TEACHERS": [entry]}}))
        cfg, again = get_cfg(), get_cfg()
        for config in (cfg, again):
            add_kd_config(config)
        merge_config_file(cfg, str(tmp_path / "run.yaml"))
        (tmp_path / "config.yaml").write_text(cfg.dump())
        again.merge_from_file(str(tmp_path / "config.yaml"))
        assert again.KD.TEACHERS == cfg.KD.TEACHERS == [entry]
        again.merge_from_list(["KD.TEACHERS", str([entry, entry])])
        assert again.KD.TEACHERS == [entry, entry]

    @pytest.mark.parametrize(
        "entry, message",
        [
            ("b.yaml", r"KD.TEACHERS\[0\] must have keys, such as CONFIG_FILE and WEIGHTS, found 'b.yaml'"),
            ({"CONFIG": "b.yaml"}, r"Unknown key of KD.TEACHERS\[0\] 'CONFIG'. Did you mean 'CONFIG_FILE'"),
            ({"CONFIG_FILE": 3}, r"KD.TEACHERS\[0\]: .*KD.TEACHER.CONFIG_FILE"),
            ({"LOSSES": ["NST"]}, "with LOSSES of its own needs a NAME"),
            ({"NAME": "b"}, "needs a NAME .* found NAME 'b' and LOSSES"),
            ({"NAME": "a.b", "LOSSES": ["NST"]}, "needs a NAME of letters"),
            ({"NAME": "b", "LOSSES": ["NSTT"]}, "Unknown distillation loss 'NSTT'"),
            ({"NAME": "b", "LOSSES": ["NST"], "WEIGHT": 2.0}, "WEIGHT would not be used here"),
            ({"LOSS_OPTS": ["KD.NST.WEIGHT", 2.0]}, "LOSS_OPTS would not be used here"),
            ({"NAME": "b", "LOSSES": ["NST"], "LOSS_OPTS": ["NST.WEIGHT", 2.0]}, "holds keys of losses"),
            ({"NAME": "b", "LOSSES": ["NST"], "LOSS_OPTS": ["KD.NST.WIGHT", 2.0]}, "Did you mean 'KD.NST.WEIGHT'"),
            ({"WEIGHT": 0.0}, "Weights of averaged teachers must be positive"),
        ],
    )
    def test_wrong_entries(self, tmp_path, entry, message):
        if isinstance(entry, dict) and "CONFIG" not in entry:
            entry = {**write_teacher(tmp_path, "b"), **entry}
        with pytest.raises(ValueError, match=message):
            build_model(cfg_of(tmp_path, "NST", teachers=[entry]))

    def test_two_of_one_name(self, tmp_path):
        entry = {**write_teacher(tmp_path, "b"), "NAME": "b", "LOSSES": ["NST"]}
        with pytest.raises(ValueError, match=r"two entries have one NAME, found \['b', 'b'\]"):
            build_model(cfg_of(tmp_path, "NST", teachers=[entry, entry]))
