"""Every LazyConfig is loaded, built and run for one training step, with shallow networks (at full depth as `slow`)."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from kd_det import Distiller
from kd_det.cli import argument_parser, parse_arguments
from kd_det.cli.lazy_config import load_lazy_config
from kd_det.compat import model_zoo
from tests.configs.test_configs import training_batch
from tests.tiny import tiny_cfg

ROOT = Path(__file__).parents[2] / "configs/lazy"
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if not p.name.startswith("base"))


def load(name: str, tmp_path, *, shallow: bool):
    """The config's model, its teacher with random weights from a file."""
    model = LazyConfig.load(str(ROOT / name)).model
    teacher = model.teacher.model
    assert teacher.backbone.bottom_up.stages.depth == 101 and model.student.backbone.bottom_up.stages.depth == 50
    if shallow:
        for network in (model.student, teacher):
            network.backbone.bottom_up.stages.depth = 18
            del network.backbone.bottom_up.stages.stride_in_1x1
            if network.backbone.top_block.get("in_channels") == 2048:
                network.backbone.top_block.in_channels = 512
    model.teacher.weights = str(tmp_path / "teacher.pth")
    torch.manual_seed(1)
    torch.save({"model": instantiate(teacher).state_dict()}, model.teacher.weights)
    return model


def check_one_step(name: str, tmp_path, *, shallow: bool):
    model = instantiate(load(name, tmp_path, shallow=shallow)).train()
    assert isinstance(model, Distiller) and model.teacher is not None
    inputs = training_batch(tiny_cfg(MODEL__MASK_ON="mask" in name))
    losses = model(inputs)
    for key in model.losses:
        assert losses[f"loss_{key}"] > 0
    sum(losses.values()).backward()
    trained = [p.grad for p in model.student.backbone.parameters() if p.requires_grad]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in trained)


def test_fcos_has_both():
    assert {"fcos_R_50_from_R_101_nst_1x.py", "fcos_R_50_from_R_101_ofd_1x.py"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_training_step_of_a_shallow_network(name, tmp_path):
    check_one_step(name, tmp_path, shallow=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_one_training_step_at_full_depth(name, tmp_path):
    check_one_step(name, tmp_path, shallow=False)


@pytest.mark.parametrize("name", FILES)
def test_the_tools_keys_are_there(name, tmp_path):
    cfg = LazyConfig.load(str(ROOT / name))
    assert set(cfg) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    assert OmegaConf.to_container(LazyConfig.load(str(tmp_path / "saved.yaml"))).keys() == set(cfg)


TRAINABLE = "dataloader = lr_multiplier = model = optimizer = train = {}"


@pytest.mark.parametrize(
    "text,opts,message",
    [
        ("model = (", [], "config.py has syntax error"),
        (
            "model = {}",
            [],
            "config.py lacks dataloader, lr_multiplier, optimizer, train: a config must name dataloader",
        ),
        (TRAINABLE, ["train.device"], "config.py: Error parsing override 'train.device'"),
    ],
)
def test_a_config_that_the_tool_cannot_use(tmp_path, text, opts, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_lazy_config(parse_arguments(argument_parser(), ["--config-file", str(tmp_path / "config.py"), *opts]))


ZOO = "COCO-Detection/retinanet_R_50_FPN_1x.py"


def override(*opts):
    return load_lazy_config(
        parse_arguments(argument_parser(), ["--config-file", model_zoo.get_config_file(ZOO), *opts])
    )


@pytest.mark.parametrize(
    "option, message",
    [
        ("train.max_itr=5", "Unknown config key 'train.max_itr'. Did you mean 'train.max_iter'"),
        ("train.amp.enabld=True", "Unknown config key 'train.amp.enabld'. Did you mean 'train.amp.enabled'"),
        ("modl.input_format=RGB", "Unknown config key 'modl'. Did you mean 'model'"),
        ("model.pixel_men=[1,2,3]", "Unknown config key 'model.pixel_men'. Did you mean 'model.pixel_mean'"),
        ("dataloader.tran.num_workers=0", "Unknown config key 'dataloader.tran'. Did you mean 'dataloader.train'"),
        ("train.max_iter.warmup=5", "Trying to update key train.max_iter.warmup, but train.max_iter is not a config"),
    ],
)
def test_an_override_of_nothing_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        override(option)


def test_new_keys_that_something_reads():
    cfg = override(
        "train.max_iter=5",
        "train.seed=3",  # read by default_setup where it is given
        "train.ddp.static_graph=True",  # an argument of DDP
        "model.max_detections_per_image=7",  # an argument of RetinaNet that the config leaves alone
        "model.backbone.bottom_up.stages.num_groups=2",  # of a callable that takes any
        "optimizer.params.overrides.weight.lr=0.1",
        "+train.mine=1",
    )
    assert cfg.train.mine == 1 and cfg.train.seed == 3 and cfg.model.max_detections_per_image == 7
