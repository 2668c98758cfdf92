"""``kd_det.distill``: the command ``kd-det train`` as a function."""

import contextlib
import functools
import gc
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable

from detectron2.utils import comm
from detectron2.utils import logger as detectron2_logger

from kd_det.classification.trainer import trainer_class
from kd_det.cli.arguments import load_config, parse_arguments, refuse
from kd_det.cli.checks import check_run
from kd_det.cli.launch import launch
from kd_det.cli.train import get_parser, train_or_evaluate
from kd_det.engine.lock import sole_run
from kd_det.engine.stopping import RESUMABLE
from kd_det.random_state import preserved_random_state

__all__ = ["run_command_line"]


def run_command_line(argv: list[str]) -> dict:
    """
    Do what ``kd-det train`` (of a classifier ``kd-det pretrain``) does with these arguments, one process in this one,
    and return the results of the evaluation, on the main process. For errors see :func:`kd_det.distill`.
    """
    parser = get_parser()
    parser.error = refuse
    try:
        args = parse_arguments(parser, argv)
        cfg = load_config(args)
        train = functools.partial(train_or_evaluate, trainer_class=trainer_class(cfg))
        cfg = check_run(cfg, args)
        args.command = f"kd-det train {shlex.join(argv)}"
        with _own_logging(), preserved_random_state(), tempfile.TemporaryDirectory() as folder:
            if args.num_gpus == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
                return sole_run(cfg.OUTPUT_DIR)(train)(args) or {}
            path = os.path.join(folder, "results.json")
            process = functools.partial(_write_results, train=train, path=path)
            launch(process, args, output_dir=cfg.OUTPUT_DIR, device=cfg.MODEL.DEVICE)
            if not os.path.isfile(path):  # under torchrun, another process is the main one
                return {}
            with open(path) as file:
                return json.load(file)
    except SystemExit as e:  # which would end a script without a word, and a notebook's cell with a wrong one
        if e.code == RESUMABLE:
            raise KeyboardInterrupt("stopped on request; all is saved, continue with resume=True") from None
        raise RuntimeError(f"the training ended with exit status {e.code}; its processes have printed why") from None
    finally:
        gc.collect()  # a trainer and its hooks are cycles, which would hold the GPU's memory until a later collection


def _write_results(args, *, train: Callable, path: str) -> None:
    results = train(args)
    if comm.is_main_process():
        with open(path, "w") as file:
            json.dump(results or {}, file)


@contextlib.contextmanager
def _own_logging():
    """
    A context with the handlers that Detectron2's ``default_setup`` adds, and no others: it keeps those of earlier runs,
    so that a second run in a process is logged twice, and into the first one's folder too.
    """
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_det")]
    kept = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = []
    # By its arguments it remembers that it was called, and, privately, the log files that it opened.
    detectron2_logger.setup_logger.cache_clear()
    detectron2_logger._cached_log_stream.cache_clear()
    try:
        yield
    finally:
        for logger, handlers, level, propagate in kept:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
