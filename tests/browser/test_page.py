"""The served pages in a browser: every state, by mouse and by keyboard, without errors and without foreign requests."""

import csv
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from imagefiles import GREY, encoded
from servedpages import choose, expect, finished, finished_card, names, tab_to, upload, wait_for_opacity

import cxr_fastai
from cxr_fastai.inference.predictor import COLUMNS

for module in ('fastapi', 'hypercorn', 'python_multipart', 'prometheus_client', 'onnxruntime'):
    pytest.importorskip(module, reason='pip install "cxr_fastai[serve]" runs this test')
from services import PATIENCE, running_server  # noqa: E402

from cxr_fastai.inference.bundle import Bundle  # noqa: E402
from cxr_fastai.serving.app import Settings  # noqa: E402
from cxr_fastai.serving.pages import MESSAGES  # noqa: E402
from cxr_fastai.serving.server import Server  # noqa: E402
from cxr_fastai.serving.service import Service  # noqa: E402
from cxr_fastai.serving.uploads import Limits  # noqa: E402

TOKEN = 'a token of a test'
FORMULA = '=HYPERLINK("http://elsewhere.example")<img src=x onerror=alert(1)>.png'
NOISE = np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8)
DROP_FILE = """bytes => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], 'dropped.jpeg'));
    const options = {dataTransfer: transfer, bubbles: true, cancelable: true};
    for (const type of ['dragover', 'drop']) document.body.dispatchEvent(new DragEvent(type, options));
}"""
FIND_BROKEN_LINKS = """() => [...document.querySelectorAll("main a[href^='#']")]
    .map(link => link.hash.slice(1))
    .filter(id => !document.getElementById(id))"""


@pytest.fixture(scope='module')
def protected(bundle):
    """The address of a server with an access token and small limits."""
    settings = Settings(bundle, port=0, drain_seconds=1, token=TOKEN, limits=Limits(50_000, 3))
    with running_server(Server(settings)) as server:
        yield server.url


def test_a_prediction_is_shown_in_words_and_on_a_scale_with_the_threshold(page, address, rows, pneumonia):
    row = rows[pneumonia]
    choose(page, address, upload(pneumonia, 'Doe Jane.jpeg'))
    card = finished_card(page)
    decision = ' '.join(card.locator('.decision').inner_text().split())
    numbers = re.fullmatch(r'Pneumonia Probability of pneumonia ([01]\.\d{3,}), threshold ([01]\.\d+)', decision)
    assert float(numbers[1]) == pytest.approx(row['p_pneumonia'], abs=6e-4)
    assert float(numbers[2]) == pytest.approx(row['threshold'], abs=6e-5)
    expect(card.locator('h3')).to_have_text('Doe Jane.jpeg')
    expect(card.get_by_role('img', name=re.compile('on a scale from 0 to 1, with the threshold'))).to_be_visible()
    position = card.locator('.scale').evaluate('scale => Number(scale.style.getPropertyValue("--p"))')
    assert position == pytest.approx(row['p_pneumonia'], abs=1e-5)
    expect(card.locator('.facts')).to_contain_text('JPEG')
    expect(card.locator('.facts')).to_contain_text('96 × 96 px')
    expect(page.locator('#live')).to_contain_text('Doe Jane.jpeg: Pneumonia. Probability')


FAILING_FILES = {
    'text.png': (b'hello', 'This is not an image file', 'E_FORMAT'),
    'empty.png': (b'', 'The file is empty', 'E_EMPTY'),
    'blank.png': (encoded(np.zeros((96, 96), np.uint8)), 'The image is blank', 'E_BLANK'),
    'small.png': (encoded(GREY[:20, :20]), 'too small', 'E_TOO_SMALL'),
    'cut.png': (encoded(GREY)[:900], 'damaged', 'E_TRUNCATED'),
    'noise.png': (encoded(NOISE), 'does not look like the chest X-ray images', 'E_OUT_OF_DISTRIBUTION'),
}


def test_files_without_a_prediction_get_a_reason_in_plain_words(page, address):
    choose(page, address, *(upload(content, name) for name, (content, *_) in FAILING_FILES.items()))
    finished(page, len(FAILING_FILES))
    for name, (_, reason, code) in FAILING_FILES.items():
        row = page.locator('#rows tr', has_text=name)
        expect(row.locator('b')).to_have_text('No prediction')
        expect(row.locator('.reason')).to_contain_text(reason)
        row.click()
        card = page.locator('#shown .image', has=page.get_by_role('heading', name=name))
        expect(card.locator('.decision')).to_have_text('No prediction')
        expect(card.locator('.reason')).to_contain_text(reason)
        expect(card.locator('.details')).to_contain_text(code)
        expect(card.locator('.scale')).to_be_hidden()
        expect(card.locator('.maps')).to_be_hidden()
        page.keyboard.press('Escape')


