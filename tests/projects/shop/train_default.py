"""The project's training script, on Detectron2's DefaultTrainer. Distillation is the import and the marked lines."""

import os

from data import ShopMapper
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from modeling import add_shop_config

import kd_det


class ShopTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=ShopMapper())

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=ShopMapper(is_train=False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def main(args):
    cfg = get_cfg()
    add_shop_config(cfg)
    kd_det.add_kd_config(cfg)  # distillation; the rest of it is in distill.yaml
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")  # optional: what kd_det says
    trainer = ShopTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    print("RESULTS", sorted(trainer._last_eval_results["bbox"])[:2])


if __name__ == "__main__":
    main(default_argument_parser().parse_args())
