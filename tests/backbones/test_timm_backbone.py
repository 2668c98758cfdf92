import pytest
import timm
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

from kd_det.backbones import TimmBackbone
from kd_det.cli import argument_parser, load_config, parse_arguments
from kd_det.features.taps import Taps, tap_names, tap_shape
from tests.tiny import batch, distillation_cfg, tiny_cfg

# The smallest of their families. Names by stride: res2 is the map of stride 4.
CHANNELS = {
    "mobilenetv2_035": [8, 16, 32, 112],
    "resnet10t": [64, 128, 256, 512],
    "convnext_atto": [40, 80, 160, 320],
}
LEVELS = ["res2", "res3", "res4", "res5"]


def timm_cfg(name="mobilenetv2_035", **opts):
    opts = {"MODEL__BACKBONE__NAME": "build_timm_fpn_backbone", "MODEL__TIMM__NAME": name, **opts}
    return tiny_cfg(MODEL__FPN__IN_FEATURES=LEVELS, **opts)


@pytest.mark.parametrize("name", CHANNELS)
def test_levels_are_timms_own_maps_by_stride(name):
    backbone = TimmBackbone(name=name).eval()
    image = torch.rand(1, 3, 64, 96)
    maps = backbone(image)
    want = [m for m in backbone.network(image) if m.shape[-1] <= 24]  # stride 4 and more
    assert list(maps) == LEVELS
    assert [maps[level].shape[1] for level in LEVELS] == CHANNELS[name]
    for level, stride, expected in zip(LEVELS, (4, 8, 16, 32), want):
        assert backbone.output_shape()[level] == ShapeSpec(channels=expected.shape[1], stride=stride)
        assert torch.equal(maps[level], expected) and expected.shape[-1] == 96 // stride


def test_maps_of_channels_last_models_come_channels_first():
    options = {"strict_img_size": False, "embed_dim": 24, "depths": (1, 1, 1, 1)}
    backbone = TimmBackbone(name="swin_tiny_patch4_window7_224", options=options).eval()
    image = torch.rand(1, 3, 64, 96)
    maps, want = backbone(image), backbone.network(image)
    assert [tuple(m.shape) for m in maps.values()] == [(1, 24 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    assert torch.equal(maps["res4"], want[2].permute(0, 3, 1, 2))


def test_a_network_is_no_deeper_than_it_is_read():
    whole, part = (TimmBackbone(name="resnet10t", out_features=f) for f in (LEVELS, ["res2", "res3"]))
    assert not hasattr(part.network, "layer3") and hasattr(whole.network, "layer4")
    assert list(part(torch.rand(1, 3, 64, 64))) == ["res2", "res3"]


def trainable(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "name,stem,res2",
    [("mobilenetv2_035", ("conv_stem", "bn1", "blocks.0."), "blocks.1."), ("convnext_atto", ("stem",), "stages_0")],
)
def test_frozen_stages(name, stem, res2):
    free = trainable(TimmBackbone(name=name).network)
    for freeze_at, frozen in ((0, ()), (1, stem), (2, (*stem, res2))):
        backbone = TimmBackbone(name=name, freeze_at=freeze_at)
        want = {p for p in free if not p.startswith(tuple(frozen))} if frozen else free
        assert trainable(backbone.network) == want
    assert trainable(TimmBackbone(name=name, freeze_at=5).network) == set()


def test_frozen_batch_norms_keep_their_activation_and_statistics():
    torch.manual_seed(3)
    plain = TimmBackbone(name="mobilenetv2_035")
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.weight.data.uniform_(0.5, 1.5)
    image = torch.rand(2, 3, 64, 64)
    want = plain.eval()(image)
    for arguments in ({"norm": "FrozenBN"}, {"freeze_at": 5}):
        frozen = TimmBackbone(name="mobilenetv2_035", **arguments)
        frozen.load_state_dict(plain.state_dict(), strict=False)
        got = frozen.train()(image)  # in training mode: nothing is updated
        for level in LEVELS:
            torch.testing.assert_close(got[level], want[level], rtol=1e-3, atol=1e-3)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())


def test_sync_batch_norm():
    norms = [m for m in TimmBackbone(name="resnet10t", norm="SyncBN").modules() if hasattr(m, "running_mean")]
    assert norms and all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)


