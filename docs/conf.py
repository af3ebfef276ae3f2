"""Settings of the site: `python -m sphinx -W --keep-going docs site`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras_moe.tfrs  # noqa: E402  # Before anything uses tf.keras.

project = "keras_moe"
version = release = keras_moe.__version__
copyright = "the authors of keras_moe, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "pages",
]
exclude_patterns = ["_extensions"]
nitpicky = True  # A reference that leads nowhere is a warning, and `-W` makes it fail.

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "alphabetical"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # Docstrings say the types, and shapes too.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    ("Attributes", "params_style"),
    ("Class attributes", "params_style"),
]
python_maximum_signature_line_length = 70
add_module_names = False

html_theme = "furo"
html_title = "keras_moe"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "tango"
pygments_dark_style = "github-dark"

nitpick_ignore = [
    ("py:class", "collections.abc.Mapping"),
]
