"""Classes that both networks know: matched by name or by map, compared renormalised."""

import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from kd_det import Distiller
from kd_det.features.classes import match_classes
from kd_det.losses import SoftTargetLoss, binary_soft_target_loss, bounded_regression_loss, dist_loss, dkd_loss
from tests.losses.test_soft_target import naive_kl
from tests.tiny import batch, distillation_cfg, tiny_cfg, tiny_retinanet_cfg
from tests.tiny_run import write_coco

ABC = ["a", "b", "c"]


def pairs(student, teacher, class_map=(), *, counts=None):
    """The pairs of classes of two lists; None where they are the same."""
    counts = counts or (len(student), len(teacher))
    match = match_classes(*counts, student_classes=student, teacher_classes=teacher, class_map=class_map)
    return match and list(zip(match.student.tolist(), match.teacher.tolist()))


@pytest.mark.parametrize(
    "student, teacher, class_map, expected",
    [
        (ABC, ABC, (), None),
        (["x", "x"], ["x", "x"], (), None),
        (ABC, ["c", "b", "a"], (), [(0, 2), (1, 1), (2, 0), (3, 3)]),
        (ABC, ["x", "c", "y", "a"], (), [(0, 3), (2, 1), (3, 4)]),  # background last
        (["Dining_Table", "pottedplant"], ["potted plant", "dining-table"], (), [(0, 1), (1, 0), (2, 2)]),
        (["sofa", "cat"], ["cat", "couch"], [["sofa", "couch"]], [(0, 1), (1, 0), (2, 2)]),
        (["a", "b"], ["a", "b"], [["a", "b"], ["b", "a"]], [(0, 1), (1, 0), (2, 2)]),  # the map is right
        (["x", "y"], ["a", "b"], [[1, "a"]], [(1, 0), (2, 2)]),
        (["x", "y"], ["a", "b"], [["x", "a"], ["y", "b"]], None),
        (["x", "x"], ["a", "b"], [[0, 1], [1, 0]], [(0, 1), (1, 0), (2, 2)]),  # named alike, paired by number
    ],
)
def test_pairs(student, teacher, class_map, expected):
    assert pairs(student, teacher, class_map) == expected


def test_names_that_are_not_known():
    assert pairs([], [], counts=(3, 3)) is None
    assert pairs(ABC, [], counts=(3, 3)) is None
    assert pairs([], ABC, [[1, "c"]], counts=(2, 3)) == [(1, 2), (2, 3)]
    assert pairs(ABC, [*ABC, "d"], counts=(5, 4)) == [(0, 0), (1, 1), (2, 2), (5, 4)]  # the head has unused classes


@pytest.mark.parametrize(
    "student, teacher, class_map, message",
    [
        (ABC, ["x", "y"], (), "no class in common: the student's are a, b, c, the teacher's x, y"),
        (ABC, ABC, [["d", "a"]], "KD.TEACHER.CLASS_MAP: Unknown class of the student 'd'. .*Valid names: .*a, b, c"),
        (ABC, ABC, [["a", "cc"]], "KD.TEACHER.CLASS_MAP: Unknown class of the teacher 'cc'"),
        (ABC, ABC, [["a", 3]], "KD.TEACHER.CLASS_MAP: Unknown class of the teacher 3"),
        (ABC, ABC, [["a", "b"], ["A", "c"]], "KD.TEACHER.CLASS_MAP has 'A' twice"),
        (ABC, ABC, [["a", "b"], ["c", 1]], "KD.TEACHER.CLASS_MAP has 1 twice"),
        (ABC, ABC, ["ab"], "pairs of a student's and a teacher's class, found 'ab'"),
        (ABC, ["a", "x", "A"], (), "'A' names two of the teacher's classes"),
    ],
)
def test_what_is_wrong_with_names(student, teacher, class_map, message):
    with pytest.raises(ValueError, match=message):
        pairs(student, teacher, class_map)


