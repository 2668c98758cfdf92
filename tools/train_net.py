#!/usr/bin/env python
"""``kd-det train``, from a checkout; --help describes it."""

from kd_det.cli.train import main

if __name__ == "__main__":
    main()
