"""`check_onnx` refuses every ONNX file that is not a plain image classifier, before ONNX Runtime sees it.

The file is judged by what it contains, field by field. It may contain one graph of the operators in `OPERATORS` with
all tensors inside the file. Weights may be stored as float16 if each is converted to float32 before it is used: a file
of `export --half`. It must not refer to other files, contain functions, subgraphs or operators of other
domains, or anything that this reader does not know.
"""

from __future__ import annotations

import math

from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.files import StrPath
from cxr_fastai.inference.onnx_operators import (
    DOUBLE,
    FLOAT,
    FLOAT16,
    OPERATORS,
    TENSOR_TYPES,
    UINT8,
    VALUE_TYPES,
    WINDOW,
)
from cxr_fastai.inference.protobuf import Field, Message, Reader, Refused, Schema

INPUT = 'images'
OUTPUTS = {'p_pneumonia': DOUBLE, 'p_calibrated': DOUBLE, 'features': FLOAT}
"""Output -> its type. `p_calibrated` may be missing."""
REQUIRED_OUTPUTS = ('p_pneumonia', 'features')

OPSETS = range(11, 27)
"""Versions of the set of operators. `export` writes 17; the operators of others are checked by the same list."""
IR_VERSIONS = range(6, 14)
"""Versions of the file format."""
MAX_DESCRIPTIONS = 100
MAX_NODES = 20_000
MAX_TENSORS = 20_000
MAX_FIELDS = 1_000_000
MAX_DEPTH = 8
MAX_TEXT = 2**16
"""Largest text, such as a name, in bytes."""
MAX_RANK = 8
"""Largest number of dimensions of a tensor."""
MAX_ELEMENTS = 2**31
"""Largest number of values of a tensor."""
MAX_WINDOW = 2**12
"""Largest entry of the shape, stride, padding or dilation of a window."""
ORT_MAGIC = b'ORTM'
"""Bytes 4 to 7 of a file in the internal format of ONNX Runtime."""
FUNCTIONS = 'functions of its own'
SUBGRAPHS = 'a subgraph (Loop, If or Scan)'
SPARSE = 'sparse tensors'
EXTERNAL = 'tensors in other files'
OTHER_TYPES = 'values that are not tensors'

