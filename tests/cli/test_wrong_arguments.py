"""Arguments in the wrong order, missing files and files of another kind are named for what they are."""

import shutil

import pytest

import cxr_fastai.cli.serve as serve
from cxr_fastai.cli import main
from cxr_fastai.core.foreign import LFS_POINTER
from cxr_fastai.inference.pretrained import FOLDER

POINTER = LFS_POINTER + b'.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'
ORDER = 'Name the model first, then the images'


@pytest.fixture
def image(images):
    return next((images / 'test/NORMAL').iterdir())


def test_the_images_before_the_model_are_told_apart(fails, images, image, run, bundle, tmp_path):
    table = tmp_path / 'images.csv'
    table.write_text('path\n')
    out = ['--out', tmp_path / 'maps']
    fails(['predict', image, run.path], 2, f'a run folder, which contains no images. {ORDER}|an image. {ORDER}')
    fails(['predict', image, bundle], 2, f'a bundle, which contains no images. {ORDER}')
    fails(['predict', images / 'test', image], 2, f'no model there. {ORDER}')
    fails(['predict', images / 'test', bundle], 2, f'a bundle, which contains no images. {ORDER}')
    fails(['predict', table, image], 2, 'not a model file.*images come after the model')
    fails(['explain', image, run.path, *out], 2, ORDER)


def test_images_among_the_runs_are_named(fails, images, run, bundle, image):
    example = f'`cxr-fastai evaluate {run.path} --data {images}`'
    fails(['evaluate', images, run.path], 2, f'not a run folder. Name the run first and images with --data: {example}')
    fails(['evaluate', run.path, images], 2, f'images with --data: {example}')
    fails(['evaluate', images], 2, 'not a run folder .*Name a folder that `cxr-fastai train` wrote, and images with')
    fails(['evaluate', image], 2, 'not a run folder')
    fails(['export', images], 2, 'not a run folder')


def test_a_model_in_place_of_a_data_set_is_named(fails, bundle):
    fails(['train', '--data', bundle], 1, 'a bundle, not a folder of images')
    fails(['data', 'audit', bundle], 1, 'a bundle, not a folder of images')


def test_a_repository_before_the_bundle_is_named(fails, bundle):
    pytest.importorskip('huggingface_hub')
    fails(['push-to-hub', 'me/x', bundle], 2, 'a bundle, not a repository.*the other way round')


@pytest.mark.parametrize('command', [['evaluate'], ['export'], ['report'], ['train', '--resume']], ids=' '.join)
def test_a_missing_run_is_no_folder_without_a_recipe(fails, tmp_path, command):
    fails([*command, tmp_path / 'gone'], 2, f'{tmp_path / "gone"}: no such run folder. Check the name')


@pytest.mark.parametrize('name', ['model.safetensors', 'recipe.json', 'items.csv'])
def test_pointers_of_git_lfs_in_a_run_are_named(fails, run, images, tmp_path, name):
    copy = shutil.copytree(run.path, tmp_path / 'run')
    (copy / name).write_bytes(POINTER)
    fails(['evaluate', copy, '--data', images, '--limit', '3'], 2, f'{name}: a pointer of Git LFS.*git lfs pull')


def test_pointers_of_git_lfs_in_place_of_a_state_weights_and_images_are_named(fails, run, images, tmp_path, image):
    copy = shutil.copytree(run.path, tmp_path / 'run')
    (copy / 'state.pt').write_bytes(POINTER)
    fails(['train', '--resume', copy, '--epochs', '3'], 2, 'state.pt: a pointer of Git LFS.*git lfs pull')
    pointer = tmp_path / 'weights.jpeg'
    pointer.write_bytes(POINTER)
    training = ['train', '--data', images, '--size', '48', '--workers', '0', '--out', tmp_path / 'new']
    fails([*training, '--weights', pointer], 2, 'a pointer of Git LFS.*git lfs pull')
    fails(['predict', run.path, pointer], 3, 'E_FORMAT: a pointer of Git LFS, not the file itself. Run `git lfs pull`')


@pytest.fixture
def refused(capsys):
    """Runs a command that must exit with 2 before it prints anything but its error, and returns the error."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        output, error = capsys.readouterr()
        assert output == '' and error.count('error: ') == 1
        return error

    return run


def test_serving_a_run_names_the_commands_that_make_its_bundle(refused, run, evaluated, tmp_path):
    error = refused('serve', evaluated.path)
    bundle = evaluated.path / 'bundle'
    assert (
        f'a run folder, not a bundle. Make a bundle by `cxr-fastai export {evaluated.path}`, and name {bundle}' in error
    )
    error = refused('serve', run.path)
    assert f'by `cxr-fastai evaluate {run.path}`, then `cxr-fastai export {run.path}`, and name' in error
    error = refused('push-to-hub', evaluated.path, 'me/x')
    assert f'`cxr-fastai export {evaluated.path}`' in error
    exported = tmp_path / 'exported run'
    shutil.copytree(evaluated.path, exported)
    shutil.copytree(FOLDER, exported / 'bundle')
    assert f"Name the bundle in it: '{exported / 'bundle'}'." in refused('serve', exported)


def test_serving_an_unfinished_run_says_how_to_finish_it(refused, run, tmp_path):
    for name in ('recipe.json', 'state.pt'):
        shutil.copy(run.path / name, tmp_path)
    assert f'`cxr-fastai train --resume {tmp_path}` continues it' in refused('serve', tmp_path)
    (tmp_path / 'state.pt').unlink()
    assert 'its training has not finished' in refused('serve', tmp_path)


def test_serving_a_folder_without_a_bundle_or_its_model_announces_nothing(refused, tmp_path):
    assert 'not a bundle. `cxr-fastai export RUN` makes one' in refused('serve', tmp_path)
    shutil.copytree(FOLDER, tmp_path / 'part')
    (tmp_path / 'part/model.onnx').unlink()
    assert 'lacks its file model.onnx' in refused('serve', tmp_path / 'part')


def test_serving_without_its_packages_names_the_extra(refused, monkeypatch):
    monkeypatch.setattr(serve, 'find_spec', lambda name: None if name == 'hypercorn' else name)
    assert 'serve needs hypercorn. Install them with pip install "cxr_fastai[serve]"' in refused('serve', FOLDER)
