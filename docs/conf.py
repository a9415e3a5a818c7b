"""Configuration of the documentation site: Sphinx with MyST-NB for Markdown and notebooks, and the theme furo.

Sphinx reads docstrings, checks every reference and is maintained (MkDocs 1 and mkdocs-material are in maintenance
mode). MyST-NB shows the stored outputs of notebooks without running them. The theme, the search and the formulas
(MathML by docutils) load nothing from other servers.
"""

import os
import re
from dataclasses import is_dataclass
from inspect import cleandoc
from pathlib import Path
from textwrap import indent

import fastapi  # noqa: F401  (must precede autodoc, which sets TYPE_CHECKING during imports and breaks pydantic)
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from fastcore.docments import docments
from fastcore.nbio import NbCell, mk_cell, nb2str, nb_frontmatter, read_nb
from typer.cli import get_docs_for_click
from typer.main import get_command

import cxr_fastai
from cxr_fastai import cli

HERE = Path(__file__).parent
ROOT = HERE.parent

project = 'cxr_fastai'
author = 'cxr_fastai maintainers'
release = cxr_fastai.__version__
copyright = 'the cxr_fastai maintainers, Apache-2.0'
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.viewcode', 'myst_nb', 'sphinx_copybutton']
exclude_patterns = ['_build']
highlight_language = 'bash'  # indented blocks are commands
smartquotes = False  # `--` is an option

nb_execution_mode = 'off'
nb_merge_streams = True
copybutton_prompt_text = '$ '
myst_enable_extensions = ['dollarmath']
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
myst_heading_anchors = 4  # with the names that GitHub uses
myst_fence_as_directive = ['math']

autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints_format = 'short'
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 84
add_module_names = False
viewcode_follow_imported_members = False
toc_object_entries_show_parents = 'hide'
default_role = 'py:obj'
# Names of other packages, which have no inventory here, and type variables.
nitpick_ignore_regex = [('py:.*', r'(?!cxr_fastai\.).*'), ('py:class', r'cxr_fastai(\.\w+)+\.[ST]')]

html_theme = 'furo'
html_title = 'cxr_fastai'
html_favicon = '_static/logo.svg'
html_logo = '_static/logo.svg'
html_static_path = ['_static']
html_css_files = ['house.css']
html_js_files = ['search.js']
html_math_renderer = 'mathml'
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    'light_css_variables': {'color-brand-primary': '#005a8d', 'color-brand-content': '#0067a3'},
    'dark_css_variables': {
        'color-brand-primary': '#7cc4ee',
        'color-brand-content': '#56b4e9',
        'color-brand-visited': '#b9a3e3',
        'color-background-primary': '#14181e',
        'color-background-secondary': '#1c222a',
        'color-foreground-primary': '#e6eaf0',
    },
}
pygments_style = 'friendly'
pygments_dark_style = 'github-dark'

PARAMETERS = re.compile(r'^(Args|Parameters|Attributes)(?::|\n-+)\n(.+?)(?=\n\n|\Z)', re.M | re.S)
LINK = re.compile(r'(?<=\]\()(?![a-z]+:|[#/])([^)\s#]+)(?=[)#\s])')
PAGES = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'nbs': 'notebooks',
    'docs': '.',
}
"""Repository files and folders, and their places on the site. Links to other files become downloads."""
TAGS = {'echo': 'remove-input', 'output': 'remove-output'}
"""Directives of nbdev that are false, and the tags of MyST-NB with the same meaning."""


def gather(app, config) -> None:
    """Write the pages of the notebooks and the page of all commands."""
    (HERE / 'notebooks').mkdir(exist_ok=True)
    names = {path.name for path in (ROOT / 'nbs').glob('*.ipynb')}
    for old in (HERE / 'notebooks').iterdir():
        if old.name not in names:
            old.unlink()
    for name in names:
        write_if_new(HERE / 'notebooks' / name, notebook_page(ROOT / 'nbs' / name))
    write_if_new(HERE / 'commands.md', commands())


def write_if_new(path: Path, text: str) -> None:
    """Write `text` unless the file has the same content, so that an unchanged page is not built again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def notebook_page(path: Path) -> str:
    """Return the notebook `path` in the form that MyST-NB reads: without front matter and directives of nbdev.

    The first cell becomes title and description, `#| hide` removes a cell, and `show_doc` cells become text.
    """
    notebook = read_nb(path)
    front = nb_frontmatter(notebook)
    notebook.metadata['myst'] = {'html_meta': {'description': front['description']}}
    title = mk_cell(f'# {front["title"]}\n\n{front["description"]}', 'markdown', id=notebook.cells[0].id)
    notebook.cells = [title, *(page_cell(cell) for cell in notebook.cells[1:] if not cell.has_directive('hide'))]
    return nb2str(notebook)


def page_cell(cell: NbCell) -> NbCell:
    """Return `cell` with the tags of MyST-NB in the place of nbdev's directives."""
    if cell.cell_type == 'code' and cell.source.startswith('show_doc('):
        text = ''.join(cell.outputs[0].data['text/markdown'])
        return mk_cell(text.removeprefix('---\n\n'), 'markdown', id=cell.id)
    cell.metadata['tags'] = [tag for directive, tag in TAGS.items() if cell.directive(directive) == 'false']
    cell.remove_directives()
    return cell


