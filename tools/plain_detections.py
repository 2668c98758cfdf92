#!/usr/bin/env python
"""``kd_det/quickstart/plain_detections.py``, by its path, so that kd_det is not imported."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    script = Path(__file__).parents[1] / "kd_det" / "quickstart" / "plain_detections.py"
    runpy.run_path(str(script), run_name="__main__")
