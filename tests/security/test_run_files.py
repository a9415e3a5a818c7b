"""Files of a run that somebody changed, damaged or mixed are refused in one line, and never become wrong results."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from runfiles import seal_results

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.evaluation.comparison import compare_runs
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.publishing.exporting import export
from cxr_fastai.publishing.reporting import report

RESULTS = ('predictions.csv', 'decision.json', 'metrics.json')


@pytest.fixture
def copy(evaluated, tmp_path) -> Run:
    """A copy of the evaluated run, to be changed."""
    return Run(shutil.copytree(evaluated.path, tmp_path / 'run'))


@pytest.fixture
def refused(capsys):
    """Run a command, which must fail with an error of one line; the line."""

    def run(*words: object) -> str:
        capsys.readouterr()
        code = main([str(word) for word in words])
        err = capsys.readouterr().err
        assert code in (1, 2), err
        assert err.startswith('error: ') and err.count('\n') == 1 and 'Traceback' not in err, err
        return err

    return run


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_predictions(run: Run, edit) -> None:
    table = run.predictions
    edit(table).to_csv(run / 'predictions.csv', index=False)


def inverted(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(p_pneumonia=1 - table.p_pneumonia)


MIXED = {
    'inverted probabilities': lambda run: change_predictions(run, inverted),
    'an image less': lambda run: change_predictions(run, lambda table: table.iloc[1:]),
    'another order': lambda run: change_predictions(run, lambda table: table.iloc[::-1]),
    'another label': lambda run: change_predictions(run, lambda table: table.assign(label='NORMAL')),
    'another class': lambda run: change_predictions(run, lambda table: table.assign(prediction='NORMAL')),
    'another threshold': lambda run: change(run / 'decision.json', threshold=0.9),
    'another temperature': lambda run: change(run / 'decision.json', temperature=2.0),
    'another patient': lambda run: change_predictions(run, lambda table: table.assign(patient='1')),
    'another loss': lambda run: change_predictions(run, lambda table: table.assign(loss=0.0)),
    'no decision': lambda run: (run / 'decision.json').unlink(),
    'another PPV': lambda run: edit_metrics(run, lambda metrics: metrics['ppv'].update(value=0.99)),
    'another AUC interval': lambda run: edit_metrics(run, lambda metrics: metrics['auc'].update(low=0.99)),
    'more patients': lambda run: edit_metrics(run, lambda metrics: metrics.update(patients=600)),
    'another threshold in metrics': lambda run: edit_metrics(run, lambda metrics: metrics.update(threshold=0.9)),
    'another low pass': lambda run: change(run / 'recipe.json', low_pass=0.1),
    'another size': lambda run: change(run / 'recipe.json', size=96),
    'images of another training': lambda run: run.items.iloc[1:].to_csv(run / 'items.csv', index=False),
    'another history': lambda run: run.history.iloc[:-1].to_csv(run / 'history.csv', index=False),
    'no hash of the decision': lambda run: edit_metrics(run, lambda metrics: metrics['hashes'].update(decision=None)),
    'no hashes': lambda run: edit_metrics(run, lambda metrics: metrics.pop('hashes')),
    'no predictions': lambda run: (run / 'predictions.csv').unlink(),
}


@pytest.mark.parametrize('mix', MIXED.values(), ids=MIXED)
def test_results_that_do_not_belong_together_are_refused(mix, copy, evaluated, tmp_path):
    mix(copy)
    for use in (report, export, lambda run: compare_runs([evaluated, run], 'test', tmp_path / 'comparison')):
        with pytest.raises(UsageError):
            use(copy)
    assert not (copy / 'report.html').exists() and not (copy / 'bundle').exists()


def edit_metrics(run: Run, edit) -> None:
    metrics = json.loads((run / 'metrics.json').read_text())
    edit(metrics['test'])
    (run / 'metrics.json').write_text(json.dumps(metrics))


def test_metrics_with_the_right_hashes_are_computed_again(copy):
    edit_metrics(copy, lambda metrics: metrics['sensitivity'].update(value=0.999))
    seal_results(copy.path)
    with pytest.raises(UsageError, match='say sensitivity 0.999, but that of predictions.csv is'):
        report(copy)
    change_predictions(copy, inverted)
    seal_results(copy.path)
    with pytest.raises(UsageError, match=r'the metrics of test say .* Run `cxr-fastai evaluate'):
        report(copy)


@pytest.mark.parametrize('n_written', [0, 1, 2])
def test_a_crash_between_the_files_of_an_evaluation_leaves_no_mixed_results(n_written, copy, images, monkeypatch):
    replace = os.replace
    written = []

    def crash(source, target):
        if Path(target).name in RESULTS:
            if len(written) == n_written:
                raise KeyboardInterrupt
            written.append(Path(target).name)
        replace(source, target)

    before = {name: (copy / name).read_bytes() for name in RESULTS}
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', crash)
        with pytest.raises(KeyboardInterrupt):
            evaluate(copy, images, 'test', rule='fixed:0.9')
    if n_written == 0:
        assert {name: (copy / name).read_bytes() for name in RESULTS} == before
    else:
        with pytest.raises(UsageError, match=r'evaluate .* again'):
            report(copy)
    metrics = evaluate(copy, images, 'test', rule='fixed:0.9')
    assert copy.metrics['test'] == metrics and report(copy).is_file()


KILLED = """
import os, signal, sys
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate
replace = os.replace
def kill_before_the_metrics(source, target):
    if str(target).endswith('metrics.json'):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_before_the_metrics
