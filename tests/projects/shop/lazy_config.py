"""The project with LazyConfig: the same detector, built from Python objects."""

from data import ShopMapper
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from modeling import add_shop_config
from torch.optim import SGD

from kd_det import Distiller
from kd_det.losses import HintLoss, NSTLoss
from kd_det.teachers import load_teacher


def shop_detector(yaml):
    cfg = get_cfg()
    add_shop_config(cfg)
    cfg.merge_from_file(yaml)
    return build_model(cfg)


dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(ShopMapper)(),
        total_batch_size=2,
        num_workers=0,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(ShopMapper)(is_train=False),
        num_workers=0,
    ),
    "evaluator": L(COCOEvaluator)(dataset_name="coco_2017_val", output_dir="./output_lazy"),
}
optimizer = L(SGD)(params=L(get_default_optimizer_params)(), lr=0.001, momentum=0.9)
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[2, 3])
train = {
    "output_dir": "./output_lazy",
    "init_checkpoint": "",
    "max_iter": 3,
    "amp": {"enabled": False},
    "ddp": {"broadcast_buffers": False},
    "checkpointer": {"period": 3, "max_to_keep": 100},
    "eval_period": 3,
    "log_period": 1,
    "device": "cpu",
}

model = L(Distiller)(
    student=L(shop_detector)(yaml="config.yaml"),
    teacher=L(load_teacher)(model=L(shop_detector)(yaml="teacher.yaml"), weights="teacher.pth"),
    losses=[
        L(NSTLoss)(student_taps=["fine", "coarse"], weight=2.0),
        L(HintLoss)(student_taps=["coarse"], student_channels=[8], teacher_channels=[16]),
    ],
)
