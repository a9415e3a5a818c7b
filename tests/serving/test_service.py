"""Prediction rows and explanations of a service equal those of the library; one image cannot fail another."""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO

import numpy as np
import pytest
from imagefiles import dicom
from PIL import Image
from services import predict

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.images.decode import open_image
from cxr_fastai.inference.predictor import COLUMNS, Predictor
from cxr_fastai.interpretation.overlays import Explanation, blend
from cxr_fastai.serving.service import Batcher, Service, find_bundle


def is_same_prediction(row: dict, other: dict) -> bool:
    """True if two rows agree in everything but the path, and in the probability within 1e-6."""
    p, q = row['p_pneumonia'], other['p_pneumonia']
    same_score = p is q is None or abs(p - q) <= 1e-6
    return same_score and all(row[name] == other[name] for name in COLUMNS if name not in ('path', 'p_pneumonia'))


@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rows_equal_those_of_the_predictor_in_any_order_and_batch(client, paths, expected_rows, seed):
    order = np.random.default_rng(seed).permutation(len(paths))
    rows = predict(client, *(paths[i].read_bytes() for i in order))
    assert [row['path'] for row in rows] == [f'image-{i}' for i in range(1, len(order) + 1)]
    for row, i in zip(rows, order, strict=True):
        assert is_same_prediction(row, expected_rows[i]), (row, expected_rows[i])


def test_an_image_alone_gets_the_same_row_as_among_others(client, paths, expected_rows):
    for path, expected in list(zip(paths, expected_rows, strict=True))[::2]:
        (row,) = predict(client, path.read_bytes())
        assert is_same_prediction(row, expected)


def test_an_unusable_image_does_not_affect_the_others(client, paths, expected_rows):
    rows = predict(client, *(path.read_bytes() for path in paths))
    assert {'ok', 'error', 'rejected'} <= {row['status'] for row in rows}
    assert [row['code'] for row in rows] == [row['code'] for row in expected_rows]
    for row in rows:
        has_no_score = row['status'] != 'ok'
        assert (row['p_pneumonia'] is None) == (row['prediction'] is None) == has_no_score


def test_rows_have_the_columns_of_prediction_tables_and_an_explanation_on_request(client, paths):
    image = paths[0].read_bytes()
    assert list(predict(client, image)[0]) == list(COLUMNS)
    assert list(predict(client, image, params={'explain': False})[0]) == list(COLUMNS)
    assert list(predict(client, image, b'', params={'explain': True})[1]) == [*COLUMNS, 'explanation']


def test_an_image_that_breaks_the_network_does_not_affect_the_rest_of_its_batch():
    async def submit_all(batcher: Batcher) -> list:
        running = asyncio.create_task(batcher.run())
        images = [np.full((2, 2), value, np.uint8) for value in (1, 0, 2)]
        results = await asyncio.gather(*map(batcher.submit, images), return_exceptions=True)
        running.cancel()
        return results

    def infer(images):
        batches.append(len(images))
        if not images.any(axis=(1, 2)).all():
            raise MemoryError
        return images.mean(axis=(1, 2)), np.zeros(len(images))

    batches = []
    with ThreadPoolExecutor(1) as executor:
        first, broken, last = asyncio.run(submit_all(Batcher(infer, executor, max_delay=0.2)))
    assert batches == [3, 1, 1, 1]
    assert isinstance(broken, MemoryError) and first == (1, 0) and last == (2, 0)


def collect_batches(announced: int, submitted: int) -> list[int]:
    """Return the sizes of the batches of images that are submitted while others are announced; none waits for long."""
    batches = []

    def infer(images):
        batches.append(len(images))
        return images.mean(axis=(1, 2)), np.zeros(len(images))

    async def submit(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.run())
        async with asyncio.timeout(60):
            with ExitStack() as stack:
                for _ in range(announced):
                    stack.enter_context(batcher.expecting())
                first = asyncio.create_task(batcher.submit(np.ones((2, 2), np.uint8)))
                for _ in range(10):  # turns in which the batch could start
                    await asyncio.sleep(0)
            await asyncio.gather(first, *(batcher.submit(np.ones((2, 2), np.uint8)) for _ in range(submitted - 1)))
        running.cancel()

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(submit(Batcher(infer, executor, max_delay=3600)))
    return batches


def test_a_single_image_does_not_wait_for_others():
    assert collect_batches(announced=0, submitted=1) == [1]


def test_a_batch_waits_for_images_that_are_being_decoded():
    assert collect_batches(announced=1, submitted=2) == [2]


def decode_png(text: str) -> np.ndarray:
    with Image.open(BytesIO(base64.b64decode(text, validate=True))) as image:
        assert image.format == 'PNG'
        return np.asarray(image)


@pytest.fixture(scope='module')
def explained_rows(client, paths) -> list[dict]:
    return predict(client, *(path.read_bytes() for path in paths), params={'explain': True})


def test_the_overlay_is_the_one_that_the_library_draws(bundle, paths, explained_rows):
    from cxr_fastai.interpretation.cam import activation_maps, enlarge, scale
    from cxr_fastai.models.inputs import to_input

    predictor = Predictor.load(bundle, engine='torch')
    overlays = 0
    for path, row in zip(paths, explained_rows, strict=True):
        if row['status'] != 'ok' or not row['explanation']['overlay']:
            continue
        image = decode_png(row['explanation']['image'])
        square = predictor.preprocessing.load(path)
        heat = scale(enlarge(activation_maps(predictor.model, to_input(square[None])), len(square))).numpy()[0]
        heat = np.clip(predictor.preprocessing.map_to_image(heat, *image.shape), 0, 1)
        expected = blend(Explanation(image, heat, 'image', row['p_pneumonia'], row['threshold']))
        assert np.array_equal(decode_png(row['explanation']['overlay']), expected)
        overlays += 1
    assert overlays or all(row['explanation']['note'] for row in explained_rows if row['status'] == 'ok')


def test_an_explanation_describes_the_file_and_says_why_a_map_is_missing(paths, explained_rows):
    for path, row in zip(paths, explained_rows, strict=True):
        explanation = row['explanation']
        if explanation is None:
            with pytest.raises(ImageError, match='.'):
                open_image(path)
            continue
        image = open_image(path)
        facts = (explanation['format'], explanation['width'], explanation['height'])
        assert facts == (image.format, image.width, image.height)
        assert explanation['overlay'] or explanation['note'] or row['status'] != 'ok'


def test_an_image_with_burned_in_text_is_predicted_but_not_shown(client):
    (row,) = predict(client, dicom(BurnedInAnnotation='YES'), params={'explain': True})
    explanation = row['explanation']
    assert explanation['image'] is None and explanation['overlay'] is None
    assert 'may name the patient' in explanation['note']


def test_one_image_can_be_explained_without_a_running_service(bundle, paths, explained_rows):
    row = Service.open(bundle).explain(paths[0].read_bytes())
    assert row['explanation'] == explained_rows[0]['explanation']
    assert is_same_prediction(row, explained_rows[0])


def test_only_bundles_can_be_served(bundle, tmp_path):
    assert find_bundle(bundle / 'model.onnx') == bundle
    for name in ('learner.pkl', 'other.onnx', 'model.safetensors'):
        with pytest.raises(UsageError, match='only bundles can be served'):
            find_bundle(tmp_path / name)
