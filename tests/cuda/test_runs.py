"""Runs of the Trainer on a GPU: mixed precision, resuming, ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.cuda.tiny_cuda import MAP_LOSSES, assert_fine, build, faster_cfg, losses_of, train
from tests.tiny import batch, tiny_cfg
from tests.tiny_run import ALL_LOSSES, run_cfg
from tests.tiny_run import train as run

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def storage():
    """Trainers open their own."""


def load(cfg, name="model_final.pth") -> dict:
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True, map_location="cpu")


def assert_similar(found: dict, expected: dict):
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-2, atol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_float16_with_scaled_gradients_resumes(tmp_path, device):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, MODEL__DEVICE=device, SOLVER__AMP__ENABLED=True)
    run(cfg)
    state = load(cfg)["trainer"]["_trainer"]
    assert device == "cpu" or state["grad_scaler"]["scale"] > 0
    resumed = cfg.clone()
    resumed.OUTPUT_DIR = str(tmp_path / "resumed")
    os.makedirs(resumed.OUTPUT_DIR)
    torch.save(load(cfg, "model_0000003.pth"), os.path.join(resumed.OUTPUT_DIR, "model_0000003.pth"))
    with open(os.path.join(resumed.OUTPUT_DIR, "last_checkpoint"), "w") as f:
        f.write("model_0000003.pth")
    assert run(resumed, resume=True).start_iter == 4
    assert_similar(load(resumed)["model"], load(cfg)["model"])


def test_mixed_precision_changes_little(tmp_path, device):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, MODEL__DEVICE=device, SOLVER__MAX_ITER=2)
    run(cfg)
    expected = load(cfg)["model"]
    cfg.SOLVER.AMP.ENABLED = True
    precisions = ["float16", "bfloat16"] if "PRECISION" in cfg.SOLVER.AMP else [""]
    for precision in precisions:
        if device == "cpu" and precision == "float16":
            continue
        if precision:
            cfg.SOLVER.AMP.PRECISION = precision
        cfg.OUTPUT_DIR = str(tmp_path / f"amp_{precision}")
        run(cfg)
        found = load(cfg)["model"]
        assert all(value.dtype == expected[key].dtype and value.isfinite().all() for key, value in found.items())


def test_evaluation_and_workers(tmp_path, device):
    cfg = run_cfg(tmp_path, "NST", "SoftTarget", MODEL__DEVICE=device, DATALOADER__NUM_WORKERS=2, SOLVER__MAX_ITER=2)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.TEST.EVAL_PERIOD = 2
    trainer = run(cfg)
    assert "bbox" in trainer._last_eval_results


def test_one_rank_of_nccl(tmp_path, device):
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = build(faster_cfg(tmp_path, device, *ALL_LOSSES))
        devices = [0] if device == "cuda" else None
        assert_fine(train(DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False), 2), device)
    finally:
        dist.destroy_process_group()


def _losses_on_a_rank(rank: int, cfgs: list, folder: str, backend: str, device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting_{backend}", rank=rank, world_size=2)
    from kd_det.cli.launch import _create_local_process_group

    _create_local_process_group(2)
    found = {}
    for name, cfg in cfgs:
        model = build(cfg)
        losses = losses_of(DistributedDataParallel(model, broadcast_buffers=False), _images()[2 * rank :][:2])
        sum(losses.values()).backward()
        found[name] = {loss.key: losses[loss.key].detach().cpu() for loss in model.losses.values()}
    torch.save(found, f"{folder}/{backend}_{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def _images():
    return batch(((64, 64),) * 4)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_ranks_are_one_batch(tmp_path, device, backend):
    """With gloo two processes may share one GPU."""
    if backend == "nccl" and (device == "cpu" or torch.cuda.device_count() < 2):
        pytest.skip("needs two GPUs")
    frozen = {"MODEL__RESNETS__NORM": "FrozenBN", "KD__OVERHAUL__CONNECTOR_NORM": "FrozenBN"}
    frozen |= {"KD__REVIEW_KD__CONNECTOR_NORM": "FrozenBN", "KD__OVERHAUL__MARGIN": "running"}
    names = [*MAP_LOSSES, "SoftTarget", "DKD", "DIST", "Similarity"]
    cfg = faster_cfg(tmp_path, device, *names, teacher=tiny_cfg(depth=50, width=8), **frozen)
    multiprocessing.start_processes(
        _losses_on_a_rank, ([("all", cfg)], str(tmp_path), backend, device), nprocs=2, start_method="spawn"
    )
    halves = [torch.load(f"{tmp_path}/{backend}_{rank}.pth")["all"] for rank in range(2)]
    whole = losses_of(build(cfg), _images())
    for name in MAP_LOSSES:  # the others' regions are sampled at random
        key = next(key for key in whole if key == f"loss_{_name(name)}")
        mean = (halves[0][key] + halves[1][key]) / 2
        torch.testing.assert_close(mean, whole[key].detach().cpu(), rtol=1e-3, atol=1e-6, msg=lambda m, k=key: k + m)


def _name(loss: str) -> str:
    from kd_det.losses import loss_class

    return loss_class(loss).name
