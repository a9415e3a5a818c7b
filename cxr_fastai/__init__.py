"""Chest images on disk go in; a trained, measured, explained and safely shared classifier comes out.

::

    files --items--> table --data--> dls --learner--> Learner --training--> run/ --evaluation--> predictions + metrics
                                                                            run/ --interpret--> figures
                                                                            run/ --report--> report.html
                                                                            run/ --export--> bundle
                                                                            bundle --inference--> predictions.csv
"""

from importlib.metadata import version

__version__ = version(__name__)
