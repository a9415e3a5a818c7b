"""What a publication has to tell, by topic: items of CLAIM (2024 update) and TRIPOD+AI (2024), in our own words.

A report fills what a program can know. It never says that a guideline is complied with: a human has to read it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A topic with its item numbers in the two guidelines; `where` is the section of the report that fills it, empty
    where none can; `human` is what a human has to add, empty for nothing; `fact` is what that section must have."""

    name: str
    claim: str
    tripod: str
    where: str = ''
    human: str = ''
    fact: str = ''

    def status(self, told: Container[str]) -> str:
        """`filled`, `partly`, or `needs a human`, in a report that has told these sections and facts."""
        if self.where not in told or (self.fact and self.fact not in told):
            return 'needs a human'
        return 'partly' if self.human else 'filled'


TOPICS = (
    Topic('Title', '1', '1', '', 'says that a deep network is developed and tested, for whom and for what'),
    Topic('Abstract', '2', '2', '', 'a structured summary'),
    Topic('Background and intended use', '3', '3a-3c', '', 'clinical setting, role of the model, known inequities'),
    Topic('Aims', '4', '4', '', 'aims and hypotheses'),
    Topic('Study design and goal', '5, 6', '4', '', 'prospective or retrospective; development, test or both'),
    Topic('Sources of data, setting, dates', '7', '5a, 5b, 6a', 'data', 'where, when and why the images were taken'),
    Topic('Treatments', '', '6c', '', 'what patients had received before the image'),
    Topic('Eligibility', '8', '6b', '', 'which patients were included and excluded'),
    Topic('Preprocessing of images', '9', '7, 12b', 'card'),
    Topic('Subsets', '10', '7', 'data'),
    Topic('De-identification', '11', '', '', 'how images and their names were freed of identities'),
    Topic('Missing and unreadable images', '12', '11', 'data', 'images that never reached the folder'),
    Topic('Acquisition', '13', '9b', '', 'machines, views, protocols'),
    Topic('Reference standard', '14-18', '8a-8c', '', 'who labelled the images, by what, how well readers agree'),
    Topic('Predictors', '', '9a, 9c', 'card'),
    Topic('Partitions, and the level at which they are disjoint', '19, 20', '12a', 'data'),
    Topic('Sample size', '21', '10', 'data', 'why so many images'),
    Topic('Network', '22', '12c, 22', 'card'),
    Topic('Software', '23', '18f', 'card'),
    Topic('First weights', '24', '12c', 'card', '', 'origin'),
    Topic('Training', '25', '12c', 'training'),
    Topic('Choice of the final model', '26', '12c', 'training'),
    Topic('Ensembles', '27', '12c', 'card'),
    Topic('Class imbalance', '', '13', 'card'),
    Topic('Measures of performance', '28', '12e', 'performance'),
    Topic('Uncertainty', '29', '12e', 'performance'),
    Topic('Robustness', '30', '12d', 'robustness', 'other machines, views and populations'),
    Topic('Explanations', '31', '', 'images', 'whether what is marked makes clinical sense', 'cams'),
    Topic('Internal evaluation', '32', '12a, 16', 'performance', '', 'internal'),
    Topic('External evaluation', '33', '16', '', 'images of another hospital'),
    Topic('Output and thresholds', '', '12g, 15', 'thresholds'),
    Topic('Fairness and subgroups', '', '14, 23b', 'groups', 'groups by age, sex, origin, machine: give them by --by'),
    Topic('Flow of images and patients', '35', '20a, 21', 'data', 'patients who were not included'),
    Topic('Characteristics of each partition', '36', '20b, 20c', 'data', 'ages, sexes, severity'),
    Topic('Performance with intervals', '37, 38', '23a', 'performance'),
    Topic('Analysis of failures', '39', '', 'images', "a radiologist's reading of the errors"),
    Topic('Updating of the model', '', '12f, 24', '', 'whether and how it is updated'),
    Topic('Limitations', '40', '26', 'summary', 'those of the data and the setting'),
    Topic('Implications and usability', '41', '25, 27a-27c', '', 'what follows for practice, and who may use it'),
    Topic('Protocol and registration', '34, 42', '18c, 18d', '', 'where they are'),
    Topic('Availability of code, model and data', '43', '18e, 18f', 'reproduce', 'where model and data are to be had'),
    Topic('Funding and interests', '44', '18a, 18b', '', 'who paid, who gains'),
    Topic('Ethics', '', '17', '', 'approval and consent'),
    Topic('Patients and public', '', '19', '', 'how they were involved'),
)
