"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import sys
from pathlib import Path

import einsum_transformer

sys.path.insert(0, str(Path(__file__).parent))

project = "Einsum Transformer"
copyright = "the Einsum Transformer authors"
release = version = einsum_transformer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "extension"]
exclude_patterns = ["_build", "reference/_commands.md"]
default_role = "code"
smartquotes = False  # it makes one dash of the two of an option

myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
