import pytest
import torch
from detectron2.modeling import build_model

from kd_det.features.connectors import build_connector
from tests.tiny import batch, distillation_cfg


def test_the_kernel_area_counts_in_the_initial_scale():
    # D31: variance 2 / (Ct k^2), for 1x1 as in the code of overhaul.
    for kernel_size in (1, 3):
        connector = build_connector(64, 96, kernel_size=kernel_size)
        expected = (2 / (96 * kernel_size**2)) ** 0.5
        assert connector.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert not connector.bias.any()


def test_a_norm_that_cannot_be_trained_is_named(tmp_path):
    # D21: one image of 32 pixels, whose p6 is a single position.
    opts = {"KD__REVIEW_KD__MID_CHANNELS": 8, "MODEL__RESNETS__NORM": "FrozenBN"}
    model = build_model(distillation_cfg(tmp_path, "ReviewKD", **opts)).train()
    with pytest.raises(ValueError, match="KD.REVIEW_KD.CONNECTOR_NORM to 'GN' or ''"):
        model(batch(sizes=((32, 32),)))
    assert model(batch(sizes=((32, 32),) * 2))["loss_review_kd"] > 0


def test_what_is_no_map():
    with pytest.raises(ValueError, match=r"needs maps \(N, C, H, W\); a student tap gave shape \(2, 4\)"):
        build_connector(4, 4)(torch.zeros(2, 4))


def test_an_unknown_norm():
    with pytest.raises(ValueError, match="Unknown norm of a connector 'BNN'"):
        build_connector(4, 4, norm="BNN")
