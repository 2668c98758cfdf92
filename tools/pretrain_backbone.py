#!/usr/bin/env python
"""``kd-det pretrain``, from a checkout; --help describes it."""

from kd_det.cli.pretrain import main

if __name__ == "__main__":
    main()
