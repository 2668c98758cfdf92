"""One run an OUTPUT_DIR (D40)."""

import multiprocessing
import os
import signal
import socket
import time

import pytest

from kd_det.engine.lock import sole_run
from kd_det.errors import UserError


def hold(folder, entered, with_child: bool):
    with sole_run(str(folder)):
        if with_child:  # as a worker of a data loader, which lives on for a while
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,)).start()
        entered.set()
        time.sleep(60)


def holder(folder, *, with_child: bool = False):
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=hold, args=(folder, entered, with_child))
    process.start()
    assert entered.wait(30)
    return process


def test_a_second_run_is_refused_with_the_first_ones_host_and_process(tmp_path):
    first = holder(tmp_path / "out")
    try:
        with pytest.raises(UserError) as e, sole_run(str(tmp_path / "out")):
            raise AssertionError("it came in")
        assert f"process {first.pid} on {socket.gethostname()}" in str(e.value)
        assert "\n" not in str(e.value) and "OUTPUT_DIR" in str(e.value)
        with sole_run(str(tmp_path / "other")):
            pass
    finally:
        first.kill()
        first.join()


@pytest.mark.parametrize("with_child", [False, True])
def test_a_kill_leaves_nothing_locked(tmp_path, with_child):
    first = holder(tmp_path / "out", with_child=with_child)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with sole_run(str(tmp_path / "out")):
        pass


def test_one_run_after_the_other(tmp_path):
    for _ in range(2):
        with sole_run(str(tmp_path / "out")):
            pass


def test_a_folder_that_cannot_be_written_to_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUTPUT_DIR .*file/out: .*Not a directory"), sole_run(f"{tmp_path}/file/out"):
        pass


def test_a_remote_folder_is_not_locked():
    with sole_run("s3://bucket/out"):
        pass
