"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import sys
from pathlib import Path

import einsum_transformer

sys.path.insert(0, str(Path(__file__).parent))

project = "Einsum Transformer"
copyright = "the Einsum Transformer authors"
release = version = einsum_transformer.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "extension"]
exclude_patterns = ["_build", "reference/_commands.md"]
default_role = "code"
smartquotes = False  # it makes one dash of the two of an option

myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 4

# The notebooks of tutorials/. With -D nb_execution_mode=force they run, and the pages have their outputs.
nb_execution_mode = "off"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # notes of the library, such as that of et.quantize

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
