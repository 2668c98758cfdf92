import pickle

import detectron2.modeling
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model

from kd_det import build_teacher
from kd_det.cli.teacher import add_teacher
from kd_det.compat import model_zoo
from kd_det.teachers import Teacher, get_teacher_cfg
from tests.tiny import NUM_CLASSES, batch, tiny_cfg

# What Detectron2's new_baselines change of Mask R-CNN, at small width, in a file with imports of its own.
TINY_BASELINE = """
from detectron2.layers import ShapeSpec
from .widths import fpn
from kd_det.cli.teacher import add_teacher
from kd_det.compat import model_zoo

_zoo = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
model, dataloader, train = _zoo.model, _zoo.dataloader, _zoo.train
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.out_channels = model.proposal_generator.head.in_channels = fpn["channels"]
model.proposal_generator.head.conv_dims = [-1, -1]
for head, side in ((model.roi_heads.box_head, 7), (model.roi_heads.mask_head, 14)):
    head.input_shape = ShapeSpec(channels=fpn["channels"], height=side, width=side)
    head.conv_dims = [8, 8]
model.roi_heads.box_head.fc_dims = [16]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=16)
model.roi_heads.num_classes = 3
"""

# A plain vision transformer under its pyramid, as the project ViTDet builds it.
TINY_VITDET = """
from functools import partial
import torch.nn as nn
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from kd_det.cli.teacher import add_teacher
from kd_det.compat import model_zoo

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
train = {"init_checkpoint": "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"}
model.pixel_mean, model.pixel_std, model.input_format = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB"
model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=128, patch_size=16, embed_dim=16, depth=2, num_heads=2, window_size=4, window_block_indexes=[0],
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}", out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(), norm="LN", square_pad=SQUARE,
)
model.proposal_generator.head.in_channels = 16
model.roi_heads.num_classes = 3
model.roi_heads.box_head.update(input_shape=ShapeSpec(channels=16, height=7, width=7), fc_dims=[16])
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=16)
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
"""

MAP_LOSSES = ("NST", "AttentionTransfer", "Hint", "PKD", "CWD", "FGD", "MGD", "ReviewKD")
REGION_LOSSES = ("SoftTarget", "DKD", "DIST", "BoundedRegression", "Similarity")
needs_vit = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "SimpleFeaturePyramid"), reason="Detectron2 v0.6 has no plain vision transformers"
)


