import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from kd_det import build_teacher
from kd_det.features.taps import Taps
from kd_det.teachers import Teacher
from tests.tiny import batch, distillation_cfg, tiny_cfg


class TestBuildTeacher:
    def test_is_the_saved_network_frozen_in_eval(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST")
        teacher = build_teacher(cfg)
        saved = torch.load(tmp_path / "teacher.pth")["model"]
        assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
        assert not any(m.training for m in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())

    def test_weights_default_to_those_of_its_config(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST")
        teacher_cfg = tiny_cfg(depth=50, width=8, MODEL__WEIGHTS=cfg.KD.TEACHER.WEIGHTS)
        (tmp_path / "with_weights.yaml").write_text(teacher_cfg.dump())
        cfg.merge_from_list(["KD.TEACHER.CONFIG_FILE", str(tmp_path / "with_weights.yaml"), "KD.TEACHER.WEIGHTS", ""])
        build_teacher(cfg)

    def test_a_zoo_name_brings_its_checkpoint(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr("kd_det.teachers.build.load_strictly", lambda model, path, who: asked.append((path, who)))
        cfg = distillation_cfg(tmp_path, "NST")
        name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
        cfg.merge_from_list(["KD.TEACHER.CONFIG_FILE", name, "KD.TEACHER.WEIGHTS", ""])
        teacher = build_teacher(cfg)
        ((path, who),) = asked
        assert path.endswith("faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl") and name in who
        assert teacher.roi_heads.num_classes == 80

    def test_a_distillation_config_teaches_as_its_student(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST")
        chained = tiny_cfg(depth=50, width=8, MODEL__META_ARCHITECTURE="Distiller", KD__LOSSES=["NST"])
        (tmp_path / "teacher.yaml").write_text(chained.dump())
        assert type(build_teacher(cfg)).__name__ == "GeneralizedRCNN"

    def test_opts(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST", KD__TEACHER__OPTS=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.25])
        assert build_teacher(cfg).roi_heads.box_predictor.test_score_thresh == 0.25


class TestNoSilentTeacher:
    def edit(self, tmp_path, change):
        cfg = distillation_cfg(tmp_path, "NST")
        weights = torch.load(tmp_path / "teacher.pth")
        change(weights["model"])
        torch.save(weights, tmp_path / "teacher.pth")
        return cfg

    def test_missing_weights_are_listed(self, tmp_path):
        cfg = self.edit(tmp_path, lambda w: [w.pop(k) for k in list(w) if "box_predictor" in k])
        with pytest.raises(ValueError, match=r"do not fit the teacher .*4 missing \(roi_heads.box_predictor"):
            build_teacher(cfg)

    def test_unexpected_weights_are_listed(self, tmp_path):
        cfg = self.edit(tmp_path, lambda w: w.update({"roi_heads.mask_head.weight": torch.zeros(3)}))
        with pytest.raises(ValueError, match=r"1 unexpected \(roi_heads.mask_head.weight\)"):
            build_teacher(cfg)

    def test_misshapen_weights_are_listed(self, tmp_path):
        cfg = self.edit(tmp_path, lambda w: w.update({"backbone.fpn_lateral2.bias": torch.zeros(9)}))
        with pytest.raises(ValueError, match=r"1 misshapen \(backbone.fpn_lateral2.bias is \(9,\), expected \(8,\)\)"):
            build_teacher(cfg)

    def test_another_normalisation_than_it_was_trained_with(self, tmp_path):
        cfg = self.edit(tmp_path, lambda w: w.update(pixel_mean=torch.tensor([123.675, 116.28, 103.53])))
        with pytest.raises(ValueError, match=r"trained with pixel_mean \[123.67.* configured \[103.5"):
            build_teacher(cfg)

    def test_keys_of_older_checkpoints_are_no_error(self, tmp_path):
        def add(weights):
            weights["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
            weights["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)

        build_teacher(self.edit(tmp_path, add))

    def test_a_file_that_does_not_exist(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST", KD__TEACHER__WEIGHTS=str(tmp_path / "none.pth"))
        with pytest.raises(FileNotFoundError, match="weights of the teacher .* do not exist: .*none.pth"):
            build_teacher(cfg)

    def test_no_weights_at_all(self, tmp_path):
        cfg = distillation_cfg(tmp_path, "NST", KD__TEACHER__WEIGHTS="")
        with pytest.raises(ValueError, match="has no weights"):
            build_teacher(cfg)


def run(teacher, inputs, canvas=(64, 96), input_format="BGR"):
    return teacher(inputs, input_format=input_format, canvas=canvas, device=torch.device("cpu"))


class TestTeacher:
    def plain_features(self, model, inputs):
        with torch.no_grad():
            return model.backbone(model.preprocess_image(inputs).tensor)

    def test_maps_are_its_own_backbones(self):
        model = build_model(tiny_cfg())
        features, outputs = run(Teacher(model, ["p3", "res5"], whole_backbone=True), batch())
        expected = self.plain_features(model, batch())
        assert torch.equal(features["p3"][0], expected["p3"])
        assert all(torch.equal(outputs[level], expected[level]) for level in expected)

    def test_channels_are_reordered_before_its_own_normalisation(self):
        model = build_model(tiny_cfg(INPUT__FORMAT="RGB", MODEL__PIXEL_MEAN=[120.0, 110.0, 100.0]))
        features, _ = run(Teacher(model, ["p3"]), batch())
        flipped = [{**x, "image": x["image"].flip(0)} for x in batch()]
        assert torch.equal(features["p3"][0], self.plain_features(model, flipped)["p3"])
        assert not torch.equal(features["p3"][0], self.plain_features(model, batch())["p3"])

    def test_colours_that_cannot_be_matched(self):
        teacher = Teacher(build_model(tiny_cfg()), ["p3"])
        with pytest.raises(ValueError, match="'YUV-BT.601' .* teacher wants 'BGR'"):
            run(teacher, batch(), input_format="YUV-BT.601")

    def test_covers_the_students_canvas(self):
        model = build_model(tiny_cfg())
        larger, _ = run(Teacher(model, ["p3"]), batch(), canvas=(128, 128))
        assert larger["p3"][0].shape[-2:] == (16, 16)
        # The student pads to 80 x 112, which strides of 32 round up to 96 x 128; the map is cut to 10 x 14.
        cut, _ = run(Teacher(model, ["p3"]), batch(), canvas=(80, 112))
        assert cut["p3"][0].shape[-2:] == (10, 14)

    def test_runs_only_as_deep_as_it_is_read(self):
        model = build_model(tiny_cfg())
        ran = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *a, name=name: ran.append(name))
        run(Teacher(model, ["res3"]), batch())
        assert "backbone.bottom_up.res3" in ran
        assert not any("res4" in name or "fpn" in name or "rpn" in name or "roi" in name for name in ran)
        ran.clear()
        run(Teacher(model, ["p5"], whole_backbone=True), batch())
        assert "backbone" in ran and not any("proposal_generator" in name or "roi" in name for name in ran)

    def test_a_tap_in_a_head_runs_the_head(self):
        model = build_model(tiny_cfg())
        tap = "proposal_generator.rpn_head.objectness_logits"
        features, _ = run(Teacher(model, [tap]), batch())
        taps = Taps(model, [tap])
        with taps.recording(), torch.no_grad():
            model(batch())
        assert torch.equal(features[tap][0], taps.pop()[tap][0])

    def test_zoo_format_with_another_author_is_read(self, tmp_path):
        """The zoo's .pkl: NumPy arrays under "model"."""
        import pickle

        model = build_model(tiny_cfg(depth=50, width=8))
        with open(tmp_path / "zoo.pkl", "wb") as f:
            weights = {key: value.numpy() for key, value in model.state_dict().items()}
            pickle.dump({"model": weights, "__author__": "Detectron2 Model Zoo"}, f)
        cfg = distillation_cfg(tmp_path, "NST", KD__TEACHER__WEIGHTS=str(tmp_path / "zoo.pkl"))
        teacher = build_teacher(cfg)
        DetectionCheckpointer(model).load(str(tmp_path / "zoo.pkl"))
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters()))
