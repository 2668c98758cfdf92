"""FCOS with an R-50, taught by FCOS with an R-101. The zoo has no such teacher: train it first, in plain Detectron2."""

from detectron2.config import LazyCall as L

from kd_det import Distiller
from kd_det.compat import model_zoo
from kd_det.teachers import load_teacher

_zoo = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
dataloader, lr_multiplier, optimizer, train = _zoo.dataloader, _zoo.lr_multiplier, _zoo.optimizer, _zoo.train

_teacher = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
_teacher.backbone.bottom_up.stages.depth = 101

model = L(Distiller)(
    student=_zoo.model,
    teacher=L(load_teacher)(model=_teacher, weights="output/fcos_R_101_FPN/model_final.pth", input_format="BGR"),
    losses=[],
    input_format="BGR",
)