SCHEMA: Schema = {
    'ModelProto': {
        1: Field('ir_version', 'int'),
        2: Field('producer_name', 'text'),
        3: Field('producer_version', 'text'),
        4: Field('domain', 'text'),
        5: Field('model_version', 'int'),
        6: Field('doc_string', 'text'),
        7: Field('graph', 'GraphProto'),
        8: Field('opset_import', 'OperatorSetIdProto', repeated=True),
        14: Field('metadata_props', 'StringStringEntryProto', repeated=True),
        20: Refused('instructions for a training'),
        25: Refused(FUNCTIONS),
        26: Refused('settings of several devices'),
    },
    'OperatorSetIdProto': {1: Field('domain', 'text'), 2: Field('version', 'int')},
    'StringStringEntryProto': {1: Field('key', 'text'), 2: Field('value', 'text')},
    'GraphProto': {
        1: Field('node', 'NodeProto', repeated=True),
        2: Field('name', 'text'),
        5: Field('initializer', 'TensorProto', repeated=True),
        10: Field('doc_string', 'text'),
        11: Field('input', 'ValueInfoProto', repeated=True),
        12: Field('output', 'ValueInfoProto', repeated=True),
        13: Field('value_info', 'ValueInfoProto', repeated=True),
        14: Refused('annotations of a quantisation'),
        15: Refused(SPARSE),
        16: Field('metadata_props', 'StringStringEntryProto', repeated=True),
    },
    'NodeProto': {
        1: Field('input', 'text', repeated=True),
        2: Field('output', 'text', repeated=True),
        3: Field('name', 'text'),
        4: Field('op_type', 'text'),
        5: Field('attribute', 'AttributeProto', repeated=True),
        6: Field('doc_string', 'text'),
        7: Field('domain', 'text'),
        8: Refused(FUNCTIONS),
        9: Field('metadata_props', 'StringStringEntryProto', repeated=True),
        10: Refused('settings of several devices'),
    },
    'AttributeProto': {
        1: Field('name', 'text'),
        2: Field('f', 'float'),
        3: Field('i', 'int'),
        4: Field('s', 'bytes'),
        5: Field('t', 'TensorProto'),
        6: Refused(SUBGRAPHS),
        7: Field('floats', 'float', repeated=True),
        8: Field('ints', 'int', repeated=True),
        9: Refused('a list of texts'),
        10: Refused('a list of tensors'),
        11: Refused(SUBGRAPHS),
        13: Field('doc_string', 'text'),
        14: Refused(OTHER_TYPES),
        15: Refused(OTHER_TYPES),
        20: Field('type', 'int'),
        21: Refused(FUNCTIONS),
        22: Refused(SPARSE),
        23: Refused(SPARSE),
    },
    'TensorProto': {
        1: Field('dims', 'int', repeated=True),
        2: Field('data_type', 'int'),
        3: Refused('a part of a tensor'),
        4: Field('float_data', 'float', repeated=True),
        5: Field('int32_data', 'int', repeated=True),
        6: Refused('a tensor of texts'),
        7: Field('int64_data', 'int', repeated=True),
        8: Field('name', 'text'),
        9: Field('raw_data', 'bytes'),
        10: Field('double_data', 'double', repeated=True),
        11: Field('uint64_data', 'int', repeated=True),
        12: Field('doc_string', 'text'),
        13: Refused(EXTERNAL),
        14: Field('data_location', 'int'),
        16: Field('metadata_props', 'StringStringEntryProto', repeated=True),
    },
    'ValueInfoProto': {
        1: Field('name', 'text'),
        2: Field('type', 'TypeProto'),
        3: Field('doc_string', 'text'),
        4: Field('metadata_props', 'StringStringEntryProto', repeated=True),
    },
    'TypeProto': {
        1: Field('tensor_type', 'Tensor'),
        4: Refused(OTHER_TYPES),
        5: Refused(OTHER_TYPES),
        6: Field('denotation', 'text'),
        7: Refused(OTHER_TYPES),
        8: Refused(SPARSE),
        9: Refused(OTHER_TYPES),
    },
    'Tensor': {1: Field('elem_type', 'int'), 2: Field('shape', 'TensorShapeProto')},
    'TensorShapeProto': {1: Field('dim', 'Dimension', repeated=True)},
    'Dimension': {1: Field('dim_value', 'int'), 2: Field('dim_param', 'text'), 3: Field('denotation', 'text')},
}
"""The messages of the ONNX specification (onnx.proto), as far as an image classifier needs them."""
ATTRIBUTE_FIELDS = {1: 'f', 2: 'i', 3: 's', 4: 't', 6: 'floats', 7: 'ints'}
"""Type of an attribute -> the field with its value."""
DATA_FIELDS = ('float_data', 'int32_data', 'int64_data', 'double_data', 'uint64_data')


def check_onnx(data: bytes, source: StrPath, size: int | None = None) -> None:
    """Raise `CXRError` unless `data`, the bytes of the file `source`, are an image classifier that `export` writes.

    With `size` the classifier must take images of that many pixels. The time is linear in the size of the file.
    """
    try:
        if data[4:8] == ORT_MAGIC:  # a file may be a valid ONNX file and one of this format at the same time
            raise ValueError('it is in the internal format of ONNX Runtime')
        model = Reader(SCHEMA, MAX_FIELDS, MAX_DEPTH, MAX_TEXT).read(memoryview(data), 'ModelProto')
        _check_model(model, size)
    except ValueError as error:
        raise CXRError(
            f'{source}: refused, because it is not an ONNX file of this program ({error}). Export the run again.'
        ) from None


def _check_model(model: Message, size: int | None) -> None:
    if 'graph' not in model or not model['opset_import']:
        raise ValueError('it has no graph')
    domains = [entry.get('domain', '') for entry in model['opset_import']]
    if domains != ['']:
        raise ValueError(f'it needs the operators of {", ".join(map(repr, domains)):.80}')
    _check_version('operators', model['opset_import'][0].get('version', 0), OPSETS)
    _check_version('format', model.get('ir_version', 0), IR_VERSIONS)
    _check_count('descriptions', len(model['metadata_props']), MAX_DESCRIPTIONS)
    graph = model['graph']
    _check_count('nodes', len(graph['node']), MAX_NODES)
    _check_count('tensors', len(graph['initializer']), MAX_TENSORS)
    for tensor in graph['initializer']:
        _check_tensor(tensor)
    for node in graph['node']:
        _check_node(node)
    for value in graph['value_info']:
        _check_type(value)
    _check_interface(graph, size)
    _check_order(graph)
    _check_half(graph)


