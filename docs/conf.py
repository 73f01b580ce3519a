"""How Sphinx builds the site: ``make docs``.

The source folder is the top of the repository, not ``docs``. So the notebooks need no copy, and a
relative link between a page, a notebook and a source file is right on the site, in JupyterLab and
where the repository is shown.
"""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "refdist"
copyright = "the refdist contributors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "learn"]  # Sphinx walks through all other folders

# notebooks are shown with the outputs that are stored in them
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    # a build without a network cannot know the pages of other projects
    ("py:.*", r"(collections|datetime|signal|socket|types|typing)\..*"),
    ("py:.*", r"(ipyparallel|matplotlib|torch)\..*"),
]

html_theme = "furo"
html_title = "refdist"
html_theme_options = {
    "source_repository": "https://github.com/refdist/refdist/",
    "source_branch": "main",
    "source_directory": "",
}
html_extra_path = ["_extra"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = html_domain_indices = False  # search finds every name
html_math_renderer = "mathml"  # show_math
pygments_dark_style = "github-dark"


def show_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show without a script from the network."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (show_math, None), (show_math, None))
