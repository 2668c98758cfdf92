#!/usr/bin/env python
"""What distillation costs; see --help."""

import kd_det_command  # noqa: F401  as quiet as kd-det: before kd_det and Detectron2 are imported
from kd_det.benchmark import main

if __name__ == "__main__":
    main()
