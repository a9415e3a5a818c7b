"""The topics of two reporting guidelines, and whether a report covers them: CLAIM (2024) and TRIPOD+AI (2024).

The wording is ours, not that of the guidelines. A report fills in what software can know. It never claims compliance
with a guideline, which only a human can judge.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A topic with its item numbers in CLAIM and TRIPOD+AI.

    `section` is the section of the report that covers it, empty if none can. `human` is what a human has to add, empty
    if nothing. `fact` is a fact that the section must contain to cover the topic, empty if none.
    """

    name: str
    claim: str
    tripod: str
    section: str = ''
    human: str = ''
    fact: str = ''

    def status(self, contents: Container[str]) -> str:
        """Return `filled`, `partly` or `needs a human` for a report with these sections and facts."""
        has_section = self.section in contents
        has_fact = not self.fact or self.fact in contents
        if not has_section or not has_fact:
            return 'needs a human'
        return 'partly' if self.human else 'filled'


TOPICS = (
    Topic('Title', '1', '1', '', 'names deep learning, the population and the purpose'),
    Topic('Abstract', '2', '2', '', 'a structured summary'),
    Topic(
        'Background and intended use',
        '3',
        '3a-3c',
        '',
        'clinical setting, role of the model, known health inequalities',
    ),
    Topic('Aims', '4', '4', '', 'aims and hypotheses'),
    Topic('Study design and goal', '5, 6', '4', '', 'prospective or retrospective; development, test or both'),
    Topic('Sources of data, setting, dates', '7', '5a, 5b, 6a', 'data', 'where, when and why the images were taken'),
    Topic('Treatments', '', '6c', '', 'treatments that patients received before the image'),
    Topic('Eligibility', '8', '6b', '', 'which patients were included and excluded'),
    Topic('Preprocessing of images', '9', '7, 12b', 'card'),
    Topic('Subsets', '10', '7', 'data'),
    Topic('De-identification', '11', '', '', 'how images and file names were de-identified'),
    Topic(
        'Missing and unreadable images', '12', '11', 'data', 'images that were excluded before they reached the folder'
    ),
    Topic('Acquisition', '13', '9b', '', 'machines, views, protocols'),
    Topic(
        'Reference standard',
        '14-18',
        '8a-8c',
        '',
        'who labelled the images, by which criteria, agreement of the readers',
    ),
    Topic('Predictors', '', '9a, 9c', 'card'),
    Topic('Partitions, and the level at which they are disjoint', '19, 20', '12a', 'data', '', 'patients'),
    Topic('Sample size', '21', '10', 'data', 'justification of the number of images'),
    Topic('Network', '22', '12c, 22', 'card'),
    Topic('Software', '23', '', 'card'),
    Topic('Initialisation of the model', '24', '12c', 'card', '', 'origin'),
    Topic('Training', '25', '12c', 'training'),
    Topic('Selection of the final model', '26', '12c', 'training'),
    Topic('Ensembles', '27', '12c', 'card'),
    Topic('Class imbalance', '', '13', 'card'),
    Topic('Performance metrics', '28', '12e', 'performance'),
    Topic('Uncertainty', '29', '12e', 'performance'),
    Topic('Robustness', '30', '', 'robustness', 'other devices, views and populations'),
    Topic('Differences between hospitals', '', '12d, 23b', '', 'how performance varies between hospitals or countries'),
    Topic('Explanations', '31', '', 'images', 'whether the highlighted regions are clinically plausible', 'cams'),
    Topic('Internal evaluation', '32', '12a', 'performance', '', 'internal'),
    Topic('External evaluation', '33', '', '', 'evaluation on images of another hospital'),
    Topic(
        'Differences between training and evaluation data',
        '',
        '16',
        '',
        'setting, eligibility, reference standard and images of both',
    ),
    Topic('Output and thresholds', '', '12g, 15', 'thresholds'),
    Topic('Fairness and subgroups', '', '14, 23a', 'groups', 'groups by age, sex, ethnicity, device (option --by)'),
    Topic('Flow of images and patients', '35', '20a, 21', 'data', 'patients who were not included'),
    Topic('Characteristics of each partition', '36', '20b, 20c', 'data', 'age, sex, severity'),
    Topic('Performance with intervals', '37, 38', '23a', 'performance'),
    Topic('Analysis of failures', '39', '', 'images', 'review of the errors by a radiologist'),
    Topic('Model updating', '', '12f, 24', '', 'whether and how it is updated'),
    Topic('Limitations', '40', '26', 'summary', 'limitations of the data and the setting'),
    Topic('Implications and usability', '41', '25, 27a-27c', '', 'implications for practice, and intended users'),
    Topic('Protocol and registration', '34, 42', '18c, 18d', '', 'where the protocol and the registration are'),
    Topic(
        'Availability of code, model and data',
        '43',
        '18e, 18f',
        '',
        'where the code, the model and the data are available, and under which licenses',
    ),
    Topic('Funding and interests', '44', '18a, 18b', '', 'funding sources and conflicts of interest'),
    Topic('Ethics', '', '17', '', 'ethics approval and consent'),
    Topic('Patients and public', '', '19', '', 'how patients and the public were involved'),
)
