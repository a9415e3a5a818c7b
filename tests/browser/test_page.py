"""The served pages in a real browser: every state, by mouse and by keyboard, with nothing from outside and no error."""

import csv
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from imagefiles import GREY, encoded

import cxr_fastai
from cxr_fastai.inference.predictor import COLUMNS, Predictor
from cxr_fastai.publishing.reporting import find_browser

for needed in ('fastapi', 'uvicorn', 'python_multipart', 'prometheus_client', 'onnxruntime'):
    pytest.importorskip(needed)
from cxr_fastai.serving.service import (  # noqa: E402
    Limits,
    Service,  # noqa: E402
    Settings,
)

pytestmark = pytest.mark.skipif(not find_browser(), reason='no Chromium or Chrome here')
PATIENCE = 30
"""Seconds that anything may take."""
TOKEN = 'a token of a test'
TOLD = 'Failed to load resource'
"""What a browser says of any answer from 400 on."""
FORMULA = '=HYPERLINK("http://elsewhere.example")<img src=x onerror=alert(1)>.png'
SENT: list[bytes] = []
"""What a service was sent, body by body."""
NOISE = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)


@contextmanager
def served(settings: Settings):
    """The address of a service in a thread."""
    import uvicorn

    from cxr_fastai.serving.app import make_app
    from cxr_fastai.serving.server import listen

    listening = listen(settings.host, 0)
    server = uvicorn.Server(
        uvicorn.Config(overheard(make_app(settings)), log_config=None, ws='none', timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listening]})
    thread.start()
    try:
        yield f'http://127.0.0.1:{listening.getsockname()[1]}'
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listening.close()
    assert not thread.is_alive()


def overheard(app):
    """`app`, with what it is sent in `SENT`."""

    async def hearing(scope, receive, send):
        async def hear():
            message = await receive()
            SENT.append(message.get('body', b''))
            return message

        await app(scope, hear if scope['type'] == 'http' else receive, send)

    return hearing


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    playwright.expect.set_options(timeout=1000 * PATIENCE)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=find_browser(),
            args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update'],
        )
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def address(bundle, browser) -> str:
    """A service that is ready."""
    with served(Settings(bundle)) as address:
        until_ready(browser, address)
        yield address


@pytest.fixture(scope='module')
def guarded(bundle, browser) -> str:
    """One that asks for a token, and takes little."""
    with served(Settings(bundle, token=TOKEN, limits=Limits(50_000, 3))) as address:
        until_ready(browser, address)
        yield address


def until_ready(browser, address: str) -> None:
    context, end = browser.new_context(), time.monotonic() + PATIENCE
    while not context.request.get(f'{address}/ready').ok:
        assert time.monotonic() < end
    context.close()


