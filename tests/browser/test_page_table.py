"""Many images on the served page: a table, the details of each image, and decisions at another threshold."""

import csv

import pytest
from servedpages import ROWS, choose, expect, finished, finished_card, names, tab_to, upload

DISCLAIMER = 'Research software, not a medical device.'
SCREEN = 800
"""Height of a screen in pixels."""
TOPS = """selectors => selectors.map(selector => document.querySelector(selector).getBoundingClientRect().top)"""


@pytest.fixture
def many(page, address, rows):
    """A page with eight images and a file without a prediction."""
    files = [upload(path, f'image {number}.jpeg') for number, path in enumerate(rows, 1)][:8]
    choose(page, address, *files, upload(b'hello', 'text.png'))
    finished(page, 9)
    return page


@pytest.fixture
def expected(rows) -> list[tuple[str, float, str]]:
    """Name, probability and class of these eight images."""
    return [
        (f'image {number}.jpeg', row['p_pneumonia'], row['prediction']) for number, row in enumerate(rows.values(), 1)
    ][:8]


def decisions(page) -> list[str]:
    """The decisions that the table shows, in its order."""
    return page.locator(f'{ROWS} b').all_text_contents()


def save_table(page, folder) -> tuple[str, list[dict[str, str]]]:
    """Name and rows of the CSV file that the page offers."""
    with page.expect_download() as download:
        page.get_by_role('button', name='Download CSV').click()
    download.value.save_as(folder / 'table.csv')
    with open(folder / 'table.csv', encoding='utf-8', newline='') as file:
        return download.value.suggested_filename, list(csv.DictReader(file))


def set_threshold(page, threshold: float) -> None:
    page.get_by_label('Threshold as a number').fill(f'{threshold:g}')
    page.keyboard.press('Enter')


# The table


def test_the_disclaimer_stands_above_the_results(page, address, pneumonia, many):
    notice, table = page.evaluate(TOPS, ['#results .purpose', '.list'])
    expect(page.locator('#results .purpose')).to_contain_text(DISCLAIMER)
    assert notice < table
    page.locator(ROWS).first.click()
    expect(page.get_by_role('dialog')).to_contain_text(DISCLAIMER)
    notice, card = page.evaluate(TOPS, ['dialog .purpose', 'dialog .image'])
    assert notice < card
    choose(page, address, upload(pneumonia))
    finished(page)
    notice, card = page.evaluate(TOPS, ['#results .purpose', '#single .image'])
    assert notice < card


def test_twenty_images_take_at_most_three_screens(page, address, rows):
    paths = list(rows) * 3
    texts = [upload(b'hello', f'text {number}.png') for number in range(4)]
    choose(page, address, *map(upload, paths[:16]), *texts)
    finished(page, 20)
    assert page.evaluate('document.documentElement.scrollHeight') <= 3 * SCREEN
    assert page.evaluate('[...document.querySelectorAll("tr[data-state=done] img")].every(image => image.naturalWidth)')


def test_the_table_is_sorted_by_each_column(many, expected):
    in_order = [name for name, *_ in expected]
    by_probability = [name for name, *_ in sorted(expected, key=lambda image: image[1])]
    orders = {
        'Image': ([*in_order, 'text.png'], ['text.png', *in_order[::-1]]),
        'Probability': ([*by_probability, 'text.png'], [*by_probability[::-1], 'text.png']),
    }
    for column, (ascending, descending) in orders.items():
        header = many.get_by_role('columnheader', name=column)
        header.get_by_role('button').focus()
        many.keyboard.press('Enter')
        expect(header).to_have_attribute('aria-sort', 'ascending')
        assert names(many) == ascending
        header.get_by_role('button').click()
        expect(header).to_have_attribute('aria-sort', 'descending')
        assert names(many) == descending
        many.keyboard.press('Space')
        assert names(many) == [*in_order, 'text.png'] and many.locator('[aria-sort]').count() == 0
    many.get_by_role('columnheader', name='Decision').get_by_role('button').click()
    order = ['Pneumonia', 'Normal', 'No prediction']
    assert [order.index(decision) for decision in decisions(many)] == sorted(map(order.index, decisions(many)))


def test_the_table_is_filtered_by_decision(many, expected):
    counts = {'Pneumonia': 'PNEUMONIA', 'Normal': 'NORMAL'}
    for label, prediction in counts.items():
        chosen = [name for name, _, each in expected if each == prediction]
        many.get_by_role('radio', name=label).check()
        assert names(many) == chosen and set(decisions(many)) <= {label}
        expect(many.locator(f'.filters [data-prediction={prediction}] .count')).to_have_text(str(len(chosen)))
    many.keyboard.press('ArrowRight')
    assert names(many) == ['text.png']
    expect(many.locator(ROWS)).to_contain_text('No prediction This is not an image file')
    many.get_by_role('radio', name='All').check()
    assert len(names(many)) == 9


# Details


