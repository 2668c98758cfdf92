"""The config of a run without what it does not use: for its log and its folder, and to compare runs by."""

import os

from detectron2.config import CfgNode, get_cfg

from kd_det.config import add_kd_config
from kd_det.config_file import add_missing_keys, merge_config_file
from kd_det.losses.build import DISTILLATION_LOSS_REGISTRY, loss_class
from kd_det.student import student_class

__all__ = ["holds_config", "used_config"]

# Keys of KD that kd_det's trainer reads for a plain student, too.
_OF_ANY_TRAINING = {
    "AMP_PRECISION", "BEST_METRIC", "EMA_DECAY", "IMPORTS", "NON_FINITE", "RESUME_SOLVER", "WRITERS"
}  # fmt: skip


def used_config(cfg: CfgNode) -> CfgNode:
    """
    A copy without the nodes of losses that the config does not name, of the pretraining stage and of timm unless they
    are used, and, for a plain student, of distillation. No two keys share a list: its dump has no anchors.
    """
    ret = cfg.clone()
    ret.defrost()
    if ret.MODEL.META_ARCHITECTURE == "Distiller":
        named = {loss_class(name) for name in ret.KD.LOSSES}
        unused = {loss.name.upper() for _, loss in DISTILLATION_LOSS_REGISTRY if loss not in named}
    else:
        unused = set(ret.get("KD", ())) - _OF_ANY_TRAINING
    for key in unused:
        ret.KD.pop(key, None)
    if "CLASSIFICATION" not in getattr(student_class(cfg), "config_nodes", ()):
        ret.pop("CLASSIFICATION", None)
    if not ret.MODEL.get("TIMM", {}).get("NAME"):
        ret.MODEL.pop("TIMM", None)
    _unshare(ret)
    ret.freeze()
    return ret


def _unshare(node: CfgNode) -> None:
    """Give each key a list of its own: equal literals may be one object, to which YAML would refer by an anchor."""

    def fresh(value):
        return type(value)([fresh(item) for item in value]) if isinstance(value, (list, tuple)) else value

    for key, value in node.items():
        if isinstance(value, CfgNode):
            _unshare(value)
        else:
            node[key] = fresh(value)


def holds_config(output_dir: str, cfg: CfgNode) -> bool:
    """Whether a folder holds a run of this config, in what the run uses of it."""
    found = get_cfg()
    add_kd_config(found)
    add_missing_keys(found, cfg)
    try:
        merge_config_file(found, os.path.join(output_dir, "config.yaml"))
        return used_config(found).dump() == used_config(cfg).dump()
    except (OSError, ValueError):  # no config, or none of ours
        return False
