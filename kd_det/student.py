"""The plain student of a distillation config: its class, its config, the network itself."""

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from kd_det.errors import unknown_name

__all__ = ["build_student", "student_cfg", "student_class"]

DISTILLER = "Distiller"


def student_class(cfg: CfgNode):
    """
    The registered meta-architecture of the student: ``KD.STUDENT.META_ARCHITECTURE`` of a distillation config,
    ``MODEL.META_ARCHITECTURE`` of any other.

    Raises:
        ValueError: it is not registered, or is the Distiller itself.
    """
    distils = cfg.MODEL.META_ARCHITECTURE == DISTILLER
    key = "KD.STUDENT.META_ARCHITECTURE" if distils else "MODEL.META_ARCHITECTURE"
    name = cfg.KD.STUDENT.META_ARCHITECTURE if distils else cfg.MODEL.META_ARCHITECTURE
    registered = {name: architecture for name, architecture in META_ARCH_REGISTRY if name != DISTILLER}
    if name not in registered:
        raise ValueError(unknown_name(key, name, registered if distils else [*registered, DISTILLER]))
    return registered[name]


def student_cfg(cfg: CfgNode) -> CfgNode:
    """
    The config of the plain student: the same, with its own meta-architecture and without the keys of kd_det that the
    student does not read (a class declares those it reads as ``config_nodes``). A plain config stays what it is but
    for these keys.
    """
    unread = {"KD", "CLASSIFICATION"} - set(getattr(student_class(cfg), "config_nodes", ()))
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == DISTILLER:
        cfg.MODEL.META_ARCHITECTURE = cfg.KD.STUDENT.META_ARCHITECTURE
    for node in unread:
        cfg.pop(node, None)
    if not cfg.MODEL.get("TIMM", {}).get("NAME", ""):
        cfg.MODEL.pop("TIMM", None)
    cfg.freeze()
    return cfg


def build_student(cfg: CfgNode) -> nn.Module:
    """The plain student, as Detectron2's ``build_model`` would build it; for errors see :func:`student_class`."""
    return student_class(cfg)(cfg)
