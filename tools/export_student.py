#!/usr/bin/env python
"""``kd-det export``, from a checkout; --help describes it."""

from kd_det.cli.export import main

if __name__ == "__main__":
    main()
