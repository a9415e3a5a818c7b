"""The documentation: every link, picture and anchor is there, every page and module has its place, the site builds."""

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

from cxr_fastai.publishing.reporting import find_browser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
GENERATED = DOCS / 'commands.md'
PAGES = sorted(
    {*ROOT.glob('*.md'), *DOCS.glob('*.md'), *DOCS.glob('api/*.md'), *ROOT.glob('nbs/*.ipynb')} - {GENERATED}
)
ASKED = [
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
    found = [one or other for one, other in LINK.findall(CODE.sub('', prose(page)))]
    return [link for link in found if not urlsplit(link).scheme]


def test_links_are_found_behind_code():
    assert len(links(ROOT / 'README.md')) > 10 and len(links(DOCS / 'quickstart.md')) > 10


@cache
def anchors(page: Path) -> set[str]:
    """GitHub's: letters of the heading in lower case, hyphens for spaces, a number where it is taken."""
    seen: dict[str, int] = {}
    for heading in re.findall(r'^#{1,6} (.+)$', re.sub(r'^```.*?^```', '', prose(page), flags=re.M | re.S), re.M):
        plain = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading.strip().lower())
        slug = re.sub(r'[^\w\- ]', '', plain).replace(' ', '-')
        seen[slug] = seen.get(slug, -1) + 1
        if seen[slug]:
            seen[f'{slug}-{seen[slug]}'] = 0
    return set(seen)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_is_there(page):
    for link in links(page):
        path, _, anchor = unquote(link).partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f'{link}: no such file'
        assert ROOT in target.parents, f'{link}: outside of the repository'
        if anchor:
            assert anchor in anchors(target), f'{link}: no such heading'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_says_what_is_to_be_seen(page):
    assert not re.search(r'!\[\s*\]\(', CODE.sub('', prose(page)))


def in_toctrees() -> list[str]:
    found = []
    for page in (DOCS / 'index.md', DOCS / 'api' / 'index.md'):
        for tree in re.findall(r'^```\{toctree\}\n(.*?)^```', page.read_text(), re.M | re.S):
            entries = [re.sub(r'.*<(.*)>', r'\1', line) for line in tree.splitlines() if line and line[0] != ':']
            found += [(page.parent / entry).relative_to(DOCS).as_posix() for entry in entries]
    return found


def test_every_page_has_its_place_in_the_table_of_contents():
    entries = in_toctrees()
    assert set(ASKED) <= set(entries)
    written = [page.relative_to(DOCS).with_suffix('').as_posix() for page in PAGES if DOCS in page.parents]
    notebooks = [f'notebooks/{page.stem}' for page in PAGES if page.suffix == '.ipynb']
    assert sorted(['index', *entries]) == sorted(['commands', *written, *notebooks])


def test_every_module_is_on_one_page_about_the_package():
    modules = {path.stem for path in (ROOT / 'cxr_fastai').glob('*.py')} - {'__init__'}
    told = [
        name
        for page in (DOCS / 'api').glob('*.md')
        for name in re.findall(r'automodule:: cxr_fastai\.(\w+)', page.read_text())
    ]
    assert sorted(told) == sorted(modules)


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    """The site, built once for all workers, with every warning an error."""
    for module in ('sphinx', 'myst_nb', 'furo', 'sphinx_copybutton'):
        pytest.importorskip(module, reason='the extra docs is not installed')
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    with FileLock(folder / 'site.lock'):
        if not (folder / 'site').exists():
            command = [
                sys.executable,
                '-m',
                'sphinx',
                '-n',
                '-q',
                '-W',
                '--keep-going',
                '-d',
                folder / 'doctrees',
                DOCS,
            ]
            built = subprocess.run([*command, folder / 'building'], capture_output=True, text=True)
            assert not built.returncode, built.stderr
            (folder / 'building').rename(folder / 'site')
    return folder / 'site'


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_hold(site):
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
def test_the_site_names_no_folder_of_the_machine_that_built_it(site):
    for page in site.rglob('*.html'):
        assert str(ROOT) not in page.read_text(encoding='utf-8'), page.name


@pytest.mark.slow
@pytest.mark.skipif(not find_browser(), reason='no Chromium or Chrome here')
def test_the_site_asks_nothing_of_another_server_and_is_searched_without_one(site):
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=['--no-sandbox', '--disable-gpu'])
        page, said, asked = browser.new_page(viewport={'width': 390, 'height': 844}), [], []
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('request', lambda request: asked.append(request.url))
        for path in sorted(site.rglob('*.html')):
            if '_modules' in path.parts or path.name == 'search.html':
                continue
            page.goto(path.as_uri())
            wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
            assert wide <= 0, f'{path.name} is wider than a phone'
        page.goto((site / 'search.html').as_uri() + '?q=threshold')
        page.wait_for_selector('#search-results li a')
        browser.close()
    assert said == []
    assert not [url for url in asked if not url.startswith(('file:', 'data:'))]