@pytest.mark.parametrize("name", ["mobilenetv2_035", "convnext_atto"])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_weights_of_the_whole_model_from_a_file(tmp_path, name, wrap):
    whole = timm.create_model(name).eval()
    torch.save(wrap(whole.state_dict()), tmp_path / "timm.pth")
    image = torch.rand(1, 3, 64, 64)
    got = TimmBackbone(name=name, weights=str(tmp_path / "timm.pth")).eval()(image)["res5"]
    want = whole.forward_intermediates(image, intermediates_only=True)[-1]
    torch.testing.assert_close(got, want)


def test_weights_that_do_not_fit(tmp_path):
    path = str(tmp_path / "other.pth")
    torch.save(timm.create_model("mobilenetv2_050").state_dict(), path)
    with pytest.raises(ValueError, match=r"do not fit timm's 'resnet10t': .*Missing key"):
        TimmBackbone(name="resnet10t", weights=path)
    with pytest.raises(ValueError, match=r"fit timm's 'mobilenetv2_035': .*size mismatch for blocks.1.0.conv_pwl"):
        TimmBackbone(name="mobilenetv2_035", weights=path)
    with pytest.raises(FileNotFoundError, match="MODEL.TIMM.WEIGHTS cannot be read: '/no/such.pth'"):
        TimmBackbone(name="mobilenetv2_035", weights="/no/such.pth")
    state = timm.create_model("mobilenetv2_035").state_dict()
    state["conv_stem.weight"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 are not finite .conv_stem.weight"):
        TimmBackbone(name="mobilenetv2_035", weights=path)


def test_weights_that_were_trained_on_other_images_are_warned_of(tmp_path, caplog):
    """D50"""
    path = str(tmp_path / "w.pth")
    torch.save(timm.create_model("mobilenetv2_035").state_dict(), path)
    fitting = {
        "INPUT__FORMAT": "RGB",
        "MODEL__PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL__PIXEL_STD": [58.395, 57.12, 57.375],
    }
    for opts, warned in (({}, True), ({**fitting, "INPUT__FORMAT": "BGR"}, True), (fitting, False)):
        caplog.clear()
        build_backbone(timm_cfg(MODEL__TIMM__WEIGHTS=path, **opts))
        assert ("on other images than the config feeds them" in caplog.text) == warned


@pytest.mark.parametrize("content", [b"", b"hello", [1, 2], {"a": None}, timm.create_model("test_vit")])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_no_weights(tmp_path, content, suffix):
    path = tmp_path / f"w.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path}' is no file of timm's weights: .") as e:
        TimmBackbone(name="test_vit", out_features=["res4"], weights=str(path))
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"name": "mobilenetv2_1000"}, "no timm model. Nearest: mobilenetv2_100"),
        ({"name": "vit_tiny_patch16_224"}, r"maps of stride \[16, 16, 16\], that is the levels \['res4'\]"),
        ({"name": "cait_xxs24_224"}, "does not give feature maps|maps of stride"),
        ({"name": "resnet10t", "out_features": ["res6"]}, "OUT_FEATURES names .*res6"),
        ({"name": "resnet10t", "norm": "GN"}, "Unknown MODEL.TIMM.NORM 'GN'. Valid names: BN, SyncBN, FrozenBN"),
        ({"name": "resnet10t", "freeze_at": 6}, "must be 0 to 5, found 6"),
        ({"name": "resnet10t", "options": {"no_such": 1}}, "does not give feature maps with .*no_such"),
    ],
)
def test_errors_name_what_was_found(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**arguments)


def test_weights_that_timm_cannot_fetch(monkeypatch):
    with pytest.raises(ValueError, match="timm has no weights of 'mobilenetv2_035': MODEL.TIMM.WEIGHTS must be a file"):
        TimmBackbone(name="mobilenetv2_035", weights="pretrained")

    def create_model(*args, pretrained, **kwargs):
        assert pretrained
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(FileNotFoundError, match="set MODEL.TIMM.WEIGHTS to a file of them: no network"):
        TimmBackbone(name="mobilenetv2_100", weights="pretrained")


