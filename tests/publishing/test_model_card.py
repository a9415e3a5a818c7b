"""The model card contains the facts and metrics of a run, and the commands that reproduce it."""

import json
import shutil

import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.recipe import AUGMENTATION_FIELDS, Recipe
from cxr_fastai.core.recipe_texts import command_line
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.publishing.model_card import describe_run, render_card, reproduce
from cxr_fastai.training import training


def test_the_card_has_the_format_of_the_hub(evaluated):
    hub = pytest.importorskip('huggingface_hub', reason='needs pip install "cxr_fastai[hub]"')
    metrics = evaluated.metrics['test']
    card = hub.ModelCard(render_card(evaluated, 'test'))
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert card.data.library_name == 'fastai' and card.data.pipeline_tag == 'image-classification'
    assert results['roc_auc'] == pytest.approx(metrics['auc']['value'], abs=1e-4)
    assert results['recall'] == pytest.approx(metrics['sensitivity']['value'], abs=1e-4)
    assert card.data.eval_results[0].dataset_split == 'test'
    for text in ('not a medical device', format_estimate(metrics['auc']), 'To be written by a human', '422,530'):
        assert text in card.content


def test_facts_that_an_older_run_did_not_record_are_marked(evaluated, tmp_path):
    run = Run(tmp_path / 'run')
    shutil.copytree(evaluated.path, run.path)
    (run / 'journal.jsonl').unlink()
    facts = describe_run(run)
    assert 'not recorded' in facts['Hardware'] and facts['Versions'] == 'not recorded'


STEPS = {'mixup', *AUGMENTATION_FIELDS} - {'low_pass', 'interpolation', 'crop_aspect'}


@pytest.mark.parametrize('field', sorted(STEPS))
def test_the_card_names_every_augmentation(field, evaluated, tmp_path):
    shutil.copytree(evaluated.path, tmp_path / 'run')
    fields = json.loads((tmp_path / 'run' / 'recipe.json').read_text())
    none = {name: getattr(Recipe, name, 0) for name in AUGMENTATION_FIELDS} | {'flip': 0, 'degrees': 0, 'translate': 0}
    none |= {'brightness': 0, 'contrast': 0, 'mixup': 0}

    def augmentation(**changes):
        (tmp_path / 'run' / 'recipe.json').write_text(json.dumps(fields | none | changes))
        return describe_run(Run(tmp_path / 'run'))['Augmentation']

    assert augmentation() == 'training images only: none'
    assert augmentation(**{field: {'jpeg': 50, 'blur': 0.01}.get(field, 0.5)}) != augmentation()


def test_the_commands_contain_the_options_of_the_evaluation(evaluated, images, tmp_path):
    run = Run(tmp_path / 'run')
    shutil.copytree(evaluated.path, run.path)
    evaluate(run, images, rule='cost:3/1', prevalences=[0.05], again=False)
    train_command, evaluate_command, report_command = reproduce(run, 'test').splitlines()
    assert train_command.endswith('--out RUN')
    assert evaluate_command == 'cxr-fastai evaluate RUN --split test --threshold cost:3/1 --prevalence 5%'
    assert report_command == 'cxr-fastai report RUN'


@pytest.mark.parametrize(
    'options',
    [
        '',
        '--arch resnet50 --epochs 4 --lr 0.01',
        '--arch resnet50 --epochs 9 --freeze-epochs 5 --patience 3',
        '--recipe tuned --set ema=0.9 --limit 5',
        '--valid official --size 96 --seed 7 --resize pad --set class_weights=true --allow-leakage --on-bad-image skip '
        '--weights none --batch-size 16',
    ],
)
def test_the_command_that_reproduces_a_run_gives_its_recipe(options, monkeypatch, images, tmp_path):
    recipes = []

    def record(recipe: Recipe, *_: object, **__: object) -> Run:
        recipes.append(recipe)
        return Run(tmp_path)

    monkeypatch.setattr(training, 'train', record)
    assert main(['train', '--data', str(images), '--precision', 'fp32', *options.split()]) == 0
    program, *words = command_line(recipes[0]).replace('DIR', str(images)).split()
    assert program == 'cxr-fastai' and main(words) == 0
    assert recipes[0] == recipes[1] and isinstance(recipes[1], Recipe)
