"""Train, evaluate, explain and share classifiers of chest X-ray images.

::

    files --data--> DataLoaders --training--> run/ --evaluation--> metrics.json, figures/
                                              run/ --interpretation--> maps
                                              run/ --publishing--> report.html, bundle/
                                              bundle/ --inference--> predictions.csv
                                              bundle/ --serving--> HTTP
"""

from importlib.metadata import version

__version__ = version(__name__)
