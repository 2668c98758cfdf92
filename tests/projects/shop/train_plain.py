"""The project's training script as a plain loop, as Detectron2's tools/plain_train_net.py writes it."""

import os

from data import ShopMapper
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import default_argument_parser, default_setup, default_writers
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from modeling import add_shop_config

import kd_det


def do_train(cfg, model, resume=False):
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler)
    start_iter = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    max_iter = cfg.SOLVER.MAX_ITER
    periodic_checkpointer = PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter=max_iter)
    writers = default_writers(cfg.OUTPUT_DIR, max_iter)
    data_loader = build_detection_train_loader(cfg, mapper=ShopMapper())
    with EventStorage(start_iter) as storage:
        for data, iteration in zip(data_loader, range(start_iter, max_iter)):
            storage.iter = iteration
            loss_dict = model(data)
            losses = sum(loss_dict.values())
            assert losses.isfinite(), loss_dict
            storage.put_scalars(total_loss=losses.item(), **{k: v.item() for k, v in loss_dict.items()})
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            for writer in writers:
                writer.write()
            periodic_checkpointer.step(iteration)
    for writer in writers:
        writer.close()


def main(args):
    cfg = get_cfg()
    add_shop_config(cfg)
    kd_det.add_kd_config(cfg)  # distillation; the rest of it is in distill.yaml
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    default_setup(cfg, args)
    do_train(cfg, build_model(cfg), resume=args.resume)


if __name__ == "__main__":
    main(default_argument_parser().parse_args())
