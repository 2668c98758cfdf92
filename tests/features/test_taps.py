import copy
from unittest import mock

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, DeformBottleneckBlock, ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint

from kd_det.features.taps import Taps, tap_module, tap_names, tap_shape
from tests.tiny import batch, tiny_cfg


class FakeDeformConv(nn.Conv2d):
    """DeformConv needs Detectron2's compiled operators; the block around it does not care what is inside."""

    def __init__(self, channels, out_channels, *, deformable_groups, norm, **kwargs):
        super().__init__(channels, out_channels, **kwargs)
        self.norm = norm

    def forward(self, x, offset):
        return self.norm(super().forward(x)) + offset.mean()


def basic(norm="BN"):
    return BasicBlock(6, 8, norm=norm)


def basic_identity(norm="BN"):
    return BasicBlock(6, 6, norm=norm)


def bottleneck(norm="BN"):
    return BottleneckBlock(6, 8, bottleneck_channels=4, norm=norm)


def deform_bottleneck(norm="BN"):
    with mock.patch("detectron2.modeling.backbone.resnet.DeformConv", FakeDeformConv):
        return DeformBottleneckBlock(6, 8, bottleneck_channels=4, norm=norm)


def pre_activation_by_hand(block, x):
    """The residual sum put together from the block's own layers, as the paper draws it."""
    out = torch.relu(block.conv1(x))
    if isinstance(block, DeformBottleneckBlock):
        out = torch.relu(block.conv2(out, block.conv2_offset(out)))
    elif isinstance(block, BottleneckBlock):
        out = torch.relu(block.conv2(out))
    out = block.conv2(out) if isinstance(block, BasicBlock) else block.conv3(out)
    return out + (block.shortcut(x) if block.shortcut is not None else x)


BLOCKS = [basic, basic_identity, bottleneck, deform_bottleneck]


class InABackbone(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


class TestPreActivation:
    @pytest.mark.parametrize("make", BLOCKS)
    @pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
    def test_value_output_and_gradient(self, make, norm):
        block = make(norm).train()
        model, x = InABackbone(block), torch.randn(2, 6, 7, 5)
        plain = block(x)
        taps = Taps(model, ["block.pre_activation"])
        with taps.recording():
            tapped = model(x)
        ((value,),) = taps.pop().values()
        assert torch.equal(tapped, plain)
        assert torch.equal(torch.relu(value), plain)
        assert (value < 0).any()

        parameters = [p for p in block.parameters() if p.requires_grad]
        found = torch.autograd.grad((value**2).sum() + tapped.sum(), parameters)
        by_hand = pre_activation_by_hand(block, x)
        expected = torch.autograd.grad((by_hand**2).sum() + torch.relu(by_hand).sum(), parameters)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e)

    def test_under_autocast(self):
        block, x = bottleneck(), torch.randn(2, 6, 7, 5)
        taps = Taps(InABackbone(block), ["block.pre_activation"])
        with torch.autocast("cpu", dtype=torch.bfloat16), taps.recording():
            out = block(x)
        ((value,),) = taps.pop().values()
        assert torch.equal(torch.relu(value), out)
        value.float().sum().backward()
        assert block.conv1.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("wrap", ["the block's inside", "the block"])
    def test_under_activation_checkpointing(self, wrap):
        x = torch.randn(2, 6, 7, 5)
        torch.manual_seed(0)
        block = bottleneck()
        torch.manual_seed(0)
        plain = bottleneck()
        model = InABackbone(block)
        if wrap == "the block":
            model.forward = lambda x: checkpoint(block, x, use_reentrant=False)
        else:
            inside = block.forward
            block.forward = lambda x: checkpoint(inside, x, use_reentrant=False)
        taps = Taps(model, ["block.pre_activation"])
        with taps.recording():
            out = model(x)
        ((value,),) = taps.pop().values()
        (out.sum() + (value**2).sum()).backward()
        by_hand = pre_activation_by_hand(plain, x)
        (torch.relu(by_hand).sum() + (by_hand**2).sum()).backward()
        for found, expected in zip(block.parameters(), plain.parameters()):
            torch.testing.assert_close(found.grad, expected.grad)

    def test_reentrant_checkpointing_is_refused(self):
        block = bottleneck()
        inside = block.forward
        block.forward = lambda x: checkpoint(inside, x, use_reentrant=True)
        taps = Taps(InABackbone(block), ["block.pre_activation"])
        with pytest.raises(RuntimeError, match="use_reentrant=False"), taps.recording():
            block(torch.randn(2, 6, 7, 5, requires_grad=True))

    def test_stages_of_a_network_leave_it_bit_identical(self):
        model = build_model(tiny_cfg(depth=50, width=8)).train()
        x = torch.randn(1, 3, 64, 96)
        plain = model.backbone(x)
        names = [f"res{i}.pre_activation" for i in range(2, 6)] + [f"res{i}" for i in range(2, 6)]
        taps = Taps(model, names)
        with taps.recording():
            tapped = model.backbone(x)
        features = taps.pop()
        assert all(torch.equal(plain[level], tapped[level]) for level in plain)
        for i in range(2, 6):
            assert torch.equal(torch.relu(features[f"res{i}.pre_activation"][0]), features[f"res{i}"][0])

    def test_a_block_that_does_not_end_in_a_relu(self):
        class LinearBottleneck(BasicBlock):
            def forward(self, x):
                return super().forward(x) - 1

        taps = Taps(InABackbone(LinearBottleneck(6, 6)), ["block.pre_activation"])
        with pytest.raises(RuntimeError, match="is not that of a ReLU"), taps.recording():
            taps._places["block.pre_activation"].module(torch.randn(1, 6, 4, 4))

    @pytest.mark.parametrize("name", ["p3.pre_activation", "fpn_output3.pre_activation", "stem.pre_activation"])
    def test_a_place_without_one_is_refused_when_built(self, name):
        model = build_model(tiny_cfg())
        with pytest.raises(ValueError, match="does not end in a ReLU .*res5.pre_activation"):
            Taps(model, [name], side="student")