def commands() -> str:
    """Return the page of all commands, generated from their `--help`."""
    command = get_command(cli.app)
    context = command.make_context('cxr-fastai', [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name='cxr-fastai', title='Commands')
    text = re.sub(r'\*\*Commands\*\*:\n\n(\* .*\n)+', '', text)
    return re.sub(r'(Examples?:) (cxr-fastai .*)', r'\1 `\2`', text)


def map_links(text: str, folder: Path) -> str:
    """Return `text`, a page in `folder` of the repository, with its relative links changed to those of the site."""

    def place(link: re.Match) -> str:
        target = (folder / link[1]).resolve()
        if target.exists() and ROOT in target.parents:
            return '/' + on_site(target.relative_to(ROOT))
        return link[0]

    return LINK.sub(place, text)


def on_site(path: Path) -> str:
    """Return the place below `docs/` of the repository file `path`: its page, or else the file itself."""
    if path.parts[0] == 'cxr_fastai' and path.suffix == '.py' and len(path.parts) == 3:
        return f'api/{path.parts[1]}.md#{path.stem}'
    for old, new in PAGES.items():
        if path.is_relative_to(old):
            return os.path.normpath(f'{new}/{path.relative_to(old)}')
    return f'../{path}'


def read_page(app, docname: str, source: list[str]) -> None:
    folder = (HERE / docname).parent
    source[0] = map_links(source[0], ROOT / 'nbs' if folder.name == 'notebooks' else folder)


def read_include(app, path: Path, docname: str, source: list[str]) -> None:
    source[0] = map_links(source[0], (HERE / path).resolve().parent)


def read_docstring(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """List parameters, keep diagrams as literal text, and add the comments next to the fields of a dataclass.

    A comment that ends with a full stop is the heading of a group of fields and is left out.
    """
    blocks = PARAMETERS.sub(list_parameters, '\n'.join(lines)).split('\n\n')
    lines[:] = '\n\n'.join(keep_drawing(block) for block in blocks).split('\n')
    if what != 'class' or not is_dataclass(thing):
        return
    comments = {field: ' '.join(text.split()) for field, text in docments(thing).items() if text}
    lines += ['', *(f':param {field}: {text}' for field, text in comments.items() if not text.endswith('.')), '']


def list_parameters(section: re.Match) -> str:
    """Return a section of `name: text` or `name : text` as a list. Further lines of a text are indented."""
    entries = re.split(r'\n(?=\S)', cleandoc(section[2]))
    items = [re.sub(r'^([\w*, ]+?) ?: ', r'``\1``: ', ' '.join(entry.split())) for entry in entries]
    return f'**{section[1]}**\n\n' + '\n'.join(f'* {item}' for item in items)


def keep_drawing(block: str) -> str:
    """Return `block`, as literal text if it has columns or arrows."""
    is_drawing = re.search(r'\S {3,}\S|-->', block)
    if block.startswith('    ') or not is_drawing:
        return block
    return '.. code-block:: text\n\n' + indent(block, '    ')


def find_name(app, env, node, contnode):
    """Link a `name` in a docstring to the only object of the package with this name; other code stays code.

    A name without a dot is not linked to an attribute, because it is usually a parameter of the same name.
    """
    if node.get('reftype') != 'obj' or not isinstance(contnode, nodes.literal):
        return None
    domain = env.domains['py']
    name = node['reftarget']
    matches = [
        key
        for key, thing in domain.objects.items()
        if key.endswith(f'.{name}')
        and key.startswith('cxr_fastai')
        and ('.' in name or thing.objtype in ('class', 'exception', 'function', 'data'))
    ]
    if len(matches) != 1:
        return nodes.literal('', name, classes=['code'])
    node['reftarget'] = matches[0]
    return domain.resolve_xref(env, node['refdoc'], app.builder, 'obj', matches[0], node, contnode)


def shorten_paths(app, doctree, docname: str) -> None:
    """Show values of constants and defaults that are paths from the root of the repository, not of this machine."""
    for text in list(doctree.findall(nodes.Text)):
        if str(ROOT) in text:
            text.parent.replace(text, nodes.Text(text.replace(f'{ROOT}/', '')))


def show_inline(self, node) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def show_block(self, node) -> None:
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer('mathml', (show_inline, None), (show_block, None))
    app.connect('config-inited', gather)
    app.connect('source-read', read_page)
    app.connect('include-read', read_include)
    app.connect('autodoc-process-docstring', read_docstring)
    app.connect('missing-reference', find_name)
    app.connect('doctree-resolved', shorten_paths)
