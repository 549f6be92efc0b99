"""Settings of the documentation: `sphinx-build -W docs docs/_build`."""

from vgg_jax import __version__

project = "vgg_jax"
author = "The vgg_jax authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3  # pages link to headings by GitHub's anchors
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # VGG has a configuration as a default
autodoc_typehints = "none"  # signatures have them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are described where their class is
default_role = "code"  # docstrings use single backticks

html_theme = "sphinx_book_theme"
html_title = "vgg_jax"
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search field is in the sidebar
}
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
exclude_patterns = ["_build"]
