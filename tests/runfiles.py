"""What several tests need of runs: result files that were changed by hand, and the name of a copied image."""

import json
from pathlib import Path

from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import hash_results

COPY = 'train/PNEUMONIA/person900_virus_9000.jpeg'
"""The image in `images_with_a_copy` that is a copy of a normal one."""


def seal_results(folder: Path) -> None:
    """Write the hashes of the present predictions and decision into the metrics of the run `folder`."""
    run = Run(folder)
    metrics = json.loads((folder / 'metrics.json').read_text())
    for split, values in metrics.items():
        values['hashes'] = hash_results(run.predicted(split), run.decision, values, run.path)
    (folder / 'metrics.json').write_text(json.dumps(metrics))
