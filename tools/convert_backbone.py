#!/usr/bin/env python
"""``kd-det convert-backbone``, from a checkout; --help describes it."""

from kd_det.cli.convert_backbone import main

if __name__ == "__main__":
    main()
