#!/usr/bin/env python
"""``kd-det digits``, from a checkout; --help describes it."""

from kd_det.cli.digits import main

if __name__ == "__main__":
    main()
