"""Mask R-CNN with an R-50, taught by the model zoo's R-101."""

from detectron2.config import LazyCall as L

from kd_det import Distiller
from kd_det.compat import model_zoo
from kd_det.losses import NSTLoss, SoftTargetLoss
from kd_det.teachers import load_teacher

_zoo = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, lr_multiplier, optimizer, train = _zoo.dataloader, _zoo.lr_multiplier, _zoo.optimizer, _zoo.train

_teacher = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py").model
_teacher.backbone.bottom_up.stages.depth = 101

model = L(Distiller)(
    student=_zoo.model,
    teacher=L(load_teacher)(
        model=_teacher,
        weights=model_zoo.get_checkpoint_url("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml"),
    ),
    losses=[
        L(NSTLoss)(student_taps=["p2", "p3", "p4", "p5"], weight=20.0),
        L(SoftTargetLoss)(temperature=2.0),
    ],
)