def test_details_are_opened_and_left_by_keyboard(many):
    dialog = many.get_by_role('dialog')
    tab_to(many, '#image-2 button')
    many.keyboard.press('Enter')
    expect(dialog.get_by_role('heading')).to_have_text('image 2.jpeg')
    expect(dialog).to_contain_text('2 of 9')
    assert many.evaluate('document.querySelector("#shown .plain").naturalWidth') == 96
    many.keyboard.press('ArrowRight')
    expect(dialog.get_by_role('heading')).to_have_text('image 3.jpeg')
    dialog.get_by_role('button', name='Previous').press('Enter')
    expect(dialog.get_by_role('heading')).to_have_text('image 2.jpeg')
    for _ in range(2):
        many.keyboard.press('ArrowLeft')
    expect(dialog.get_by_role('heading')).to_have_text('text.png')
    many.keyboard.press('Escape')
    expect(dialog).to_be_hidden()
    expect(many.locator('#image-9 button')).to_be_focused()


def test_the_map_of_an_image_among_many_can_be_faded_with_the_arrow_keys(page, address, pneumonia):
    choose(page, address, upload(pneumonia, 'a.png'), upload(pneumonia, 'b.png'))
    finished(page, 2)
    page.locator(ROWS).first.click()
    page.get_by_role('dialog').get_by_label('Opacity').focus()
    page.keyboard.press('ArrowLeft')
    assert page.get_by_role('dialog').get_by_label('Opacity').input_value() == '95'
    expect(page.get_by_role('dialog').get_by_role('heading')).to_have_text('a.png')


def test_images_step_through_what_the_filter_shows(many, expected):
    chosen = [name for name, _, prediction in expected if prediction == 'PNEUMONIA']
    many.get_by_role('radio', name='Pneumonia').check()
    many.locator(ROWS).first.click()
    dialog = many.get_by_role('dialog')
    for name in [*chosen, chosen[0]]:
        expect(dialog.get_by_role('heading')).to_have_text(name)
        dialog.get_by_role('button', name='Next').click()


# Threshold


def test_another_threshold_changes_the_decisions_on_the_page_without_a_request(many, log, expected, tmp_path):
    requests = len([url for url in log.urls if not url.startswith('data:')])
    own = many.locator('#number').input_value()
    probabilities = sorted(p for _, p, _ in expected)
    threshold = round((probabilities[3] + probabilities[4]) / 2, 4)
    before = decisions(many)
    set_threshold(many, threshold)
    after = ['Pneumonia' if p >= threshold else 'Normal' for _, p, _ in expected]
    assert decisions(many) == [*after, 'No prediction']
    changes = sum(one != other for one, other in zip(before, decisions(many), strict=True))
    expect(many.locator('#note')).to_contain_text(f'Changed from {own}, the threshold of the model: {changes} decision')
    many.locator(ROWS).first.click()
    expect(many.get_by_role('dialog')).to_contain_text(f"threshold {threshold:g} (the model's: {own})")
    many.keyboard.press('Escape')
    filename, table = save_table(many, tmp_path)
    assert filename == f'predictions-threshold-{threshold:g}.csv'
    assert [row['prediction'] for row in table] == [*map(str.upper, after), '']
    assert {row['threshold'] for row in table} == {f'{threshold:g}'}
    assert {f'{float(row["model_threshold"]):.4g}' for row in table} == {f'{float(own):.4g}'}
    assert table[-1]['code'] == 'E_FORMAT' and table[-1]['p_pneumonia'] == ''
    many.get_by_role('button', name='Reset').click()
    assert decisions(many) == before and many.locator('#number').input_value() == own
    expect(many.locator('#note')).to_be_empty()
    assert save_table(many, tmp_path)[0] == 'predictions.csv'
    assert len([url for url in log.urls if not url.startswith(('data:', 'blob:'))]) == requests


def test_the_threshold_is_moved_by_keyboard_and_by_its_number(page, address, pneumonia):
    choose(page, address, upload(pneumonia))
    card = finished_card(page)
    own = page.locator('#number').input_value()
    expect(page.locator('.own')).to_have_text(f'model: {own}')
    tab_to(page, '#range')
    page.keyboard.press('End')
    expect(card.locator('.decision b')).to_have_text('Normal')
    assert page.locator('#number').input_value() == '1'
    page.keyboard.press('Home')
    expect(card.locator('.decision b')).to_have_text('Pneumonia')
    assert page.locator('#number').input_value() == '0'
    set_threshold(page, 7)
    expect(page.locator('#note')).to_have_text('Enter a number from 0 to 1. The threshold is still 0.')
    set_threshold(page, float(own))  # the shown value means the threshold of the model, to its last digit
    expect(page.get_by_role('button', name='Reset')).to_be_disabled()


def test_clearing_the_page_restores_the_threshold_of_the_model(page, address, pneumonia):
    choose(page, address, upload(pneumonia))
    finished(page)
    own = page.locator('#number').input_value()
    set_threshold(page, 0.9999)
    page.get_by_role('button', name='Clear').click()
    page.get_by_role('button', name='Example 1').click()
    finished(page)
    assert page.locator('#number').input_value() == own


# The other pages


def test_the_card_and_the_documentation_use_the_width_and_list_their_contents(page, address):
    for path in ('card', 'docs'):
        page.goto(f'{address}/{path}')
        left, right = page.evaluate(
            '[document.querySelector(".contents").getBoundingClientRect().left,'
            ' document.querySelector("article .scroll").getBoundingClientRect().right]'
        )
        assert right - left >= 1100
        links = page.get_by_role('navigation', name='Contents').get_by_role('link')
        assert links.count() >= 5
        links.last.click()
        assert page.evaluate('document.querySelector(location.hash) !== null')