def _check_version(what: str, version: int, known: range) -> None:
    if version not in known:
        raise ValueError(f'it has version {version} of the {what}, but only {known[0]} to {known[-1]} are permitted')


def _check_count(what: str, count: int, maximum: int) -> None:
    if count > maximum:
        raise ValueError(f'it has {count:,} {what}, but at most {maximum:,} are permitted')


def _check_tensor(tensor: Message) -> None:
    """Raise `ValueError` unless the values of `tensor` are in the file and as many as its dimensions say."""
    name = tensor.get('name', '')
    if tensor.get('data_location', 0) != 0:
        raise ValueError(f'it contains {EXTERNAL}')
    if tensor.get('data_type') not in TENSOR_TYPES:
        raise ValueError(f'the tensor {name!r:.80} has the type {tensor.get("data_type")}')
    dims = tensor['dims']
    if len(dims) > MAX_RANK or any(not 0 <= dim <= MAX_ELEMENTS for dim in dims):
        raise ValueError(f'the tensor {name!r:.80} has the dimensions {dims!r:.80}')
    count = math.prod(dims)
    width, typed_field = TENSOR_TYPES[tensor['data_type']]
    sources = [field for field in DATA_FIELDS if tensor[field]]
    if tensor['data_type'] == FLOAT16 and 'raw_data' not in tensor:
        raise ValueError(f'the float16 tensor {name!r:.80} has no raw_data')
    if 'raw_data' in tensor:
        is_complete = not sources and len(tensor['raw_data']) == count * width
    else:
        is_complete = set(sources) <= {typed_field} and len(tensor[typed_field]) == count
    if count > MAX_ELEMENTS or not is_complete:
        raise ValueError(f'the tensor {name!r:.80} does not contain the values that its dimensions promise')


def _check_node(node: Message) -> None:
    operator = node.get('op_type', '')
    if node.get('domain', '') != '' or operator not in OPERATORS:
        shown = '.'.join(filter(None, (node.get('domain', ''), operator)))
        raise ValueError(f'the operator {shown!r:.80} is not permitted')
    names = [attribute.get('name', '') for attribute in node['attribute']]
    if len(set(names)) < len(names):
        raise ValueError(f'{operator} has an attribute twice')
    for attribute in node['attribute']:
        _check_attribute(attribute, operator)


def _check_attribute(attribute: Message, operator: str) -> None:
    """Raise `ValueError` unless `attribute` is one of `operator` and contains a value of its type alone."""
    name = attribute.get('name', '')
    if name not in OPERATORS[operator]:
        raise ValueError(f'{operator} has the attribute {name!r:.80}')
    expected = ATTRIBUTE_FIELDS.get(attribute.get('type', 0))
    present = {field for field in ATTRIBUTE_FIELDS.values() if field in attribute and attribute[field] != []}
    if expected is None or not present <= {expected}:
        raise ValueError(f'the attribute {name} of {operator} has another type than it says')
    if 't' in present:
        _check_tensor(attribute['t'])
        if attribute['t']['data_type'] == FLOAT16:
            raise ValueError(f'the attribute {name} of {operator} is a float16 tensor, which only weights may be')
    if operator == 'Cast' and name == 'to' and attribute.get('i', 0) not in VALUE_TYPES:
        raise ValueError(f'Cast converts to the type {attribute.get("i", 0)}')
    if 's' in present and len(attribute['s']) > MAX_TEXT:
        raise ValueError(f'the attribute {name} of {operator} has {len(attribute["s"]):,} bytes')
    is_window = name in WINDOW and name != 'auto_pad'
    if is_window and not all(0 <= number <= MAX_WINDOW for number in attribute['ints']):
        raise ValueError(f'the attribute {name} of {operator} is {attribute["ints"]!r:.80}')