def write(tmp_path, text, *, seed=1) -> str:
    """The LazyConfig's file, with random weights of its model in teacher.pth."""
    (tmp_path / "widths.py").write_text("fpn = dict(channels=8)")
    path = tmp_path / "teacher.py"
    path.write_text(text)
    torch.manual_seed(seed)
    model = instantiate(LazyConfig.load(str(path)).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("cls_score.weight"):  # opinions, as a trained network has them
                parameter.mul_(50)
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    return str(path)


def student_cfg(name, weights="", *losses, **opts):
    opts = {"KD__TEACHER__CONFIG_FILE": str(name), "KD__TEACHER__WEIGHTS": str(weights), "KD__LOSSES": losses, **opts}
    return tiny_cfg(MODEL__META_ARCHITECTURE="Distiller", **opts)


def check_losses(cfg, losses):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    found = model(batch())
    for name in model.losses:
        assert torch.isfinite(found[f"loss_{name}"]) and (found[f"loss_{name}"] > 0 or name == "bounded_regression")
    assert len(model.losses) == len(losses)
    sum(found.values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any(module.training for module in model.teacher.modules())
    return model


def test_new_baselines_teach_with_every_loss(tmp_path):
    path = write(tmp_path, TINY_BASELINE)
    losses = (*MAP_LOSSES, *REGION_LOSSES, "Overhaul", "FSP")
    model = check_losses(student_cfg(path, tmp_path / "teacher.pth", *losses), losses)
    teacher = model.teacher
    assert type(teacher.roi_heads.mask_head).__name__ == "MaskRCNNConvUpsampleHead"
    assert teacher.input_format == "BGR"
    assert teacher.pixel_mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    assert teacher.roi_heads.box_predictor.box2box_transform.weights == (10, 10, 5, 5)


@needs_vit
@pytest.mark.parametrize("square", [0, 128])
def test_a_vision_transformer_teaches_with_its_regions(tmp_path, square):
    path = write(tmp_path, TINY_VITDET.replace("SQUARE", str(square)))
    losses = MAP_LOSSES + REGION_LOSSES
    model = check_losses(student_cfg(path, tmp_path / "teacher.pth", *losses), losses)
    assert model.teacher.input_format == "RGB"
    assert model.teacher.backbone.output_shape()["p2"].stride == 4


@needs_vit
def test_a_vision_transformer_gets_multiples_of_its_coarsest_stride(tmp_path):
    """Also where it takes the student's own batch, which is normalised as it wants and not padded."""
    path = write(tmp_path, TINY_VITDET.replace("SQUARE", "0"))
    model = build_teacher(student_cfg(path, tmp_path / "teacher.pth"))
    student = build_teacher(student_cfg(path, tmp_path / "teacher.pth"))
    teacher = Teacher(model, ["p2"], student=student, input_format="RGB")
    inputs = batch([(50, 70)])
    with torch.no_grad(), teacher.running(inputs):
        student.backbone(torch.zeros(1, 3, 64, 96)[:, :, :50, :70])
    assert teacher.pop().features["p2"][0].shape[-2:] == (13, 18)  # 50 / 4 and 70 / 4, rounded up


@needs_vit
def test_what_a_vision_transformer_starts_from_are_no_trained_weights(tmp_path):
    path = write(tmp_path, TINY_VITDET.replace("SQUARE", "0"))
    with pytest.raises(ValueError, match="names no trained weights: train.init_checkpoint detectron2://ImageNetPretr"):
        build_teacher(student_cfg(path))


@pytest.mark.parametrize(
    "name, url",
    [
        ("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py", "400ep_LSJ/42073830/model_final_f96b26.pkl"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py", "137260431/model_final_a54504.pkl"),
    ],
)
def test_a_zoo_name(name, url):
    cfg = get_teacher_cfg(student_cfg(name))
    assert cfg.MODEL.WEIGHTS.endswith(url) and cfg.INPUT.FORMAT == "BGR"
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def test_the_mappers_channel_order_counts(tmp_path):
    """It is the one of the images that the network saw; the model's own is for drawing."""
    path = write(tmp_path, TINY_BASELINE + "dataloader.train.mapper.image_format = 'RGB'")
    assert build_teacher(student_cfg(path, tmp_path / "teacher.pth")).input_format == "RGB"


def test_options(tmp_path):
    path = write(tmp_path, TINY_BASELINE)
    opts = ["model.roi_heads.box_predictor.test_score_thresh", 0.25, "model.pixel_std", [2.0] * 3]
    teacher = build_teacher(student_cfg(path, tmp_path / "teacher.pth", KD__TEACHER__OPTS=opts))
    assert teacher.roi_heads.box_predictor.test_score_thresh == 0.25
    assert teacher.pixel_std.flatten().tolist() == [2.0] * 3


def test_a_distillation_teaches_as_its_student(tmp_path):
    text = TINY_BASELINE + "from detectron2.config import LazyCall as L\nfrom kd_det import Distiller\n"
    text += "model = L(Distiller)(student=model, teacher=None)"
    path = tmp_path / "teacher.py"
    write(tmp_path, TINY_BASELINE)
    path.write_text(text)
    assert type(build_teacher(student_cfg(path, tmp_path / "teacher.pth"))).__name__ == "GeneralizedRCNN"


def test_its_own_weights_as_the_zoo_publishes_them(tmp_path):
    """Arrays in a .pkl, without the counters of batch norm."""
    path = write(tmp_path, TINY_BASELINE + f"train.init_checkpoint = {str(tmp_path / 'teacher.pkl')!r}")
    state = torch.load(tmp_path / "teacher.pth")["model"]
    arrays = {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    (tmp_path / "teacher.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    teacher = build_teacher(student_cfg(path))
    assert len(arrays) < len(state) and all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


def test_the_default_losses_and_levels(tmp_path):
    path = write(tmp_path, TINY_BASELINE)
    cfg = tiny_cfg()
    add_teacher(cfg, path, weights=str(tmp_path / "teacher.pth"))
    assert cfg.KD.LOSSES == ("PKD",) and cfg.KD.PKD.STUDENT_TAPS == ("p2", "p3", "p4", "p5")
    check_losses(cfg, cfg.KD.LOSSES)


def test_a_list_of_loaders_tells_nothing(tmp_path):
    path = write(tmp_path, TINY_BASELINE + "dataloader.train = []")
    assert build_teacher(student_cfg(path, tmp_path / "teacher.pth")).input_format == "BGR"  # the model's own


NO_ORDER = "dataloader = None\ndel model.input_format"


@pytest.mark.parametrize(
    "change, opts, message",
    [
        ("", [], "The teacher '.*teacher.py' has no weights"),
        ("model = {}", [], "teacher.py has no model: expected model = LazyCall"),
        ("del model", [], "teacher.py has no model"),
        ("1 / 0", [], "teacher.py fails with ZeroDivisionError: division by zero"),
        ("import no_such_project", [], "No module named 'no_such_project'.*--import MODULE"),
        ("x = (", [], "teacher.py has syntax error"),
        (NO_ORDER, [], "neither dataloader.train.mapper.image_format nor model.input_format, the channel order"),
        ("", ["model.pixel_men", 3], "OPTS: Unknown config key 'model.pixel_men'. Did you mean"),
        ("", ["modle.input_format", "RGB"], "OPTS: Unknown config key 'modle'. Did you mean 'model'"),
        ("", ["model.input_format"], r"OPTS: expected KEY VALUE pairs, found \['model.input_format'\]"),
        ("model.backbone.no_such = 1", [], "The model of .*teacher.py cannot be built: TypeError: .*no_such"),
    ],
)
def test_bad_configs(tmp_path, change, opts, message):
    write(tmp_path, TINY_BASELINE)
    (tmp_path / "teacher.py").write_text(f"{TINY_BASELINE}\n{change}\n")
    weights = "w.pth" if "cannot be built" in message or "channel order" in message else ""
    with pytest.raises(ValueError, match=message):
        build_teacher(student_cfg(tmp_path / "teacher.py", weights, KD__TEACHER__OPTS=opts))


def test_weights_of_another_network(tmp_path):
    path = write(tmp_path, TINY_BASELINE)
    opts = {"KD__TEACHER__OPTS": ["model.roi_heads.num_classes", NUM_CLASSES + 1]}
    with pytest.raises(ValueError, match="do not fit the teacher .*misshapen"):
        build_teacher(student_cfg(path, tmp_path / "teacher.pth", **opts))


def test_names_that_do_not_exist():
    with pytest.raises(FileNotFoundError, match="Did you mean 'new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py'"):
        build_teacher(student_cfg("new_baselines/mask_rcnn_R_101_FPN_400ep_LJS.py"))
    assert model_zoo.get_config_file("COCO-Detection/fcos_R_50_FPN_1x.py")  # a config, and no weights
    with pytest.raises(ValueError, match="fcos_R_50_FPN_1x.py' has no weights"):
        build_teacher(student_cfg("COCO-Detection/fcos_R_50_FPN_1x.py"))
