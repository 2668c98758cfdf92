import copy
import sys

import pytest
import torch
from detectron2.data import MetadataCatalog

from kd_det import Distiller, build_teacher
from kd_det.features.taps import Taps
from kd_det.features.unlabelled import PseudoLabels
from kd_det.losses import NSTLoss
from kd_det.teachers import Teacher, TransformersDetector
from kd_det.teachers.transformers_detectors import _contiguous_classes
from tests.tiny import batch, build_model, tiny_cfg

transformers = pytest.importorskip("transformers")

COMMON = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 2, "encoder_attention_heads": 2}
COMMON |= {"decoder_attention_heads": 2, "num_queries": 12, "num_labels": 5}
WIDTHS = {"hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "depths": [1, 1, 1, 1], "layer_type": "basic"}
STAGES = {"out_features": ["stage2", "stage3", "stage4"]}


def detr(kind, *, stages=("stage4",), **options):
    backbone = transformers.ResNetConfig(**WIDTHS, out_features=list(stages))
    sizes = {"d_model": 32, "encoder_layers": 1, "use_timm_backbone": False, "backbone": None, **COMMON}
    if kind == "DabDetr":
        sizes["hidden_size"] = sizes.pop("d_model")
    return getattr(transformers, f"{kind}Config")(backbone_config=backbone, **sizes, **options)


def rt_detr(kind, backbone):
    sizes = {"encoder_in_channels": [16, 24, 32], "decoder_in_channels": [16, 16, 16], "encoder_hidden_dim": 16}
    return getattr(transformers, f"{kind}Config")(backbone_config=backbone, d_model=16, **sizes, **COMMON)


def hgnet():
    stages = {"stage_in_channels": [8, 8, 16, 24], "stage_mid_channels": [8] * 4, "stage_out_channels": [8, 16, 24, 32]}
    stages |= {"stage_num_blocks": [1] * 4, "stage_light_block": [False] * 4, "stage_kernel_size": [3] * 4}
    stages |= {"stage_downsample": [False, True, True, True], "stage_numb_of_layers": [1] * 4}
    return transformers.HGNetV2Config(
        hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, stem_channels=[3, 8, 8], **stages, **STAGES
    )


TWO_STAGE = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 12}
PYRAMID = ["res3", "res4", "res5", "p3", "p4", "p5"]
# Config, image processor, and the maps.
KINDS = {
    "DETR": (lambda: detr("Detr"), "Detr", ["res5", "p5"]),
    "Conditional DETR": (lambda: detr("ConditionalDetr"), "ConditionalDetr", ["res5", "p5"]),
    "DAB-DETR": (lambda: detr("DabDetr"), "ConditionalDetr", ["res5", "p5"]),
    "Deformable DETR": (
        lambda: detr("DeformableDetr", stages=STAGES["out_features"], **TWO_STAGE),
        "DeformableDetr",
        [*PYRAMID, "p6"],
    ),
    "RT-DETR": (lambda: rt_detr("RTDetr", transformers.RTDetrResNetConfig(**WIDTHS, **STAGES)), "RTDetr", PYRAMID),
    "RT-DETRv2": (lambda: rt_detr("RTDetrV2", transformers.RTDetrResNetConfig(**WIDTHS, **STAGES)), "RTDetr", PYRAMID),
    "D-FINE": (lambda: rt_detr("DFine", hgnet()), "RTDetr", PYRAMID),
}


def parts(kind):
    """A detector with random weights, and its image processor."""
    torch.manual_seed(0)
    config, processor, _ = KINDS[kind]
    detector = transformers.AutoModelForObjectDetection.from_config(config()).eval()
    return detector, getattr(transformers, f"{processor}ImageProcessor")()


def teacher(kind):
    detector, processor = parts(kind)
    return TransformersDetector(detector=detector, processor=processor, score_threshold=0.0)


