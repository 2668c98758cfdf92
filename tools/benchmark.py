#!/usr/bin/env python
"""What distillation costs; see --help."""

from kd_det.benchmark import main

if __name__ == "__main__":
    main()
