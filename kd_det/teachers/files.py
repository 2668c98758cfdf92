"""Teachers of Detectron2 by their configs, yaml files and LazyConfigs, or by their names in its model zoo."""

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from kd_det.compat import model_zoo
from kd_det.config_file import merge_config_file
from kd_det.errors import unknown_name
from kd_det.teachers.sources import TeacherSource, register_teacher_source

__all__ = ["YamlTeacher"]


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
