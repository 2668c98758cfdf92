import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model

from kd_det import student_cfg
from kd_det.classification.classifier import ImageClassifier
from kd_det.classification.trainer import ClassificationTrainer, is_classifier, trainer_class
from tests.classification.tiny_classifier import NUM_CLASSES, classifier_cfg, distilled_cfg, images


def build(**opts):
    return build_model(classifier_cfg(**opts))


def test_the_loss_is_the_cross_entropy_of_the_linear_layer():
    model = build().train()
    logits = model.logits(images()).double()
    expected = -torch.stack([logits[i].log_softmax(0)[x["label"]] for i, x in enumerate(images())]).mean()
    assert model(images())["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_label_smoothing_spreads_its_share_evenly():
    model = build(CLASSIFICATION__LABEL_SMOOTHING=0.2).eval()
    log = model.logits(images()).double().log_softmax(1)
    hard = log[range(4), [x["label"] for x in images()]]
    expected = -(0.8 * hard + 0.2 * log.mean(1)).mean()
    assert model.task_losses(images())["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_may_be_distributions():
    model = build().eval()
    mixed = [{**x, "label": torch.tensor([0.25, 0.75, 0, 0])} for x in images()]
    log = model.logits(images()).double().log_softmax(1)
    expected = -(0.25 * log[:, 0] + 0.75 * log[:, 1]).mean()
    assert model.task_losses(mixed)["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_eval_gives_each_image_scores_that_sum_to_one():
    model = build().eval()
    outputs = model(images(3))
    assert [tuple(x["scores"].shape) for x in outputs] == [(NUM_CLASSES,)] * 3
    assert torch.stack([x["scores"] for x in outputs]).sum(1).tolist() == pytest.approx([1, 1, 1])
    assert model([]) == []


def test_images_are_normalised():
    model = build(MODEL__PIXEL_MEAN=[10.0, 20.0, 30.0], MODEL__PIXEL_STD=[1.0, 2.0, 4.0])
    image = torch.tensor([12, 26, 38], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    assert model.preprocess_image([{"image": image}]).tensor[0, :, 5, 7].tolist() == [2, 3, 2]


def test_padding_is_not_pooled():
    model = build()
    features = torch.zeros(2, 1, 2, 2)
    features[0] = 7
    features[1] = torch.tensor([[1.0, 3.0], [100.0, 100.0]])  # the lower row is padding
    batch = model.preprocess_image([{"image": torch.zeros(3, 64, 64)}, {"image": torch.zeros(3, 32, 64)}])
    assert model._pool(features, batch).flatten().tolist() == [7, 2]


def test_input_size_is_that_of_the_backbone_alone_too():
    model = build(CLASSIFICATION__INPUT_SIZE=64).eval()
    x = torch.randn(1, 3, 32, 32)
    found = model.backbone(x)["res5"]
    plain = build().eval()
    plain.load_state_dict(model.state_dict())
    resized = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
    assert torch.equal(found, plain.backbone(resized)["res5"])


@pytest.mark.parametrize("resizes", ["student", "teacher"])
def test_maps_of_resized_images_are_compared_everywhere(tmp_path, resizes):
    """D30: where a network enlarges its crops, its maps hold image everywhere, not in a corner."""
    size = {"CLASSIFICATION__INPUT_SIZE": 64}
    teacher = classifier_cfg(depth=50, width=8, **(size if resizes == "teacher" else {}))
    student = size if resizes == "student" else {}
    model = build_model(distilled_cfg(tmp_path, "HintLoss", teacher=teacher, **student)).train()
    seen = []
    (module,) = model.losses.values()
    module.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(images())
    ((own, theirs, context),) = seen
    sides = {"student": own[0], "teacher": theirs[0]}  # res4, of stride 16
    assert [sides.pop(resizes).shape[-1], *(m.shape[-1] for m in sides.values())] == [4, 2]
    assert all(mask is None or mask.all() for mask in map(context.valid, own))
    inputs = model.teacher.preprocess_image(images()).tensor
    torch.testing.assert_close(theirs[0], model.teacher.backbone(inputs)["res4"])


def test_a_label_out_of_range_names_the_image():
    bad = [{**images()[0], "label": 9, "file_name": "x.jpg"}]
    with pytest.raises(ValueError, match=r"label of x.jpg is 9; expected 0..3"):
        build().train()(bad)


@pytest.mark.parametrize(
    "opts, message",
    [
        ({"CLASSIFICATION__IN_FEATURE": "res9"}, "IN_FEATURE.*'res9'.*res2"),
        ({"CLASSIFICATION__NUM_CLASSES": 1}, "num_classes must be at least 2"),
        ({"CLASSIFICATION__LABEL_SMOOTHING": 1.0}, "label_smoothing must be in"),
    ],
)
def test_wrong_options(opts, message):
    with pytest.raises(ValueError, match=message):
        build(**opts)


@pytest.mark.parametrize("head", ["fc", "stem.fc", "fc1000", "linear"])
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_the_names_of_detectron2_and_torchvision_files_are_found(head, prefix):
    model, other = build(), build()
    renamed = {"linear.": f"{head}.", "backbone.": prefix}
    state = {renamed[k.partition(".")[0] + "."] + k.partition(".")[2]: v for k, v in other.state_dict().items()}
    model.load_state_dict(state)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_head_of_other_classes_is_refused():
    state = {k.replace("linear.", "fc."): v for k, v in build(CLASSIFICATION__NUM_CLASSES=7).state_dict().items()}
    with pytest.raises(ValueError, match="linear.*; they classify 7 classes, not 4"):
        build().load_state_dict(state)


ALL = ("NSTLoss", "AttentionTransferLoss", "OverhaulLoss", "SimilarityLoss", "HintLoss", "SoftTargetLoss", "FSPLoss")


@pytest.mark.parametrize("losses", [*((name,) for name in ALL), ("GradientAttentionLoss",), ("SoftTarget", "NST"), ALL])
def test_every_loss_teaches_a_classifier(tmp_path, losses):
    cfg = distilled_cfg(tmp_path, *losses, KD__OVERHAUL__CALIBRATION_IMAGES=4)
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    values = []
    for _ in range(12):
        found = model(images(6))
        assert len(found) == 1 + len(losses) and "loss_cls" in found
        assert found.pop("loss_cls").requires_grad
        values.append(sum(found.values()).item())
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
    assert 0 < values[-1] < values[0]


def test_the_checkpoint_is_the_plain_classifier(tmp_path):
    cfg = distilled_cfg(tmp_path, "HintLoss")
    model = build_model(cfg)
    plain = build_model(student_cfg(cfg))
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(images())[0]["scores"], plain.eval()(images())[0]["scores"])


def test_soft_targets_need_equal_class_counts(tmp_path):
    teacher = classifier_cfg(depth=50, width=8, CLASSIFICATION__NUM_CLASSES=5)
    cfg = distilled_cfg(tmp_path, "SoftTargetLoss", teacher=teacher)
    with pytest.raises(ValueError, match="student has 4 classes and the teacher 5"):
        build_model(cfg)


def test_soft_targets_ask_a_classifier_for_taps(tmp_path):
    cfg = distilled_cfg(tmp_path, "SoftTargetLoss", KD__SOFT_TARGET__STUDENT_TAPS=())
    with pytest.raises(ValueError, match=r'KD.SOFT_TARGET.STUDENT_TAPS names .* \("linear",\) in a classifier'):
        build_model(cfg)


def test_a_backbone_without_such_a_tap(tmp_path):
    cfg = distilled_cfg(tmp_path, "NSTLoss", KD__NST__STUDENT_TAPS=("res7",))
    with pytest.raises(ValueError, match="Unknown tap of the student 'res7'"):
        build_model(cfg)


def test_soft_targets_are_those_of_whole_images(tmp_path):
    cfg = distilled_cfg(tmp_path, "SoftTargetLoss", KD__SOFT_TARGET__TEMPERATURE=3.0)
    model = build_model(cfg).train()
    found = model(images())["loss_soft_target"].item()
    s = model.student.logits(images()).double().detach()
    t = model.teacher.logits(images()).double()
    p = (t / 3).softmax(1)
    expected = 9 * (p * ((t / 3).log_softmax(1) - (s / 3).log_softmax(1))).sum(1).mean()
    assert found == pytest.approx(expected.item(), rel=1e-3)


def test_a_classifier_is_known_by_its_class_not_its_name():
    for name in ("PlainNamed", "LooksLikeAClassifier"):
        META_ARCH_REGISTRY._do_register(name, ImageClassifier if name == "PlainNamed" else GeneralizedRCNN)
    try:
        for name in ("PlainNamed", "NetworkClassifier"):
            assert is_classifier(classifier_cfg(MODEL__META_ARCHITECTURE=name))
        assert not is_classifier(classifier_cfg(MODEL__META_ARCHITECTURE="LooksLikeAClassifier"))
        cfg = classifier_cfg(MODEL__META_ARCHITECTURE="Distiller", KD__STUDENT__META_ARCHITECTURE="PlainNamed")
        assert "CLASSIFICATION" in student_cfg(cfg) and trainer_class(cfg) is ClassificationTrainer
    finally:
        for name in ("PlainNamed", "LooksLikeAClassifier"):
            del META_ARCH_REGISTRY._obj_map[name]
