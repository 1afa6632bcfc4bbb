"""The site that ``make docs`` builds into site/.

Every warning is an error: a broken link, a page that no table of contents names, or a reference to
an API that does not exist fails the build. The API pages are read from the source text, so nothing
of the package is imported, and neither torch nor a GPU is needed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = 'vmamba_mm'
author = 'The vmamba_mm contributors'
release = re.search(r"__version__ = '(.+)'", (ROOT / 'vmamba_mm/__init__.py').read_text())[1]

extensions = ['myst_parser', 'autoapi.extension', 'sphinx.ext.napoleon']
myst_heading_anchors = 4

autoapi_dirs = [str(ROOT / 'vmamba_mm')]
autoapi_ignore = ['*/.mim/*']
autoapi_generate_api_docs = False  # the pages in api/ say what is shown, and in which order
autoapi_add_toctree_entry = False
autoapi_python_class_content = 'both'
autoapi_options = ['members', 'imported-members']
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what stands before a colon in 'Returns:' need not be a type
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

nitpicky = True
# Types that are documented elsewhere: looking them up would need the network.
nitpick_ignore_regex = [
    ('py:class', rf'({"|".join(sys.stdlib_module_names)}|torch|timm|numpy|diffusers)\..*'),
    ('py:class', r'(vmamba_mm\..*\.)?(Backend|Order|StateDict)'),  # abbreviations of types
]

html_theme = 'furo'
html_title = 'vmamba_mm'
html_copy_source = False
html_show_sourcelink = False


def find_by_last_name(app, env, node, contnode):
    """Find ``SS2D``, or the module's ``vmamba_mm.layers.ss2d.SS2D``, as ``vmamba_mm.layers.SS2D``.

    Docstrings and annotations use the names of their module; the pages document public names.
    """
    if node.get('refdomain') != 'py' or node.get('refspecific'):
        return None
    node['refspecific'] = True  # also finds names that end with this one
    return env.get_domain('py').resolve_xref(
        env, node['refdoc'], app.builder, node['reftype'], node['reftarget'].rpartition('.')[2],
        node, contnode)


def setup(app):
    app.connect('missing-reference', find_by_last_name)
