import pytest
import torch
from detectron2.modeling import build_model

from kd_det.features.taps import deepest_level
from kd_det.losses import FeatureDistillationLoss, feature_distillation_loss, hint_loss
from tests.classification.tiny_classifier import unlabelled_cfg
from tests.tiny import distillation_cfg, tiny_cfg


def test_by_hand():
    # Channels 1 and 5 have mean 3 and deviation 2: whitened they are -1 and 1. The student's 3 is 4 away from -1, its 1
    # is 0 away from 1. With beta 2, a distance of 4 costs 4 - 1 = 3, averaged over two channels 1.5.
    student, teacher = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)
    assert feature_distillation_loss(student, teacher).item() == pytest.approx(1.5, rel=1e-4)
    # With beta 8 it costs 4^2 / 16 = 1, averaged 0.5.
    assert feature_distillation_loss(student, teacher, beta=8.0).item() == pytest.approx(0.5, rel=1e-4)


def test_is_its_definition_position_by_position():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, 6, dtype=torch.float64) * 3 for _ in range(2))
    valid = torch.rand(2, 1, 4, 6) > 0.3
    expected = []
    for s, t, v in zip(student, teacher, valid):
        costs = []
        for y, x in v[0].nonzero().tolist():
            d = s[:, y, x] - (t[:, y, x] - t[:, y, x].mean()) / (t[:, y, x].var(correction=0) + 1e-5).sqrt()
            costs.append(torch.where(d.abs() <= 2, d**2 / 4, d.abs() - 1).mean())
        expected.append(sum(costs) / len(costs))
    found = feature_distillation_loss(student, teacher, valid=valid)
    torch.testing.assert_close(found, sum(expected) / 2)


def test_scale_and_offset_of_the_teachers_positions_do_not_matter():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 3, 5), torch.randn(2, 8, 3, 5)
    scale, offset = torch.rand(2, 1, 3, 5) * 9 + 1, torch.randn(2, 1, 3, 5)
    found = feature_distillation_loss(student, teacher * scale + offset)
    torch.testing.assert_close(found, feature_distillation_loss(student, teacher), rtol=1e-4, atol=1e-5)


def test_is_half_the_hint_of_the_whitened_map_where_no_distance_exceeds_beta():
    """With beta 1, near the target: d^2 / 2, and FitNets' hint takes the mean of d^2."""
    torch.manual_seed(0)
    teacher = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    white = torch.nn.functional.layer_norm(teacher.movedim(1, -1), (8,)).movedim(-1, 1)
    student = white + torch.rand_like(white)
    torch.testing.assert_close(
        feature_distillation_loss(student, teacher, beta=1.0), hint_loss(student, white) / 2, rtol=1e-6, atol=0
    )


def test_wrong_options_and_maps():
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="feature_distillation_loss: beta must be a positive number, found 0"):
        FeatureDistillationLoss(beta=0)
    with pytest.raises(ValueError, match="as many student as teacher channels, found 4 and 3"):
        feature_distillation_loss(x, x[:, :3])


def test_without_taps_it_reads_the_levels_in_common_or_the_deepest(tmp_path):
    (loss,) = build_model(distillation_cfg(tmp_path, "FeatureDistillation")).losses.values()
    assert loss.student_taps == loss.teacher_taps == ("res3", "res4", "res5")
    (loss,) = build_model(unlabelled_cfg(tmp_path)).losses.values()  # of a ViT
    assert (loss.student_taps, loss.teacher_taps) == (("res5",), ("res4",))
    taps = {"KD__FD__STUDENT_TAPS": ("p3",), "KD__FD__TEACHER_TAPS": ("p4",)}
    (loss,) = build_model(distillation_cfg(tmp_path, "FeatureDistillation", **taps)).losses.values()
    assert (loss.student_taps, loss.teacher_taps) == (("p3",), ("p4",))
    with pytest.raises(ValueError, match="0 student taps .. are paired with 1 teacher taps"):
        build_model(distillation_cfg(tmp_path, "FeatureDistillation", KD__FD__TEACHER_TAPS=("res4",)))
    assert deepest_level(build_model(tiny_cfg())) == "res5"