evaluate(Run(sys.argv[1]), sys.argv[2], 'test', rule='fixed:0.9')
"""


@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
def test_an_evaluation_that_was_killed_leaves_no_mixed_results(copy, images, refused):
    process = subprocess.run([sys.executable, '-c', KILLED, copy.path, images], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert copy.decision['threshold'] == 0.9
    for command in (['report', copy.path], ['export', copy.path], ['predict', copy.path, next(images.rglob('*.jpeg'))]):
        assert 'evaluate' in refused(*command)
    metrics = evaluate(copy, images, 'test', rule='fixed:0.9')
    assert copy.metrics['test'] == metrics and report(copy).is_file()


NUMBERS = ['NaN', '-5', 'true', '"0.5"', '1e999', '[0.5]', '{}', '1.5', '9' * 1000]


@pytest.mark.parametrize('value', NUMBERS)
@pytest.mark.parametrize('field', ['threshold', 'temperature'])
def test_a_decision_with_an_impossible_number_is_refused(field, value, copy, images, refused):
    if field == 'temperature' and value == '1.5':
        value = '0'
    facts = json.loads((copy / 'decision.json').read_text())
    facts.pop(field)
    (copy / 'decision.json').write_text(json.dumps(facts)[:-1] + f', "{field}": {value}}}')
    image = next(images.rglob('*.jpeg'))
    line = refused('predict', copy.path, image)
    assert 'decision.json' in line


BAD_JSON = {
    'a repeated key': '{"threshold": 0.5, "threshold": 0.1, "rule": "fixed:0.5"}',
    'a list': '[]',
    'a number': '1',
    'depth': '{"a": ' * 5000 + '1' + '}' * 5000,
    'not UTF-8': b'{"a": "\xff"}',
    'half': '{"threshold": 0.5',
    'a rule of 1 MB': json.dumps({'threshold': 0.5, 'rule': 'x' * 2**20}),
}


@pytest.mark.parametrize('content', BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize('name', ['recipe.json', 'decision.json', 'metrics.json'])
def test_a_damaged_json_file_is_refused(name, content, copy, refused):
    (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert name in refused('report', copy.path)


@pytest.mark.parametrize('p', ['nan', '', '-0.1', '1.1', 'inf', 'a', '0x1'])
def test_a_probability_out_of_range_is_refused(p, copy, refused):
    change_predictions(copy, lambda table: table.assign(p_pneumonia=[p, *table.p_pneumonia.astype(str)[1:]]))
    assert 'predictions.csv: damaged' in refused('report', copy.path)


BAD_TABLES = {
    'no header': b'',
    'null characters': b'\0' * 100,
    'another table': b'a,b\n1,2\n',
    'an unknown label': b'path,label,split,patient,p_pneumonia,prediction,loss\nx,CAT,test,1,0.5,NORMAL,1\n',
    'an unknown split': b'path,label,split,patient,p_pneumonia,prediction,loss\nx,NORMAL,TEST,1,0.5,NORMAL,1\n',
    'an image twice': b'path,label,split,patient,p_pneumonia,prediction,loss\n' + b'x,NORMAL,test,1,0.5,NORMAL,1\n' * 2,
    'an open quote': b'path,label,split,patient,p_pneumonia,prediction,loss\n"x,NORMAL,test,1,0.5,NORMAL,1\n' * 3,
    'more cells': b'path,label,split,patient,p_pneumonia,prediction,loss\nx,NORMAL,test,1,0.5,NORMAL,1,2,3\n',
    'not UTF-8': b'path,label,split,patient,p_pneumonia,prediction,loss\n\xff,NORMAL,test,1,0.5,NORMAL,1\n',
}


@pytest.mark.parametrize('content', BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_damaged_table_is_refused(content, copy, refused):
    (copy / 'predictions.csv').write_bytes(content)
    refused('report', copy.path)


@pytest.mark.parametrize('name', ['recipe.json', 'decision.json', 'metrics.json', 'predictions.csv', 'items.csv'])
def test_a_pipe_or_device_in_place_of_a_file_is_refused_at_once(name, copy, refused):
    for make in (os.mkfifo, lambda path: os.symlink('/dev/zero', path), os.mkdir):
        (copy / name).unlink(missing_ok=True)
        make(copy / name)
        assert f'{name}: a' in refused('report', copy.path)
        if (copy / name).is_dir():
            (copy / name).rmdir()
        else:
            (copy / name).unlink()


def test_a_pipe_in_place_of_the_network_or_a_manifest_is_named(copy, images, tmp_path, refused):
    image = next(images.rglob('*.jpeg'))
    (copy / 'model.safetensors').unlink()
    os.mkfifo(copy / 'model.safetensors')
    for command in (['report', copy.path], ['predict', copy.path, image]):
        assert 'model.safetensors: a pipe' in refused(*command)
    os.mkfifo(tmp_path / 'manifest.json')
    assert 'manifest.json: a pipe' in refused('predict', tmp_path, image)


def test_lines_of_a_journal_that_are_damaged_are_ignored(copy):
    images = copy.images
    with open(copy / 'journal.jsonl', 'a') as journal:
        journal.write('{"event": "start", "data": 5}\n[]\n{"event": "start", "unreadable": [1]}\n{"event": NaN}\n')
    assert copy.images == images and copy.unreadable == []


ODD_FIELDS = {
    'seconds as text': lambda run: edit_cell(run, 'history.csv', 'seconds', 'long'),
    'a loss as text': lambda run: edit_cell(run, 'predictions.csv', 'loss', 'high'),
    'an AUC as text': lambda run: edit_cell(run, 'robustness.csv', 'auc', 'good'),
    'history without columns': lambda run: (run / 'history.csv').write_text('phase,epoch\ntrain,1\n'),
    'items without kind': lambda run: (run / 'items.csv').write_text('path,label,split\nx,NORMAL,train\n'),
    'a margin as number': lambda run: change(run / 'decision.json', margin=5),
    'valid as list': lambda run: change(run / 'decision.json', valid=[1]),
    'patients as list': lambda run: change_metrics(run, patients_by_class=[]),
    'intervals as text': lambda run: change_metrics(run, intervals='x'),
    'subgroups as number': lambda run: change_metrics(run, subgroups=3),
}


def edit_cell(run: Run, name: str, column: str, value: str) -> None:
    if name == 'robustness.csv':
        (run / name).write_text(
            'corruption,strength,n,auc,auc_low,auc_high,sensitivity,specificity,split,model,sha256\n'
            'clean,0,9,0.9,0.8,1,1,1,test,,\n'
        )
    table = pd.read_csv(run / name, dtype=str)
    table.loc[0, column] = value
    table.to_csv(run / name, index=False)


def change_metrics(run: Run, **fields: object) -> None:
    edit_metrics(run, lambda metrics: metrics.update(fields))
    seal_results(run.path)


@pytest.mark.parametrize('edit', ODD_FIELDS.values(), ids=ODD_FIELDS)
def test_an_odd_field_is_an_error_of_one_line(edit, copy, refused):
    edit(copy)
    refused('report', copy.path)


def test_a_prediction_with_another_decision_than_the_metrics_is_refused_until_it_is_evaluated(copy, images, refused):
    change(copy / 'decision.json', threshold=0.9)
    image = next(images.rglob('*.jpeg'))
    assert 'another decision' in refused('predict', copy.path, image)
    evaluate(copy, images, 'test')
    assert main(['predict', str(copy.path), str(image)]) == 0


def test_an_evaluation_that_fails_changes_no_result(copy, tmp_path, refused):
    change(copy / 'decision.json', threshold=0.9)
    before = {name: (copy / name).read_bytes() for name in RESULTS}
    refused('evaluate', copy.path, '--data', tmp_path)
    assert {name: (copy / name).read_bytes() for name in RESULTS} == before


def test_a_prediction_with_another_recipe_than_the_metrics_is_refused_until_it_is_evaluated(copy, images, refused):
    before = copy.predicted('valid')
    change(copy / 'recipe.json', low_pass=0.1)
    assert 'another training' in refused('predict', copy.path, next(images.rglob('*.jpeg')))
    evaluate(copy, images, 'test')
    assert (copy.predicted('valid').p_pneumonia != before.p_pneumonia).any()  # predicted again, not reused


def test_a_temperature_that_was_never_fitted_is_not_published(copy, images, tmp_path, refused):
    (copy / 'predictions.csv').unlink()
    (copy / 'metrics.json').unlink()
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    copy.log_event('resume', data=str(tmp_path / 'nowhere'))
    for _ in range(2):
        evaluate(copy, tmp_path / 'elsewhere', 'test', rule='fixed:0.3')
    assert copy.decision['temperature'] is None
    page = report(copy).read_text()
    assert 'No temperature was fitted' in page and 'The temperature is fitted' not in page
    bundle = export(copy)
    assert 'needs a temperature' in refused('predict', bundle, next(images.rglob('*.jpeg')), '--calibrated')


def test_a_changed_decision_is_not_accepted_where_the_validation_images_are_missing(copy, images, tmp_path):
    metrics = json.loads((copy / 'metrics.json').read_text())
    (copy / 'metrics.json').write_text(json.dumps({'test': metrics['test']}))  # valid was never predicted
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    copy.log_event('resume', data=str(tmp_path / 'nowhere'))
    change(copy / 'decision.json', threshold=0.3)
    with pytest.raises(UsageError, match=r'another decision .* name the folder that the run was trained on'):
        evaluate(copy, tmp_path / 'elsewhere', 'test')
    evaluate(copy, tmp_path / 'elsewhere', 'test', rule='fixed:0.3')
    report(copy)
    assert copy.metrics['test']['threshold'] == Predictor.load(copy.path).threshold == copy.decision['threshold'] == 0.3


@pytest.mark.parametrize('fields', [{'threshold': 0.9}, {'temperature': 2.0}, {'rule': 'youden'}, {'model': 'a' * 64}])
def test_a_changed_decision_with_the_right_hash_is_refused(copy, fields):
    change(copy / 'decision.json', **fields)
    seal_results(copy.path)
    for use in (report, export):
        with pytest.raises(UsageError, match=r'another decision than that in decision.json. Run `cxr-fastai evaluate'):
            use(copy)


def test_a_prediction_without_results_says_which_threshold_it_uses(copy, images, refused, capsys):
    image = next(images.rglob('*.jpeg'))
    (copy / 'metrics.json').unlink()
    assert 'metrics.json is missing' in refused('predict', copy.path, image)
    (copy / 'decision.json').unlink()
    assert main(['predict', str(copy.path), str(image)]) == 0
    assert 'probability of 0.5 or more: a fixed threshold, not chosen' in capsys.readouterr().out


def test_metrics_without_hashes_must_be_computed_again(copy, refused):
    metrics = json.loads((copy / 'metrics.json').read_text())
    for values in metrics.values():
        del values['hashes']
    (copy / 'metrics.json').write_text(json.dumps(metrics))
    assert 'older version' in refused('report', copy.path)


@pytest.mark.parametrize('content', [b'', b'\xff', b'"x', b'path,label\n"x'])
def test_a_damaged_table_of_any_columns_is_refused(content, tmp_path):
    (tmp_path / 'list.csv').write_bytes(content)
    with pytest.raises(CXRError, match='^[^\n]*list.csv: '):
        CXRDataLoaders.from_csv(tmp_path / 'list.csv', fn_col='path', label_col='label')
