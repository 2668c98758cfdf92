"""
The console script ``kd-det``, also ``python -m kd_det``: one command for each thing to do. ``kd_det_command.py`` runs
this file by its path, so that PyTorch is imported only where a command needs it: kd_det itself is imported inside.
"""

import importlib
import sys
import warnings

__all__ = ["COMMANDS", "main"]

# Each is the function main of a module in kd_det.cli, imported when it is called.
COMMANDS = {
    "train": "train a detector with or without a teacher, or evaluate it",
    "lazy-train": "the same from a LazyConfig (.py)",
    "pretrain": "pretrain a backbone, with labels or without; compare configs over seeds",
    "evaluate-teacher": "evaluate the teacher of a config by itself, as it teaches",
    "taps": "list the places of the networks that losses can read",
    "weights": "measure the losses on a few batches, and propose weights",
    "visualize": "draw what a student learned: detections, attention, selective channels, margins",
    "compare": "one table and the curves of several runs",
    "study": "train several configs with several seeds, and compare them",
    "report": "one page about several runs, to open in a browser",
    "export": "write a trained student as a folder for plain Detectron2",
    "convert": "turn weights of torchvision or timm into a file for Detectron2's backbones",
    "digits": "make the small data set of the quickstart",
    "quickstart": "teacher, student alone and distilled student on that data set, compared",
}

# Deprecations in Detectron2 and fvcore, which no user of a command can act on. They go behind the user's own filters,
# and are set again where a process is spawned.
for message, category in (("`torch.jit", FutureWarning), ("torch.meshgrid", UserWarning)):
    warnings.filterwarnings("ignore", message, category, append=True)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {command:18}{line}" for command, line in COMMANDS.items())
        print(f"usage: kd-det COMMAND ...\n\nKnowledge distillation for Detectron2.\n\n{commands}\n")
        print("kd-det COMMAND --help tells more.")
        return
    if name not in COMMANDS:
        from kd_det.errors import unknown_name

        sys.exit(f"error: {unknown_name('command', name, COMMANDS)}")
    sys.argv = [f"kd-det {name}", *sys.argv[2:]]
    importlib.import_module(f"kd_det.cli.{name.replace('-', '_')}").main()