class TestPlaces:
    def test_levels_stages_and_modules(self):
        model = build_model(tiny_cfg()).train()
        names = ["p2", "p6", "res3", "stem", "res4.0", "backbone.fpn_lateral2", "backbone.bottom_up.res5"]
        taps = Taps(model, names)
        x = torch.randn(1, 3, 64, 96)
        with taps.recording():
            out = model.backbone(x)
        features = taps.pop()
        assert features["p2"][0] is out["p2"] and features["p6"][0] is out["p6"]
        assert torch.equal(features["res3"][0], model.backbone.bottom_up(x)["res3"])
        assert features["res4.0"][0].shape == (1, 16, 4, 6)
        assert features["backbone.fpn_lateral2"][0].shape == (1, 8, 16, 24)

    def test_a_module_that_runs_once_a_level_gives_every_call(self):
        model = build_model(tiny_cfg()).train()
        taps = Taps(model, ["proposal_generator.rpn_head.objectness_logits"])
        with taps.recording():
            model(batch())
        maps = taps.pop()["proposal_generator.rpn_head.objectness_logits"]
        assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]

    def test_names_of_a_detector(self):
        stages = [f"res{i}" for i in range(2, 6)]
        expected = ["p2", "p3", "p4", "p5", "p6", "stem"]
        expected += [name for stage in stages for name in (stage, f"{stage}.pre_activation")]
        assert tap_names(build_model(tiny_cfg())) == expected

    def test_a_stage_that_out_features_leaves_out(self):
        stages = ResNet.make_default_stages(18, norm="BN")
        backbone = ResNet(BasicStem(norm="BN"), stages[:3], out_features=["res4"])
        taps = Taps(backbone, ["res2.pre_activation", "res4"])
        with taps.recording():
            backbone(torch.randn(1, 3, 32, 32))
        assert taps.pop()["res2.pre_activation"][0].shape == (1, 64, 8, 8)

    @pytest.mark.parametrize(
        "name, channels, stride",
        [("p3", 8, 8), ("res4", 16, 16), ("res5.pre_activation", 32, 32), ("res4.0", 16, None), ("stem", 4, 4)],
    )
    def test_shapes_are_known_without_running(self, name, channels, stride):
        shape = tap_shape(build_model(tiny_cfg()), name)
        assert (shape.channels, shape.stride) == (channels, stride)

    def test_shape_of_a_module_that_declares_none(self):
        with pytest.raises(ValueError, match="channels of student tap 'backbone.top_block' are unknown"):
            tap_shape(build_model(tiny_cfg()), "backbone.top_block", side="student")

    def test_module_behind_a_pre_activation_is_the_block(self):
        model = build_model(tiny_cfg())
        assert tap_module(model, "res4.pre_activation") is model.backbone.bottom_up.res4[-1]

    @pytest.mark.parametrize(
        "name, hint", [("P3", "p3"), ("res22", "res2"), ("res4.preactivation", "res4.pre_activation")]
    )
    def test_unknown_names_say_the_nearest(self, name, hint):
        with pytest.raises(ValueError, match=f"Unknown tap of the teacher '{name}'. Did you mean '{hint}'"):
            Taps(build_model(tiny_cfg()), [name], side="teacher")

    @pytest.mark.parametrize("name", ["", ".", "res4.", ".pre_activation"])
    def test_empty_names(self, name):
        with pytest.raises(ValueError, match="tap of the model|does not end in a ReLU"):
            Taps(build_model(tiny_cfg()), [name])


