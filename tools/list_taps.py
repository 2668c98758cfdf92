#!/usr/bin/env python
"""``kd-det taps``, from a checkout; --help describes it."""

from kd_det.cli.taps import main

if __name__ == "__main__":
    main()
