#!/usr/bin/env python
"""``kd-det lazy-train``, from a checkout; --help describes it."""

from kd_det.cli.lazy_train import main

if __name__ == "__main__":
    main()
