"""Anything at all in the KD node, and tensors of any shape: a ValueError in plain words, or a finite loss."""

import functools

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_det import losses as functions
from kd_det.config_file import merge_options
from tests.tiny import LOSSES, batch, distillation_cfg, tiny_cfg

fuzzed = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# The config.

TAPS = ["p2", "p3", "p9", "res4", "res4.pre_activation", "p2.pre_activation", "stem", "roi_heads", "", ".", "p2 ", "é"]
WORDS = ["", "poly", "sum", "sum_pow", "norm", "running", "BN", "GN", "nothing", "COCO-Detection/no.yaml", "/", "\x00"]
numbers = st.one_of(
    st.integers(-3, 5), st.floats(allow_nan=True, allow_infinity=True, width=16), st.sampled_from([2**63, 1e300, -1e-300])
)  # fmt: skip
values = st.one_of(
    numbers,
    st.sampled_from(WORDS + TAPS),
    st.none(),
    st.booleans(),
    st.lists(st.one_of(st.sampled_from(TAPS + LOSSES), numbers), max_size=3),
    st.dictionaries(st.sampled_from(["A", "WEIGHT"]), numbers, max_size=2),
)


def leaves(node: CfgNode, prefix: str) -> list[str]:
    ret = []
    for key, value in node.items():
        ret += leaves(value, f"{prefix}.{key}") if isinstance(value, CfgNode) else [f"{prefix}.{key}"]
    return ret


# Reading images to calibrate on is another matter.
KEYS = [key for key in leaves(tiny_cfg().KD, "KD") if key != "KD.OVERHAUL.MARGIN"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> CfgNode:
    cfg = distillation_cfg(tmp_path_factory.mktemp("fuzz"))
    cfg.KD.OVERHAUL.MARGIN = "running"
    return cfg


@fuzzed(max_examples=120)
@given(
    losses=st.lists(st.sampled_from(LOSSES), min_size=1, max_size=2, unique=True),
    changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3),
)
def test_any_config(base, losses, changes):
    cfg = base.clone()
    try:
        cfg.KD.LOSSES = tuple(losses)
        merge_options(cfg, [x for pair in changes.items() for x in pair], where="fuzz")
        model = build_model(cfg).train()
        found = model(batch(sizes=((48, 64), (64, 48))))
    except (ValueError, FileNotFoundError) as e:
        check_words(e)
        return
    except FloatingPointError as e:  # a weight of 1e300
        assert "not finite" in str(e)
        return
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()


def check_words(error: Exception):
    message = str(error)
    assert 10 < len(message) < 3000
    for inside in ("Traceback", "CUDA", "aten::", "size mismatch", "must match the size of tensor", "expected scalar"):
        assert inside not in message


# The losses' shapes.

sizes = st.lists(st.integers(0, 5), min_size=0, max_size=5).map(tuple)
channels, side = st.integers(1, 4), st.integers(1, 7)
kinds = st.sampled_from(
    [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
scales = st.sampled_from([0.0, 1e-20, 1.0, 1.0, 1e4])


@st.composite
def pairs(draw) -> tuple[Tensor, Tensor]:
    """Student and teacher, most of the time of shapes that fit."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.integers(0, 3)):
        batch, c = draw(st.integers(0, 3)), draw(channels)
        shapes = [(batch, c if draw(st.booleans()) else draw(channels), draw(side), draw(side)) for _ in range(2)]
        if draw(st.booleans()):
            shapes[1] = shapes[0]
        if draw(st.integers(0, 3)) == 0:
            shapes = [shape[:2] for shape in shapes]
    else:
        shapes = [draw(sizes), draw(sizes)]
    return tuple((torch.randn(s, generator=generator) * draw(scales)).to(draw(kinds)) for s in shapes)


masks = st.one_of(
    st.none(), st.tuples(st.integers(0, 3), st.integers(1, 2), side, side).map(lambda s: torch.rand(s) > 0.5)
)  # fmt: skip

MAP_LOSSES = {
    **{
        f"nst {kernel}": functools.partial(functions.nst_loss, kernel=kernel)
        for kernel in ("linear", "poly", "gaussian")
    },
    "attention_transfer": functions.attention_transfer_loss,
    "hint": functions.hint_loss,
    "pkd": functions.pkd_loss,
    "cwd": functions.cwd_loss,
    "partial_l2": functions.partial_l2_loss,
}
PLAIN_LOSSES = {
    "similarity": functions.similarity_preserving_loss,
    "soft_target": functions.soft_target_loss,
    "dist": functions.dist_loss,
    "fsp": functions.fsp_loss,
    "gradient_attention": functions.gradient_attention_loss,
    "quality_focal": functions.quality_focal_loss,
}


def check_loss(loss, student: Tensor, *rest, **kwargs):
    if student.is_floating_point():
        student.requires_grad_()
    try:
        value = loss(student, *rest, **kwargs)
    except ValueError as e:
        check_words(e)
        return
    assert value.shape == () and value.is_floating_point() and value.requires_grad
    value.backward()
    assert student.grad.shape == student.shape
    if all(
        x is None or x.dtype == torch.bool or x.abs().max().item() < 1e3
        for x in (student, *rest)
        if x is None or x.numel()
    ):
        assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("name", MAP_LOSSES)
@fuzzed(max_examples=30)
@given(maps=pairs(), valid=masks)
def test_any_maps(name, maps, valid):
    check_loss(MAP_LOSSES[name], *maps, valid=valid)


@pytest.mark.parametrize("name", PLAIN_LOSSES)
@fuzzed(max_examples=30)
@given(maps=pairs())
def test_any_samples(name, maps):
    check_loss(PLAIN_LOSSES[name], *maps)


@fuzzed(max_examples=30)
@given(maps=pairs(), third=pairs(), margin=st.integers(0, 5))
def test_any_third_argument(maps, third, margin):
    student, teacher = maps
    check_loss(functions.overhaul_loss, student.clone(), teacher, -torch.rand(margin))
    check_loss(functions.bounded_regression_loss, student.clone(), teacher, third[0])
    check_loss(functions.dkd_loss, student.clone(), teacher, torch.randint(-1, 4, (margin,)))
