"""The fields of a foreign JSON object follow the rules of a schema, or an error names the field."""

import pytest

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.schemas import Anything, Choice, Fields, Flag, Integer, ListOf, Number, Table, Text, check_object

SCHEMA = {'threshold': Number(0, 1), 'temperature': Number(0.001, 1000, optional=True, required=False)}


def test_the_fields_of_the_schema_are_returned_and_others_are_ignored():
    assert check_object({'threshold': 1, 'more': []}, SCHEMA, 'd.json') == {'threshold': 1}
    assert check_object({'threshold': 0.5, 'temperature': None}, SCHEMA, 'd.json')['temperature'] is None


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -5, 1.01, True, '0.5', None, [0.5], 10**399])
def test_a_bad_value_is_named(value):
    with pytest.raises(CXRError, match=r'd\.json: threshold is .*, but must be a number from 0 to 1\. Get'):
        check_object({'threshold': value}, SCHEMA, 'd.json')


def test_missing_fields_and_other_values_than_objects_are_refused():
    with pytest.raises(CXRError, match='threshold is missing'):
        check_object({}, SCHEMA, 'd.json')
    with pytest.raises(UsageError, match=r'not an object of JSON, but \[\]. Write it again.'):
        check_object([], SCHEMA, 'd.json', fix='Write it again.', error=UsageError)


@pytest.mark.parametrize(
    ('rule', 'good', 'bad'),
    [
        (Number(), [0, -1.5, 10**300], [True, float('nan'), float('-inf')]),
        (Integer(1), [1, 10**30], [0, 1.0, True, '1']),
        (Text(3), ['', 'abc'], ['abcd', 1, None]),
        (Text(64, '[0-9a-f]{64}'), ['0' * 64], ['0' * 63, '0' * 63 + 'g', '0' * 64 + '\n']),
        (Flag(), [True, False], [0, 1, 'true']),
        (Choice(('a', 'b')), ['a'], ['c', ['a'], {}]),
        (Choice((1, 2)), [1], [True, 3]),
        (ListOf(Integer(), 2), [[], [1, 2]], [[1, 2, 3], [1, 'a'], (1,), 'ab']),
        (Table(Number(), '[a-z]+', 2), [{}, {'a': 1}], [{'A': 1}, {'a': None}, {'a': 1, 'b': 1, 'c': 1}, []]),
        (Fields({'a': Flag()}), [{'a': True}, {'a': True, 'b': 1}], [{}, {'a': 1}, []]),
        (Anything(), [None, []], []),
        (Number(optional=True), [None, 1], ['']),
    ],
)
def test_rules(rule, good, bad):
    assert [value for value in good if not rule.accepts(value)] == []
    assert [value for value in bad if rule.accepts(value)] == []
    assert rule.words
