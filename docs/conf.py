"""The site: `sphinx-build -W docs docs/_build/html`, with ROCmForge and its extra `docs` installed.

Guides are Markdown that reads well in the repository too; the reference is made from the docstrings
of the installed package.
"""

import re

import rocmforge

project = "ROCmForge"
author = "the authors of ROCmForge"
version = release = rocmforge.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_docstring_signature = False  # Cython writes it there too, and numpydoc takes it out
autodoc_mock_imports = ["torch", "transformers", "vllm"]  # the site needs none of them
autodoc_typehints = "none"  # the docstrings give dtypes and shapes as well
autodoc_inherit_docstrings = False
numpydoc_show_class_members = False
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = f"ROCmForge {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#b3261e",
        "color-brand-content": "#9a2018",
        "color-sidebar-link-text--top-level": "var(--color-foreground-primary)",
    },
    "dark_css_variables": {"color-brand-primary": "#ff8a80", "color-brand-content": "#ff9d94"},
}


def _without_self(app, what, name, obj, options, signature, return_annotation):
    """Methods of compiled classes look like functions to autodoc, which leaves their self."""
    if what == "method" and signature:
        return re.sub(r"^\((self|cls)(, |(?=\)))", "(", signature), return_annotation
    return None


def _repository_links(app, relative_path, parent, content):
    """README.md and CHANGELOG.md as pages: their links are meant from the top of the repository."""
    text = content[0].replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    content[0] = re.sub(r"\A# .*\n", "", text) if relative_path.name == "README.md" else text


def setup(app):
    """Connect the two."""
    app.connect("autodoc-process-signature", _without_self)
    app.connect("include-read", _repository_links)
