"""A teacher evaluated by itself through the code that teaches, so that a wrong one is seen before a training."""

import logging
import tempfile
from collections.abc import Sequence
from typing import Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn

from kd_det.errors import UserError
from kd_det.features.classes import ClassMatch, match_classes
from kd_det.teachers.build import teacher_dtype
from kd_det.teachers.feature_teacher import FeatureTeacher
from kd_det.teachers.runner import Teacher, padded_images

__all__ = ["EvaluateTeacher", "TeacherDetector", "evaluate_teacher", "register_first_images"]

logger = logging.getLogger(__name__)


class TeacherDetector(nn.Module):
    """
    In place of a student in evaluation: what the teacher finds in the student's inputs, in its own channel order and
    normalisation, on the student's padded canvas. Neither network is a submodule.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        input_format: str,
        dtype: torch.dtype = torch.float32,
        classes: Sequence[str] = (),
        class_map: Sequence = (),
    ):
        """
        Args:
            student, teacher, input_format, dtype: as for :class:`kd_det.teachers.Teacher`.
            classes: of the data set, matched with the teacher's as in :func:`kd_det.features.classes.match_classes`;
                what the teacher finds of others is left out.
            class_map: ``KD.TEACHER.CLASS_MAP``.

        Raises:
            UserError: a teacher of feature maps only, or of other classes than the data set's.
        """
        super().__init__()
        if type(teacher).forward is FeatureTeacher.forward:
            raise UserError("the teacher gives feature maps and no detections: there is nothing to evaluate")
        self.runner = Teacher(teacher, [], student=student, input_format=input_format, dtype=dtype)
        object.__setattr__(self, "student", student)
        self._match = _match(teacher, list(classes), class_map)

    def forward(self, batched_inputs: List[Dict]) -> List[Dict]:
        images = padded_images(self.student, batched_inputs)
        outputs = self.runner(batched_inputs, images.device, images, detects=True).detections
        for output in outputs if self._match is not None else ():
            found = output["instances"]
            found.pred_classes = self._match.to(found.pred_classes.device).of_student(found.pred_classes)
            output["instances"] = found[found.pred_classes >= 0]
        return outputs


def evaluate_teacher(cfg: CfgNode, student: nn.Module, teacher: nn.Module, trainer_class) -> dict:
    """
    Evaluate a teacher on ``DATASETS.TEST``, at the student's size of test images. Every rank calls it.

    Returns:
        Results as ``trainer_class.test`` gives them.

    Raises:
        UserError: a teacher of feature maps only, or of other classes.
    """
    first = cfg.DATASETS.TEST[0]
    if not MetadataCatalog.get(first).get("thing_classes"):
        DatasetCatalog.get(first)  # a COCO file tells its classes when it is read
    classes = MetadataCatalog.get(first).get("thing_classes", ())
    known = {"classes": classes, "class_map": cfg.KD.TEACHER.CLASS_MAP}
    detector = TeacherDetector(student, teacher, input_format=cfg.INPUT.FORMAT, dtype=teacher_dtype(cfg), **known)
    try:
        with tempfile.TemporaryDirectory() as folder:
            evaluators = [trainer_class.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
            return trainer_class.test(cfg, detector, evaluators)
    finally:
        for handle in detector.runner.handles:
            handle.remove()


class EvaluateTeacher(HookBase):
    """Evaluates the teacher before the first step, and logs the results as ``teacher/...``."""

    def before_train(self):
        if self.trainer.start_iter:
            return
        model = getattr(self.trainer.model, "module", self.trainer.model)
        if getattr(model, "teacher", None) is None:
            return
        logger.info(f"Evaluating the teacher {self.trainer.cfg.KD.TEACHER.CONFIG_FILE} by itself:")
        trainer_class = self.trainer.__class__  # type() of a weak proxy is another
        results = evaluate_teacher(self.trainer.cfg, model.student, model.teacher, trainer_class)
        results = {f"teacher/{key}": value for key, value in flatten_results_dict(results).items()}
        self.trainer.storage.put_scalars(**results, smoothing_hint=False)


def register_first_images(name: str, count: int) -> str:
    """
    Register the first images of a data set, and return the new name. COCO's measures take the place of VOC's, which
    need the whole data set.
    """
    ret = f"{name}_first_{count}"
    if ret not in DatasetCatalog:
        records = DatasetCatalog.get(name)[:count]
        known = MetadataCatalog.get(name).as_dict()
        if known.get("evaluator_type") == "pascal_voc":
            known["evaluator_type"] = "coco"
        DatasetCatalog.register(ret, lambda: records)
        # Without the COCO file of all images, the evaluator writes one of these.
        MetadataCatalog.get(ret).set(**{key: known[key] for key in known.keys() - {"name", "json_file"}})
    return ret


def _match(teacher: nn.Module, classes: Sequence[str], class_map: Sequence) -> Optional[ClassMatch]:
    """Which of the data set's classes are which of the teacher's; None where they are the same, or not known."""
    names = getattr(teacher, "class_names", ())
    count = len(names) or getattr(getattr(teacher, "roi_heads", teacher), "num_classes", None)
    if not classes or count is None:
        return None
    try:
        return match_classes(len(classes), count, student_classes=classes, teacher_classes=names, class_map=class_map)
    except ValueError as e:
        raise UserError(f"the teacher cannot be evaluated: {e}") from None
