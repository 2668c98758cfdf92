"""
tools/train_net.py for the tiny detectors: a user's own script that registers a backbone and a data set and then is the
tool. TINY_DATA is the folder of the data set; TINY_KILL=rank:iteration:signal has a process end itself there.
"""

import os
import sys
from pathlib import Path

from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tests.tiny  # noqa: E402, F401
from kd_det.cli import train  # noqa: E402
from kd_det.engine import Trainer  # noqa: E402

register_coco_instances("tiny", {}, os.environ["TINY_DATA"] + "/annotations.json", os.environ["TINY_DATA"])


class Killed(Trainer):
    def run_step(self):
        rank, iteration, signum = (int(x) for x in os.environ["TINY_KILL"].split(":"))
        if (comm.get_rank(), self.iter) == (rank, iteration):
            if signum == 0:
                raise ZeroDivisionError("a defect")
            os.kill(os.getpid(), signum)
        super().run_step()


if "TINY_KILL" in os.environ:
    train.Trainer = Killed

if __name__ == "__main__":
    train.main()