def test_the_pixel_mode_of_a_16_bit_image_is_shown(page, address):
    deep = np.uint16(np.linspace(1000, 4000, 96 * 96).reshape(96, 96))
    choose(page, address, upload(encoded(deep)))
    expect(finished_card(page).locator('.facts')).to_contain_text('I;16')


def test_several_images_are_sent_two_at_a_time_without_their_names_and_keep_their_order(page, recorder, rows):
    open_requests = set()
    counts = []

    def begin(request) -> None:
        if 'predict' in request.url:
            open_requests.add(request)
            counts.append(len(open_requests))

    recorder.bodies.clear()
    page.on('request', begin)
    page.on('requestfinished', lambda request: open_requests.discard(request))
    chosen = [f'Jane Doe {i}.jpeg' for i in range(6)]
    choose(page, recorder.url, *(upload(path, name) for path, name in zip(rows, chosen, strict=False)))
    finished(page, 6)
    assert names(page) == chosen
    assert len(counts) == 6 and max(counts) == 2
    sent = b''.join(recorder.bodies)
    assert sent.count(b'filename="image"') == 6 and b'Jane' not in sent
    expect(page.locator('#count')).to_contain_text('6 images')


def test_the_map_can_be_faded_and_switched_off(page, address, pneumonia):
    choose(page, address, upload(pneumonia))
    card = finished_card(page)
    wait_for_opacity(page, 1)
    card.get_by_label('Opacity').fill('40')
    wait_for_opacity(page, 0.4)
    card.get_by_role('switch').uncheck()
    wait_for_opacity(page, 0)
    card.get_by_label('Opacity').fill('70')
    wait_for_opacity(page, 0.7)
    expect(card.get_by_role('switch')).to_be_checked()
    expect(card.locator('.maps')).to_contain_text('not a lesion outline')
    assert page.evaluate('[...document.images].every(image => image.hidden || image.naturalWidth > 0)')


def test_the_table_downloads_as_csv_without_formulas(page, address, rows, pneumonia, tmp_path):
    chosen = ['a, "b".jpeg', FORMULA, "'=1.png", 'Ä.png']
    contents = (pneumonia, pneumonia, b'hello', pneumonia)
    choose(page, address, *(upload(content, name) for content, name in zip(contents, chosen, strict=True)))
    finished(page, 4)
    assert names(page) == chosen
    with page.expect_download() as download:
        page.get_by_role('button', name='Download CSV').click()
    download.value.save_as(tmp_path / 'images.csv')
    with open(tmp_path / 'images.csv', encoding='utf-8', newline='') as file:
        columns, *lines = csv.reader(file)
    assert columns == [*COLUMNS, 'model_threshold']
    assert [line[0] for line in lines] == [chosen[0], f"'{chosen[1]}", f"'{chosen[2]}", chosen[3]]
    assert [line[1] for line in lines] == ['ok', 'ok', 'error', 'ok']
    assert float(lines[0][2]) == pytest.approx(rows[pneumonia]['p_pneumonia'], abs=1e-5)
    assert lines[2][2:4] == ['', ''] and lines[2][5] == 'E_FORMAT'
    assert all(line[4] == line[7] for line in lines)
    assert download.value.suggested_filename == 'predictions.csv'


def test_an_example_is_predicted_by_one_click(page, address):
    page.goto(address)
    expect(page.locator('.examples img')).to_have_count(8)
    page.get_by_role('button', name='Example 3').click()
    expect(finished_card(page).locator('h3')).to_have_text('example-3.png')


def test_everything_can_be_done_by_keyboard(page, address, pneumonia):
    # Chromium reports a file chooser only if somebody listened before the key was pressed. `expect_file_chooser` alone
    # starts to listen at the same time, which a busy machine may do too late.
    page.on('filechooser', lambda chooser: None)
    page.goto(address)
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className') == 'skip'
    tab_to(page, '#chooser')
    assert page.locator('.drop').evaluate('drop => getComputedStyle(drop).outlineStyle') == 'solid'
    with page.expect_file_chooser() as chooser:
        page.keyboard.press('Space')
    chooser.value.set_files(upload(pneumonia))
    finished(page)
    tab_to(page, '.toggle')
    page.keyboard.press('Space')
    wait_for_opacity(page, 0)
    tab_to(page, '.opacity')
    page.keyboard.press('ArrowLeft')
    wait_for_opacity(page, 0.95)
    tab_to(page, '#clear', 'Shift+Tab')
    page.keyboard.press('Enter')
    expect(page.locator('#results')).to_be_hidden()
    expect(page.locator('#chooser')).to_be_focused()
    tab_to(page, '[data-example="0"]')
    page.keyboard.press('Enter')
    finished(page)