@pytest.fixture
def page(browser):
    """A page that must go without errors, dialogs, refusals of its policy and requests elsewhere."""
    context = browser.new_context(viewport={'width': 1280, 'height': 900})
    page = context.new_page()
    page.said, page.asked, page.dialogs = [], [], []
    page.on('console', lambda message: page.said.append(message.text))
    page.on('pageerror', lambda error: page.said.append(str(error)))
    page.on('request', lambda request: page.asked.append(request.url))
    page.on('dialog', lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    yield page
    assert page.said == [] and page.dialogs == []
    assert all(url.startswith(('http://127.0.0.1:', 'data:image/', 'blob:http://127.0.0.1:')) for url in page.asked)
    context.close()


@pytest.fixture
def upset(page):
    """The same for a service that refuses something, of which a browser writes a line by itself."""
    yield page
    page.said = [line for line in page.said if TOLD not in line]


@pytest.fixture(scope='module')
def rows(bundle, images) -> dict[Path, dict]:
    """What the Predictor says of test images, by path."""
    paths = sorted((images / 'test').rglob('*.jpeg'))
    return dict(zip(paths, Predictor.load(bundle, engine='onnx').predict(paths), strict=True))


@pytest.fixture(scope='module')
def good(rows, address, browser) -> Path:
    """An image that is called pneumonia, with a map."""
    context = browser.new_context()
    for path, row in rows.items():
        if row['prediction'] != 'PNEUMONIA':
            continue
        answer = context.request.post(f'{address}/v1/predict?explain=true', multipart={'images': as_file(path)})
        if answer.json()['images'][0]['explanation']['overlay']:
            return path
    pytest.fail('no image has a map')


def as_file(content: Path | bytes, name: str = 'image.png') -> dict:
    data = content.read_bytes() if isinstance(content, Path) else content
    return {'name': name, 'mimeType': 'application/octet-stream', 'buffer': data}


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def choose(page, address: str, *files) -> None:
    page.goto(address)
    page.set_input_files('#chooser', list(files))


def settled(page, n: int = 1):
    """The cards of `n` images, once they are all answered."""
    expect(page.locator('.image:is([data-state=done], [data-state=refused])')).to_have_count(n)
    return page.locator('.image')


def opacity(page) -> float:
    return float(page.locator('.map').evaluate('map => getComputedStyle(map).opacity'))


def until_opacity(page, wanted: float) -> None:
    end = time.monotonic() + PATIENCE
    while abs(opacity(page) - wanted) > 1e-3:
        assert time.monotonic() < end, opacity(page)


def test_an_image_gets_its_decision_in_words_on_a_scale_with_the_threshold(page, address, rows, good):
    choose(page, address, as_file(good, 'Doe Jane.jpeg'))
    card, row = settled(page), rows[good]
    words = card.locator('.decision').inner_text()
    found = re.fullmatch(r'Pneumonia: (1?\.\d{3,}), threshold (1?\.\d+)', ' '.join(words.split()))
    assert float(found[1]) == pytest.approx(row['p_pneumonia'], abs=6e-4)
    assert float(found[2]) == pytest.approx(row['threshold'], abs=6e-5)
    expect(card.locator('h3')).to_have_text('Doe Jane.jpeg')
    expect(card.get_by_role('img', name=re.compile('on a scale from 0 to 1 with the threshold'))).to_be_visible()
    assert card.locator('.scale').evaluate('scale => Number(scale.style.getPropertyValue("--p"))') == pytest.approx(
        row['p_pneumonia'], abs=1e-5
    )
    expect(card.locator('.facts')).to_contain_text('JPEG')
    expect(card.locator('.facts')).to_contain_text('96 × 96 px')
    expect(page.locator('#live')).to_contain_text('Doe Jane.jpeg: Pneumonia:')


def test_the_window_of_a_deep_image_is_told(page, address):
    deep = np.uint16(np.linspace(1000, 4000, 96 * 96).reshape(96, 96))
    choose(page, address, as_file(encoded(deep)))
    expect(settled(page).locator('.facts')).to_contain_text('I;16')


@pytest.mark.parametrize(
    ('content', 'why', 'code'),
    [
        (b'hello', 'This is no image file', 'E_FORMAT'),
        (b'', 'The file is empty', 'E_EMPTY'),
        (encoded(np.zeros((96, 96), np.uint8)), 'The picture is blank', 'E_BLANK'),
        (encoded(GREY[:20, :20]), 'too small', 'E_TOO_SMALL'),
        (encoded(GREY)[:900], 'damaged', 'E_TRUNCATED'),
        (encoded(NOISE), 'does not look like the chest images', 'E_OUT_OF_DISTRIBUTION'),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_image_is_refused_in_plain_words(page, address, content, why, code):
    choose(page, address, as_file(content, 'notes.png'))
    card = settled(page)
    expect(card.locator('.decision')).to_have_text('Not judged')
    expect(card.locator('.why')).to_contain_text(why)
    expect(card.locator('.said')).to_contain_text(code)
    expect(card.locator('.scale')).to_be_hidden()
    expect(card.locator('.maps')).to_be_hidden()


def test_several_images_go_two_at_a_time_without_their_names_and_keep_their_order(page, address, rows):
    open_now, most = set(), []

    def begin(request):
        if 'predict' not in request.url:
            return
        open_now.add(request)
        most.append(len(open_now))

    SENT.clear()
    page.on('request', begin)
    page.on('requestfinished', lambda request: open_now.discard(request))
    names = [f'Jane Doe {i}.jpeg' for i in range(6)]
    choose(page, address, *(as_file(path, name) for path, name in zip(rows, names, strict=False)))
    assert settled(page, 6).locator('h3').all_inner_texts() == names
    assert len(most) == 6 and max(most) == 2
    assert b''.join(SENT).count(b'filename="image"') == 6 and b'Jane' not in b''.join(SENT)
    expect(page.locator('#count')).to_contain_text('6 images')
    expect(page.locator('#rows tr')).to_have_count(6)


def test_the_map_fades_and_goes(page, address, good):
    choose(page, address, as_file(good))
    card = settled(page)
    until_opacity(page, 1)
    card.get_by_label('Opacity').fill('40')
    until_opacity(page, 0.4)
    card.get_by_role('switch').uncheck()
    until_opacity(page, 0)
    card.get_by_label('Opacity').fill('70')
    until_opacity(page, 0.7)
    expect(card.get_by_role('switch')).to_be_checked()
    expect(card.locator('.maps')).to_contain_text('not a lesion outline')
    assert page.evaluate('[...document.images].every(one => one.hidden || one.naturalWidth > 0)')


def test_the_table_downloads_as_csv_without_formulas(page, address, rows, good, tmp_path):
    names = ['a, "b".jpeg', FORMULA, "'=1.png", 'Ä.png']
    choose(
        page,
        address,
        *(as_file(content, name) for content, name in zip((good, good, b'hello', good), names, strict=True)),
    )
    assert settled(page, 4).locator('h3').all_inner_texts() == names
    with page.expect_download() as download:
        page.get_by_role('button', name='Download CSV').click()
    download.value.save_as(tmp_path / 'images.csv')
    with open(tmp_path / 'images.csv', encoding='utf-8', newline='') as file:
        columns, *lines = csv.reader(file)
    assert tuple(columns) == COLUMNS
    assert [line[0] for line in lines] == [names[0], f"'{names[1]}", f"'{names[2]}", names[3]]
    assert [line[1] for line in lines] == ['ok', 'ok', 'error', 'ok']
    assert float(lines[0][2]) == pytest.approx(rows[good]['p_pneumonia'], abs=1e-5)
    assert lines[2][2:4] == ['', ''] and lines[2][5] == 'E_FORMAT'
    assert download.value.suggested_filename == 'predictions.csv'


def test_an_example_is_judged_at_a_click(page, address):
    page.goto(address)
    pictures = page.locator('.examples img')
    expect(pictures).to_have_count(8)
    page.get_by_role('button', name='Example 3').click()
    expect(settled(page).locator('h3')).to_have_text('example-3.png')


def test_all_goes_by_keyboard(page, address, good):
    page.goto(address)
    press(page, 'Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    tab_to(page, '#chooser')
    assert page.locator('.drop').evaluate('drop => getComputedStyle(drop).outlineStyle') == 'solid'
    with page.expect_file_chooser() as chooser:
        press(page, 'Space')
    chooser.value.set_files(as_file(good))
    settled(page)
    tab_to(page, '.toggle')
    press(page, 'Space')
    until_opacity(page, 0)
    tab_to(page, '.opacity')
    press(page, 'ArrowLeft')
    until_opacity(page, 0.95)
    tab_to(page, '#clear', 'Shift+Tab')
    press(page, 'Enter')
    expect(page.locator('#results')).to_be_hidden()
    assert page.evaluate('document.activeElement.id') == 'chooser'
    tab_to(page, '[data-example="0"]')
    press(page, 'Enter')
    settled(page)


def press(page, key: str) -> None:
    page.keyboard.press(key)


def tab_to(page, selector: str, key: str = 'Tab') -> None:
    for _ in range(40):
        if page.evaluate(f"document.activeElement.matches('{selector}')"):
            return
        press(page, key)
    pytest.fail(f'{selector} cannot be reached')


def test_a_busy_service_is_asked_again_by_itself(upset, address, good):
    refuse(upset, 503, 'E_BUSY', times=1)
    choose(upset, address, as_file(good))
    settled(upset)
    expect(upset.locator('#notice')).to_be_hidden()


@pytest.mark.parametrize(
    ('status', 'code', 'why'),
    [(503, 'E_BUSY', 'The service is busy.'), (429, 'E_TOO_OFTEN', 'Many of your images are under way already.')],
)
def test_one_that_stays_busy_is_asked_a_few_times_and_then_by_hand(upset, address, good, status, code, why):
    refuse(upset, status, code, wait=3600)
    upset.clock.install()
    choose(upset, address, as_file(good))
    for i in range(1, 6):
        expect(upset.locator('#why')).to_contain_text(f'({i} of 5)')
        upset.clock.fast_forward(3_600_000)
    expect(upset.locator('#why')).to_contain_text(f'{why} It was asked 6 times.')
    upset.unroute('**/v1/predict*')
    upset.get_by_role('button', name='Try again').click()
    settled(upset)


def refuse(page, status: int, code: str, wait: int = 0, times: int | None = None) -> None:
    page.route(
        '**/v1/predict*',
        lambda route: route.fulfill(
            status=status, headers={'Retry-After': str(wait)}, json={'code': code, 'message': 'why'}
        ),
        times=times,
    )


def test_one_that_cannot_be_reached_is_told_and_asked_by_hand(upset, address, good):
    upset.route('**/v1/predict*', lambda route: route.abort())
    choose(upset, address, *[as_file(good)] * 3)
    expect(upset.locator('#why')).to_contain_text('cannot be reached')
    upset.unroute('**/v1/predict*')
    upset.get_by_role('button', name='Try again').click()
    settled(upset, 3)
    expect(upset.locator('#notice')).to_be_hidden()


def test_a_computer_that_comes_online_goes_on_by_itself(upset, address, good):
    upset.goto(address)
    upset.context.set_offline(True)
    upset.set_input_files('#chooser', [as_file(good)])
    expect(upset.locator('#why')).to_contain_text('this computer is offline')
    upset.context.set_offline(False)
    settled(upset)


def test_a_token_is_asked_for_and_kept_for_the_session(upset, guarded, good):
    choose(upset, guarded, *[as_file(good)] * 2)
    expect(upset.get_by_label('Access token')).to_be_focused()
    upset.keyboard.type('a wrong token')
    press(upset, 'Enter')
    expect(upset.locator('#why')).to_contain_text('does not know this access token')
    upset.get_by_label('Access token').fill(TOKEN)
    upset.get_by_role('button', name='Go on').click()
    settled(upset, 2)
    upset.reload()
    upset.get_by_role('button', name='Example 1').click()
    settled(upset)
    assert TOKEN not in upset.content()


def test_what_is_too_large_is_not_sent_and_what_is_too_many_is_told(upset, guarded):
    choose(upset, guarded, *(as_file(b'0' * 50_000, f'{i}.dcm') for i in range(4)))
    expect(settled(upset, 3).first.locator('.why')).to_have_text('The file is larger than the service takes.')
    expect(upset.locator('#why')).to_contain_text('4 images are too many')
    assert not [url for url in upset.asked if 'predict' in url]


def test_a_file_is_sent_with_its_progress_and_then_worked_on(page, address, good):
    let_go = []
    page.route('**/v1/predict*', lambda route: let_go.append(route))
    choose(page, address, as_file(good), as_file(good), as_file(good))
    expect(page.locator('.image progress').first).to_be_visible()
    expect(page.locator('[data-state=queued] .why')).to_have_text('Waits for its turn.')
    page.get_by_role('button', name='Clear').click()
    expect(page.locator('.image')).to_have_count(0)
    for route in let_go:
        route.abort()
    page.said.clear()


def test_a_dropped_image_is_taken(page, address, good):
    page.goto(address)
    page.evaluate(
        """bytes => {
        const moved = new DataTransfer();
        moved.items.add(new File([new Uint8Array(bytes)], 'dropped.jpeg'));
        const options = {dataTransfer: moved, bubbles: true, cancelable: true};
        for (const type of ['dragover', 'drop']) document.body.dispatchEvent(new DragEvent(type, options)); }""",
        list(good.read_bytes()),
    )
    expect(settled(page).locator('h3')).to_have_text('dropped.jpeg')


def test_a_page_that_came_too_early_waits_for_the_model(upset, bundle, monkeypatch):
    may, opened = threading.Event(), Service.open
    monkeypatch.setattr(Service, 'open', lambda *args, **kwargs: may.wait(PATIENCE) and opened(*args, **kwargs))
    with served(Settings(bundle)) as address:
        upset.goto(address)
        expect(upset.locator('#starting')).to_contain_text('The model is being opened')
        expect(upset.locator('#chooser')).to_be_disabled()
        other = upset.context.new_page()
        assert other.goto(f'{address}/card').status == 503
        expect(other.locator('main')).to_contain_text('The model is being opened')
        may.set()
        expect(upset.locator('#chooser')).to_be_enabled()
        expect(upset.locator('footer')).to_contain_text('64 px')
        upset.context.close()


def test_every_page_names_the_model_and_what_it_is_not(page, address, bundle):
    from cxr_fastai.inference.bundle import Bundle

    identity = Bundle.open(bundle).identity
    for path in ('', 'card', 'docs'):
        page.goto(f'{address}/{path}')
        foot = page.locator('footer')
        expect(foot).to_contain_text('Research software, not a medical device.')
        expect(foot).to_contain_text('baseline, 64 px')
        expect(foot.locator(f'code[title="{identity}"]')).to_have_text(identity[:12])
        for there in ('card', 'docs'):
            assert foot.locator(f'a[href={there}]').count()


def test_the_card_is_a_page_without_what_it_tells_programs(page, address):
    page.goto(f'{address}/card')
    text = page.locator('main').inner_text()
    assert 'Intended use' in text and 'library_name' not in text and 'model-index' not in text
    assert page.locator('h1').count() == 1 and page.locator('main table').count() >= 3


def test_the_interface_is_told_whole(page, address):
    page.goto(f'{address}/docs')
    api = page.context.request.get(f'{address}/openapi.json').json()
    text = page.locator('main').inner_text()
    for path in api['paths']:
        assert path in text
    for name, schema in api['components']['schemas'].items():
        expect(page.locator(f'#{name}')).to_have_text(name)
        assert all(field in text for field in schema['properties'])
    assert f'curl -F images=@image.jpeg {address}/v1/predict' in text
    broken = page.evaluate(
        '[...document.querySelectorAll("main a[href^=\'#\']")].map(a => a.hash.slice(1))'
        '.filter(id => !document.getElementById(id))'
    )
    assert broken == []


def test_one_that_asks_for_a_token_shows_how(page, guarded):
    page.goto(f'{guarded}/docs')
    expect(page.locator('main')).to_contain_text('curl -H "Authorization: Bearer $TOKEN" -F images=@image.jpeg')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_the_pages_are_accessible_and_fit(browser, address, guarded, good, width, scheme):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    context = browser.new_context(
        viewport={'width': width, 'height': 900}, color_scheme=scheme, reduced_motion='reduce'
    )
    page = context.new_page()

    def check(state: str) -> None:
        found = axe.run(page).response['violations']
        serious = [one for one in found if one['impact'] in ('serious', 'critical')]
        assert not serious, (state, [(one['id'], [node['html'][:200] for node in one['nodes']]) for one in serious])
        assert page.evaluate('document.documentElement.scrollWidth') <= width, state

    for path in ('', 'card', 'docs'):
        page.goto(f'{address}/{path}')
        check(path)
    choose(page, address, as_file(good, 'a' * 200), as_file(b'hello', FORMULA), as_file(encoded(NOISE)))
    settled(page, 3)
    check('done')
    page.route('**/v1/predict*', lambda route: route.abort())
    choose(page, address, as_file(good), as_file(good), as_file(good))
    expect(page.locator('#again')).to_be_visible()
    check('offline')
    page.unroute('**/v1/predict*')
    choose(page, guarded, as_file(good))
    expect(page.locator('#secret')).to_be_visible()
    check('token')
    context.close()


def test_every_code_has_plain_words():
    from cxr_fastai.serving.pages import WORDS

    package = Path(cxr_fastai.__file__).parent
    text = ''.join(path.read_text() for path in [*package.glob('images/*.py'), package / 'inference/gate.py'])
    assert set(re.findall(r"'(E_\w+)'", text)) <= set(WORDS)


def test_the_script_makes_no_markup_of_text():
    static = Path(cxr_fastai.__file__).parent / 'serving/static'
    script = (static / 'serve.js').read_text()
    assert not re.search('innerHTML|outerHTML|insertAdjacentHTML|document.write|eval', script)
    assert not re.search('https?://(?!www.w3.org)', script + (static / 'serve.css').read_text())
