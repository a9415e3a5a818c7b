"""`CXRInterpretation.from_learner` predicts once, returns what fastai returns, and refuses what it cannot show."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImageBW
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fastai.vision.learner import vision_learner
from fasttransform import Transform
from PIL import Image
from torch import nn
from torchvision.models import resnet18

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.data.loaders import CXRDataLoaders, locate
from cxr_fastai.images.decode import read_image
from cxr_fastai.interpretation.cam import activation_maps
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.interpretation import CXRInterpretation
from cxr_fastai.models.architectures import build_model
from cxr_fastai.training.restoring import load_learner

SIZE = 64


@pytest.fixture(scope='module')
def dls(images) -> CXRDataLoaders:
    return CXRDataLoaders.from_folder(images, size=SIZE, bs=8, num_workers=0, valid_pct=0.3)


@pytest.fixture(scope='module')
def learn(dls) -> Learner:
    """A baseline after one epoch, which classifies half of the images as pneumonia. Not to be changed by a test."""
    torch.manual_seed(0)
    learn = Learner(dls, build_model('baseline'), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(ProgressCallback)
    learn.fit(1, 3e-3)
    normal, pneumonia = learn.get_preds()[0].log().unbind(dim=1)
    with torch.no_grad():
        learn.model[1][-1].bias[1] -= (pneumonia - normal).median() + 1e-3
    return learn


@pytest.fixture(scope='module')
def interpretation(learn) -> CXRInterpretation:
    return CXRInterpretation.from_learner(learn)


@pytest.fixture
def count_images(learn):
    """The sizes of all batches that pass through the network of `learn`, or through a copy of it."""
    batches: list[int] = []
    handle = learn.model.register_forward_hook(lambda _module, inputs, _output: batches.append(len(inputs[0])))
    yield lambda: sum(batches)
    handle.remove()


def other_learner(dls, model: nn.Module | None = None, loss: Callable | None = None) -> Learner:
    return Learner(dls, model or build_model('baseline'), loss_func=loss or CrossEntropyLossFlat())


def table_of(dls, split: str) -> pd.DataFrame:
    return locate(dls.item_table[dls.item_table.split == split], dls.root)


def assert_same_values(ours: CXRInterpretation, theirs: ClassificationInterpretation) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    assert (ours.confusion_matrix() == theirs.confusion_matrix()).all()
    assert ours.confusion_matrix().dtype == theirs.confusion_matrix().dtype
    assert ours.most_confused() == theirs.most_confused() and ours.most_confused(99) == []
    assert list(ours.vocab) == list(theirs.vocab) and ours.vocab.o2i == theirs.vocab.o2i
    for k, largest in ((None, True), (5, True), (5, False)):
        for mine, other in zip(ours.top_losses(k, largest), theirs.top_losses(k, largest), strict=True):
            assert torch.equal(mine, other)
    inputs, *values = ours[[3, 1]]
    their_inputs, *their_values = theirs[[3, 1]]
    assert type(inputs) is type(their_inputs) and torch.equal(inputs, their_inputs)
    for mine, other in zip(values, their_values, strict=True):
        assert torch.allclose(mine, other, atol=1e-6) and mine.dtype == other.dtype


@pytest.mark.parametrize('split', ['valid', 'test'])
def test_the_methods_of_fastai_return_the_values_of_fastai(learn, dls, split, capsys):
    def loader():
        return dls.test_dl(table_of(dls, 'test'), with_labels=True) if split == 'test' else None

    ours = CXRInterpretation.from_learner(learn, dl=loader())
    theirs = ClassificationInterpretation.from_learner(learn, dl=loader())
    assert isinstance(ours, ClassificationInterpretation)
    assert_same_values(ours, theirs)
    assert ours.top_losses(2, items=True)[2].equals(theirs.top_losses(2, items=True)[2])
    preds, targs, decoded = learn.get_preds(dl=theirs.dl, with_decoded=True)
    assert torch.equal(ours.preds, preds) and torch.equal(ours.targs, targs) and torch.equal(ours.decoded, decoded)
    capsys.readouterr()
    ours.print_classification_report()
    report = capsys.readouterr().out
    theirs.print_classification_report()
    assert report == capsys.readouterr().out
    assert set(ours.predictions.split) == {split}


def test_every_image_is_predicted_once(learn, count_images):
    interpretation = CXRInterpretation.from_learner(learn)
    n = len(interpretation.predictions)
    assert count_images() == n == len(learn.dls.valid_ds)
    interpretation.confusion_matrix()
    interpretation.most_confused()
    interpretation.print_classification_report()
    interpretation.top_losses(items=True)
    interpretation[[0, 1]]
    interpretation.show_results([0, 1])
    interpretation.plot_confusion_matrix()
    interpretation.plot_top_losses(3, heatmap=False)
    assert interpretation.metrics['n'] == n
    assert count_images() == n
    interpretation.cam([0, 1])
    assert count_images() == n + 2


def test_training_images_are_predicted_without_augmentation_and_in_order(learn, dls):
    first = CXRInterpretation.from_learner(learn, 0)
    assert first.split == 'train' and set(first.predictions.split) == {'train'}
    assert torch.equal(first.preds, CXRInterpretation.from_learner(learn, dl=dls.train).preds)
    paths = dls.item_table[dls.item_table.split == 'train'].path
    assert first.predictions.path.to_list() == paths.to_list()
    p, targs = learn.get_preds(dl=dls.test_dl(table_of(dls, 'train'), with_labels=True))
    assert torch.allclose(first.preds, p, atol=1e-6) and torch.equal(first.targs, targs)


def test_a_shuffled_loader_gives_the_order_of_its_items(learn, dls, interpretation):
    shuffled = CXRInterpretation.from_learner(learn, dl=dls.valid.new(shuffle=True, drop_last=True))
    assert torch.allclose(shuffled.losses, interpretation.losses, atol=1e-6)


def test_the_predictions_are_a_table_with_what_is_known(interpretation, dls):
    items = dls.item_table[dls.item_table.split == 'valid'].reset_index(drop=True)
    table = interpretation.predictions
    assert table.columns.to_list() == ['path', 'label', 'split', 'patient', 'p_pneumonia', 'prediction', 'loss']
    assert table[['path', 'label', 'split', 'patient']].equals(items[['path', 'label', 'split', 'patient']])
    p = np.where(table.label == 'PNEUMONIA', table.p_pneumonia, 1 - table.p_pneumonia)
    assert table.loss.to_numpy() == pytest.approx(-np.log(p), abs=1e-5)
    assert interpretation.root == dls.root and interpretation.run is None


def test_a_threshold_decides_the_classes(learn, interpretation):
    threshold = float(interpretation.predictions.p_pneumonia.median())
    other = CXRInterpretation.from_learner(learn, threshold=threshold)
    assert (other.predictions.prediction == 'PNEUMONIA').mean() == pytest.approx(0.5, abs=0.1)
    assert other.decoded.tolist() == [VOCAB.index(label) for label in other.predictions.prediction]
    assert other.confusion_matrix()[:, 1].sum() == (other.preds[:, 1].double() >= threshold).sum()
    assert other.metrics['threshold'] == threshold == other.cam([0])[0].threshold


def test_a_loss_of_torch_gives_probabilities(dls):
    torch.manual_seed(0)
    learn = other_learner(dls, loss=nn.CrossEntropyLoss())
    interpretation = CXRInterpretation.from_learner(learn)
    logits, _ = learn.get_preds()
    assert torch.allclose(interpretation.preds, logits.softmax(dim=1), atol=1e-6)
    assert torch.equal(interpretation.losses, ClassificationInterpretation.from_learner(learn).losses)


def test_maps_are_those_of_the_network_when_it_predicted(dls):
    torch.manual_seed(0)
    learn = other_learner(dls)
    learn.model.train()
    interpretation = CXRInterpretation.from_learner(learn, method='gradcam++', layer='0.2')
    (explanation,) = interpretation.cam([2])
    learn.model.eval()
    inputs = interpretation[2][0].as_subclass(torch.Tensor)
    expected = activation_maps(learn.model, inputs, 1, 'gradcam++', '0.2')[0]
    with torch.no_grad():
        for weight in learn.model.parameters():
            weight.zero_()
    again = CXRInterpretation.from_learner(learn).cam([2])[0]
    row = interpretation.predictions.iloc[2]
    assert explanation.p == row.p_pneumonia and explanation.name == row.path and explanation.label == row.label
    assert np.array_equal(interpretation.cam([2])[0].heat, explanation.heat) and again.is_empty
    peak = np.unravel_index(explanation.heat.argmax(), explanation.heat.shape)
    expected_peak = np.unravel_index(int(expected.argmax()), expected.shape)
    cells = np.array(explanation.heat.shape) / expected.shape[0]
    assert np.abs(np.array(peak) / cells - 0.5 - expected_peak).max() <= 1


@pytest.mark.parametrize('read', [read_image, Image.open])
def test_images_in_memory_have_maps(learn, dls, read):
    table = table_of(dls, 'valid').head(3)
    in_memory = table.assign(path=[read(path) for path in table.path])
    interpretation = CXRInterpretation.from_learner(learn, dl=dls.test_dl(in_memory, with_labels=True))
    assert interpretation.predictions.path.to_list() == ['image 0', 'image 1', 'image 2']
    (explanation,) = interpretation.cam([1])
    assert explanation.name == 'image 1' and explanation.heat.shape == explanation.image.shape
    assert explanation.p == pytest.approx(learn.get_preds()[0][1, 1].item(), abs=0.01)


def test_an_explainer_of_a_learner_predicts_as_the_learner_does(learn, dls):
    table = table_of(dls, 'valid')
    expected = learn.get_preds()[0][:, 1].tolist()
    explained = list(Explainer.from_learner(learn).explain(Subject(path) for path in table.path))
    assert [explanation.p for explanation in explained] == pytest.approx(expected, abs=1e-5)


@pytest.mark.filterwarnings('ignore')  # torchvision's default weights
def test_a_network_without_body_and_head_needs_a_layer(dls):
    learn = other_learner(dls, resnet18(num_classes=2))
    interpretation = CXRInterpretation.from_learner(learn)
    assert interpretation.confusion_matrix().sum() == len(learn.dls.valid_ds)
    with pytest.raises(UsageError, match=r'ResNet is not a Sequential\(body, head\).*for example layer4'):
        interpretation.plot_top_losses(2)
    (explanation,) = CXRInterpretation.from_learner(learn, layer='layer4').cam(0)
    assert explanation.heat.shape == explanation.image.shape
    with pytest.raises(UsageError, match='--method cam needs a head'):
        CXRInterpretation.from_learner(learn, method='cam', layer='layer4').cam(0)
    explainer = Explainer.from_learner(learn, layer='layer4')
    (explained,) = explainer.explain([Subject(table_of(dls, 'valid').path[0])])
    assert explained.p == pytest.approx(interpretation.preds[0, 1].item(), abs=1e-5)


def test_occlusion_needs_no_layer_of_any_network(dls):
    model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIZE // 8) ** 2, 2))
    with pytest.raises(UsageError, match='Sequential is not a Sequential.*for example 0,'):
        CXRInterpretation.from_learner(other_learner(dls, model)).cam(0)
    (explanation,) = CXRInterpretation.from_learner(other_learner(dls, model), method='occlusion').cam(0)
    assert explanation.heat.shape == explanation.image.shape


@pytest.mark.filterwarnings('ignore')
def test_a_learner_of_fastai_on_the_loaders_of_this_package_has_maps(dls):
    learn = vision_learner(dls, resnet18, pretrained=False)
    interpretation = CXRInterpretation.from_learner(learn)
    (explanation,) = interpretation.cam(interpretation.hardest(1))
    assert explanation.p == interpretation.predictions.p_pneumonia[interpretation.losses.argmax().item()]


@pytest.mark.filterwarnings('ignore')
def test_a_learner_of_fastai_on_loaders_of_fastai_has_everything_but_maps(images):
    dls = ImageDataLoaders.from_folder(images, valid='val', item_tfms=Resize(SIZE), bs=8, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False)
    interpretation = CXRInterpretation.from_learner(learn)
    assert_same_values(interpretation, ClassificationInterpretation.from_learner(learn))
    assert interpretation.top_losses(1, items=True)[2][0].suffix == '.jpeg'
    interpretation.show_results([0])
    assert len(interpretation.plot_top_losses(4, heatmap=False).axes) == 4
    with pytest.raises(UsageError, match='maps need images that OpenImage alone prepares.*Use heatmap=False'):
        interpretation.plot_top_losses(4)


class Invert(Transform):
    """Changes every image, also those of validation."""

    def encodes(self, x: TensorImageBW) -> TensorImageBW:
        return 255 - x


def test_transforms_of_validation_images_have_no_maps(images):
    dls = CXRDataLoaders.from_folder(images, size=SIZE, bs=8, num_workers=0, item_tfms=Invert())
    interpretation = CXRInterpretation.from_learner(other_learner(dls))
    interpretation.plot_top_losses(2, heatmap=False)
    with pytest.raises(UsageError, match='prepare them in another way'):
        interpretation.cam(0)
    with pytest.raises(UsageError, match='prepare them in another way'):
        Explainer.from_learner(interpretation.learn)


def test_other_classes_and_missing_labels_are_refused(learn, dls):
    with pytest.raises(UsageError, match=r'the loader has no labels. Make it with learn.dls.test_dl'):
        CXRInterpretation.from_learner(learn, dl=dls.test_dl(table_of(dls, 'test').path.to_list()))
    table = table_of(dls, 'train')
    table['kind'] = table.path.str.contains('bacteria').map(str)
    table['valid'] = table.index % 2 == 0
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=ColReader('path'),
        get_y=ColReader('kind'),
        splitter=ColSplitter('valid'),
        item_tfms=Resize(SIZE),
    )
    others = block.dataloaders(table, bs=4, num_workers=0)
    with pytest.raises(UsageError, match='classes of the loader are False, True, but NORMAL, PNEUMONIA are needed'):
        CXRInterpretation.from_learner(other_learner(others))


def test_an_exported_learner_needs_a_loader(evaluated, images, dls):
    learn = load_learner(evaluated / 'learner.pkl')
    with pytest.raises(UsageError, match='the loader has no images'):
        CXRInterpretation.from_learner(learn)
    loader = learn.dls.test_dl(table_of(dls, 'test'), with_labels=True)
    (explained,) = Explainer.from_learner(learn).explain([Subject(table_of(dls, 'test').path[0])])
    interpretation = CXRInterpretation.from_learner(learn, dl=loader)
    stored = CXRInterpretation.from_run(evaluated, 'test', images)
    assert interpretation.predictions.p_pneumonia.to_list() == pytest.approx(
        stored.predictions.p_pneumonia.to_list(), abs=1e-5
    )
    assert len(interpretation.plot_top_losses(2).axes) == 2
    assert explained.p == pytest.approx(interpretation.preds[0, 1].item(), abs=1e-5)


def test_what_is_no_probability_is_refused(learn, dls):
    with pytest.raises(UsageError, match='act returned values from .* but probabilities are needed'):
        CXRInterpretation.from_learner(learn, act=lambda logits: 10 * logits)
    damaged = other_learner(dls)
    with torch.no_grad():
        damaged.model[1][-1].bias.fill_(float('nan'))
    with pytest.raises(CXRError, match='the network returned NaN'):
        CXRInterpretation.from_learner(damaged)
    with pytest.raises(UsageError, match=r'returned \(\d+, 3\) numbers, but two'):
        CXRInterpretation.from_learner(other_learner(dls, nn.Sequential(build_model('baseline'), nn.Linear(2, 3))))


def test_wrong_options_are_refused_before_anything_is_predicted(learn, count_images):
    wrong = (
        ({'method': 'magic'}, '--method magic'),
        ({'target': 'CAT'}, '--target CAT'),
        ({'threshold': 50}, 'threshold 50: a probability from 0 to 1'),
    )
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            CXRInterpretation.from_learner(learn, **options)
    assert count_images() == 0


def test_a_loader_that_skips_unreadable_images_is_refused_if_it_has_some(images, dls, tmp_path):
    bad = tmp_path / 'bad.jpeg'
    bad.write_bytes(b'')
    skipping = CXRDataLoaders.from_folder(images, size=SIZE, bs=8, num_workers=0, on_bad_image='skip')
    learn = other_learner(skipping)
    assert len(CXRInterpretation.from_learner(learn).predictions) == len(skipping.valid_ds)
    table = table_of(dls, 'valid').head(3)
    table.loc[1, 'path'] = str(bad)
    with pytest.raises(CXRError, match='bad.jpeg: E_EMPTY.*Remove or repair these images'):
        CXRInterpretation.from_learner(learn, dl=skipping.test_dl(table, with_labels=True))
