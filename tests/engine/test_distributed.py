"""Several processes are one run: same losses, same gradients, same margins, one end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from kd_det.cli import launch
from kd_det.cli.launch import _create_local_process_group
from kd_det.engine import RESUMABLE, Trainer
from tests.classification.tiny_classifier import classifier_cfg, distilled_cfg
from tests.classification.tiny_classifier import images as classifier_images
from tests.tiny import RCNN_LOSSES, batch, distillation_cfg, tiny_cfg
from tests.tiny_run import ALL_LOSSES, differing, run_cfg, train

ROOT = Path(__file__).parents[2]
TRAIN_NET = str(ROOT / "tools" / "train_net.py")


@pytest.fixture(autouse=True)
def storage():
    """Every process opens its own."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank, port, target, args, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank, timeout=timedelta(seconds=60)
    )
    _create_local_process_group(2)
    value = target(*args)
    if value is not None:
        torch.save(value, f"{results}/{rank}.pth")
    comm.synchronize()
    dist.destroy_process_group()


def on_two_ranks(tmp_path, target, *args) -> list:
    """What ``target(*args)`` returns in each of two forked processes."""
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    multiprocessing.start_processes(_rank, (free_port(), target, args, str(results)), nprocs=2, start_method="fork")
    return [torch.load(path) if (path := results / f"{rank}.pth").exists() else None for rank in range(2)]


# Two halves are one whole.


def first_ones(labels, num_samples, positive_fraction, bg_label):
    """Detectron2's ``subsample_labels`` without chance."""
    positive = ((labels != -1) & (labels != bg_label)).nonzero().flatten()
    negative = (labels == bg_label).nonzero().flatten()
    positive = positive[: int(num_samples * positive_fraction)]
    return positive, negative[: num_samples - len(positive)]


def step(cfg, images) -> dict:
    """Losses and gradients of one step of this process' share of four images of one size."""
    import detectron2.modeling.proposal_generator.rpn as rpn
    import detectron2.modeling.roi_heads.roi_heads as roi_heads

    rpn.subsample_labels = roi_heads.subsample_labels = first_ones
    torch.manual_seed(0)
    distiller = build_model(cfg).train()
    model = distiller
    if comm.get_world_size() > 1:
        model = DistributedDataParallel(distiller, broadcast_buffers=False)
    share = len(images) // comm.get_world_size()
    mine = images[comm.get_rank() * share :][:share]
    with EventStorage():
        losses = model(mine)
    sum(losses.values()).backward()
    return {
        "losses": {key: value.detach() for key, value in losses.items()},
        "gradients": {name: p.grad for name, p in distiller.named_parameters() if p.requires_grad},
        "buffers": dict(distiller.losses.named_buffers()),
    }


PRE_ACTIVATIONS = tuple(f"res{i}.pre_activation" for i in range(2, 6))

