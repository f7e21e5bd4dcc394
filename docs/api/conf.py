"""Sphinx: the API reference from the docstrings. Build: make docs."""

import icd_tvm

project = "icd_tvm"
version = release = icd_tvm.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
autosummary_generate = True
autodoc_typehints = "none"
# The classes of the passes are made by TVM's decorator, their docstrings by us.
autodoc_default_options = {"members": True, "inherited-members": False, "undoc-members": False}
napoleon_google_docstring = False
napoleon_use_ivar = True
html_theme = "alabaster"
html_theme_options = {"description": "Re-decides the layout of compressed models"}
# Words in the types of parameters ("shape", "n") are no references, though members have such names.
suppress_warnings = ["ref.python"]
