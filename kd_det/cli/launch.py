"""Detectron2's ``launch``, also without a GPU and also under torchrun."""

import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import multiprocessing as torch_multiprocessing

from kd_det.cli.run_tool import run_tool
from kd_det.engine.lock import sole_run
from kd_det.engine.stopping import RESUMABLE, handling_requests, restartable

__all__ = ["launch"]


def launch(main: Callable, args, *, output_dir: str = "", device: str = "cuda") -> None:
    """
    Call ``main(args)`` in every process of the run.

    Under torchrun (its variables are in the environment) this process is one of them. Otherwise ``args.num_gpus``
    processes are started on this machine.

    Args:
        main: a function of a module that can be imported.
        args: as :func:`kd_det.cli.argument_parser` gives them.
        output_dir: is locked against other runs; empty: there is none.
        device: of the run; processes on the "cpu" talk over gloo, also beside a GPU.

    Raises:
        SystemExit: a process ended with another status than 0; its status is kept.
    """
    on_gpu = torch.cuda.is_available() and device.startswith("cuda")
    what = (main, args, output_dir)
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if int(os.environ["WORLD_SIZE"]) > 1:
            if on_gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            _join_group("nccl" if on_gpu else "gloo", int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run_in_group(*what)
    if args.num_gpus * args.num_machines == 1:
        return _run(*what)
    requests = []
    try:
        # This process only waits: a request to stop is for the processes that train, which then end it.
        with _passing_on(requests):
            if on_gpu:  # without a GPU, v0.6 refuses; with one, Detectron2 takes NCCL on the CPU too
                where = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
                detectron2_launch(_run_in_group, *where, args=what)
            else:
                if args.dist_url == "auto":
                    args.dist_url = _free_url()
                torch_multiprocessing.spawn(_gloo_worker, nprocs=args.num_gpus, args=(args, what))
    except torch_multiprocessing.ProcessExitedException as e:
        if requests and e.exit_code == -signal.SIGTERM:  # it had not even begun
            sys.exit(RESUMABLE)
        if e.exit_code < 0:
            print(f"error: process {e.error_index} was killed by {e.signal_name}; all were ended", file=sys.stderr)
        sys.exit(e.exit_code if e.exit_code > 0 else 128 - e.exit_code)
    except torch_multiprocessing.ProcessRaisedException as e:
        print(e, file=sys.stderr)
        sys.exit(1)


def _run(main: Callable, args, output_dir: str):
    with restartable():  # until training begins, and answers signals itself
        run_tool(sole_run(output_dir)(main), args)


def _run_in_group(*what):
    """
    ``_run``, then leave the process group: a thread of gloo that releases a result takes Python's lock, and while the
    interpreter shuts down that aborts the process.
    """
    status = 0
    try:
        _run(*what)
    except SystemExit as e:
        status = e.code
    # NCCL may wait for ranks that a process which was stopped, or failed, leaves behind.
    if dist.is_initialized() and (not status or dist.get_backend() == "gloo"):
        # Private, and without a public way to forget them: Detectron2 keeps two groups in its module.
        comm._LOCAL_PROCESS_GROUP = None
        comm._get_global_gloo_group.cache_clear()
        gc.collect()  # a model under DistributedDataParallel keeps the group, and its threads, alive
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def _gloo_worker(local_rank: int, args, what: tuple):
    rank, world_size = args.machine_rank * args.num_gpus + local_rank, args.num_machines * args.num_gpus
    _join_group("gloo", args.num_gpus, init_method=args.dist_url, world_size=world_size, rank=rank)
    _run_in_group(*what)


@restartable()
def _join_group(backend: str, num_local: int, **where):
    dist.init_process_group(backend, **where)
    _create_local_process_group(num_local)
    comm.synchronize()


def _create_local_process_group(num_processes: int):
    """What main's ``comm.create_local_process_group`` does; v0.6 does it only inside ``launch``."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    for first in range(0, comm.get_world_size(), num_processes):
        ranks = list(range(first, first + num_processes))
        group = dist.new_group(ranks)
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group  # private: v0.6 has no function that sets it


def _free_url() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def _passing_on(requests: list[int]):
    """A context in which requests to stop are noted in ``requests`` and sent on to the processes that were started."""

    def pass_on(signum, frame):
        requests.append(signum)
        for child in multiprocessing.active_children():
            # A terminal sends SIGINT to the children too, and a second SIGINT would end them at once.
            os.kill(child.pid, signal.SIGTERM)

    return handling_requests(pass_on)
