"""The report is one self-contained page that shows every metric with its interval, and file names only as text."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from runfiles import seal_results

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import hash_rows
from cxr_fastai.data.auditing import SMALL_VALIDATION
from cxr_fastai.data.items import read_items
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.figures import image_picture, shown_images, typical_correct, worst_errors
from cxr_fastai.inference.config import identify_network
from cxr_fastai.publishing import reporting
from cxr_fastai.publishing.printing import find_browser
from cxr_fastai.publishing.reporting import (
    SECTIONS,
    compare_with_targets,
    describe_flow,
    read_audit,
    report,
)

SCRIPT_NAME = '<script>alert(1)</script>.jpeg'
HOSTILE_NAMES = (
    '"onerror="alert(1)',
    "javascript:alert('x')",
    r'$\bad$',
    '[/red]',
    'a\x1b[31m',
    '{{ 7*7 }}',
    '\u202egpj.exe',
    'e\u0301.jpeg',
)
REPORT_CODE = """
import sys
from pathlib import Path
from cxr_fastai.core.run import Run
from cxr_fastai.publishing.reporting import report
report(Run(Path(sys.argv[1])))
print(*({'torch', 'fastai', 'fastcore'} & set(sys.modules)))
"""


@pytest.fixture(scope='module')
def written(evaluated, tmp_path_factory) -> tuple[str, str]:
    """The complete page, written in a new process, and the names of the heavy packages that the process loaded."""
    folder = tmp_path_factory.mktemp('report') / 'run'
    shutil.copytree(evaluated.path, folder)
    command = [sys.executable, '-c', REPORT_CODE, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return (folder / 'report.html').read_text(), process.stdout.strip()


@pytest.fixture(scope='module')
def page(written) -> str:
    return written[0]


@pytest.fixture
def copy(evaluated, tmp_path, monkeypatch) -> Run:
    """A run to change, which is reported without plots: they are slow, and the page above has them."""
    shutil.copytree(evaluated.path, tmp_path / 'run')
    monkeypatch.setattr(reporting, 'draw', lambda *_: {})
    return Run(tmp_path / 'run')


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the tags that are never closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ''
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'br', 'img', 'wbr', 'use'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def rename(run: Run, names: dict[str, str]) -> None:
    """Change paths in the predictions of `run`."""
    table = run.predictions
    table.assign(path=table.path.replace(names)).to_csv(run / 'predictions.csv', index=False)
    seal_results(run.path)


def worst_path(run: Run) -> str:
    return str(worst_errors(run.predicted('test')).path.iloc[0])


def test_a_report_loads_neither_torch_nor_fastai(written):
    _, heavy_packages = written
    assert heavy_packages == ''


def test_the_page_is_self_contained(page):
    parsed = Page(page)
    assert not parsed.open and len(page) < 5_000_000
    policies = [attrs['content'] for _, attrs in parsed.tags if attrs.get('http-equiv') == 'Content-Security-Policy']
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not {'script', 'iframe', 'object', 'embed', 'link', 'form', 'base'} & {tag for tag, _ in parsed.tags}
    for tag, attrs in parsed.tags:
        assert not any(name.startswith('on') for name in attrs), (tag, attrs)
        for name in {'src', 'href', 'xlink:href', 'srcset', 'action'} & set(attrs):
            assert attrs[name].startswith(('#', 'data:image/')), attrs[name]
    assert not re.findall(r'https?://|@import|url\((?!#)', page)


def test_every_link_has_a_target_and_identifiers_are_unique(page):
    tags = Page(page).tags
    names = [attrs['id'] for _, attrs in tags if 'id' in attrs]
    assert len(names) == len(set(names))
    links = [attrs[name] for _, attrs in tags for name in ('href', 'xlink:href') if name in attrs]
    targets = {link[1:] for link in links if link.startswith('#')}
    assert targets <= set(names) and {'summary', 'images', 'checklist'} <= targets


def test_the_page_shows_all_sections_and_the_metrics_with_their_intervals(page, evaluated):
    text = re.sub(r'\s+', ' ', Page(page).text)
    metrics = evaluated.metrics['test']
    for name, title in SECTIONS.items():
        if name not in ('robustness', 'maps', 'shift'):
            assert title in text
    for name in ('auc', 'sensitivity', 'specificity', 'ppv', 'mcc', 'average_precision'):
        value, low, high = (f'{metrics[name][key]:.3f}' for key in ('value', 'low', 'high'))
        assert f'{value} {low} to {high}' in text, name
    for statement in (
        'not a medical device',
        '0.54',
        'To be written by a human',
        'not a claim of compliance',
        metrics['threshold_rule'],
        f'{metrics["n"]} images',
    ):
        assert statement in text
    assert page.count('<svg role="img"') == 8


def test_a_file_name_with_markup_stays_text(copy):
    worst = worst_path(copy)
    picture = image_picture(copy, worst).read_bytes()
    name = f'test/NORMAL/{SCRIPT_NAME}'
    image_picture(copy, name).write_bytes(picture)
    rename(copy, {worst: name})
    html = report(copy).read_text()
    parsed = Page(html)
    assert '<script' not in html and SCRIPT_NAME in parsed.text.replace('\n', '')
    assert 'script' not in {tag for tag, _ in parsed.tags}


def test_no_file_name_breaks_the_page(copy):
    paths = list(shown_images(copy.predicted('test')).path)
    assert len(paths) >= len(HOSTILE_NAMES)
    rename(copy, {path: f'test/NORMAL/{name}' for path, name in zip(paths, HOSTILE_NAMES, strict=False)})
    parsed = Page(report(copy).read_text())
    assert not parsed.open
    for name in HOSTILE_NAMES:
        assert name in parsed.text
    assert 'onerror' not in {attribute for _, attrs in parsed.tags for attribute in attrs}


def test_folders_above_the_images_are_not_shown(copy):
    worst = worst_path(copy)
    for path in ('/home/anna/secret/test/NORMAL/a.jpeg', '../../secret/test/NORMAL/a.jpeg'):
        rename(copy, {worst: path})
        text = Page(report(copy).read_text()).text
        assert 'secret' not in text and 'test/NORMAL/a.jpeg' in text.replace('\n', '')
        assert 'Some or all of them are not among the images above' in text
        worst = path


def test_hidden_names_are_replaced_by_numbers(copy):
    rename(copy, {worst_path(copy): 'test/NORMAL/Meier_Anna.jpeg'})
    assert 'Meier_Anna' in report(copy).read_text().replace('<wbr>', '')
    html = report(copy, hide_names=True).read_text()
    n_shown = len(shown_images(copy.predicted('test')))
    assert 'Meier' not in html and 'NORMAL/' not in html
    assert len(re.findall(r'image-\d+\.jpeg', html)) == n_shown


def test_the_margin_of_the_threshold_is_shown(copy):
    assert copy.decision['margin'] in report(copy).read_text()


@pytest.mark.parametrize('threshold', [0.123, None])
def test_metrics_at_another_threshold_than_the_decision_are_refused(copy, threshold):
    if threshold:
        (copy / 'decision.json').write_text(json.dumps(copy.decision | {'threshold': threshold}))
    else:
        (copy / 'decision.json').unlink()
    with pytest.raises(UsageError, match='another decision than that in decision.json'):
        report(copy)


def test_the_images_that_evaluate_saved_are_shown(copy):
    n_shown = len(shown_images(copy.predicted('test')))
    html = report(copy).read_text()
    assert html.count('<img src="data:image/png;base64,') == n_shown and 'image not available' not in html
    shutil.rmtree(copy / 'figures/images')
    assert report(copy).read_text().count('image not available') == n_shown


def test_errors_are_sorted_by_loss_and_correct_predictions_by_distance_to_the_median_of_their_class():
    images = pd.DataFrame(
        {
            'path': list('abcdefgh'),
            'label': ['NORMAL'] * 4 + ['PNEUMONIA'] * 4,
            'p_pneumonia': [0.1, 0.2, 0.4, 0.9, 0.95, 0.6, 0.7, 0.3],
        }
    )
    images['prediction'] = images.p_pneumonia.map(lambda p: 'PNEUMONIA' if p >= 0.5 else 'NORMAL')
    p_true_class = images.p_pneumonia.where(images.label == 'PNEUMONIA', 1 - images.p_pneumonia)
    images['loss'] = -p_true_class.map(math.log)
    assert worst_errors(images).path.to_list() == ['d', 'h']
    assert typical_correct(images, 2).path.to_list() == ['b', 'g']


@pytest.mark.parametrize(
    ('value', 'low', 'high', 'verdict'),
    [
        (0.97, 0.96, 0.98, ('good', 'met')),
        (0.96, 0.94, 0.98, ('good', 'met, but the interval includes lower values')),
        (0.90, 0.86, 0.93, ('error', 'not met')),
        (0.94, 0.90, 0.96, ('error', 'not met, but the interval includes the target')),
        (None, None, None, ('warning', 'cannot be determined')),
    ],
)
def test_the_verdict_on_a_target_considers_the_interval(value, low, high, verdict):
    estimate = {'value': value, 'low': low, 'high': high}
    sensitivity, _ = compare_with_targets({'sensitivity': estimate, 'specificity': estimate})
    assert sensitivity['verdict'] == verdict


def test_subgroups_that_are_too_small_are_described_in_report_and_card(copy, images, tmp_path):
    items = read_items(images, columns=())
    test = items[items.split == 'test'].assign(site='A', path=lambda table: [images / path for path in table.path])
    test.drop(columns=['patient', 'kind']).to_csv(tmp_path / 'images.csv', index=False)
    evaluate(copy, tmp_path / 'images.csv', by=['kind', 'site'])
    report(copy)
    rows = ' '.join(Page((copy / 'report.html').read_text()).text.split())
    assert 'site: A12 too few (7) too few (5)' in rows.replace('12too', '12 too').replace(')too', ') too')
    assert '3 groups with too few images (fewer than 10): not shown' in rows
    card = (copy / 'model_card.md').read_text()
    assert 'kind (3 groups with too few images (fewer than 10)); site (1 group).' in card


def test_a_report_about_validation_images_says_so(copy):
    (copy / 'metrics.json').write_text(json.dumps({'valid': copy.metrics['valid']}))
    text = Page(report(copy).read_text()).text
    assert 'This report is about valid images, not test images' in text and 'optimistic' in text


def test_an_audit_is_shown_only_if_it_is_of_the_images_of_the_run(copy, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'were not audited' in report(copy).read_text()
    folder = tmp_path / 'elsewhere' / 'audit'
    folder.parent.mkdir()
    main(['data', 'audit', str(images), '--out', str(folder)])
    html = report(copy, folder).read_text()
    audit = json.loads((folder / 'audit.json').read_text())
    # The page leaves out this finding, because it shows the splits of the run itself.
    assert [finding['name'] for finding in audit['findings']] == [SMALL_VALIDATION] and SMALL_VALIDATION not in html
    assert 'The audit found no problems' in html and 'were not audited' not in html

    finding = {'level': 'warning', 'name': 'planted', 'count': 3, 'advice': 'Remove it.', 'images': []}
    audit['findings'].append(finding)
    nearby = tmp_path / 'audit'
    shutil.copytree(folder, nearby)
    (nearby / 'audit.json').write_text(json.dumps(audit))
    assert 'planted: 3. Remove it.' in report(copy).read_text()  # found without the option
    assert read_audit(nearby, copy)['images'] == 60
    for other in (audit | {'identity': 'another'}, {}):
        (nearby / 'audit.json').write_text(json.dumps(other))
        assert 'were not audited' in report(copy).read_text()
        with pytest.raises(UsageError, match='an audit of other images'):
            report(copy, nearby)
    with pytest.raises(UsageError, match='no such file'):
        report(copy, tmp_path / 'nowhere')


def test_the_flow_counts_every_image(evaluated):
    flow = describe_flow(evaluated)
    n_used = sum(sum(labels.values()) for labels in flow['splits'].values())
    assert flow['found'] == 60 == n_used + flow['unreadable']


def test_the_flow_states_the_real_share_of_the_validation_images(copy):
    recipe = json.loads((copy / 'recipe.json').read_text())
    (copy / 'recipe.json').write_text(json.dumps(recipe | {'valid': 'patients'}))
    items = copy.items[lambda items: items.split != 'test']
    share = items[items.split == 'valid'].patient.nunique() / items.patient.nunique()
    assert f'those of {share:.0%} of the patients of train and val' in describe_flow(copy)['valid']


def test_a_run_that_was_not_evaluated_is_rejected(run, capsys):
    assert main(['report', str(run.path)]) == 2
    assert 'not evaluated yet. Run `cxr-fastai evaluate' in capsys.readouterr().err


def test_robustness_is_shown_if_it_was_measured(copy):
    rows = [('clean', 0, 0.99), *(('blur', strength, 0.95) for strength in range(1, 6)), ('shortcut', 0, 0.90)]
    table = pd.DataFrame(rows, columns=['corruption', 'strength', 'auc']).assign(
        n=12, auc_low=0.8, auc_high=0.995, sensitivity=1.0, specificity=1.0, split='test'
    )
    table = table.assign(threshold=copy.decision['threshold'], tta=False)
    write_robustness(copy, table.assign(model=identify_network(copy.path)))
    text = re.sub(r'\s+', ' ', Page(report(copy).read_text()).text)
    assert copy.metrics['test']['n'] == 12 and 'On all 12 images, the AUC is 0.990 on clean images' in text
    assert 'it decreases by 0.090' in text
    write_robustness(copy, table.assign(model='a' * 64))
    with pytest.warns(CXRWarning, match=r'are of another network, so they are not used. Run `.* --robustness` again'):
        assert 'on clean images' not in report(copy).read_text()
    copy.robustness.assign(auc=0.999).to_csv(copy / 'robustness.csv', index=False)
    with pytest.warns(CXRWarning, match='were edited'):
        report(copy)


def write_robustness(run: Run, table: pd.DataFrame) -> None:
    table.assign(sha256=hash_rows(table)).to_csv(run / 'robustness.csv', index=False)


def test_no_file_contains_a_path_or_the_name_of_the_computer(copy, images):
    import platform

    report(copy)
    for name in ('model_card.md', 'report.html'):
        text = (copy / name).read_text()
        for private in (str(images), str(Path.home()), str(copy.path), platform.node()):
            if len(private) > 5:
                assert private not in text, (name, private)


def test_printing_needs_a_browser(copy, capsys, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert main(['report', str(copy.path), '--pdf']) == 1
    assert 'no Chromium, Chrome or Edge was found' in capsys.readouterr().err
    assert (copy / 'report.html').is_file() and not (copy / 'report.pdf').exists()


@pytest.mark.skipif(not find_browser(), reason='needs Chromium or Chrome; install one to run this test')
def test_a_pdf_has_the_pages_of_the_report(copy):
    assert main(['report', str(copy.path), '--pdf']) == 0
    pdf = (copy / 'report.pdf').read_bytes()
    assert pdf.startswith(b'%PDF-') and pdf.count(b'/Type /Page\n') >= 3


def test_a_report_without_pdf_keeps_the_old_pdf_and_says_so(copy, capsys):
    (copy / 'report.pdf').write_text('precious')
    assert main(['report', str(copy.path)]) == 0
    assert 'report.pdf is of an earlier report and was not changed. --pdf replaces it.' in capsys.readouterr().err
    assert (copy / 'report.pdf').read_text() == 'precious'


def test_a_browser_that_fails_leaves_the_old_pdf(copy, tmp_path, monkeypatch, capsys):
    (copy / 'report.pdf').write_text('precious')
    browser = tmp_path / 'bin' / 'chromium'
    browser.parent.mkdir()
    browser.write_text('#!/bin/sh\nexit 3\n')
    browser.chmod(0o755)
    monkeypatch.setenv('PATH', str(browser.parent))
    assert main(['report', str(copy.path), '--pdf']) == 1
    assert 'exit status 3' in capsys.readouterr().err
    assert (copy / 'report.pdf').read_text() == 'precious'


def test_the_caption_of_an_image_says_what_the_probability_is_of_and_which_class_it_has(evaluated, page):
    predictions = evaluated.predicted('test')
    shown = pd.concat([worst_errors(predictions), typical_correct(predictions)])
    captions = re.findall(r'<figcaption><b>(p\(pneumonia\).*?)</b>', page)
    assert captions == [f'p(pneumonia) {row.p_pneumonia:.3f} · labelled {row.label}' for row in shown.itertuples()]
    threshold = evaluated.metrics['test']['threshold']
    if len(worst_errors(predictions)):
        assert f'probability of at least {threshold:g}' in Page(page).text
