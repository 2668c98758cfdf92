import hashlib
import sys

import pytest
import timm
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from kd_det import build_teacher, student_cfg
from kd_det.backbones.timm_backbone import flat_key
from kd_det.cli import taps
from kd_det.cli.teacher import add_teacher
from kd_det.teachers import FeatureTeacher, TeacherSource, get_teacher_cfg, register_teacher_source, sources
from tests.classification.tiny_classifier import classifier_cfg
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
            teacher = FeatureTeacher(network=Patches())
            teacher.class_names = ("cat", "dog")
            return teacher

    return Mine


def cfg(name, weights=""):
    return tiny_cfg(KD__TEACHER__CONFIG_FILE=name, KD__TEACHER__WEIGHTS=str(weights))


def test_a_source_is_one_class(own_source, tmp_path):
    torch.save({f"backbone.network.{k}": v for k, v in Patches().state_dict().items()}, tmp_path / "w.pth")
    teacher = build_teacher(cfg("mine://patches", tmp_path / "w.pth"))
    assert teacher.backbone.output_shape()["p4"].channels == 8
    assert teacher.class_names == ("cat", "dog")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="'mine://patches' has no weights"):
        build_teacher(cfg("mine://patches"))


PROJECT = """
from torch import nn
from kd_det.teachers import FeatureTeacher, TeacherSource, register_teacher_source

@register_teacher_source("my")
class MyTeachers(TeacherSource):
    def build(self, cfg):
        return FeatureTeacher(network=nn.Conv2d(3, 8, int(self.path), int(self.path)))
"""


def test_a_projects_source_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_teachers.py").write_text(PROJECT)
    (tmp_path / "student.yaml").write_text(student_cfg(tiny_cfg()).dump())
    taps.main(["--config-file", "student.yaml", "--import", "my_teachers.py", "--teacher", "my://16"])
    assert "teacher, for images of" in (out := capsys.readouterr().out) and "p4" in out


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


def test_networks_that_share_no_stride(own_source, tmp_path):
    """The student has p2 to p6, a network of stride 128 is p7."""
    own_source.build = lambda self, cfg: FeatureTeacher(network=nn.Conv2d(3, 8, 128, 128))
    weights = {f"backbone.network.{k}": v for k, v in nn.Conv2d(3, 8, 128, 128).state_dict().items()}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="The backbones have no level in common: the student's are p2, .*'s 0, p7"):
        add_teacher(tiny_cfg(), "mine://patches", weights=str(tmp_path / "w.pth"))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """What torchvision and timm publish of resnet18 and convnext_atto, as files; the cache of torch.hub is empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    torch.manual_seed(3)
    for network, name in ((resnet18(), "resnet18.pth"), (timm.create_model("convnext_atto"), "convnext_atto.pth")):
        torch.save(network.state_dict(), tmp_path / name)
    digest = hashlib.sha256((tmp_path / "resnet18.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "resnet18.pth").rename(tmp_path / f"resnet18-{digest}.pth")
    resnet = (tmp_path / f"resnet18-{digest}.pth").as_uri()
    # torchvision's weights are frozen dataclasses.
    monkeypatch.setitem(ResNet18_Weights.IMAGENET1K_V1.value.__dict__, "url", resnet)
    trained = timm.get_pretrained_cfg("convnext_atto.d2_in1k")
    for key, value in {"hf_hub_id": None, "url": (tmp_path / "convnext_atto.pth").as_uri(), "mean": (0.5,) * 3}.items():
        monkeypatch.setattr(trained, key, value)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: trained)
    monkeypatch.setattr(timm.models._builder, "resolve_pretrained_cfg", lambda *args, **kwargs: trained)
    return tmp_path


@pytest.mark.parametrize(
    "name, full_name, file, mean",
    [
        ("torchvision://resnet18", "torchvision://resnet18.IMAGENET1K_V1", "resnet18-*.pth", 123.675),
        ("torchvision://resnet18.IMAGENET1K_V1", "torchvision://resnet18.IMAGENET1K_V1", "resnet18-*.pth", 123.675),
        ("timm://convnext_atto.d2_in1k", "timm://convnext_atto.d2_in1k", "convnext_atto.pth", 127.5),
    ],
)
def test_the_librarys_own_weights(published, name, full_name, file, mean):
    assert get_teacher_cfg(cfg(name)).MODEL.WEIGHTS == full_name
    assert not (published / "hub").exists()  # nothing is read before the network is built
    teacher = build_teacher(cfg(name))
    (file,) = published.glob(file)
    want = {flat_key(key): value for key, value in torch.load(file).items()}
    own = teacher.backbone.network.state_dict()
    assert own and all(torch.equal(value, want[flat_key(key)]) for key, value in own.items())
    assert teacher.pixel_mean.flatten()[0].item() == pytest.approx(mean)
    file.unlink()
    build_teacher(cfg(name))  # from the cache


@pytest.mark.parametrize("name", ["torchvision://resnet18", "timm://convnext_atto"])
def test_a_classifier_is_taught_by_the_librarys_own_weights(published, name):
    own = classifier_cfg(KD__STUDENT__META_ARCHITECTURE="ImageClassifier")
    own.KD.TEACHER.CONFIG_FILE = name
    own.KD.TEACHER.OPTS = ["CLASSIFICATION.INPUT_SIZE", 0]
    found = build_teacher(own)
    network = resnet18() if "resnet" in name else timm.create_model("convnext_atto")
    network.load_state_dict(torch.load(next(published.glob(name.rpartition("/")[2] + "*.pth"))))
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        want = network.eval()(((image - found.pixel_mean) / found.pixel_std)[None]).softmax(1)[0]
        torch.testing.assert_close(found([{"image": image}])[0]["scores"], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, cache", [("torchvision://resnet18", r"hub/checkpoints"), ("timm://convnext_atto", "huggingface")]
)
def test_without_a_network_connection(published, monkeypatch, name, cache):
    for file in published.glob("*.pth"):
        file.unlink()
    message = f"{name}.*neither in the cache of .*{cache}.* can they be downloaded: set KD.TEACHER.WEIGHTS"
    with pytest.raises(FileNotFoundError, match=message):
        build_teacher(cfg(name))


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'timm://convnext_atto.d2_in1k' are neither in the cache of timm"):
        build_teacher(cfg("timm://convnext_atto"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("torchvision://resnet19", "Unknown network of torchvision 'resnet19'. Did you mean 'resnet1"),
        ("torchvision://resnet50.IMAGENET1K_V3", "weights of torchvision's 'resnet50' 'IMAGENET1K_V3'. Did you mean"),
        ("timm://convnext_attu", "Unknown model of timm 'convnext_attu'. Did you mean 'convnext_atto'"),
        ("timm://convnext_atto.d3_in1k", "weights of timm's 'convnext_atto' 'd3_in1k'. Did you mean 'd2_in1k'"),
        ("timm://beit3_giant_patch14_224", "'timm://beit3_giant_patch14_224' has no weights"),
    ],
)
def test_names_that_a_library_lacks(name, message):
    with pytest.raises(ValueError, match=message):
        get_teacher_cfg(cfg(name))


def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm is not installed; install it with: pip install timm"):
        build_teacher(cfg("timm://convnext_atto"))
