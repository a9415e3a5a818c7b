"""Train, evaluate, explain and share classifiers of chest X-ray images.

::

    files --data--> DataLoaders --training--> run/ --evaluation--> metrics.json, figures/
                                              run/ --interpretation--> maps
                                              run/ --publishing--> report.html, bundle/
                                              bundle/ --inference--> predictions.csv
                                              bundle/ --serving--> HTTP
"""

__version__: str


def __getattr__(name: str) -> str:
    if name == '__version__':
        # Read only when it is asked for: the import takes 10 ms in each of the three processes of a prediction.
        from importlib.metadata import version

        return version(__name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
