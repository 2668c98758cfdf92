#!/usr/bin/env python
"""``kd-det quickstart``, from a checkout; --help describes it."""

from kd_det.cli.quickstart import main

if __name__ == "__main__":
    main()
