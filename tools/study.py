#!/usr/bin/env python
"""``kd-det study``, from a checkout; --help describes it."""

from kd_det.cli.study import main

if __name__ == "__main__":
    main()