@pytest.mark.parametrize("opts", [["drop_rate"], [1, 2]])
def test_options_are_pairs(opts):
    with pytest.raises(ValueError, match=r"MODEL.TIMM.OPTS must be KEY, VALUE, KEY, VALUE, ..., found \["):
        build_backbone(timm_cfg(MODEL__TIMM__OPTS=opts))


def test_a_pyramid_must_read_levels_that_exist():
    with pytest.raises(ValueError, match="must be among MODEL.TIMM.OUT_FEATURES"):
        build_backbone(timm_cfg(MODEL__TIMM__OUT_FEATURES=["res4", "res5"]))


def test_lazy_and_explicit_arguments():
    lazy = LazyCall(TimmBackbone)(name="resnet10t", out_features=["res3"])
    assert instantiate(lazy).output_shape() == {"res3": ShapeSpec(channels=128, stride=8)}


def test_retinanet_pyramid():
    cfg = timm_cfg("resnet10t", MODEL__BACKBONE__NAME="build_retinanet_timm_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert {k: v.stride for k, v in build_backbone(cfg).output_shape().items()} == {
        "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128
    }  # fmt: skip


def test_taps_at_timm_stages_and_pre_activations():
    backbone = build_backbone(timm_cfg("resnet10t", MODEL__BACKBONE__FREEZE_AT=0)).eval()
    names = tap_names(backbone)
    assert [n for n in names if n.startswith("res")] == [
        n for level in LEVELS for n in (level, f"{level}.pre_activation")
    ]
    taps = Taps(backbone, ["res4", "res5.pre_activation", "p3"])
    image = torch.rand(1, 3, 64, 64)
    plain = backbone(image)
    with taps.recording():
        tapped = backbone(image)
    maps = {name: value[0] for name, value in taps.pop().items()}
    assert all(torch.equal(plain[k], tapped[k]) for k in plain)
    bottom_up = backbone.bottom_up(image)
    assert torch.equal(maps["res4"], bottom_up["res4"])
    assert torch.equal(maps["p3"], plain["p3"])
    assert maps["res5.pre_activation"].min() < 0
    assert torch.equal(maps["res5.pre_activation"].relu(), bottom_up["res5"])
    assert tap_shape(backbone, "res5.pre_activation") == ShapeSpec(channels=512, stride=32)


def test_linear_bottlenecks_have_no_pre_activation():
    backbone = build_backbone(timm_cfg())
    with pytest.raises(ValueError, match=r"InvertedResidual does not end in a ReLU.*Valid names: .*p2.*res5"):
        Taps(backbone, ["res4.pre_activation"])
    assert "res4" in tap_names(backbone) and "res4.pre_activation" not in tap_names(backbone)


def test_a_timm_student_is_distilled(tmp_path):
    student = {"MODEL__BACKBONE__NAME": "build_timm_fpn_backbone", "MODEL__TIMM__NAME": "mobilenetv2_035"}
    cfg = distillation_cfg(
        tmp_path, "NSTLoss", **student, MODEL__FPN__IN_FEATURES=LEVELS, KD__NST__STUDENT_TAPS=("p3", "res4")
    )
    model = build_model(cfg).train()
    losses = model(batch())
    assert losses["loss_nst"] > 0
    losses["loss_nst"].backward()
    assert model.student.backbone.bottom_up.network.conv_stem.weight.grad.abs().sum() > 0


def test_evaluation_reads_no_weights_of_timm(tmp_path):
    """A checkpoint has them all, and the file may only have been there in training."""
    (tmp_path / "run.yaml").write_text(timm_cfg(MODEL__TIMM__WEIGHTS="/only/in/training.pth").dump())
    for options, weights in ((["--eval-only"], ""), ([], "/only/in/training.pth")):
        arguments = ["--config-file", str(tmp_path / "run.yaml"), *options]
        cfg = load_config(parse_arguments(argument_parser(), arguments))
        assert cfg.MODEL.TIMM.WEIGHTS == weights
