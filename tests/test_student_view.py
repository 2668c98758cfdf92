"""To whoever walks it, loads it or copies it, a Distiller is its student."""

import copy
import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kd_det import Distiller, student_cfg
from kd_det.losses import HintLoss, NSTLoss, OverhaulLoss
from tests.tiny import batch, distillation_cfg, tiny_cfg
from tests.tiny_run import run_cfg


def zoo_checkpoint(tmp_path, kind="pth", **opts):
    """A detector's checkpoint of other classes, or another box head, than the student's."""
    torch.manual_seed(3)
    state = build_model(tiny_cfg(**opts)).state_dict()
    if kind == "pth":
        torch.save({"model": state}, tmp_path / "zoo.pth")
    else:
        content = {"model": {key: value.numpy() for key, value in state.items()}, "__author__": "zoo"}
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    return str(tmp_path / f"zoo.{kind}"), state


class TestStartingFromADetectorOfOtherClasses:  # D1
    @pytest.mark.parametrize("kind", ["pth", "pkl"])
    @pytest.mark.parametrize("losses", [("NST", "Hint"), ()], ids=["distilled", "no losses"])
    @pytest.mark.parametrize(
        "opts, misfits",
        [
            ({"MODEL__ROI_HEADS__NUM_CLASSES": 7}, "box_predictor"),
            ({"MODEL__ROI_BOX_HEAD__FC_DIM": 24}, "box_head.fc1"),
        ],
        ids=["classes", "FC_DIM"],
    )
    def test_what_does_not_fit_is_skipped_with_a_warning(self, tmp_path, caplog, kind, losses, opts, misfits):
        path, state = zoo_checkpoint(tmp_path, kind, **opts)
        model = build_model(distillation_cfg(tmp_path, *losses))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with caplog.at_level(logging.WARNING):
            DetectionCheckpointer(model).load(path)
        assert any("Skip loading parameter" in r.getMessage() and misfits in r.getMessage() for r in caplog.records)
        for key, value in model.state_dict().items():
            fits = state[key].shape == value.shape
            assert torch.equal(value, state[key] if fits else before[key]), key
        losses = model.train()(batch())
        sum(losses.values()).backward()

    def test_in_a_default_trainer(self, tmp_path):
        path, state = zoo_checkpoint(tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=7)
        cfg = run_cfg(tmp_path, "NST", MODEL__WEIGHTS=path, SOLVER__MAX_ITER=1)
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=False)
        found = trainer.model.state_dict()["backbone.fpn_output3.weight"]
        assert torch.equal(found, state["backbone.fpn_output3.weight"])
        trainer.train()


class TestPaths:
    @pytest.fixture
    def model(self, tmp_path):
        return build_model(distillation_cfg(tmp_path, "Hint", "Overhaul", "NST"))

    def test_every_weight_is_found_where_its_name_says(self, model):
        state = model.state_dict()
        for name, value in state.items():
            module, _, attribute = name.rpartition(".")
            assert getattr(model.get_submodule(module), attribute).data_ptr() == value.data_ptr(), name
        parameters = dict(model.named_parameters())
        assert {name for name in parameters if not name.startswith("losses.")} == {
            name for name, _ in model.student.named_parameters()
        }
        assert any(name.startswith("losses.hint.") for name in parameters)

    def test_an_optimizer_that_goes_by_names(self, model, tmp_path):
        """As Detectron2's lr_factor_func does for layers of a backbone."""
        names = [name for name, _ in model.named_parameters() if name.startswith("backbone.bottom_up.res4")]
        assert names == [n for n, _ in model.student.named_parameters() if n.startswith("backbone.bottom_up.res4")]
        build_optimizer(distillation_cfg(tmp_path, "Hint"), model)

    def test_moving_casting_and_modes_reach_the_student(self, model):
        model.double().eval()
        assert model.student.pixel_mean.dtype == torch.float64 and not model.student.training
        assert all(p.dtype == torch.float64 for p in model.student.parameters())
        model.float().train()
        assert model.student.training and model.student.backbone.training and not model.teacher.training

    def test_a_module_replaced_inside_is_replaced_for_both(self, model):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        own = [m for m in converted.student.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert own and own == [
            m for name, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm) and "losses" not in name
        ]

    def test_a_deep_copy_is_whole_and_of_its_own(self, model):
        twin = copy.deepcopy(model).train()
        assert twin.student.backbone is twin.backbone and twin.backbone is not model.backbone
        assert twin.teacher is model.teacher
        torch.manual_seed(1)
        expected = {key: value.item() for key, value in model.train()(batch()).items()}
        torch.manual_seed(1)
        assert {key: value.item() for key, value in twin(batch()).items()} == pytest.approx(expected)
        with torch.no_grad():
            twin.backbone.fpn_output3.weight.zero_()
        assert not twin.student.backbone.fpn_output3.weight.any() and model.student.backbone.fpn_output3.weight.any()

    def test_torchs_average_of_a_model(self, model):
        average = AveragedModel(model)
        average.update_parameters(model)
        assert set(average.module.state_dict()) == set(model.student.state_dict())


