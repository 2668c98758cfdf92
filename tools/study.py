#!/usr/bin/env python
"""``kd-det study``, from a checkout; --help describes it."""

import kd_det_command  # noqa: F401  as quiet as kd-det: before kd_det and Detectron2 are imported
from kd_det.cli.study import main

if __name__ == "__main__":
    main()