def refuse(page, status: int, code: str, retry_after: int = 0, times: int | None = None) -> None:
    """Answer requests for predictions with an error."""
    response = {
        'status': status,
        'headers': {'Retry-After': str(retry_after)},
        'json': {'code': code, 'message': 'for a test'},
    }
    page.route('**/v1/predict*', lambda route: route.fulfill(**response), times=times)


def test_a_busy_service_is_asked_again_automatically(failing_page, address, pneumonia):
    refuse(failing_page, 503, 'E_BUSY', times=1)
    choose(failing_page, address, upload(pneumonia))
    finished(failing_page)
    expect(failing_page.locator('#notice')).to_be_hidden()


@pytest.mark.parametrize(
    ('status', 'code', 'reason'),
    [
        (503, 'E_STARTING', 'The model is still loading.'),
        pytest.param(429, 'E_OF_A_PROXY', 'The service is busy.', marks=pytest.mark.slow),
    ],
)
def test_after_five_retries_the_user_decides(failing_page, address, pneumonia, status, code, reason):
    refuse(failing_page, status, code, retry_after=3600)
    failing_page.clock.install()
    choose(failing_page, address, upload(pneumonia))
    for i in range(1, 6):
        expect(failing_page.locator('#reason')).to_contain_text(f'({i} of 5)')
        failing_page.clock.fast_forward(3_600_000)
    expect(failing_page.locator('#reason')).to_contain_text(f'{reason} Gave up after 6 attempts.')
    failing_page.unroute('**/v1/predict*')
    failing_page.get_by_role('button', name='Try again').click()
    finished(failing_page)


def test_an_unreachable_service_is_reported_and_asked_again_on_request(failing_page, address, pneumonia):
    failing_page.route('**/v1/predict*', lambda route: route.abort())
    choose(failing_page, address, *[upload(pneumonia)] * 3)
    expect(failing_page.locator('#reason')).to_contain_text('cannot be reached')
    failing_page.unroute('**/v1/predict*')
    failing_page.get_by_role('button', name='Try again').click()
    finished(failing_page, 3)
    expect(failing_page.locator('#notice')).to_be_hidden()


def test_uploads_continue_when_the_computer_is_online_again(failing_page, address, pneumonia):
    failing_page.goto(address)
    failing_page.context.set_offline(True)
    failing_page.set_input_files('#chooser', [upload(pneumonia)])
    expect(failing_page.locator('#reason')).to_contain_text('this computer is offline')
    failing_page.context.set_offline(False)
    finished(failing_page)


def test_the_page_asks_for_the_token_and_keeps_it_for_the_session(failing_page, protected, pneumonia):
    choose(failing_page, protected, *[upload(pneumonia)] * 2)
    field = failing_page.get_by_label('Access token')
    expect(field).to_be_focused()
    failing_page.keyboard.type('a wrong token')
    failing_page.keyboard.press('Enter')
    expect(failing_page.locator('#reason')).to_contain_text('The access token is wrong')
    field.fill(TOKEN)
    failing_page.get_by_role('button', name='Continue').click()
    finished(failing_page, 2)
    failing_page.reload()
    failing_page.get_by_role('button', name='Example 1').click()
    finished(failing_page)
    assert TOKEN not in failing_page.content()


def test_files_over_the_limits_are_not_sent(failing_page, log, protected):
    choose(failing_page, protected, *(upload(b'0' * 50_000, f'{i}.dcm') for i in range(4)))
    expect(finished(failing_page, 3).first.locator('.reason')).to_have_text(MESSAGES['E_BODY'])
    expect(failing_page.locator('#reason')).to_contain_text('At most 3 images at a time: 1 of 4 were not added.')
    assert not [url for url in log.urls if 'predict' in url]


def test_an_upload_shows_its_progress_and_can_be_cleared(page, log, address, pneumonia):
    routes = []
    page.route('**/v1/predict*', lambda route: routes.append(route))
    choose(page, address, *[upload(pneumonia)] * 3)
    expect(page.locator('#rows progress').first).to_be_visible()
    expect(page.locator('#rows [data-state=queued] .reason')).to_have_text('Waiting.')
    page.get_by_role('button', name='Clear').click()
    expect(page.locator('#rows tr')).to_have_count(0)
    for route in routes:
        route.abort()
    log.messages.clear()


def test_an_image_can_be_dropped_on_the_page(page, address, pneumonia):
    page.goto(address)
    page.evaluate(DROP_FILE, list(pneumonia.read_bytes()))
    expect(finished_card(page).locator('h3')).to_have_text('dropped.jpeg')