# Every loss of a detector; norms of the whole batch, and margins of the images seen so far.
CASES = {
    **{name: {} for name in RCNN_LOSSES},
    "OverhaulLoss": {"KD__OVERHAUL__CONNECTOR_NORM": "FrozenBN", "KD__OVERHAUL__MARGIN": "running"},
    "MGDLoss": {"KD__MGD__MASK_RATIO": 0.0},  # ranks hide other positions than one process would
    "ReviewKDLoss": {"KD__REVIEW_KD__CONNECTOR_NORM": "FrozenBN", "KD__REVIEW_KD__MID_CHANNELS": 8},
    "SimilarityLoss images": {"KD__SIMILARITY__SAMPLES": "images"},
    "NSTLoss before the ReLU": {"KD__NST__STUDENT_TAPS": PRE_ACTIVATIONS, "KD__NST__TEACHER_TAPS": PRE_ACTIVATIONS},
    "HintLoss that is off": {"KD__HINT__STOP_ITER": 0},
    "SimilarityLoss some": {"KD__SIMILARITY__MAX_REGIONS": 24},
    "OverhaulLoss sum": {
        "KD__OVERHAUL__CONNECTOR_NORM": "FrozenBN",
        "KD__OVERHAUL__MARGIN": "running",
        "KD__OVERHAUL__REDUCTION": "sum",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_the_batch_are_one_with_the_whole(tmp_path, case):  # D26
    teacher = tiny_cfg(depth=50, width=8)
    opts = {"MODEL__RESNETS__NORM": "FrozenBN", **CASES[case]}
    cfg = distillation_cfg(tmp_path, case.split()[0], teacher=teacher, **opts)
    # Padded to one canvas on both ranks, with unequal numbers of valid positions.
    compare_halves_with_whole(tmp_path, cfg, batch(sizes=((64, 96), (64, 96), (40, 96), (64, 32))))


def compare_halves_with_whole(tmp_path, cfg, images):
    whole = _in_fork(tmp_path, step, cfg, images)
    halves = on_two_ranks(tmp_path, step, cfg, images)
    for key, value in whole["losses"].items():
        mean = (halves[0]["losses"][key] + halves[1]["losses"][key]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    largest = max(g.abs().max() for g in whole["gradients"].values())
    for name, gradient in whole["gradients"].items():
        assert gradient is not None, name
        for half in halves:
            torch.testing.assert_close(half["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * float(largest))
    for name, value in whole["buffers"].items():
        for half in halves:
            torch.testing.assert_close(half["buffers"][name], value, rtol=1e-5, atol=1e-6)


CLASSIFICATION_LOSSES = ("GradientAttention", "FSP SoftTarget Similarity", "NST AttentionTransfer PKD CWD DIST")


@pytest.mark.parametrize("loss", ["BoundedRegression", "SoftTarget"])
def test_two_ranks_with_unequal_numbers_of_objects_are_one_with_the_whole(tmp_path, loss):
    cfg = distillation_cfg(tmp_path, loss, teacher=tiny_cfg(depth=50, width=8), MODEL__RESNETS__NORM="FrozenBN")
    images = batch(sizes=((64, 64),) * 4)
    for image in images[2:]:  # those of the second rank
        image["instances"] = image["instances"][:0]
    compare_halves_with_whole(tmp_path, cfg, images)


@pytest.mark.parametrize("losses", CLASSIFICATION_LOSSES)
def test_two_ranks_with_half_the_batch_of_a_classifier_are_one_with_the_whole(tmp_path, losses):
    opts = {"MODEL__RESNETS__NORM": "FrozenBN", "KD__DIST__STUDENT_TAPS": ("linear",)}
    opts.update(KD__PKD__STUDENT_TAPS=("res5",), KD__CWD__STUDENT_TAPS=("res4",))
    cfg = distilled_cfg(tmp_path, *losses.split(), teacher=classifier_cfg(depth=50, width=8), **opts)
    compare_halves_with_whole(tmp_path, cfg, classifier_images(4))


def _in_fork(tmp_path, target, *args):
    def save():
        torch.save(target(*args), tmp_path / "alone.pth")

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    assert process.exitcode == 0
    return torch.load(tmp_path / "alone.pth")


def test_synchronised_connectors_see_the_whole_batch(tmp_path):
    opts = {"MODEL__RESNETS__NORM": "FrozenBN", "KD__HINT__CONNECTOR_NORM": "naiveSyncBN"}
    cfg = distillation_cfg(tmp_path, "Hint", teacher=tiny_cfg(depth=50, width=8), **opts)
    images = batch(sizes=((64, 64),) * 4)
    whole, halves = _in_fork(tmp_path, step, cfg, images), on_two_ranks(tmp_path, step, cfg, images)
    mean = (halves[0]["losses"]["loss_hint"] + halves[1]["losses"]["loss_hint"]) / 2
    torch.testing.assert_close(mean, whole["losses"]["loss_hint"], rtol=1e-5, atol=1e-6)
    own = distillation_cfg(tmp_path, "Hint", **{**opts, "KD__HINT__CONNECTOR_NORM": "BN"})
    halves = on_two_ranks(tmp_path, step, own, images)
    mean = (halves[0]["losses"]["loss_hint"] + halves[1]["losses"]["loss_hint"]) / 2
    assert not torch.allclose(mean, whole["losses"]["loss_hint"], rtol=1e-5)


def uneven_similarity() -> dict:
    from kd_det.losses import similarity_preserving_loss
    from kd_det.losses._ranks import gather_samples

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, 2, generator=generator), torch.randn(5, 4, generator=generator)
    mine = slice(0, 1) if comm.get_rank() == 0 else slice(1, 5)
    local = student[mine].requires_grad_()
    loss = similarity_preserving_loss(*gather_samples(local, teacher[mine]))
    loss.backward()
    return {"loss": loss.detach(), "gradient": local.grad}


def test_ranks_may_bring_different_numbers_of_regions(tmp_path):
    from kd_det.losses import similarity_preserving_loss

    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, 2, generator=generator), torch.randn(5, 4, generator=generator)
    whole = similarity_preserving_loss(student.requires_grad_(), teacher)
    whole.backward()
    ranks = on_two_ranks(tmp_path, uneven_similarity)
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], whole.detach())
    # Each rank's gradient is twice its part of the whole one; DDP halves it.
    torch.testing.assert_close(torch.cat([rank["gradient"] for rank in ranks]) / 2, student.grad)


# The trainer on several processes.


def train_one_rank(cfg, resume=False):
    train(cfg, resume=resume)


def load(folder, name="model_final.pth") -> dict:
    return torch.load(os.path.join(folder, name), weights_only=True)


def test_two_ranks_resume_with_the_same_bits(tmp_path):
    cfg = run_cfg(tmp_path, *ALL_LOSSES, SOLVER__IMS_PER_BATCH=4)
    on_two_ranks(tmp_path, train_one_rank, cfg)
    before = load(cfg.OUTPUT_DIR)
    assert len(before["trainer"]["random_states"]["states"]) == 2
    os.remove(f"{cfg.OUTPUT_DIR}/model_final.pth")
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000001.pth")
    on_two_ranks(tmp_path, train_one_rank, cfg, True)
    assert differing(load(cfg.OUTPUT_DIR), before) == []


def skip_on_one_rank(cfg, in_forward):
    from kd_det.engine import Trainer

    class Broken(Trainer):
        def run_step(self):
            student = self.model.module.student
            if in_forward:  # the proposal generator raises, before what the ranks do together
                handle = student.backbone.register_forward_hook(self._break_features)
            else:
                handle = student.proposal_generator.register_forward_hook(self._break_losses)
            super().run_step()
            handle.remove()

        def _factor(self):
            return float("nan") if comm.get_rank() == 1 and self.iter == 2 else 1.0

        def _break_features(self, module, args, output):
            return {key: value * self._factor() for key, value in output.items()}

        def _break_losses(self, module, args, output):
            return output[0], {key: value * self._factor() for key, value in output[1].items()}

    trainer = train(cfg, trainer_class=Broken)
    return {"skipped": trainer._trainer.non_finite_steps, "weights": trainer.model.module.student.state_dict()}


@pytest.mark.parametrize("losses, in_forward", [("Hint", False), ("Similarity PKD", True)])
def test_a_step_is_skipped_by_all_ranks_or_none(tmp_path, losses, in_forward):
    cfg = run_cfg(tmp_path, *losses.split(), SOLVER__IMS_PER_BATCH=4, KD__NON_FINITE="skip")
    ranks = on_two_ranks(tmp_path, skip_on_one_rank, cfg, in_forward)
    assert [rank["skipped"] for rank in ranks] == [1, 1]
    weights = [{k: v for k, v in rank["weights"].items() if "running" not in k} for rank in ranks]
    assert differing(*weights) == []
    assert os.listdir(f"{cfg.OUTPUT_DIR}/non_finite") == ["iter_0000002_rank_1.pth"]


# The command line on several processes.


def start(tmp_path, cfg, *argv: str, launcher=(sys.executable,), kill: str = "", **env) -> subprocess.Popen:
    (tmp_path / "run.yaml").write_text(cfg.dump())
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TINY_DATA": str(tmp_path / "images"), **env}
    if kill:
        env["TINY_KILL"] = kill
    script = str(ROOT / "tests" / "tiny_train_net.py")
    command = [*launcher, script, "--config-file", str(tmp_path / "run.yaml"), *argv]
    stderr = tmp_path / f"stderr{len(_started)}"
    with stderr.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=file, cwd=ROOT)
    process.stderr_path = stderr
    _started.append(process)
    return process


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.terminate()  # its children end with it
            process.wait(60)