class TestStateOfLosses:
    def test_of_another_teacher_is_not_restored(self, tmp_path, caplog):  # D14
        cfg = distillation_cfg(tmp_path, "Overhaul", "Hint", KD__OVERHAUL__CALIBRATION_IMAGES=2)
        model = build_model(cfg).train()
        model(batch())
        weights = torch.load(tmp_path / "teacher.pth")
        for value in weights["model"].values():
            if value.is_floating_point():
                value.mul_(1.1)
        torch.save(weights, tmp_path / "teacher.pth")
        other = build_model(cfg).train()
        fresh = {key: value.clone() for key, value in other.losses.state_dict().items()}
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(fresh[key], value) for key, value in other.losses.state_dict().items())
        assert "another teacher" in caplog.text
        other(batch())
        assert other.losses["overhaul"].margins[0].count.any()  # measured on the new teacher

    def test_survives_the_same_teacher_in_half_precision(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "Hint")
        state = build_model(cfg).state_dict()
        cfg.KD.TEACHER.DTYPE = "bfloat16"
        torch.manual_seed(9)
        other = build_model(cfg)
        other.load_state_dict(state)
        saved = state._metadata["kd_det.losses"]
        assert all(torch.equal(saved[key], value) for key, value in other.losses.state_dict().items())

    def test_of_one_loss_comes_back_beside_a_new_one(self, tmp_path):
        model = build_model(distillation_cfg(tmp_path, "Hint"))
        torch.manual_seed(9)
        other = build_model(distillation_cfg(tmp_path, "PKD", "Hint"))
        other.load_state_dict(model.state_dict())
        for key, value in model.losses["hint"].state_dict().items():
            assert torch.equal(other.losses["hint"].state_dict()[key], value)


class TestInPython:
    def test_losses_read_their_channels_from_the_networks(self):  # D51
        student, teacher = build_model(tiny_cfg()), build_model(tiny_cfg(depth=50, width=8, fpn=12))
        losses = [HintLoss(student_taps=["p3"]), OverhaulLoss(student_taps=["res4.pre_activation"])]
        model = Distiller(student=student, teacher=teacher, losses=losses, input_format="BGR").train()
        assert model.losses["hint"].connectors[0].weight.shape == (12, 8, 1, 1)
        assert model.losses["overhaul"].margins[0].value.shape == (32,)
        assert all(torch.isfinite(value) for value in model(batch()).values())

    def test_a_loss_without_taps_is_refused(self, tmp_path):  # D20
        student, teacher = build_model(tiny_cfg()), build_model(tiny_cfg())
        with pytest.raises(ValueError, match="NSTLoss compares maps and has no taps.*KD.NST.STUDENT_TAPS"):
            Distiller(student=student, teacher=teacher, losses=[NSTLoss(student_taps=[])], input_format="BGR")
        cfg = distillation_cfg(tmp_path, "NST")
        cfg.KD.NST.STUDENT_TAPS = []
        with pytest.raises(ValueError, match="has no taps"):
            build_model(cfg)

    def test_connectors_do_not_shift_what_training_draws(self, tmp_path):
        torch.manual_seed(5)
        build_model(distillation_cfg(tmp_path, "Hint", "FGD", "ReviewKD"))
        after = torch.rand(1)
        torch.manual_seed(5)
        cfg = distillation_cfg(tmp_path, "Hint")
        build_model(student_cfg(cfg))
        assert torch.equal(torch.rand(1), after)
