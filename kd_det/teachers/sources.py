"""
Where teachers come from. The name in ``KD.TEACHER.CONFIG_FILE`` chooses the source: ``SCHEME://NAME`` the one that is
registered for the scheme, any other name that of its ending: a config file, or an entry of the model zoo.

A source is one class::

    @register_teacher_source("mine")
    class MyTeachers(TeacherSource):
        def build(self, cfg):
            return FeatureTeacher(network=my_network(self.path))
"""

from typing import Callable, Dict, Mapping, Optional, Type

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from kd_det.config_file import is_lazy_config, merge_options
from kd_det.errors import IMPORT_HINT, unknown_name

__all__ = ["TeacherSource", "register_teacher_source", "teacher_source"]

_SOURCES: Dict[str, Type["TeacherSource"]] = {}


class TeacherSource:
    """
    From a name to a teacher. A source overrides what it does otherwise than a yaml config of Detectron2 would. All
    methods raise a ``ValueError`` or an ``OSError`` with one line for what a user can fix.

    Attributes:
        name: the value of ``KD.TEACHER.CONFIG_FILE``.
        path: the part of it behind ``SCHEME://``; without a scheme, the name.
    """

    def __init__(self, name: str):
        self.name, self.path = name, name.rpartition("://")[2]

    def configure(self, cfg: CfgNode, student: CfgNode) -> None:
        """
        Set, in the teacher's config, what is known before the network is built; nothing is downloaded here.

        Args:
            cfg: Detectron2's and kd_det's defaults, changed in place: ``INPUT.FORMAT``, the channel order of the
                images; ``MODEL.WEIGHTS``, the default weights, as a file, a URL, or a name for :meth:`read_weights`;
                ``DATASETS.TRAIN`` and the number of classes, where they are known.
            student: the config of the run.
        """

    def merge_options(self, cfg: CfgNode, options: list) -> None:
        """Merge ``KD.TEACHER.OPTS``, KEY VALUE pairs, into the configured config."""
        merge_options(cfg, options, where="KD.TEACHER.OPTS")

    def build(self, cfg: CfgNode) -> nn.Module:
        """
        The network without trained weights: with a ``backbone``, ``pixel_mean`` and ``pixel_std`` or
        ``preprocess_image``, and ``input_format`` where that is not ``INPUT.FORMAT``.
        """
        name, registered = cfg.MODEL.META_ARCHITECTURE, dict(META_ARCH_REGISTRY)
        if name not in registered:
            raise ValueError(unknown_name("teacher meta-architecture", name, registered))
        return registered[name](cfg)

    def read_weights(self, cfg: CfgNode) -> Optional[Mapping[str, Tensor]]:
        """The weights that ``MODEL.WEIGHTS`` names; None: those of this file or URL."""
        return None


def register_teacher_source(key: str) -> Callable:
    """
    A decorator: the class is the source of the teachers ``KEY://NAME`` or, where the key begins with a dot, of the
    names that end with it. A later one replaces an earlier one.
    """

    def register(source: Type[TeacherSource]) -> Type[TeacherSource]:
        _SOURCES[key] = source
        return source

    return register


def teacher_source(name: str) -> TeacherSource:
    """The source of a name, or a ``ValueError`` for an unknown scheme; lists the registered ones."""
    scheme, is_url, _ = name.partition("://")
    endings = (key for key in _SOURCES if key.startswith(".") and name.endswith(key))
    key = scheme if is_url else ".py" if is_lazy_config(name) else next(endings, ".yaml")
    if key not in _SOURCES:
        schemes = ", ".join(f"{known}://NAME" for known in _SOURCES if not known.startswith("."))
        raise ValueError(
            f"KD.TEACHER.CONFIG_FILE {name!r} is a URL. Expected a config file (yaml, or a LazyConfig, .py), a "
            f"model-zoo name, or a network as {schemes}. {IMPORT_HINT}"
        )
    return _SOURCES[key](name)
