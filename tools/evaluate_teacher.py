#!/usr/bin/env python
"""``kd-det evaluate-teacher``, from a checkout; --help describes it."""

from kd_det.cli.evaluate_teacher import main

if __name__ == "__main__":
    main()
