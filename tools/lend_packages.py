#!/usr/bin/env python
"""
Let a virtual environment see the packages of the Python that runs this script.

``python -m venv --system-site-packages`` does the same for a system Python, but passes over the packages of a
virtual environment.

    python tools/lend_packages.py .venv/bin/python
"""

import site
import subprocess
import sys
from pathlib import Path

QUERY = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2]); print(sysconfig.get_path('purelib'))"


def main(borrower):
    """``borrower`` is the Python of the virtual environment, of the same version as this one."""
    version, target = subprocess.check_output([borrower, "-c", QUERY], text=True).splitlines()
    own = "{}.{}".format(*sys.version_info)
    if version != own:
        sys.exit(f"lend_packages: {borrower} is Python {version}, {sys.executable} {own}; make clean first")
    folders = site.getsitepackages()
    if site.ENABLE_USER_SITE:
        folders.insert(0, site.getusersitepackages())
    # addsitedir, not the bare path: packages installed in editable mode are found through .pth files there.
    lines = ["import site\n", *(f"site.addsitedir({folder!r})\n" for folder in folders)]
    Path(target, "lent_packages.py").write_text("".join(lines))
    Path(target, "lent_packages.pth").write_text("import lent_packages\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
