"""Networks looked at: what is read of them, what is drawn, and that training stays what it was."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata
from detectron2.engine import hooks
from detectron2.modeling import build_model
from torch import nn

from kd_det import Distiller
from kd_det.cli.visualize import visualization_hook
from kd_det.engine import Trainer
from kd_det.losses import HintLoss, NSTLoss
from kd_det.teachers.ensemble import OtherTeacher
from kd_det.visualization import Panel, Sample, View, Viewer, detections_row, draw_row, overlay, read_sample
from tests.tiny import distillation_cfg, tiny_cfg, tiny_retinanet_cfg
from tests.tiny_run import differing, run_cfg, train, write_coco


def sample_of(cfg, tmp_path, sizes=((48, 72),)) -> Sample:
    name = write_coco(tmp_path / "images", images=1, sizes=sizes)
    return read_sample(DatasetMapper(cfg, is_train=False), DatasetCatalog.get(name)[0])


def test_maps_cover_the_image_without_its_padding(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", "Overhaul", INPUT__MIN_SIZE_TEST=48)
    model = build_model(cfg).eval()
    sample = sample_of(cfg, tmp_path)  # 48 x 72, padded to 64 x 96
    viewer = Viewer(model, input_format="BGR")
    seen = viewer(sample, "now")
    assert list(seen) == ["teacher", "now"]
    assert seen["now"].maps["p2"][0].shape == (8, 12, 18) and seen["teacher"].maps["p2"][0].shape == (8, 12, 18)
    assert seen["now"].maps["p5"][0].shape == (8, 2, 3)
    inputs = [sample.inputs]
    with torch.no_grad():
        direct = model.student.backbone(model.student.preprocess_image(inputs).tensor)["p2"]
        detected = model.student(inputs)[0]["instances"]
    torch.testing.assert_close(seen["now"].maps["p2"][0], direct[0, :, :12, :18])
    assert torch.equal(seen["now"].instances.pred_boxes.tensor, detected.pred_boxes.tensor)
    assert [tap for tap, _ in viewer.rows(sample, seen)] == [student for student, _ in viewer.pairs]


class Echo(nn.Module):
    """Gives the image as its map, in the order in which it reads colours."""

    input_format = "RGB"

    def __init__(self):
        super().__init__()
        self.backbone = nn.Identity()

    def forward(self, batched_inputs):
        return {"out": self.backbone(batched_inputs[0]["image"][None].float())}


def test_a_teacher_gets_its_own_order_of_colours():
    image = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 2)
    sample = Sample(np.zeros((2, 2, 3), np.uint8), {"image": image}, {})
    seen = View(Echo(), ["backbone"], input_format="BGR", side="teacher")(sample, torch.device("cpu"))
    assert seen.instances is None and seen.maps["backbone"][0][:, 0, 0].tolist() == [2, 1, 0]


def test_a_tap_that_gives_no_map_of_the_image_is_refused(tmp_path):
    model, cfg = build_model(tiny_cfg()).eval(), get_cfg()
    view = View(model, ["roi_heads.box_head.fc1"], input_format="BGR", side="student")
    with pytest.raises(ValueError, match=r"student tap 'roi_heads.box_head.fc1' gives .*expected maps \(1, C, h, w\)"):
        view(sample_of(cfg, tmp_path), torch.device("cpu"))
    with pytest.raises(ValueError, match="Unknown tap of the student 'p9'"):
        Viewer(model, input_format="BGR", pairs=[("p9", "p9")])


def test_maps_that_inference_overwrites_are_refused_and_not_drawn_unasked(tmp_path):
    """RetinaNet takes the sigmoid of its head's output in place; a loss that reads it shows the backbone instead."""
    cfg = tiny_retinanet_cfg(INPUT__MIN_SIZE_TEST=48)
    model, sample = build_model(cfg).eval(), sample_of(cfg, tmp_path)
    view = View(model, ["head.cls_score"], input_format="BGR", side="student")
    with pytest.raises(ValueError, match="The student in inference: tap 'head.cls_score'.* in place"):
        view(sample, torch.device("cpu"))
    loss = HintLoss(student_taps=["head.cls_score"], student_channels=[1], teacher_channels=[1])
    taught = Distiller(student=model, teacher=build_model(tiny_retinanet_cfg()), losses=[loss]).eval()
    viewer = Viewer(taught, input_format="BGR")
    assert [s for s, _ in viewer.pairs] == ["p3", "p4", "p5", "p6", "p7"]
    assert len(list(viewer.rows(sample, viewer(sample)))) == 5


def test_a_plain_detector_shows_its_levels(tmp_path):
    viewer = Viewer(build_model(tiny_cfg()).eval(), input_format="BGR")
    assert [s for s, _ in viewer.pairs] == ["p2", "p3", "p4", "p5", "p6"]
    sample = sample_of(tiny_cfg(INPUT__MIN_SIZE_TEST=48), tmp_path)
    (rows,) = (rows for tap, rows in viewer.rows(sample, viewer(sample)) if tap == "p3")
    assert [row.title for row in rows] == ["attention at p3", "most selective channels of the student at p3"]
    assert len(rows[1].panels) == 5


