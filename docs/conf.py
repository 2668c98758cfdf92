"""The documentation as a site: ``make docs``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import reference  # noqa: E402

import kd_det  # noqa: E402

project, release, author = "kd_det", kd_det.__version__, "the kd_det authors"
html_title = "kd_det"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "study/*.md"]  # parts of study.md
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False
highlight_language = "bash"  # of blocks without a language
pygments_style, pygments_dark_style = "friendly", "github-dark"
# Only what a shell or Python would take is copied, no output and no prompt.
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autoclass_content = "both"  # with what __init__ takes
autodoc_inherit_docstrings = False  # a base class tells what its methods do, once
napoleon_use_rtype = False

# Every reference to kd_det must lead somewhere (see reference.resolve). Those of other projects would need their
# inventories, and so a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!kd_det\b).*")]
suppress_warnings = ["myst.header"]


def setup(app):
    app.connect("source-read", reference.fill_in)
    app.connect("missing-reference", reference.resolve)
