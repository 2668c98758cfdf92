#!/usr/bin/env python
"""``kd-det convert``, from a checkout; --help describes it."""

from kd_det.cli.convert import main

if __name__ == "__main__":
    main()