def test_overhauls_margins_and_counted_positions(tmp_path):
    cfg = distillation_cfg(tmp_path, "Overhaul", INPUT__MIN_SIZE_TEST=48)
    model = build_model(cfg).eval()
    viewer, sample = Viewer(model, input_format="BGR"), sample_of(cfg, tmp_path)
    seen = viewer(sample, "before") | viewer(sample)
    before = list(viewer.rows(sample, seen))[0][1][-1]
    assert before.title == "OFD at res3.pre_activation" and before.panels[0].title == "margins, not measured yet"
    model.calibrate([[sample.inputs]])
    row = list(viewer.rows(sample, seen))[0][1][-1]
    assert [panel.title for panel in row.panels] == ["margins", "counted, before", "counted, student"]
    assert torch.equal(row.panels[0].values, model.losses["overhaul"].margins[0].value)
    assert row.panels[0].values.min() < 0 < row.panels[1].values.max() <= 1


def test_of_several_teachers_the_first_is_drawn(tmp_path):
    model = build_model(tiny_cfg()).eval()
    first, other = (build_model(tiny_cfg(fpn=width)).eval() for width in (8, 12))
    losses = [NSTLoss(student_taps=[tap]) for tap in ("p3", "p4")]
    more = [OtherTeacher("other", other, losses[1:])]
    taught = Distiller(student=model, teacher=first, losses=losses[:1], other_teachers=more, input_format="BGR")
    viewer, sample = Viewer(taught.eval(), input_format="BGR"), sample_of(tiny_cfg(), tmp_path)
    assert viewer.pairs == [("p3", "p3")] and viewer(sample)["teacher"].maps["p3"][0].shape[0] == 8


def test_the_weights_of_regions(tmp_path):
    cfg = distillation_cfg(tmp_path, "NST", INPUT__MIN_SIZE_TEST=48, KD__NST__REGIONS="boxes")
    viewer, sample = Viewer(build_model(cfg).eval(), input_format="BGR"), sample_of(cfg, tmp_path, ((48, 72),))
    rows = next(iter(viewer.rows(sample, viewer(sample))))[1]
    (panel,) = rows[-1].panels
    assert rows[-1].title == "weights of the NST loss at p2" and panel.values.shape == (12, 18)
    # boxes from (2, 3), (7, 7) and (12, 11) to (14, 13), (25, 25) and (36, 37), in cells of 4 pixels
    assert panel.values[9, 8] == panel.values[0, 0] > 0 and panel.values[10, 8] == panel.values[9, 9] == 0
    torch.testing.assert_close(panel.values.mean(), torch.tensor(1.0))


def test_an_overlay_has_the_legends_colours():
    panel = Panel("", np.full((2, 4, 3), 255, np.uint8), torch.tensor([[0.0, 5.0]]), limit=5)
    drawn = overlay(panel, width=40)
    low, high = (panel.colours.to_rgba([0.0, 5.0])[:, 2::-1] * 255 * 0.7 + 255 * 0.3).round()
    assert drawn.shape == (20, 40, 3)
    np.testing.assert_allclose(drawn[10, 5], low, atol=1.5)
    np.testing.assert_allclose(drawn[10, 35], high, atol=1.5)


def test_rows_are_drawn_with_readable_sizes(tmp_path):
    cfg = tiny_cfg(INPUT__MIN_SIZE_TEST=48)
    sample = sample_of(cfg, tmp_path)
    row = detections_row(sample, {}, Metadata())
    assert [panel.title for panel in row.panels] == ["ground truth"]
    picture = draw_row(row)
    assert picture.dtype == np.uint8 and picture.shape[1] == round((5 * 2.35 + 0.2) * 150)


@pytest.mark.parametrize("losses", [("NST", "Overhaul"), ()], ids=["distilled", "plain"])
def test_the_hook_draws_and_changes_no_bit_of_training(tmp_path, losses):
    taps = {"KD__NST__STUDENT_TAPS": ("p3",), "KD__OVERHAUL__STUDENT_TAPS": ("res5.pre_activation",)}
    opts = taps if losses else {"MODEL__META_ARCHITECTURE": "GeneralizedRCNN"}
    cfg = run_cfg(tmp_path, *losses, SOLVER__MAX_ITER=3, SOLVER__STEPS=(2,), **opts)
    train(cfg)
    without = torch.load(tmp_path / "out/model_final.pth", weights_only=True)

    class Watched(Trainer):
        names: ClassVar[list] = []

        def build_hooks(self):
            period = cfg.clone()  # the trainer has none: by the same key, Detectron2 draws proposals in random colours
            period.VIS_PERIOD = 2
            draw = visualization_hook(period, getattr(self.model, "module", self.model))
            return [*super().build_hooks()[:-1], draw, hooks.CallbackHook(after_step=self.note)]

        def note(self, _):
            self.names.extend((self.iter, name) for name, *_ in self.storage._vis_data)
            self.storage.clear_images()

    cfg.OUTPUT_DIR = str(tmp_path / "drawn")
    train(cfg, trainer_class=Watched)
    assert Watched.names == [(1, "distillation/image_0"), (1, "distillation/image_1")]
    assert not differing(without, torch.load(tmp_path / "drawn/model_final.pth", weights_only=True))
