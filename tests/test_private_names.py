"""
Every private name of Detectron2, fvcore and torch that kd_det touches, so that an update that drops one fails here and
says which. Why each is needed stands where it is used.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.modeling import FPN, Backbone, ResNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm, logger
from detectron2.utils.visualizer import Visualizer
from torch import nn
from torchvision.models.detection.rpn import RegionProposalNetwork

KD_DET = Path(__file__).parents[1] / "kd_det"


def reads(function, name: str) -> bool:
    return name in inspect.getsource(function)


NAMES = {
    "_LOCAL_PROCESS_GROUP": lambda: hasattr(comm, "_LOCAL_PROCESS_GROUP") and reads(comm.get_local_rank, "_LOCAL_PROC"),
    "_BatchNorm": lambda: issubclass(nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm),
    "_cached_log_stream": lambda: hasattr(logger._cached_log_stream, "cache_clear"),
    "_coco_api": lambda: reads(COCOEvaluator.__init__, "self._coco_api = COCO("),
    "_default_font_size": lambda: reads(Visualizer.draw_text, "self._default_font_size"),
    "_data_loader": lambda: reads(hooks.PreciseBN, "self._data_loader ="),
    "_data_loader_iter": lambda: reads(SimpleTrainer.run_step, "next(self._data_loader_iter)"),
    "_decode_per_level_predictions": lambda: reads(DenseDetector, "self._decode_per_level_predictions("),
    "_eval_predictions": lambda: reads(COCOEvaluator.evaluate, "self._eval_predictions("),
    "_get_global_gloo_group": lambda: hasattr(comm._get_global_gloo_group, "cache_clear"),
    "_last_eval_results": lambda: reads(DefaultTrainer.train, "self._last_eval_results"),
    "_load_file": lambda: reads(DetectionCheckpointer.__base__.load, "self._load_file("),
    "_load_from_state_dict": lambda: hasattr(nn.Module, "_load_from_state_dict"),
    "_load_model": lambda: reads(DetectionCheckpointer.__base__.load, "self._load_model("),
    "_metadata": lambda: hasattr(nn.Linear(1, 1).state_dict(), "_metadata"),
    "_out_feature_channels": lambda: all(reads(c, "_out_feature_channels") for c in (Backbone, FPN, ResNet)),
    "_modules": lambda: hasattr(nn.Module(), "_modules"),
    # Of main: cut from the name of a file, and None between two loads.
    "_parsed_url_during_load": lambda: (
        not reads(DetectionCheckpointer, "matching_heuristics=")
        or reads(DetectionCheckpointer.load, "self._parsed_url_during_load = None")
    ),
    "_post_nms_top_n": lambda: reads(RegionProposalNetwork, 'self._post_nms_top_n["testing"]'),
    "_pre_nms_top_n": lambda: reads(RegionProposalNetwork, 'self._pre_nms_top_n["testing"]'),
    "_version": lambda: isinstance(torch.zeros(1)._version, int),
    "_trainer": lambda: reads(DefaultTrainer.run_step, "self._trainer.run_step()"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_still_there(name):
    assert NAMES[name](), f"kd_det uses the private name {name}: gone from this Detectron2 or torch {torch.__version__}"


def test_the_evaluator_still_looks_its_implementation_up():
    assert reads(COCOEvaluator, "COCOeval_opt") or reads(coco_evaluation, "COCOeval_opt if use_fast_impl")


def private(name: str) -> bool:
    """But for ``os._exit`` and lazy configs' ``_target_``, which are documented."""
    return name.startswith("_") and not name.endswith("_") and name != "_exit"


def test_no_other_private_name_is_used():
    trees = [ast.parse(path.read_text()) for path in KD_DET.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own, used = set(), set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
    inherited = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "super()"}
    by_string = {
        node.args[1].value
        for node in nodes
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr")
        and isinstance(node.args[1], ast.Constant)
    }
    imported = {a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names} - own
    foreign = {name for name in (used - own) | inherited | by_string | imported if private(name)}
    modules = {path.stem for path in KD_DET.rglob("_*.py")}
    assert foreign - modules <= NAMES.keys(), "list the name here with what it depends on, or use a public one"