def finish(process: subprocess.Popen, timeout: float = 600) -> tuple[int, str]:
    process.wait(timeout)
    return process.returncode, process.stderr_path.read_text()


def local_url() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.mark.slow
def test_launch_torchrun_and_two_machines_train_alike(tmp_path):
    cfg = run_cfg(tmp_path, "NST", "Hint", SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=2)
    on_two_ranks(tmp_path, train_one_rank, cfg)
    expected = load(cfg.OUTPUT_DIR)["model"]

    def check(name, *processes):
        for process in processes:
            status, stderr = finish(process)
            assert status == 0, stderr
        assert differing(load(tmp_path / name)["model"], expected) == []

    out = ("OUTPUT_DIR", str(tmp_path / "launch"))
    check("launch", start(tmp_path, cfg, "--num-gpus", "2", "--dist-url", local_url(), *out))

    out, url = ("OUTPUT_DIR", str(tmp_path / "machines")), local_url()
    machines = [("--num-machines", "2", "--machine-rank", str(rank), "--dist-url", url) for rank in range(2)]
    check("machines", *[start(tmp_path, cfg, *machine, *out) for machine in machines])

    out = ("OUTPUT_DIR", str(tmp_path / "torchrun"))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}")
    check("torchrun", start(tmp_path, cfg, *out, launcher=torchrun))


