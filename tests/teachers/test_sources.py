import pytest
import torch
from torch import nn

from kd_det import build_teacher
from kd_det.teachers import FeatureTeacher, TeacherSource, register_teacher_source, sources
from tests.tiny import tiny_cfg


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)

    def forward(self, x):
        return self.conv(x)


@pytest.fixture
def own_source(monkeypatch):
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))

    @register_teacher_source("mine")
    class Mine(TeacherSource):
        def build(self, cfg):
            assert self.path == "patches"
            return FeatureTeacher(network=Patches())

    return Mine


def cfg(name, weights=""):
    return tiny_cfg(KD__TEACHER__CONFIG_FILE=name, KD__TEACHER__WEIGHTS=str(weights))


def test_a_source_is_one_class(own_source, tmp_path):
    torch.save({f"backbone.network.{k}": v for k, v in Patches().state_dict().items()}, tmp_path / "w.pth")
    teacher = build_teacher(cfg("mine://patches", tmp_path / "w.pth"))
    assert teacher.backbone.output_shape()["p4"].channels == 8
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="'mine://patches' has no weights"):
        build_teacher(cfg("mine://patches"))


def test_a_source_may_bring_weights_that_are_no_file(own_source):
    network = Patches()
    own_source.configure = lambda self, cfg, student: setattr(cfg.MODEL, "WEIGHTS", "mine")
    own_source.read_weights = lambda self, cfg: network.state_dict() if cfg.MODEL.WEIGHTS == "mine" else None
    teacher = build_teacher(cfg("mine://patches"))
    assert torch.equal(teacher.backbone.network.conv.weight, network.conv.weight)
    network.conv = nn.Conv2d(3, 9, 16, 16)
    with pytest.raises(ValueError, match="weights 'mine' do not fit the teacher 'mine://patches': 2 misshapen"):
        build_teacher(cfg("mine://patches"))


def test_an_unknown_scheme_lists_the_registered_ones(own_source):
    with pytest.raises(ValueError, match="'mime://patches' is a URL. Expected .* as timm://NAME, .*, mine://NAME"):
        build_teacher(cfg("mime://patches"))