def _check_type(value: Message) -> list[int | str]:
    """Return the shape that the name and type `value` declare. Raises `ValueError` if it is not a tensor's."""
    tensor = value.get('type', {}).get('tensor_type')
    if tensor is None or tensor.get('elem_type') not in VALUE_TYPES:
        raise ValueError(f'{value.get("name", "")!r:.80} is not a tensor of numbers')
    dims = tensor.get('shape', {'dim': []})['dim']
    shape = [dim.get('dim_value', dim.get('dim_param', '')) for dim in dims]
    if len(shape) > MAX_RANK or any(isinstance(dim, int) and not 0 <= dim <= MAX_ELEMENTS for dim in shape):
        raise ValueError(f'{value.get("name", "")!r:.80} has the shape {shape!r:.80}')
    return shape


def _check_interface(graph: Message, size: int | None) -> None:
    """Raise `ValueError` unless the graph takes grey images and returns probabilities and features."""
    inputs = {value.get('name', ''): _check_type(value) for value in graph['input']}
    outputs = {value.get('name', ''): value['type']['tensor_type']['elem_type'] for value in _typed(graph['output'])}
    if list(inputs) != [INPUT] or len(graph['input']) != 1 or len(graph['output']) != len(outputs):
        raise ValueError(f'its input is {", ".join(inputs)!r:.80} instead of {INPUT}')
    if not set(REQUIRED_OUTPUTS) <= outputs.keys() <= OUTPUTS.keys():
        raise ValueError(f'its outputs are {", ".join(outputs)!r:.80} instead of {", ".join(OUTPUTS)}')
    shape = inputs[INPUT]
    is_square = (
        len(shape) == 4 and shape[1] == 1 and shape[2] == shape[3] and isinstance(shape[2], int) and shape[2] > 0
    )
    types = [value['type']['tensor_type']['elem_type'] for value in graph['input']]
    if not is_square or isinstance(shape[0], int) or types != [UINT8]:
        raise ValueError('its input is not a batch of square grey images')
    if size is not None and shape[2] != size:
        raise ValueError(f'it takes images of {shape[2]} px instead of {size} px')
    if any(OUTPUTS[name] != kind for name, kind in outputs.items()):
        raise ValueError('an output has another type than expected')


def _typed(values: list[Message]) -> list[Message]:
    for value in values:
        _check_type(value)
    return values


def _check_order(graph: Message) -> None:
    """Raise `ValueError` unless every value has one origin, before its first use."""
    names = [INPUT, *(tensor.get('name', '') for tensor in graph['initializer'])]
    known = set(names)
    if len(known) < len(names) or '' in known:
        raise ValueError('two tensors have the same name')
    for node in graph['node']:
        missing = [name for name in node['input'] if name and name not in known]
        if missing:
            raise ValueError(f'{node["op_type"]} uses {missing[0]!r:.80}, which nothing computes before')
        outputs = [name for name in node['output'] if name]
        if known & set(outputs) or len(set(outputs)) < len(outputs):
            raise ValueError(f'{node["op_type"]} computes a value that exists already')
        known.update(outputs)
    if not {value.get('name', '') for value in graph['output']} <= known:
        raise ValueError('an output is not computed')


def _check_half(graph: Message) -> None:
    """Raise `ValueError` unless each float16 tensor is used by nothing but one conversion to float32."""
    converted: set[str] = set()
    half = {tensor.get('name', '') for tensor in graph['initializer'] if tensor['data_type'] == FLOAT16}
    for node in graph['node']:
        used = half.intersection(node['input'])
        types = [attribute.get('i', 0) for attribute in node['attribute'] if attribute.get('name', '') == 'to']
        if used and (node['op_type'] != 'Cast' or types != [FLOAT]):
            raise ValueError(
                f'{node["op_type"]} uses the float16 tensor {min(used)!r:.80}, which only a Cast to float32 may use'
            )
        if used & converted:
            raise ValueError(f'the float16 tensor {min(used)!r:.80} is converted more than once')
        converted |= used
    for value in graph['output']:
        if value.get('name', '') in half:
            raise ValueError(f'the output {value["name"]!r:.80} is a float16 tensor')