@pytest.mark.parametrize(
    "counts, names, message",
    [
        ((3, 80), {}, "the student has 3 classes and the teacher 80, and the names of the teacher's are not known"),
        ((3, 4), {"teacher_classes": [*ABC, "d"]}, "the names of the student's are not known.*DATASETS.TRAIN"),
        ((3, 3), {"class_map": [["a", 0]]}, "has 'a', and the names of the student's classes are not known"),
        ((3, 3), {"teacher_classes": ["a", "b"]}, "2 for the teacher's 3"),
        ((2, 3), {"student_classes": ABC}, "found 3 names for the student's 2 classes"),
    ],
)
def test_numbers_and_names_that_do_not_fit(counts, names, message):
    with pytest.raises(ValueError, match=message):
        match_classes(*counts, **names)


def test_what_is_shared_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        pairs(["u", "v"], ["v", "w"])
    assert "The teacher knows 1 of the student's 2 classes: v; it teaches nothing about u." in caplog.text


def test_tables_are_no_part_of_a_checkpoint():
    match = match_classes(3, 3, class_map=[[0, 2]])
    assert not match.state_dict()
    labels, shared = match.places(torch.tensor([0, 1, 2, 3]))
    assert labels.tolist() == [0, 0, 0, 1] and shared.tolist() == [True, False, False, True]


MINE = ["dog", "zebra crossing", "person"]  # of COCO 16, none, and 0


@pytest.fixture
def mine():
    MetadataCatalog.get("mine").thing_classes = MINE
    yield "mine"
    MetadataCatalog.remove("mine")


def run(tmp_path, loss, mine, teacher=None, **opts):
    """A step of a student of three classes whose teacher knows COCO's 80: what the loss saw, and its value."""
    coco = {"DATASETS__TRAIN": ("coco_2017_train",), "MODEL__ROI_HEADS__NUM_CLASSES": 80}
    teacher = teacher or tiny_cfg(depth=50, width=8, **coco)
    model = build_model(distillation_cfg(tmp_path, loss, teacher=teacher, DATASETS__TRAIN=(mine,), **opts)).train()
    seen = []
    next(iter(model.losses.values())).register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    model(batch())
    return seen[0]


STUDENT, TEACHER = [0, 2, 3], [16, 0, 80]


class TestCOCOTeacher:
    def test_soft_target(self, tmp_path, mine):
        *_, context, value = run(tmp_path, "SoftTarget", mine)
        ((s, t),) = context.region_pairs()
        assert t.logits.shape[1] == 81
        torch.testing.assert_close(value, naive_kl(s.logits[:, STUDENT], t.logits[:, TEACHER], 2.0))

    def test_dist(self, tmp_path, mine):
        *_, context, value = run(tmp_path, "DIST", mine)
        ((s, t),) = context.region_pairs()
        assert value == dist_loss(s.logits[:, STUDENT], t.logits[:, TEACHER]) > 0

    def test_dkd_leaves_out_what_the_teacher_does_not_know(self, tmp_path, mine):
        *_, context, value = run(tmp_path, "DKD", mine)
        ((s, t),) = context.region_pairs()
        labels = context.region_targets(0).classes
        keep = labels != 1
        assert 0 < (~keep).sum() < len(labels)
        place = torch.tensor([0, -1, 1, 2])[labels[keep]]
        logits = s.logits[keep][:, STUDENT], t.logits[keep][:, TEACHER]
        torch.testing.assert_close(value, dkd_loss(*logits, place, beta=0.25, temperature=1.0))

    def test_bounded_regression(self, tmp_path, mine):
        *_, context, value = run(tmp_path, "BoundedRegression", mine)
        ((s, t),), targets = context.region_pairs(), context.region_targets(0)
        rows = [i for i, c in enumerate(targets.classes.tolist()) if c in (0, 2)]
        own = torch.stack([s.deltas[i].view(3, 4)[targets.classes[i]] for i in rows])
        theirs = torch.stack([t.deltas[i].view(80, 4)[{0: 16, 2: 0}[int(targets.classes[i])]] for i in rows])
        expected = bounded_regression_loss(own, theirs, targets.deltas[rows])
        torch.testing.assert_close(value, len(rows) / len(targets.classes) * expected)
        assert 0 < len(rows) < targets.foreground.sum()

    def test_a_dense_head_with_anchors(self, tmp_path, mine):
        coco = {"DATASETS__TRAIN": ("coco_2017_train",), "MODEL__RETINANET__NUM_CLASSES": 80}
        plain = tiny_retinanet_cfg(DATASETS__TRAIN=(mine,))
        taps = {"KD__SOFT_TARGET__STUDENT_TAPS": ("head.cls_score",), "KD__STUDENT__META_ARCHITECTURE": "RetinaNet"}
        cfg = distillation_cfg(tmp_path, "SoftTarget", teacher=tiny_retinanet_cfg(depth=50, **coco), **taps)
        plain.MODEL.META_ARCHITECTURE, plain.KD = "Distiller", cfg.KD
        model = build_model(plain).train()
        seen = []
        model.losses["soft_target"].register_forward_hook(lambda m, args, out: seen.append((*args, out)))
        model(batch(((64, 96), (64, 96))))
        ((student, teacher, _, value),) = seen
        flat = []
        for maps, classes, channels in ((student, 3, STUDENT), (teacher, 80, TEACHER)):
            anchors = [x.permute(0, 2, 3, 1).reshape(-1, classes) for x in maps]  # (positions A, K)
            flat.append(torch.cat(anchors)[:, channels[:2]])
        torch.testing.assert_close(value, binary_soft_target_loss(*flat, temperature=2.0))

    def test_names_that_only_reading_the_data_set_registers(self, tmp_path):
        name = write_coco(tmp_path / "images", name="unread")  # classes "0", "1" and "2"
        opts = {"KD__TEACHER__CLASSES": [f"x{i}" for i in range(79)] + ["2"], "KD__TEACHER__CLASS_MAP": [["1", "x7"]]}
        *_, context, value = run(tmp_path, "SoftTarget", name, **opts)
        ((s, t),) = context.region_pairs()
        torch.testing.assert_close(value, naive_kl(s.logits[:, [1, 2, 3]], t.logits[:, [7, 79, 80]], 2.0))


