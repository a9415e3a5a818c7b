"""The checklist covers both guidelines completely, and does not claim what a report does not contain."""

from cxr_fastai.publishing.checklist import TOPICS
from cxr_fastai.publishing.reporting import SECTIONS

CLAIM_ITEMS = range(1, 45)
TRIPOD_ITEMS = range(1, 28)
TRIPOD_PARTS = {
    '3': 'abc',
    '5': 'ab',
    '6': 'abc',
    '8': 'abc',
    '9': 'abc',
    '12': 'abcdefg',
    '18': 'abcdef',
    '20': 'abc',
    '23': 'ab',
    '27': 'abc',
}
"""The items of TRIPOD+AI that have parts, such as 3a, 3b and 3c."""


def test_a_topic_is_filled_only_by_its_section_and_fact():
    topics = {topic.name: topic for topic in TOPICS}
    assert topics['Robustness'].status(SECTIONS.keys() - {'robustness'}) == 'needs a human'
    assert topics['Robustness'].status(SECTIONS) == 'partly'
    assert topics['Network'].status(SECTIONS) == 'filled'
    assert topics['Explanations'].status(SECTIONS) == 'needs a human'
    assert topics['Explanations'].status({*SECTIONS, 'cams'}) == 'partly'
    assert topics['Internal evaluation'].status(SECTIONS) == 'needs a human'
    assert topics['Internal evaluation'].status({*SECTIONS, 'internal'}) == 'filled'


def test_facts_that_no_report_contains_are_left_to_a_human():
    everything = {*SECTIONS, 'cams', 'internal', 'origin', 'patients'}
    for item in ('12d', '16', '18e', '18f', '23b'):
        statuses = {topic.status(everything) for topic in TOPICS if item in _items(topic.tripod)}
        assert statuses == {'needs a human'}, item


def test_subgroups_are_item_23a_of_tripod_ai():
    (topic,) = [topic for topic in TOPICS if topic.section == 'groups']
    assert topic.tripod == '14, 23a'


def test_partitions_are_filled_only_if_all_patients_are_known():
    (topic,) = [topic for topic in TOPICS if topic.name.startswith('Partitions')]
    assert topic.status(SECTIONS) == 'needs a human' and topic.status({*SECTIONS, 'patients'}) == 'filled'


def test_a_topic_without_section_is_left_to_a_human():
    assert all(topic.human for topic in TOPICS if not topic.section)


def test_every_item_of_both_guidelines_is_covered():
    claim = {number for topic in TOPICS for item in _items(topic.claim) for number in _numbers(item)}
    assert claim == set(CLAIM_ITEMS)
    tripod = {part for topic in TOPICS for item in _items(topic.tripod) for part in _parts(item)}
    assert tripod == {f'{n}{part}' for n in TRIPOD_ITEMS for part in TRIPOD_PARTS.get(str(n), [''])}


def _items(text: str) -> list[str]:
    return [item for item in text.split(', ') if item]


def _numbers(item: str) -> range:
    """`5-7` as 5, 6, 7."""
    first, _, last = item.partition('-')
    return range(int(first), int(last or first) + 1)


def _parts(item: str) -> list[str]:
    """`3a-3c` as 3a, 3b, 3c."""
    first, _, last = item.partition('-')
    if not last:
        return [first]
    number = first[:-1]
    return [f'{number}{chr(letter)}' for letter in range(ord(first[-1]), ord(last[-1]) + 1)]
