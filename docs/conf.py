"""Settings of the documentation: sphinx-build -W --keep-going docs build/docs."""

from importlib.metadata import version as installed_version

project = "fwp_core"
author = "fwp_core contributors"
copyright = author
release = version = installed_version(project)

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images/*.py"]

# The docstrings give types in words: shapes and dtypes, which annotations cannot.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False

myst_heading_anchors = 2
nb_execution_mode = "force"
nb_execution_raise_on_error = True

html_theme = "pydata_sphinx_theme"
html_title = project
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
