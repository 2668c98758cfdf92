"""
The console script ``kd-det``. Outside the package, whose import registers the losses and so takes PyTorch and seconds:
``kd-det --help`` answers at once, and the commands can silence others' deprecation warnings before they are given.
"""

import importlib.util
import runpy
from pathlib import Path

_PACKAGE = Path(importlib.util.find_spec("kd_det").origin).parent  # of a package at the top, which is not imported

main = runpy.run_path(str(_PACKAGE / "cli" / "main.py"))["main"]
