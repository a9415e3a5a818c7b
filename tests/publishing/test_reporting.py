"""One page that needs nothing else, in which no name becomes markup and no figure stands without its interval."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import Recipe, command_line
from cxr_fastai.core.run import Run
from cxr_fastai.data.auditing import TOO_SMALL
from cxr_fastai.evaluation.intervals import describe
from cxr_fastai.interpretation.interpretation import image_picture, typical_hits, worst_errors
from cxr_fastai.publishing import model_card as card
from cxr_fastai.publishing.checklist import TOPICS
from cxr_fastai.publishing.model_card import describe_run, render_card
from cxr_fastai.publishing.reporting import SECTIONS, describe_flow, find_browser, judge_targets, read_audit, report

SCRIPT = '<script>alert(1)</script>.jpeg'


@pytest.fixture
def copy(evaluated, tmp_path, monkeypatch) -> Run:
    """A run to change, whose report is made without curves, which take their time and have their own tests."""
    shutil.copytree(evaluated.path, tmp_path / 'run')
    monkeypatch.setattr('cxr_fastai.publishing.reporting.draw', lambda *_: {})
    return Run(tmp_path / 'run')


@pytest.fixture(scope='module')
def page(evaluated, tmp_path_factory) -> str:
    """The whole page, with everything on it."""
    shutil.copytree(evaluated.path, folder := tmp_path_factory.mktemp('report') / 'run')
    return report(Run(folder)).read_text()


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, its words, and what is never closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.open = [], '', []
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
        self.words += data


def test_the_page_needs_nothing_else(page):
    found = Page(page)
    assert not found.open and len(page) < 5_000_000
    policy = next(attrs['content'] for tag, attrs in found.tags if attrs.get('http-equiv') == 'Content-Security-Policy')
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {'script', 'iframe', 'object', 'embed', 'link', 'form', 'base'} & {tag for tag, _ in found.tags}
    for tag, attrs in found.tags:
        assert not any(name.startswith('on') for name in attrs), (tag, attrs)
        for name in {'src', 'href', 'xlink:href', 'srcset', 'action'} & set(attrs):
            assert attrs[name].startswith(('#', 'data:image/')), attrs[name]
    assert not re.findall(r'https?://|@import|url\((?!#)', page)


def test_every_link_has_its_target_and_no_identifier_stands_twice(page):
    tags = Page(page).tags
    names = [attrs['id'] for _, attrs in tags if 'id' in attrs]
    assert len(names) == len(set(names))
    links = [attrs[name] for _, attrs in tags for name in ('href', 'xlink:href') if name in attrs]
    links = [link[1:] for link in links if link.startswith('#')]
    assert set(links) <= set(names) and {'summary', 'images', 'checklist'} <= set(links)


def test_the_page_has_its_sections_and_the_figures_of_the_metrics(page, evaluated):
    words, metrics = re.sub(r'\s+', ' ', Page(page).words), evaluated.metrics['test']
    for title in SECTIONS.values():
        if title not in ('Robustness', SECTIONS['maps']):
            assert title in words
    for name in ('auc', 'sensitivity', 'specificity', 'ppv', 'mcc', 'average_precision'):
        value, low, high = (f'{metrics[name][key]:.3f}' for key in ('value', 'low', 'high'))
        assert f'{value} {low} to {high}' in words, name
    for words_needed in (
        'not a medical device',
        '.54',
        'To be written by a human',
        'no claim of compliance',
        metrics['threshold_rule'],
        f'{metrics["n"]} images',
    ):
        assert words_needed in words
    assert page.count('<svg role="img"') == 8


def test_an_image_called_like_markup_stays_text(copy):
    table = copy.predictions
    worst = worst_errors(copy.predicted('test')).path.iloc[0]
    picture = image_picture(copy, worst).read_bytes()
    named = 'test/NORMAL/' + SCRIPT
    image_picture(copy, named).write_bytes(picture)
    table.assign(path=table.path.replace(worst, named)).to_csv(copy / 'predictions.csv', index=False)
    found = Page(text := report(copy).read_text())
    assert '<script' not in text and SCRIPT.replace('/', '/') in found.words.replace('\n', '')
    assert 'script' not in {tag for tag, _ in found.tags}


@pytest.mark.parametrize(
    'name',
    [
        '"onerror="alert(1)',
        "javascript:alert('x')",
        r'$\bad$',
        '[/red]',
        'a\x1b[31m',
        '{{ 7*7 }}',
        '\u202egpj.exe',
        'e\u0301.jpeg',
    ],
)
def test_no_name_breaks_the_page(copy, name):
    table = copy.predictions
    worst = worst_errors(copy.predicted('test')).path.iloc[0]
    table.assign(path=table.path.replace(worst, f'test/NORMAL/{name}')).to_csv(copy / 'predictions.csv', index=False)
    found = Page(report(copy).read_text())
    assert not found.open and name in found.words and '49' not in name
    assert 'onerror' not in {attribute for _, attrs in found.tags for attribute in attrs}


def test_folders_above_the_images_are_not_shown(copy):
    worst = worst_errors(copy.predicted('test')).path.iloc[0]
    for path in ('/home/anna/secret/test/NORMAL/a.jpeg', '../../secret/test/NORMAL/a.jpeg'):
        table = copy.predictions
        table.assign(path=table.path.replace(worst, path)).to_csv(copy / 'predictions.csv', index=False)
        words = Page(report(copy).read_text()).words
        assert 'secret' not in words and 'test/NORMAL/a.jpeg' in words.replace('\n', '')
        assert 'some or all come from elsewhere' in words
        worst = path


def test_a_report_without_a_decision_or_with_anothers_says_nothing_of_it(copy):
    margin = copy.decision['margin']
    assert margin in report(copy).read_text()
    changed = copy.decision | {'threshold': 0.123}
    (copy / 'decision.json').write_text(json.dumps(changed))
    assert margin not in report(copy).read_text()
    (copy / 'decision.json').unlink()
    assert 'of pneumonia are called' not in report(copy).read_text()


def test_the_commands_give_the_same_page_again(copy, images, monkeypatch):
    monkeypatch.setattr('cxr_fastai.interpretation.interpretation.save_figures', lambda *_: [])
    assert (
        main(['evaluate', str(copy.path), '--data', str(images), '--threshold', 'cost:3/1', '--prevalence', '5']) == 0
    )
    lines = card.reproduce(copy, 'test').splitlines()
    assert lines[1] == 'cxr-fastai evaluate RUN --split test --threshold cost:3/1 --prevalence 5'
    assert lines[0].endswith('--out RUN') and lines[2] == 'cxr-fastai report RUN'


def test_names_that_may_be_persons_can_be_hidden(copy):
    table = copy.predictions
    worst = worst_errors(copy.predicted('test')).path.iloc[0]
    named = table.assign(path=table.path.replace(worst, 'test/NORMAL/Meier_Anna.jpeg'))
    named.to_csv(copy / 'predictions.csv', index=False)
    assert 'Meier_Anna' in report(copy).read_text()
    hidden = report(copy, hide_names=True).read_text()
    assert 'Meier' not in hidden and re.search(r'image-\d+\.jpeg', hidden)


def test_images_are_shown_where_evaluate_left_their_pictures(copy):
    test, page = copy.predicted('test'), report(copy).read_text()
    shown = pd.concat([worst_errors(test), typical_hits(test)])
    assert page.count('<img src="data:image/png;base64,') == len(shown) and 'no picture at hand' not in page
    shutil.rmtree(copy / 'figures/images')
    assert report(copy).read_text().count('no picture at hand') == len(shown)


def test_errors_are_the_most_certain_ones_and_hits_the_middle_of_each_class(evaluated):
    images = pd.DataFrame(
        {
            'path': list('abcdefgh'),
            'label': ['NORMAL'] * 4 + ['PNEUMONIA'] * 4,
            'p_pneumonia': [0.1, 0.2, 0.4, 0.9, 0.95, 0.6, 0.7, 0.3],
        }
    )
    images['prediction'] = images.p_pneumonia.map(lambda p: 'PNEUMONIA' if p >= 0.5 else 'NORMAL')
    right = images.p_pneumonia.where(images.label == 'PNEUMONIA', 1 - images.p_pneumonia)
    images['loss'] = -right.map(__import__('math').log)
    assert worst_errors(images).path.to_list() == ['d', 'h']
    assert typical_hits(images, 2).path.to_list() == ['b', 'g']


def test_targets_are_judged_with_their_intervals():
    estimate = lambda value, low, high: {'value': value, 'low': low, 'high': high}
    found = lambda sensitivity: judge_targets({'sensitivity': sensitivity, 'specificity': estimate(None, None, None)})
    assert found(estimate(0.97, 0.96, 0.98))[0]['verdict'] == ('good', 'met')
    assert 'reaches below' in found(estimate(0.96, 0.94, 0.98))[0]['verdict'][1]
    assert found(estimate(0.90, 0.86, 0.93))[0]['verdict'] == ('error', 'missed')
    assert 'reaches it' in found(estimate(0.94, 0.90, 0.96))[0]['verdict'][1]
    assert found(estimate(0.94, 0.90, 0.96))[1]['verdict'][1] == 'cannot be told'


def test_validation_images_are_called_what_they_are(copy):
    metrics = json.loads((copy / 'metrics.json').read_text())
    (copy / 'metrics.json').write_text(json.dumps({'valid': metrics['valid']}))
    words = Page(report(copy).read_text()).words
    assert 'These are valid images, not test images' in words and 'optimistic' in words


def test_an_audit_is_shown_if_it_is_of_these_images(copy, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'were not audited' in report(copy).read_text()
    (tmp_path / 'elsewhere').mkdir()
    main(['data', 'audit', str(images), '--out', str(tmp_path / 'elsewhere/audit')])
    text = report(copy, tmp_path / 'elsewhere/audit').read_text()
    told = json.loads((tmp_path / 'elsewhere/audit/audit.json').read_text())
    assert [finding['name'] for finding in told['findings']] == [TOO_SMALL] and TOO_SMALL not in text  # the run says so
    assert 'Nothing was found to be wrong' in text and 'were not audited' not in text
    told['findings'].append({'level': 'warning', 'name': 'planted', 'count': 3, 'advice': 'Dig it up.', 'images': []})
    shutil.copytree(tmp_path / 'elsewhere/audit', tmp_path / 'audit')
    (tmp_path / 'audit/audit.json').write_text(json.dumps(told))
    assert 'planted: 3. Dig it up.' in report(copy).read_text()  # found by itself
    assert read_audit(tmp_path / 'audit', copy)['images'] == 60
    for other in (told | {'identity': 'another'}, {}, [1]):
        (tmp_path / 'audit/audit.json').write_text(json.dumps(other))
        assert 'were not audited' in report(copy).read_text()
        with pytest.raises(UsageError, match='is about other images'):
            report(copy, tmp_path / 'audit')
    with pytest.raises(UsageError, match='no such file'):
        report(copy, tmp_path / 'nowhere')


def test_the_flow_counts_every_image(evaluated):
    flow = describe_flow(evaluated)
    assert flow['found'] == 60 == sum(sum(labels.values()) for labels in flow['splits'].values()) + flow['unreadable']


def test_a_run_that_was_not_evaluated_is_told_so(run, capsys, tmp_path):
    shutil.copytree(run.path, tmp_path / 'run')
    assert main(['report', str(tmp_path / 'run')]) == 2
    assert 'nothing was evaluated yet: `cxr-fastai evaluate' in capsys.readouterr().err


def test_metrics_of_an_older_version_other_predictions_or_another_network_are_refused(copy, evaluated):
    metrics = copy.metrics
    (copy / 'metrics.json').write_text(json.dumps({'test': {'n': 12, 'auc': metrics['test']['auc']}}))
    with pytest.raises(UsageError, match='older version.*evaluate .* --split test'):
        report(copy)
    (copy / 'metrics.json').write_text(
        json.dumps(metrics | {'test': {name: figure for name, figure in metrics['test'].items() if name != 'mcc'}})
    )
    with pytest.raises(UsageError, match='older version'):
        report(copy)
    (copy / 'metrics.json').write_text(json.dumps(metrics))
    copy.predictions.iloc[1:].to_csv(copy / 'predictions.csv', index=False)
    with pytest.raises(UsageError, match='are of 12 images, predictions.csv of 11'):
        report(copy)
    shutil.copy(evaluated / 'predictions.csv', copy / 'predictions.csv')
    save_file(load_file(copy / 'model.safetensors'), copy / 'model.safetensors', {'another': 'network'})
    with pytest.raises(UsageError, match='of another network'):
        report(copy)


def test_robustness_is_shown_where_it_was_measured(copy):
    rows = [('clean', 0, 0.99), *(('blur', s, 0.95) for s in range(1, 6)), ('shortcut', 0, 0.90)]
    table = pd.DataFrame(rows, columns=['corruption', 'strength', 'auc']).assign(
        n=12, auc_low=0.8, auc_high=0.995, sensitivity=1.0, specificity=1.0, split='test'
    )
    table.to_csv(copy / 'robustness.csv', index=False)
    words = Page(report(copy).read_text()).words
    assert 'AUC 0.990 on clean images' in words and '0.090\nlost without the shortcut' in words


def test_the_checklist_claims_nothing_that_is_not_there():
    topics = {topic.name: topic for topic in TOPICS}
    assert topics['Robustness'].status(SECTIONS.keys() - {'robustness'}) == 'needs a human'
    assert topics['Robustness'].status(SECTIONS) == 'partly' and topics['Network'].status(SECTIONS) == 'filled'
    assert topics['Explanations'].status({*SECTIONS, 'cams'}) == 'partly'
    assert topics['Explanations'].status(SECTIONS) == topics['Internal evaluation'].status(SECTIONS) == 'needs a human'
    assert topics['Internal evaluation'].status({*SECTIONS, 'internal'}) == 'filled'
    assert all(topic.human for topic in TOPICS if not topic.where)
    told = {int(part) for topic in TOPICS for item in topic.claim.split(', ') if item for part in _span(item)}
    assert told == set(range(1, 45))  # CLAIM has 44 items, TRIPOD+AI 27 with their parts
    parts = {
        '3': 'abc',
        '5': 'ab',
        '6': 'abc',
        '8': 'abc',
        '9': 'abc',
        '12': 'abcdefg',
        '18': 'abcdef',
        '20': 'abc',
        '23': 'ab',
        '27': 'abc',
    }
    wanted = {f'{n}{part}' for n in range(1, 28) for part in parts.get(str(n), [''])}
    assert {item for topic in TOPICS for item in _letters(topic.tripod)} == wanted


def _letters(items: str) -> list[str]:
    """`3a-3c, 9b` as 3a, 3b, 3c and 9b."""
    told = []
    for item in filter(None, items.split(', ')):
        first, _, last = item.partition('-')
        letters = 'abcdefg'[ord(first[-1]) - 97 : ord(last[-1]) - 96] if last else ''
        told += [first[:-1] + letter for letter in letters] or [first]
    return told


def _span(item: str) -> range:
    first, _, last = item.partition('-')
    return range(int(first), int(last or first) + 1)


def test_the_card_is_in_the_hubs_format(copy):
    hub = pytest.importorskip('huggingface_hub')
    card = hub.ModelCard(render_card(copy, 'test'))
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert card.data.library_name == 'fastai' and card.data.pipeline_tag == 'image-classification'
    assert results['roc_auc'] == pytest.approx(copy.metrics['test']['auc']['value'], abs=1e-4)
    assert results['recall'] == pytest.approx(copy.metrics['test']['sensitivity']['value'], abs=1e-4)
    assert {'dataset_split': 'test'}.items() <= vars(card.data.eval_results[0]).items()
    for words in ('not a medical device', describe(copy.metrics['test']['auc']), 'To be written by a human', '422,530'):
        assert words in card.content


def test_the_card_names_no_folder_and_no_host(copy, images):
    report(copy)
    import platform

    for name in ('model_card.md', 'report.html'):
        text = (copy / name).read_text()
        for secret in (str(images), str(Path.home()), str(copy.path), platform.node()):
            if len(secret) > 5:
                assert secret not in text, (name, secret)


def test_the_card_tells_what_an_older_run_did_not_write_down(copy):
    (copy / 'journal.jsonl').unlink()
    facts = describe_run(copy)
    assert 'not recorded' in facts['Hardware'] and facts['Versions'] == 'not recorded'


@pytest.mark.parametrize(
    'options',
    [
        '',
        '--arch resnet50 --epochs 4 --lr 0.01',
        '--recipe tuned --set ema=0.9 --limit 5',
        '--valid patients --size 96 --seed 7 --resize pad --set class_weights=true --allow-leakage --on-bad-image skip '
        '--weights none --batch-size 16',
    ],
)
def test_the_command_that_reproduces_a_run_gives_its_recipe(options, monkeypatch, images, tmp_path):
    recipes = []
    monkeypatch.setattr(
        'cxr_fastai.training.training.train', lambda recipe, *_, **__: recipes.append(recipe) or Run(tmp_path)
    )
    assert main(['train', '--data', str(images), '--precision', 'fp32', *options.split()]) == 0
    typed = command_line(recipes[0]).replace('DIR', str(images)).split()
    assert typed[:2] == ['cxr-fastai', 'train'] and main(typed[1:]) == 0
    assert recipes[0] == recipes[1] and isinstance(recipes[1], Recipe)


def test_a_pdf_needs_a_browser(copy, capsys, monkeypatch):
    monkeypatch.setattr('cxr_fastai.publishing.reporting.shutil.which', lambda _: None)
    assert main(['report', str(copy.path), '--pdf']) == 1
    assert 'neither Chromium nor Chrome was found' in capsys.readouterr().err
    assert (copy / 'report.html').is_file() and not (copy / 'report.pdf').exists()


@pytest.mark.skipif(not find_browser(), reason='no Chromium or Chrome here')
def test_the_pdf_is_the_page(copy):
    assert main(['report', str(copy.path), '--pdf']) == 0
    made = (copy / 'report.pdf').read_bytes()
    assert made.startswith(b'%PDF-') and made.count(b'/Type /Page\n') >= 3
    assert main(['report', str(copy.path)]) == 0 and not (copy / 'report.pdf').exists()  # it would tell something else


def test_a_browser_that_fails_leaves_the_old_pdf(copy, tmp_path, monkeypatch, capsys):
    (copy / 'report.pdf').write_text('precious')
    (broken := tmp_path / 'chromium').write_text('#!/bin/sh\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setattr('cxr_fastai.publishing.reporting.find_browser', lambda: str(broken))
    assert main(['report', str(copy.path), '--pdf']) == 1 and 'exit status 3' in capsys.readouterr().err
    assert (copy / 'report.pdf').read_text() == 'precious'
