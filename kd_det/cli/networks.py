"""What a config describes, a yaml config and a LazyConfig alike, for commands that draw or count and train nothing."""

import argparse
from collections.abc import Callable

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from kd_det.classification.trainer import is_classifier
from kd_det.cli.arguments import is_lazy, load_config, usable_device
from kd_det.cli.lazy_config import LAZY_SIZE, configured_losses, data_sets, load_lazy_config, plain_student
from kd_det.config import add_kd_config
from kd_det.config_file import instantiate_lazy
from kd_det.data import check_dataset
from kd_det.errors import UserError
from kd_det.features.tap_table import input_size
from kd_det.losses.build import enabled_loss_classes
from kd_det.student import student_cfg
from kd_det.study.run_config import used_config
from kd_det.visualization.history import History

__all__ = ["LazyNetworks", "YamlNetworks", "load_records", "open_networks"]


def open_networks(args: argparse.Namespace) -> "YamlNetworks | LazyNetworks":
    """Those of the config that a command line describes; for errors see ``load_config`` and ``load_lazy_config``."""
    return LazyNetworks(load_lazy_config(args), args.config_file) if is_lazy(args) else YamlNetworks(load_config(args))


class YamlNetworks:
    """
    A yaml config's.

    Attributes:
        input_format: channel order of the detector's input.
        test_sets: names of the data sets that are tested on.
        initial_weights: what training begins with.
        seed: of training; negative: none.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg
        self.is_classifier = is_classifier(cfg)
        self.input_format = cfg.INPUT.FORMAT
        self.test_sets = tuple(cfg.DATASETS.TEST)
        self.initial_weights = cfg.MODEL.WEIGHTS
        self.seed = cfg.SEED

    def build(self) -> nn.Module:
        """The Distiller with its teacher, or the plain model, with the weights of ``SEED``, in eval mode."""
        if self.seed >= 0:
            seed_all_rng(self.seed)  # as training does before it builds the student
        return build_model(self.cfg).eval()

    def student_key(self) -> str:
        """The same text for students of the same architecture."""
        return student_cfg(self.cfg).dump()

    def build_student(self) -> nn.Module:
        """The plain student, on the CPU, without trained weights, in eval mode."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE, cfg.MODEL.TIMM.WEIGHTS = "cpu", ""
        return build_model(student_cfg(cfg)).eval()

    def image_size(self) -> tuple[int, int]:
        """Height and width of a test image."""
        return input_size(self.cfg)

    def mapper(self) -> Callable[[dict], dict]:
        """From a dataset dict to what a detector takes in inference."""
        return DatasetMapper(self.cfg, is_train=False)

    def records(self) -> tuple[list[dict], Metadata]:
        """The dicts of the first data set that is tested on, and its metadata; ``UserError`` without one."""
        if not self.test_sets:
            raise UserError("DATASETS.TEST is empty")
        return load_records(self.test_sets[0])

    def loss_weights(self, history: History) -> dict[str, float]:
        """The weights of its distillation losses; ``history`` is that of its run."""
        losses = enabled_loss_classes(self.cfg) if self.cfg.MODEL.META_ARCHITECTURE == "Distiller" else []
        return {loss.__name__.removesuffix("Loss"): self.cfg.KD[loss.name.upper()].WEIGHT for loss in losses}

    def changed_keys(self) -> dict[str, tuple[str, str]]:
        """Its keys that differ from the defaults: there and here."""
        default = get_cfg()
        add_kd_config(default)
        return _changed_keys(default, used_config(self.cfg))


class LazyNetworks:
    """A LazyConfig's; for the methods see :class:`YamlNetworks`."""

    is_classifier = False

    def __init__(self, cfg: DictConfig, path: str):
        """``path`` is what messages call it."""
        self.cfg, self.path = cfg, path
        mapper = self._select("dataloader.test.mapper")
        given = mapper.get("image_format") if isinstance(mapper, DictConfig) else None
        self.input_format = given or cfg.model.get("input_format") or "BGR"
        self.test_sets = data_sets(cfg, "test")
        self.initial_weights = cfg.train.get("init_checkpoint", "")
        self.seed = cfg.train.get("seed", -1)

    def build(self) -> nn.Module:
        if self.seed >= 0:
            seed_all_rng(self.seed)
        try:
            model = instantiate_lazy(self.cfg.model, path=self.path, what="The model")
        except FileNotFoundError as e:
            model = self.build_student()
            model.missing_teacher = e
        return model.to(usable_device(self.cfg.train.get("device", "cuda"), is_given=False)).eval()

    def student_key(self) -> str:
        return str(OmegaConf.to_container(plain_student(self.cfg.model)))

    def build_student(self) -> nn.Module:
        return instantiate_lazy(plain_student(self.cfg.model), path=self.path, what="The model").eval()

    def image_size(self) -> tuple[int, int]:
        augmentations = getattr(self.mapper(), "augmentations", None)
        blank = T.AugInput(np.zeros((*LAZY_SIZE, 3), np.uint8))
        if augmentations is not None:
            augmentations(blank)
        return blank.image.shape[:2]

    def mapper(self) -> Callable[[dict], dict]:
        node = self._select("dataloader.test.mapper")
        if node is None:
            raise UserError(
                f"{self.path} has no dataloader.test.mapper, which would tell how an image becomes the detector's input"
            )
        return instantiate_lazy(node, path=self.path, what="dataloader.test.mapper")

    def records(self) -> tuple[list[dict], Metadata]:
        if self.test_sets:
            return load_records(self.test_sets[0])
        node = self._select("dataloader.test.dataset")
        if node is None:
            raise UserError(f"{self.path} has no dataloader.test.dataset")
        found = node if isinstance(node, ListConfig) else instantiate_lazy(node, path=self.path, what="The data set")
        return list(found), Metadata()

    def loss_weights(self, history: History) -> dict[str, float]:
        return configured_losses(self.cfg, logged=history.values)

    def changed_keys(self) -> dict[str, tuple[str, str]]:
        return {key: ("", value) for key, value in _leaves(OmegaConf.to_container(self.cfg)).items()}

    def _select(self, key: str):
        return OmegaConf.select(self.cfg, key)


def load_records(name: str) -> tuple[list[dict], Metadata]:
    """A data set's dicts and metadata; a ``DatasetError`` that says why if it cannot be loaded."""
    try:
        return DatasetCatalog.get(name), MetadataCatalog.get(name)
    except Exception:  # loaders fail in every way, and the check knows why
        check_dataset(name)
        raise


def _changed_keys(default: CfgNode, cfg: CfgNode, prefix: str = "") -> dict[str, tuple[str, str]]:
    ret = {}
    for key, value in cfg.items():
        other = default.get(key, CfgNode() if isinstance(value, CfgNode) else "")
        if isinstance(value, CfgNode):
            ret |= _changed_keys(other, value, f"{prefix}{key}.")
        elif str(_as_lists(value)) != str(_as_lists(other)):  # a yaml file has no tuples inside of tuples
            ret[prefix + key] = str(other), str(value)
    return ret


def _as_lists(value):
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _leaves(value, prefix: str = "") -> dict[str, str]:
    """The values of nested dicts and lists by their dotted keys; lists of plain values are values."""
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: str(value)}
    ret = {}
    for key, item in value.items():
        ret |= _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    return ret
