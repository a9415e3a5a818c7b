"""Probes of single properties need enough images, and are measured on other patients than those that set them."""

import numpy as np
import pandas as pd

from cxr_fastai.data.image_stats import TRAITS
from cxr_fastai.data.probes import probe_label, probe_shift


def test_probes_need_enough_images_and_patients():
    table = pd.DataFrame({trait: np.arange(60.0) for trait in TRAITS}).assign(
        split='train', label=['NORMAL', 'PNEUMONIA'] * 30, patient='one'
    )
    assert probe_label(table).empty
    assert probe_shift(table).empty


def test_a_probe_is_measured_on_patients_that_did_not_set_its_direction():
    # Every patient has a width of their own, which contains no information about other patients.
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(80), 5)
    width = np.repeat(rng.random(80), 5)
    label = np.where(np.repeat(rng.random(80) < 0.5, 5), 'PNEUMONIA', 'NORMAL')
    table = pd.DataFrame({trait: 1.0 for trait in TRAITS}, index=range(400)).assign(
        width=width, split='train', label=label, patient=patient.astype(str)
    )
    (row,) = probe_label(table).itertuples()
    assert row.trait == 'width'
    assert row.auc < 0.65