def wait_for(path: Path, process: subprocess.Popen):
    for _ in range(3000):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.stderr_path.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def test_a_request_to_stop_reaches_all_processes(tmp_path):
    cfg = run_cfg(tmp_path, "NST", SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=9999, SOLVER__CHECKPOINT_PERIOD=9999)
    process = start(tmp_path, cfg, "--num-gpus", "2", "--dist-url", local_url())
    wait_for(tmp_path / "out" / "metrics.json", process)
    process.send_signal(signal.SIGTERM)  # as a cluster does: to the process it started
    status, stderr = finish(process)
    assert status == RESUMABLE, stderr
    assert "Traceback" not in stderr
    name = (tmp_path / "out" / "last_checkpoint").read_text()
    assert re.fullmatch(r"model_\d{7}.pth", name)
    assert load(tmp_path / "out", name)["trainer"]["iteration"] == int(name[6:13])


class _Slow:
    """Gone only when the interpreter shuts down, after a while."""

    def __del__(self, sleep=time.sleep):
        sleep(3)


def _leave_a_callback(args):
    """Rank 1 ends by ``args.ends`` before gloo's thread is done with its last result and calls Python again."""
    if comm.get_rank() == 1:
        dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda future: None)
        sys.slow = _Slow()
        raise args.ends
    time.sleep(1)
    dist.all_reduce(torch.ones(1))
    time.sleep(60)  # and is ended


@pytest.mark.parametrize("ends, status", [(SystemExit(RESUMABLE), RESUMABLE), (ValueError("a wrong option"), 1)])
def test_threads_of_the_process_group_end_before_python(ends, status):
    args = SimpleNamespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url=local_url(), ends=ends)
    with pytest.raises(SystemExit) as e:
        launch(_leave_a_callback, args)
    assert e.value.code == status


@pytest.mark.parametrize(
    "kill, message",
    [
        (f"1:2:{signal.SIGKILL:d}", "was killed by SIGKILL"),
        pytest.param("1:2:0", "ZeroDivisionError: a defect", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_others(tmp_path, kill, message):
    cfg = run_cfg(tmp_path, "NST", SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=9999)
    process = start(tmp_path, cfg, "--num-gpus", "2", "--dist-url", local_url(), kill=kill)
    status, stderr = finish(process)
    assert status not in (0, RESUMABLE)
    assert message in stderr
    assert load(tmp_path / "out", "model_0000001.pth")["trainer"]["iteration"] == 1


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_others(tmp_path):
    cfg = run_cfg(tmp_path, "NST", SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=9999)
    url = local_url()
    machines = [
        start(tmp_path, cfg, "--num-machines", "2", "--machine-rank", str(rank), "--dist-url", url, kill="1:2:9")
        for rank in range(2)
    ]
    assert finish(machines[1])[0] != 0
    status, stderr = finish(machines[0])
    assert status not in (0, RESUMABLE)
    assert stderr.strip()


def _note_backend(args):
    (args.folder / f"{comm.get_rank()}").write_text(f"{dist.get_backend()} {comm.get_local_rank()}")


def launch_args(tmp_path, **values) -> SimpleNamespace:
    return SimpleNamespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", folder=tmp_path, **values)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_processes_on_the_cpu_find_each_other_also_beside_a_gpu(tmp_path, monkeypatch, has_gpu):  # D38
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    launch(_note_backend, launch_args(tmp_path), output_dir=str(tmp_path / "out"), device="cpu")
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["gloo 0", "gloo 1"]


def test_torchrun_on_the_cpu_of_a_machine_with_a_gpu(tmp_path):  # D38
    port = free_port()

    def join(rank: int):
        torch.cuda.is_available = lambda: True
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        launch(_note_backend, launch_args(tmp_path), output_dir=str(tmp_path / "out"), device="cpu")

    processes = [multiprocessing.get_context("fork").Process(target=join, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["gloo 0", "gloo 1"]


def resume_with_another_folder(cfg):
    if comm.get_rank() == 1:  # another machine's disk
        cfg.OUTPUT_DIR += "_of_the_other_machine"
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    with pytest.raises(FileNotFoundError, match="holds a checkpoint, but not on the machines"):
        Trainer(cfg).resume_or_load(resume=True)
    return {"refused": True}


def test_a_machine_without_the_checkpoint_is_said_on_all(tmp_path):  # D39: one rank raised, the others waited
    cfg = run_cfg(tmp_path, SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=2)
    on_two_ranks(tmp_path, train_one_rank, cfg)
    assert on_two_ranks(tmp_path, resume_with_another_folder, cfg) == [{"refused": True}] * 2
