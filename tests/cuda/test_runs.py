"""Runs of the Trainer on a GPU: mixed precision, resuming, ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from kd_det import student_cfg
from kd_det.losses import loss_class
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


def assert_similar(found: dict, expected: dict, *, atol: float):
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0.02, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


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
    assert_similar(load(resumed)["model"], load(cfg)["model"], atol=1e-3)


def test_an_average_of_the_weights_follows_them(tmp_path, device):
    opts = {"KD__EMA_DECAY": 0.2, "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 4}
    cfg = run_cfg(tmp_path, "NST", MODEL__DEVICE=device, **opts)
    start = {key: value.cpu() for key, value in build(student_cfg(cfg)).state_dict().items()}
    torch.save({"model": start}, tmp_path / "start.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    run(cfg)
    files = ("model_0000000.pth", "model_0000001.pth", "model_0000002.pth", "model_final.pth")
    for key in ("backbone.fpn_output3.weight", "backbone.bottom_up.res3.0.conv1.norm.running_var"):
        expected = start[key].double()
        for n, name in enumerate(files, start=1):
            decay = min(0.2, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * load(cfg, name)["model"][key]
        torch.testing.assert_close(load(cfg, "model_ema.pth")["model"][key], expected.float())


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_changes_little(tmp_path, device, precision):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, MODEL__DEVICE=device, SOLVER__MAX_ITER=2, KD__AMP_PRECISION=precision)
    if device == "cpu" and precision == "float16":
        pytest.skip("float16 is for GPUs")
    run(cfg)
    expected = load(cfg)["model"]
    cfg.SOLVER.AMP.ENABLED = True
    cfg.OUTPUT_DIR = str(tmp_path / "amp")
    run(cfg)
    found = load(cfg)["model"]
    assert all(value.dtype == expected[key].dtype for key, value in found.items())
    assert_similar(found, expected, atol=0.02)


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


def _losses_on_a_rank(rank: int, cfg, folder: str, backend: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting_{backend}", rank=rank, world_size=2)
    model = DistributedDataParallel(build(cfg), broadcast_buffers=False)
    losses = losses_of(model, _images()[2 * rank :][:2])
    sum(losses.values()).backward()
    torch.save({key: value.detach().cpu() for key, value in losses.items()}, f"{folder}/{backend}_{rank}.pth")
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
    multiprocessing.start_processes(_losses_on_a_rank, (cfg, str(tmp_path), backend), nprocs=2, start_method="spawn")
    halves = [torch.load(f"{tmp_path}/{backend}_{rank}.pth") for rank in range(2)]
    whole = losses_of(build(cfg), _images())
    for name in MAP_LOSSES:  # the others' regions are sampled at random
        key = f"loss_{loss_class(name).name}"
        mean = (halves[0][key] + halves[1][key]) / 2
        torch.testing.assert_close(mean, whole[key].detach().cpu(), rtol=1e-3, atol=1e-6, msg=lambda m, k=key: k + m)
