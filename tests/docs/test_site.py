"""The documentation: links, pictures and anchors exist, every page and module is listed, and the site builds."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from cxr_fastai.publishing.printing import find_browser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
GENERATED = DOCS / 'commands.md'
PAGES = sorted(
    {*ROOT.glob('*.md'), *DOCS.glob('*.md'), *DOCS.glob('api/*.md'), *ROOT.glob('nbs/*.ipynb')} - {GENERATED}
)
REQUIRED_PAGES = [
    'quickstart',
    'data',
    'training',
    'recipe',
    'evaluation',
    'explanation',
    'models',
    'reliability',
    'benchmarks',
    'faq',
    'contributing',
    'changelog',
    'api/index',
    'notebooks/index',
]
CODE = re.compile(r'^(`{3,})(?!\{).*?^\1 *$|^(?: {4}|\t)[^\n]*$|(`+)(?!`).+?(?<!`)\2(?!`)', re.M | re.S)
LINK = re.compile(r'\]\(\s*([^)\s]+)[^)]*\)|<(?:img|a)[^>]+(?:src|href)="([^"]+)"')


@cache
def prose(page: Path) -> str:
    """The Markdown of a page or notebook without its code."""
    text = page.read_text(encoding='utf-8')
    if page.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    return text


def links(page: Path) -> list[str]:
    """The relative links and pictures of a page."""
    targets = [markdown or html for markdown, html in LINK.findall(CODE.sub('', prose(page)))]
    return [target for target in targets if not urlsplit(target).scheme]


def test_links_after_code_are_found():
    assert len(links(ROOT / 'README.md')) > 10 and len(links(DOCS / 'quickstart.md')) > 10


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of the headings as GitHub creates them: lower case, hyphens for spaces, a number for repetitions."""
    seen: dict[str, int] = {}
    for heading in re.findall(r'^#{1,6} (.+)$', re.sub(r'^```.*?^```', '', prose(page), flags=re.M | re.S), re.M):
        plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading.strip().lower())
        slug = re.sub(r'[^\w\- ]', '', plain).replace(' ', '-')
        seen[slug] = seen.get(slug, -1) + 1
        if seen[slug]:
            seen[f'{slug}-{seen[slug]}'] = 0
    return set(seen)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_exists(page):
    for link in links(page):
        path, _, anchor = unquote(link).partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f'{link}: no such file'
        assert ROOT in target.parents, f'{link}: outside of the repository'
        if anchor:
            assert anchor in anchors(target), f'{link}: no such heading'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_has_a_text_alternative(page):
    assert not re.search(r'!\[\s*\]\(', CODE.sub('', prose(page)))


def in_toctrees() -> list[str]:
    """The pages in the tables of contents."""
    pages = []
    for page in (DOCS / 'index.md', DOCS / 'api' / 'index.md'):
        for tree in re.findall(r'^```\{toctree\}\n(.*?)^```', page.read_text(), re.M | re.S):
            entries = [re.sub(r'.*<(.*)>', r'\1', line) for line in tree.splitlines() if line and line[0] != ':']
            pages += [(page.parent / entry).relative_to(DOCS).as_posix() for entry in entries]
    return pages


def test_every_page_is_in_a_table_of_contents():
    entries = in_toctrees()
    assert set(REQUIRED_PAGES) <= set(entries)
    written = [page.relative_to(DOCS).with_suffix('').as_posix() for page in PAGES if DOCS in page.parents]
    notebooks = [f'notebooks/{page.stem}' for page in PAGES if page.suffix == '.ipynb']
    assert sorted(['index', *entries]) == sorted(['commands', *written, *notebooks])


def test_every_module_is_on_the_api_page_of_its_room():
    package = ROOT / 'cxr_fastai'
    for room in sorted(path.parent for path in package.glob('*/__init__.py')):
        modules = {f'{room.name}.{path.stem}' for path in room.glob('*.py') if path.stem != '__init__'}
        assert automodules(DOCS / 'api' / f'{room.name}.md') - {room.name} == modules
    modules = {path.stem for path in package.glob('*.py') if path.stem != '__init__'}
    assert automodules(DOCS / 'api/index.md') - {''} == modules


def automodules(page: Path) -> set[str]:
    names = re.findall(r'automodule:: cxr_fastai\.?([\w.]*)', page.read_text())
    assert len(names) == len(set(names)), f'{page.name}: a module is listed twice'
    return set(names)


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    """The site, built once for all workers; every warning is an error."""
    for module in ('sphinx', 'myst_nb', 'furo', 'sphinx_copybutton'):
        pytest.importorskip(module, reason='needs the extra docs: run `make docs` first')
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    with FileLock(folder / 'site.lock'):
        if not (folder / 'site').exists():
            options = ['-n', '-q', '-W', '--keep-going', '-d', folder / 'doctrees']
            command = [sys.executable, '-m', 'sphinx', *options, DOCS]
            built = subprocess.run([*command, folder / 'building'], capture_output=True, text=True)
            assert not built.returncode, built.stderr
            (folder / 'building').rename(folder / 'site')
    return folder / 'site'


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_its_links_work(site):
    pages = {page: page.read_text(encoding='utf-8') for page in site.rglob('*.html')}
    ids = {page: {unescape(name) for name in re.findall(r'\sid="([^"]*)"', text)} for page, text in pages.items()}
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]*)"', re.sub(r'<svg.*?</svg>', '', text, flags=re.S)):
            parts = urlsplit(unescape(link))
            if parts.scheme:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f'{page.relative_to(site)}: {link}'
            if parts.fragment and target in ids:
                assert unquote(parts.fragment) in ids[target], f'{page.name}: {link}'


@pytest.mark.slow
def test_the_site_contains_no_path_of_the_machine_that_built_it(site):
    for page in site.rglob('*.html'):
        assert str(ROOT) not in page.read_text(encoding='utf-8'), page.name


@pytest.mark.slow
@pytest.mark.skipif(not find_browser(), reason='needs Chromium or Chrome: install one of them')
def test_the_site_and_its_search_load_nothing_from_other_servers(site):
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright: pip install playwright')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport={'width': 390, 'height': 844})
        messages: list[str] = []
        requests: list[str] = []
        page.on('console', lambda message: messages.append(message.text))
        page.on('pageerror', lambda error: messages.append(str(error)))
        page.on('request', lambda request: requests.append(request.url))
        for path in sorted(site.rglob('*.html')):
            if '_modules' in path.parts or path.name == 'search.html':
                continue
            page.goto(path.as_uri())
            overflow = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
            assert overflow <= 0, f'{path.name} is wider than a phone'
        page.goto((site / 'search.html').as_uri() + '?q=threshold')
        page.wait_for_selector('#search-results li a')
        browser.close()
    assert messages == []
    assert not [url for url in requests if not url.startswith(('file:', 'data:'))]
