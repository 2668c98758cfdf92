import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

import kd_det  # noqa: F401 (registers the builder)


def resnet(name="build_basic_resnet_backbone", *, depth=18, width=64, freeze_at=0):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = width
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    return build_backbone(cfg)


@pytest.mark.parametrize("depth", [18, 34])
def test_at_width_64_it_is_detectron2s_own(depth):
    found, expected = resnet(depth=depth, freeze_at=2), resnet("build_resnet_backbone", depth=depth, freeze_at=2)
    found.load_state_dict(expected.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, expected_maps = found.eval()(x), expected.eval()(x)
    assert list(maps) == ["res4", "res5"]
    assert all(torch.equal(maps[level], expected_maps[level]) for level in maps)
    trained = [name for name, p in found.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in expected.named_parameters() if p.requires_grad]


def test_any_width():
    found = resnet(width=6)
    assert found.output_shape() == {
        "res4": ShapeSpec(channels=24, stride=16),
        "res5": ShapeSpec(channels=48, stride=32),
    }
    assert found(torch.randn(2, 3, 64, 64))["res5"].shape == (2, 48, 2, 2)


def test_the_pyramid_is_detectron2s_own():
    found, expected = resnet("build_basic_resnet_fpn_backbone"), resnet("build_resnet_fpn_backbone")
    found.load_state_dict(expected.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, expected_maps = found.eval()(x), expected.eval()(x)
    assert list(maps) == ["p4", "p5", "p6"]
    assert all(torch.equal(maps[level], expected_maps[level]) for level in maps)
    narrow = resnet("build_basic_resnet_fpn_backbone", width=6).bottom_up
    assert {k: v.shape for k, v in narrow.state_dict().items()} == {
        k: v.shape for k, v in resnet(width=6).state_dict().items()
    }


def test_other_depths_are_refused():
    with pytest.raises(ValueError, match="DEPTH must be 18 or 34, found 50; build_resnet_backbone"):
        resnet(depth=50)