def test_the_same_classes_are_as_if_nothing_was_known(tmp_path, mine):
    values = []
    for known in ({}, {"KD__TEACHER__CLASSES": MINE}):
        torch.manual_seed(0)
        values.append(run(tmp_path, "SoftTarget", mine, tiny_cfg(depth=50, width=8), **known)[-1])
    assert values[0] == values[1] > 0


def test_without_a_config():
    student, teacher = build_model(tiny_cfg()), build_model(tiny_cfg(depth=50, MODEL__ROI_HEADS__NUM_CLASSES=4))
    names = {"student_classes": ABC, "teacher_classes": ["c", "x", "y", "b"]}
    loss = SoftTargetLoss(temperature=2.0, **names)
    Distiller(student=student, teacher=teacher, losses=[loss], input_format="BGR")
    assert loss.classes.teacher.tolist() == [3, 0, 4]
    with pytest.raises(ValueError, match="the student has 3 classes and the teacher 4"):
        Distiller(student=student, teacher=teacher, losses=[SoftTargetLoss()], input_format="BGR")


def test_shared_classes_are_indifferent_to_the_others(tmp_path):
    """A label of a class that is not shared, and logits of others, change nothing."""
    match = match_classes(4, 6, class_map=[[3, 0], [1, 5]])
    student, teacher = torch.randn(5, 5), torch.randn(5, 7)
    s, t = match.logits(student, teacher, background=True)
    assert torch.equal(s, student[:, [1, 3, 4]]) and torch.equal(t, teacher[:, [5, 0, 6]])
    # Two anchors of 4 and 6 classes: the classes of an anchor are neighbours.
    dense = torch.arange(8.0)[None, :, None], torch.arange(12.0)[None, :, None]
    s, t = match.logits(*dense, background=False, num_anchors=2)
    assert s[0, :, 0].tolist() == [1, 3, 5, 7] and t[0, :, 0].tolist() == [5, 0, 11, 6]
    counted = torch.tensor([True, False, True, False, True])
    logits, labels = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)], torch.tensor([0, 1, 2, 0, 1])
    expected = dkd_loss(*(x[counted] for x in logits), labels[counted])
    torch.testing.assert_close(dkd_loss(*logits, labels, valid=counted), expected)
    assert dkd_loss(*logits, labels, valid=torch.zeros(5, dtype=torch.bool)) == 0