def images(*sizes):
    return [{"image": x["image"].flip(0)} for x in batch(sizes)]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_by_level(kind):
    model = teacher(kind)
    shapes = model.backbone.output_shape()
    names = KINDS[kind][2]
    assert [name for name in shapes if name in names] == names
    assert all(shapes[name].stride == 2 ** int(name[-1]) for name in names)
    assert model.backbone.size_divisibility == 32 and model.input_format == "RGB"
    inputs = images((64, 96))
    reader = Taps(model, names)
    with reader.recording(), torch.no_grad():
        model.backbone(model.preprocess_image(inputs).tensor)
    maps = {name: values[0] for name, values in reader.pop().items()}
    assert all(m.shape[-2:] == (-(-64 // 2 ** int(n[-1])), -(-96 // 2 ** int(n[-1]))) for n, m in maps.items())
    want = model.backbone.network.detector.model.backbone(model.preprocess_image(inputs).tensor, torch.ones(1, 64, 96))
    want = (want[0] if isinstance(want[0], list) else want)[-1][0]
    torch.testing.assert_close(maps["res5"], want)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_library(kind):
    """The library's processor keeps the images' size; where it pads, it masks the padding beside the smaller one."""
    model, (detector, processor) = teacher(kind), parts(kind)
    inputs = images((64, 96), (128, 64)) if processor.do_pad else images((64, 96))
    encoded = processor(images=[x["image"] for x in inputs], do_resize=False, return_tensors="pt")
    sizes = [tuple(2 * side for side in x["image"].shape[-2:]) for x in inputs]
    with torch.no_grad():
        wanted = processor.post_process_object_detection(detector(**encoded), threshold=0.0, target_sizes=sizes)
        found = model([{**x, "height": h, "width": w} for x, (h, w) in zip(inputs, sizes)])
    for ours, theirs, (height, width) in zip(found, wanted, sizes):
        ours, inside = ours["instances"], theirs["boxes"].clamp(min=0)
        inside = torch.minimum(inside, torch.tensor([width, height, width, height]))
        kept = (inside[:, 2:] > inside[:, :2]).all(dim=1)
        assert ours.image_size == (height, width) and len(ours) > 5
        torch.testing.assert_close(ours.scores, theirs["scores"][kept], rtol=0, atol=1e-4)
        # Equal up to the order of nearly equal scores.
        error = torch.cdist(ours.pred_boxes.tensor, inside[kept], p=float("inf"))
        error = error.masked_fill(ours.pred_classes[:, None] != theirs["labels"][kept], float("inf"))
        assert error.min(dim=0).values.max() < 0.01 and error.min(dim=1).values.max() < 0.01


@pytest.mark.parametrize("kind", ["DETR", "RT-DETR"])
def test_detections_on_the_students_canvas(kind):
    """Twice the image's width: DETR is told by the mask, for RT-DETR the image is the left half of a larger one."""
    model = teacher(kind)
    runner = Teacher(model, [], student=build_model(tiny_cfg()), input_format="RGB")
    seen = []
    model.backbone.network.register_forward_hook(lambda network, *_: seen.append(network.outputs.pred_boxes[0]))
    canvas = torch.zeros(1, 3, 64, 128)
    (found,) = runner(images((64, 64)), canvas.device, canvas, detects=True).detections
    boxes = found["instances"].pred_boxes.tensor
    x, _, w, _ = seen[0].unbind(1)
    left = (x - w / 2) * (64 if kind == "DETR" else 128)
    assert model.backbone.network.canvas == (64, 128) and boxes.max() <= 64
    assert torch.isclose(boxes[:, :1], left.clamp(0, 64), atol=1e-3).any(dim=1).all()


@pytest.mark.parametrize("kind", ["DETR", "RT-DETR"])
def test_it_labels_unlabelled_images(kind):
    labels = PseudoLabels(threshold=0.0, student_classes="abc", class_map=[["a", 0], ["b", 1]])
    losses = [NSTLoss(student_taps=["p5"], teacher_taps=["res5"])]
    student = build_model(tiny_cfg())
    model = Distiller(student=student, teacher=teacher(kind), losses=losses, input_format="BGR", pseudo_labels=labels)
    losses = model.train()(batch() + [{**x, "unlabelled": True} for x in images((64, 96), (48, 64))])
    assert losses["loss_cls_pseudo"] > 0 and losses["loss_nst"] > 0


def test_normalisation_of_the_image_processor():
    # DETR's images are standardised as ImageNet's, RT-DETR's only divided by 255.
    assert teacher("DETR").pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    model = teacher("RT-DETR")
    assert model.pixel_mean.flatten().tolist() == [0, 0, 0]
    assert model.pixel_std.flatten().tolist() == pytest.approx([255, 255, 255])


def test_classes_in_detectron2s_order():
    coco = tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    # As RT-DETR calls them.
    renamed = ["tvmonitor" if name == "tv" else "motorbike" if name == "motorcycle" else name for name in coco]
    assert _contiguous_classes(renamed) == (coco, list(range(80)))
    # As DETR numbers them, by COCO's ids with gaps.
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    names = ["N/A"] * 91
    for category, i in ids.items():
        names[category] = coco[i]
    classes, of_label = _contiguous_classes(names)
    assert classes == coco and of_label == [ids.get(category, -1) for category in range(91)]
    assert _contiguous_classes(["N/A", "cat", "tree"]) == (("cat", "tree"), [-1, 0, 1])


@pytest.fixture
def folder(tmp_path):
    for part in parts("RT-DETR"):
        part.save_pretrained(tmp_path / "rt_detr")
    return tmp_path / "rt_detr"


def hf_cfg(name, *losses, **opts):
    opts = {"KD__LOSSES": losses, "KD__TEACHER__CONFIG_FILE": f"hf://{name}", **opts}
    return tiny_cfg(MODEL__META_ARCHITECTURE="Distiller", **opts)


def test_a_folder_teaches_through_the_config(folder):
    cfg = hf_cfg(folder, "NSTLoss", KD__NST__STUDENT_TAPS=("p3", "res4"))
    losses = build_model(cfg).train()(batch())
    assert losses["loss_nst"] > 0
    found, want = build_teacher(cfg), parts("RT-DETR")[0]
    own = found.backbone.network.detector.state_dict()
    assert all(torch.equal(own[key], value) for key, value in want.state_dict().items())
    assert found.class_names == tuple(f"LABEL_{i}" for i in range(5))
    copied = copy.deepcopy(found)
    inputs = images((64, 64))
    with torch.no_grad():
        a, b = found(inputs)[0]["instances"], copied(inputs)[0]["instances"]
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and not found.training


def test_what_is_no_such_detector(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="There is no folder 'no/such/folder' .*a folder that save_pretrained wrote"):
        build_teacher(hf_cfg("no/such/folder"))  # at once: no hub is asked
    with pytest.raises(ValueError, match="'hf://no/such', which is no folder here.* hub: .*connect"):
        build_teacher(hf_cfg("no/such"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="transformers cannot load .*no file named model.safetensors"):
        build_teacher(hf_cfg(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="transformers cannot load .*image processor"):
        build_teacher(hf_cfg(folder))


def test_weights_that_are_missing(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.enc_score_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 of the network, first model.enc_score_head.weight"):
        build_teacher(hf_cfg(folder))


def test_yolos_has_no_maps():
    config = transformers.YolosConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    detector = transformers.AutoModelForObjectDetection.from_config(config)
    with pytest.raises(ValueError, match="YolosForObjectDetection has no backbone and no encoder to read maps of"):
        TransformersDetector(detector=detector, processor=transformers.YolosImageProcessor())


def test_transformers_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'not installed; install it with: pip install "kd_det\[transformers\]"'):
        build_teacher(hf_cfg("facebook/detr-resnet-50"))
