#!/usr/bin/env python
"""``kd-det weights``, from a checkout; --help describes it."""

from kd_det.cli.weights import main

if __name__ == "__main__":
    main()