def test_a_page_opened_before_the_model_is_loaded_reloads_itself(failing_page, bundle, monkeypatch):
    may_load = threading.Event()
    open_service = Service.open
    monkeypatch.setattr(
        Service, 'open', lambda *args, **options: may_load.wait(PATIENCE) and open_service(*args, **options)
    )
    server = Server(Settings(bundle, port=0, drain_seconds=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        failing_page.goto(server.url)
        expect(failing_page.locator('#starting')).to_contain_text('The model is loading')
        expect(failing_page.locator('#chooser')).to_be_disabled()
        card = failing_page.context.new_page()
        assert card.goto(f'{server.url}/card').status == 503
        expect(card.locator('main')).to_contain_text('The model is loading')
        may_load.set()
        expect(failing_page.locator('#chooser')).to_be_enabled()
        expect(failing_page.locator('footer')).to_contain_text('64 px')
        failing_page.goto('about:blank')
    finally:
        may_load.set()
        server.stop()
        thread.join(PATIENCE)


def test_every_page_names_the_model_and_its_purpose(page, address, bundle):
    identity = Bundle.open(bundle).identity
    for path in ('', 'card', 'docs'):
        page.goto(f'{address}/{path}')
        footer = page.locator('footer')
        expect(footer).to_contain_text('Research software, not a medical device.')
        expect(footer).to_contain_text('baseline, 64 px')
        expect(footer.locator(f'code[title="{identity}"]')).to_have_text(identity[:12])
        for target in ('card', 'docs'):
            assert footer.locator(f'a[href={target}]').count()


def test_the_model_card_is_shown_without_its_metadata(page, address):
    page.goto(f'{address}/card')
    text = page.locator('main').inner_text()
    assert 'Intended use' in text and 'library_name' not in text and 'model-index' not in text
    assert page.locator('h1').count() == 1 and page.locator('main table').count() >= 3


def test_the_documentation_lists_every_operation_and_field(page, address):
    page.goto(f'{address}/docs')
    api = page.context.request.get(f'{address}/openapi.json').json()
    text = page.locator('main').inner_text()
    for path in api['paths']:
        assert path in text
    for name, schema in api['components']['schemas'].items():
        expect(page.locator(f'#{name}')).to_have_text(name)
        assert all(field in text for field in schema['properties'])
    assert f'curl -F images=@image.jpeg {address}/v1/predict' in text
    assert page.evaluate(FIND_BROKEN_LINKS) == []


def test_the_documentation_of_a_protected_service_shows_the_token(page, protected):
    page.goto(f'{protected}/docs')
    expect(page.locator('main')).to_contain_text('curl -H "Authorization: Bearer $TOKEN" -F images=@image.jpeg')


def test_the_pages_are_accessible_and_fit(open_page, address, protected, pneumonia, width, scheme):
    axe_module = pytest.importorskip(
        'axe_playwright_python.sync_playwright', reason='pip install axe-playwright-python runs this test'
    )
    axe = axe_module.Axe()
    page = open_page(width, scheme, reduced_motion='reduce')

    def check(state: str) -> None:
        violations = axe.run(page).response['violations']
        serious = [violation for violation in violations if violation['impact'] in ('serious', 'critical')]
        assert not serious, (state, [(each['id'], [node['html'][:200] for node in each['nodes']]) for each in serious])
        assert page.evaluate('document.documentElement.scrollWidth') <= width, state

    for path in ('', 'card', 'docs'):
        page.goto(f'{address}/{path}')
        check(path)
    choose(page, address, upload(pneumonia, 'a' * 200), upload(b'hello', FORMULA), upload(encoded(NOISE)))
    finished(page, 3)
    check('done')
    page.locator('#number').fill('0.999')
    page.keyboard.press('Enter')
    check('another threshold')
    page.locator('#rows tr').first.click()
    expect(page.get_by_role('dialog')).to_be_visible()
    check('details')
    choose(page, address, upload(pneumonia, 'a' * 200))
    finished(page)
    check('a single image')
    page.route('**/v1/predict*', lambda route: route.abort())
    choose(page, address, *[upload(pneumonia)] * 3)
    expect(page.locator('#retry')).to_be_visible()
    check('offline')
    page.unroute('**/v1/predict*')
    choose(page, protected, upload(pneumonia))
    expect(page.locator('#secret')).to_be_visible()
    check('token')


def test_every_error_code_has_a_message():
    package = Path(cxr_fastai.__file__).parent
    sources = [*package.glob('images/*.py'), package / 'inference/gate.py']
    codes = set(re.findall(r"'(E_\w+)'", ''.join(path.read_text() for path in sources)))
    assert codes and codes <= set(MESSAGES)


def test_the_scripts_never_turn_text_into_markup():
    static = Path(cxr_fastai.__file__).parent / 'serving/static'
    scripts = ''.join(path.read_text() for path in static.glob('*.js'))
    assert scripts and not re.search('innerHTML|outerHTML|insertAdjacentHTML|document.write|eval', scripts)
    assert not re.search('https?://(?!www.w3.org)', scripts + (static / 'serve.css').read_text())
