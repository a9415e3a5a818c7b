"""Runs for tests whose result files were changed by hand."""

import json
from pathlib import Path

import pandas as pd

from cxr_fastai.core.run_files import hash_decision, hash_predictions


def seal_results(folder: Path) -> None:
    """Write the hashes of the present predictions and decision into the metrics of the run `folder`."""
    predictions = pd.read_csv(folder / 'predictions.csv', dtype={'p_pneumonia': str})
    predictions['p_pneumonia'] = predictions.p_pneumonia.map(float)
    decision = folder / 'decision.json'
    metrics = json.loads((folder / 'metrics.json').read_text())
    for split, values in metrics.items():
        values['predictions_sha256'] = hash_predictions(predictions[predictions.split == split])
        values['decision_sha256'] = hash_decision(json.loads(decision.read_text())) if decision.exists() else None
    (folder / 'metrics.json').write_text(json.dumps(metrics))