class TestRecording:
    def setup_method(self):
        self.model = build_model(tiny_cfg())
        self.taps = Taps(self.model, ["p3", "res5.pre_activation"])
        self.x = torch.randn(1, 3, 64, 64)

    def hooks(self):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules())

    def test_reading_empties(self):
        with self.taps.recording():
            self.model.backbone(self.x)
        assert len(self.taps.pop()) == 2
        with pytest.raises(RuntimeError, match=r"nothing was recorded at \['p3', 'res5.pre_activation'\]"):
            self.taps.pop()

    def test_nothing_is_recorded_outside(self):
        before = self.hooks()
        with self.taps.recording():
            assert self.hooks() == before  # hooks that come and go would make a compiled network compile anew
            self.model.backbone(self.x)
        recorded = self.taps.pop()
        self.model.backbone(self.x)
        with pytest.raises(RuntimeError, match="nothing was recorded"):
            self.taps.pop()
        assert set(recorded) == set(self.taps.names)

    def test_a_deep_copy_records_its_own(self):
        model, taps = copy.deepcopy((self.model, self.taps))
        with taps.recording():
            model.backbone(self.x)
        assert all(len(maps) == 1 for maps in taps.pop().values())
        assert not any(self.taps._values.values())

    def test_an_exception_leaves_nothing_behind(self):
        self.model.backbone.fpn_output2.register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError), self.taps.recording():
            self.model.backbone(self.x)
        assert not any(self.taps._values.values())

    def test_an_exception_inside_a_block_ends_its_mode(self):
        block = self.model.backbone.bottom_up.res5[-1]
        block.conv2.register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError), self.taps.recording():
            self.model.backbone(self.x)
        assert torch._C._len_torch_function_stack() == 0

    def test_stops_as_soon_as_complete(self):
        ran = []
        self.model.backbone.fpn_lateral5.register_forward_hook(lambda *a: ran.append(1))
        taps = Taps(self.model, ["res3", "res4.pre_activation"])
        with taps.recording(stop_when_complete=True):
            self.model.backbone(self.x)
        assert not ran and len(taps.pop()) == 2
        assert torch._C._len_torch_function_stack() == 0

    def test_not_inside_itself(self):
        with self.taps.recording(), pytest.raises(RuntimeError, match="recording already"):
            with self.taps.recording():
                pass

    def test_a_value_that_the_network_overwrites_is_refused(self):
        taps = Taps(self.model, ["res4.0.conv1"])
        with taps.recording():
            self.model.backbone(self.x)
        with pytest.raises(RuntimeError, match="overwrote this module's output in place"):
            taps.pop()
