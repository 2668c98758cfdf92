"""Teachers of Detectron2 by their configs, yaml files and LazyConfigs, or by their names in its model zoo."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from kd_det.compat import model_zoo
from kd_det.config_file import check_lazy_key, instantiate_lazy, merge_config_file, read_lazy_config
from kd_det.errors import one_line, unknown_name
from kd_det.teachers.sources import TeacherSource, register_teacher_source

__all__ = ["LazyTeacher", "YamlTeacher"]


@register_teacher_source(".yaml")
class YamlTeacher(TeacherSource):
    def configure(self, cfg: CfgNode, student: CfgNode) -> None:
        merge_config_file(cfg, self.config_file())
        if not PathManager.isfile(self.name):
            cfg.MODEL.WEIGHTS = self.zoo_weights()

    def config_file(self) -> str:
        """The file of that name, or the zoo's; a ``FileNotFoundError`` lists the nearest names of the zoo."""
        if PathManager.isfile(self.name):
            return self.name
        try:
            return model_zoo.get_config_file(self.name)
        except RuntimeError:
            root = Path(model_zoo.__file__).parent / "configs"
            files = root.glob(f"*/**/*{Path(self.name).suffix or '.yaml'}")
            known = sorted(str(file.relative_to(root)) for file in files if "Base" not in file.name)
            raise FileNotFoundError(
                f"KD.TEACHER.CONFIG_FILE {self.name!r} is neither a file nor in Detectron2's model zoo. "
                + unknown_name("model-zoo name", self.name, known)
            ) from None

    def zoo_weights(self) -> str:
        """The URL of the zoo entry's trained weights; "" where the zoo has none."""
        try:
            return model_zoo.get_checkpoint_url(self.name)
        except RuntimeError:
            return ""


@register_teacher_source(".py")
class LazyTeacher(YamlTeacher):
    """
    The ``model`` of a LazyConfig: a file, which is Python and is run, or an entry of the zoo. ``KD.TEACHER.OPTS`` are
    KEY VALUE pairs over it (``["model.roi_heads.num_classes", 10]``). A Distiller teaches as its student.
    """

    def configure(self, cfg: CfgNode, student: CfgNode) -> None:
        config = self._config(student.KD.TEACHER.OPTS)
        model = self._model(config)
        cfg.INPUT.FORMAT = _value(config, "dataloader.train.mapper.image_format") or model.get("input_format") or ""
        # Where a yaml config has what others than this source ask for.
        names = _value(config, "dataloader.train.dataset.names") or ()
        cfg.DATASETS.TRAIN = (names,) if isinstance(names, str) else tuple(names)
        cfg.MODEL.META_ARCHITECTURE = getattr(model._target_, "__name__", str(model._target_).rpartition(".")[2])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = _value(model, "roi_heads.num_classes") or 0
        cfg.MODEL.RETINANET.NUM_CLASSES = _value(model, "num_classes") or 0
        if not PathManager.isfile(self.name):
            cfg.MODEL.WEIGHTS = self.zoo_weights()
            return
        cfg.MODEL.WEIGHTS = _value(config, "train.init_checkpoint") or ""
        if "ImageNetPretrained" in cfg.MODEL.WEIGHTS and not student.KD.TEACHER.WEIGHTS:
            raise ValueError(
                f"The LazyConfig {self.name} names no trained weights: train.init_checkpoint {cfg.MODEL.WEIGHTS} is "
                f"what its training starts from. Set KD.TEACHER.WEIGHTS (--teacher-weights)."
            )

    def merge_options(self, cfg: CfgNode, options: list) -> None:
        cfg.KD.TEACHER.OPTS = list(options)  # for build

    def build(self, cfg: CfgNode) -> nn.Module:
        config = self._model(self._config(cfg.KD.TEACHER.OPTS))
        model = instantiate_lazy(config, path=self.name, what="The model")
        # That of the images it was trained on, of which the model's own need not know.
        model.input_format = cfg.INPUT.FORMAT or getattr(model, "input_format", None)
        if model.input_format is None:
            raise ValueError(
                f"The LazyConfig {self.name} has neither dataloader.train.mapper.image_format nor model.input_format, "
                f"the channel order of its images: set it by KD.TEACHER.OPTS ['model.input_format', 'BGR'] or 'RGB'."
            )
        return model

    def _config(self, options: list) -> DictConfig:
        config, where = read_lazy_config(self.config_file()), "KD.TEACHER.OPTS"
        if len(options) % 2:
            raise ValueError(f"{where}: expected KEY VALUE pairs, found {list(options)}")
        for key, value in zip(options[::2], options[1::2]):
            try:
                check_lazy_key(config, key, where=where)
                OmegaConf.update(config, key, value)
            except OmegaConfBaseException as e:
                raise ValueError(f"{where}: {key}: {one_line(e)}") from e
        return config

    def _model(self, config: DictConfig) -> DictConfig:
        model = config.get("model")
        if not isinstance(model, DictConfig) or "_target_" not in model:
            raise ValueError(f"The LazyConfig {self.name} has no model: expected model = LazyCall(...)(...).")
        return model.student if "student" in model and "teacher" in model else model


def _value(config: DictConfig, key: str):
    """The value at a dotted key; None where there is none, or a list or a number stands in the way."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None
