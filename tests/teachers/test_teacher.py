import contextlib

import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model

from kd_det import build_teacher
from kd_det.teachers import Teacher
from tests.tiny import batch, distillation_cfg, tiny_cfg, tiny_retinanet_cfg


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
        load = "kd_det.teachers.build.load_strictly"
        monkeypatch.setattr(load, lambda model, path, who, read: asked.append((path, who)))
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


def run(model, taps, inputs, *, canvas=(64, 96), input_format="BGR", student=None, **options):
    """What the teacher computes when a student is run on these inputs, padded to the canvas."""
    student = student or build_model(tiny_cfg(MODEL__PIXEL_STD=[2.0, 2.0, 2.0]))
    teacher = Teacher(model, taps, student=student, input_format=input_format, **options)
    images = student.preprocess_image(inputs).tensor
    images = F.pad(images, (0, canvas[1] - images.shape[-1], 0, canvas[0] - images.shape[-2]))
    with teacher.running(inputs):
        student.backbone(images)
    return teacher.pop()


def add_backbone(network):
    network.backbone = torch.nn.Conv2d(3, 3, 1)


def dense_head_taps(model):
    return ["head.cls_score"] if hasattr(model, "head") else ["proposal_generator.rpn_head.objectness_logits"]


class TestTeacher:
    def plain_features(self, model, inputs):
        with torch.no_grad():
            return model.backbone(model.preprocess_image(inputs).tensor)

    def test_maps_are_its_own_backbones(self):
        model = build_model(tiny_cfg()).eval()
        expected = self.plain_features(model, batch())
        maps = run(model, ["p3", "res5"], batch(), with_head=True)
        assert torch.equal(maps.features["p3"][0], expected["p3"])
        assert all(torch.equal(maps.outputs[level], expected[level]) for level in expected)
        assert maps.canvas == (64, 96)

    def test_runs_before_the_students_layers_and_once(self):
        model, student = build_model(tiny_cfg()), build_model(tiny_cfg())
        order = []
        teacher = Teacher(model, ["p3"], student=student, input_format="BGR")
        model.backbone.bottom_up.stem.register_forward_hook(lambda *a: order.append("teacher"))
        student.backbone.bottom_up.stem.register_forward_hook(lambda *a: order.append("student"))
        with teacher.running(batch()):
            student.backbone(student.preprocess_image(batch()).tensor)
            student.backbone(student.preprocess_image(batch()).tensor)
        assert order == ["teacher", "student", "student"]
        teacher.pop()
        with pytest.raises(RuntimeError, match="did not call its backbone"):
            teacher.pop()

    @pytest.mark.parametrize("alike", [True, False])
    def test_networks_that_normalise_alike_share_the_batch(self, alike):
        model, student = build_model(tiny_cfg()), build_model(tiny_cfg())
        if not alike:
            student.pixel_std *= 2
        preprocessed = []
        own = type(model).preprocess_image
        model.preprocess_image = lambda inputs: preprocessed.append(1) or own(model, inputs)
        maps = run(model, ["p3"], batch(), student=student)
        assert torch.equal(maps.features["p3"][0], self.plain_features(model, batch())["p3"])
        assert len(preprocessed) == 1 + (not alike)  # one is that of plain_features

    def test_channels_are_reordered_before_its_own_normalisation(self):
        model = build_model(tiny_cfg(INPUT__FORMAT="RGB", MODEL__PIXEL_MEAN=[120.0, 110.0, 100.0]))
        features = run(model, ["p3"], batch()).features
        flipped = [{**x, "image": x["image"].flip(0)} for x in batch()]
        assert torch.equal(features["p3"][0], self.plain_features(model, flipped)["p3"])
        assert not torch.equal(features["p3"][0], self.plain_features(model, batch())["p3"])

    @pytest.mark.parametrize("input_format", ["YUV-BT.601", "L"])
    def test_colours_that_cannot_be_matched_are_refused_before_a_step(self, input_format):  # D18
        with pytest.raises(ValueError, match=f"{input_format!r} .* teacher wants 'BGR'"):
            Teacher(build_model(tiny_cfg()), ["p3"], student=build_model(tiny_cfg()), input_format=input_format)

    def test_covers_the_students_canvas(self):
        larger = run(build_model(tiny_cfg()), ["p3"], batch(), canvas=(128, 128)).features
        assert larger["p3"][0].shape[-2:] == (16, 16)
        # The student pads to 80 x 112, which strides of 32 round up to 96 x 128; the map is cut to 10 x 14.
        student = build_model(tiny_cfg(MODEL__META_ARCHITECTURE="GeneralizedRCNN"))
        teacher = Teacher(build_model(tiny_cfg()), ["p3"], student=student, input_format="BGR")
        student.backbone.bottom_up.stem.register_forward_hook(lambda *a: 1 / 0)
        with teacher.running(batch()), contextlib.suppress(ZeroDivisionError):
            student.backbone(torch.zeros(2, 3, 80, 112))
        assert teacher.pop().features["p3"][0].shape[-2:] == (10, 14)

    def test_runs_only_as_deep_as_it_is_read(self):
        model = build_model(tiny_cfg())
        ran = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *a, name=name: ran.append(name))
        run(model, ["res3"], batch())
        assert "backbone.bottom_up.res3" in ran
        assert not any("res4" in name or "fpn" in name or "rpn" in name or "roi" in name for name in ran)
        ran.clear()
        run(model, ["p5"], batch(), with_head=True)
        assert "backbone" in ran and not any("proposal_generator" in name or "roi" in name for name in ran)

    @pytest.mark.parametrize("make", [tiny_cfg, tiny_retinanet_cfg])
    def test_a_tap_in_a_dense_head_gives_every_level(self, make):  # D22
        model = build_model(make()).eval()
        (tap,) = dense_head_taps(model)
        features = run(model, [tap], batch()).features
        head, levels = (
            (model.head, model.head_in_features)
            if hasattr(model, "head")
            else (model.proposal_generator.rpn_head, model.proposal_generator.in_features)
        )
        maps = self.plain_features(model, batch())
        with torch.no_grad():
            expected = head([maps[level] for level in levels])[0]
        assert len(features[tap]) == len(expected) > 1
        assert all(torch.equal(a, b) for a, b in zip(features[tap], expected))

    def test_a_module_of_the_backbone_that_runs_once_a_level_gives_every_level(self):  # D22
        class Shared(Backbone):
            def __init__(self):
                super().__init__()
                self.stem, self.lateral = torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Conv2d(4, 4, 1)

            def forward(self, x):
                x = self.stem(x)
                return {"p1": self.lateral(x), "p2": self.lateral(x[:, :, ::2, ::2])}

            def output_shape(self):
                return {name: ShapeSpec(channels=4) for name in ("p1", "p2")}

        model = build_model(tiny_cfg())
        model.backbone = Shared()
        assert len(run(model, ["backbone.lateral"], batch()).features["backbone.lateral"]) == 2

    def test_a_network_that_wants_squares_is_given_them(self):
        class Squared(type(build_model(tiny_cfg()).backbone)):
            padding_constraints = {"square_size": 128}

        model, sizes = build_model(tiny_cfg()), []
        model.backbone.__class__ = Squared
        model.backbone.bottom_up.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2:]))
        maps = run(model, ["p3"], batch(), student=build_model(tiny_cfg()))  # which normalises alike
        assert sizes == [(128, 128)] and maps.features["p3"][0].shape[-2:] == (8, 12)

    def test_a_tap_in_a_dense_head_runs_nothing_behind_it(self):
        model = build_model(tiny_retinanet_cfg())
        model.forward = lambda *a: pytest.fail("detections are not needed")
        run(model, ["head.bbox_pred", "p3"], batch())

    def test_a_tap_behind_the_heads_runs_the_whole_model_on_the_students_canvas(self):  # D24, D25
        model = build_model(tiny_cfg()).eval()
        maps = run(model, ["roi_heads.box_head", "p3"], batch(), canvas=(128, 160), with_head=True)
        assert maps.features["p3"][0].shape[-2:] == (16, 20) and maps.outputs["p2"].shape[-2:] == (32, 40)
        assert maps.features["roi_heads.box_head"][0].dim() == 2

    @pytest.mark.parametrize("architecture", ["ProposalNetwork", "SemanticSegmentor"])
    def test_teachers_without_preprocess_image(self, architecture):  # D17, v0.6
        opts = {"MODEL__SEM_SEG_HEAD__CONVS_DIM": 8, "MODEL__SEM_SEG_HEAD__NORM": ""}
        model = build_model(tiny_cfg(MODEL__META_ARCHITECTURE=architecture, **opts)).eval()
        model.input_format = "BGR"  # as build_teacher sets it where the architecture has none
        features = run(model, ["p3"], batch()).features
        plain = build_model(tiny_cfg()).eval()
        plain.backbone = model.backbone
        assert torch.equal(features["p3"][0], self.plain_features(plain, batch())["p3"])

    def test_a_network_that_cannot_teach_is_refused_when_it_is_built(self):
        class Headless(torch.nn.Module):
            input_format = "BGR"

        for change, message in ((lambda m: None, "no backbone"), (add_backbone, "neither preprocess_image nor")):
            network = Headless()
            change(network)
            with pytest.raises(ValueError, match=message):
                Teacher(network, [], student=build_model(tiny_cfg()), input_format="BGR")

    def test_half_precision_is_the_backbones_alone(self):
        model = build_model(tiny_cfg()).eval()
        expected = self.plain_features(model, batch())
        maps = run(model, ["p3", "p2"], batch(), with_head=True, dtype=torch.bfloat16)
        assert maps.features["p3"][0].dtype in (torch.bfloat16, torch.float32)
        assert maps.outputs["p3"].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in model.roi_heads.parameters())
        error = (maps.outputs["p3"] - expected["p3"]).abs().max() / expected["p3"].abs().max()
        assert 0 < error < 0.05

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


@pytest.mark.parametrize("dtype, expected", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_autocast_casts_the_teacher_unless_it_has_a_dtype_of_its_own(dtype, expected):
    model = build_model(tiny_cfg())
    with torch.autocast("cpu", torch.bfloat16):
        maps = run(model, ["fpn_lateral3"], batch(), dtype=dtype)
    assert maps.features["fpn_lateral3"][0].dtype == expected
