"""A hostile ONNX file runs no code, reads no other file, and cannot hang the program or use up its memory."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundlefiles import seal
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.bundle import GATE, ONNX, SELFTEST
from cxr_fastai.inference.engines import OnnxEngine
from cxr_fastai.inference.onnx_format import MAX_NODES, check_onnx


def number_of(value: int) -> bytes:
    """A number as protobuf writes it."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number_of(value >> 7)


def member(number: int, content: bytes) -> bytes:
    """A field of texts, bytes or a message."""
    return number_of(number << 3 | 2) + number_of(len(content)) + content


def constant(name: str, value: object) -> onnx.NodeProto:
    return helper.make_node('Constant', [], [name], value=numpy_helper.from_array(np.asarray(value)))


def program(*nodes: onnx.NodeProto, side: int = 64, functions: tuple = (), domains: tuple[str, ...] = ('',)) -> bytes:
    """An ONNX file with the input and outputs of ours."""
    images = helper.make_tensor_value_info('images', TensorProto.UINT8, ['n', 1, side, side])
    outputs = [
        helper.make_tensor_value_info('p_pneumonia', TensorProto.DOUBLE, None),
        helper.make_tensor_value_info('features', TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, 'g', [images], outputs)
    imports = [helper.make_opsetid(domain, 17) for domain in domains]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions).SerializeToString()


def with_graph(data: bytes, change) -> bytes:
    """The file `data` after `change`, which may return bytes that are appended to the graph."""
    model = onnx.load_from_string(data)
    more = change(model.graph) or b''
    graph = model.graph.SerializeToString() + more
    model.ClearField('graph')
    return model.SerializeToString() + member(7, graph)


P = constant('p_pneumonia', [0.5, 0.5])
FEATURES = constant('features', np.ones((2, 256), np.float32))
PLAIN = program(P, FEATURES)


def node(operator: str, output: str = 'x', inputs: tuple[str, ...] = (), **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], **attributes)


def body(name: str) -> onnx.GraphProto:
    """A graph without inputs, for a subgraph."""
    value = helper.make_tensor_value_info(name, TensorProto.DOUBLE, None)
    return helper.make_graph([constant(name, [0.5, 0.5])], 'body', [], [value])


def external(place: str, key: bytes = b'\x0a\x08location') -> bytes:
    """A tensor `weight` of four bytes whose values are in the file `place`, which the field `key` names."""
    facts = (
        key + member(2, place.encode()),
        member(1, b'offset') + member(2, b'0'),
        member(1, b'length') + member(2, b'4'),
    )
    return b'\x08\x01\x10\x01' + member(8, b'weight') + b''.join(member(13, fact) for fact in facts) + b'\x70\x01'


def external_attribute(place: str) -> onnx.NodeProto:
    tensor = TensorProto.FromString(external(place))
    return helper.make_node('Constant', [], ['x'], value=tensor)


def sparse_external(place: str) -> onnx.NodeProto:
    values = TensorProto.FromString(external(place))
    indices = helper.make_tensor('i', TensorProto.INT64, [1], [0])
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[4])
    return helper.make_node('Constant', [], ['x'], sparse_value=sparse)


def renamed(graph: onnx.GraphProto) -> None:
    graph.output[0].name = 'p_pneumoniX'


LONG_TAG = b'\x82\x00'  # field 0, with a byte more than it needs
HUGE_DIMS = onnx.TensorProto(dims=[2**40, 2**20], data_type=1, name='huge')
BOTH = onnx.TensorProto(dims=[1], data_type=1, name='both', raw_data=b'abcd', float_data=[1.0])
FUNCTION = helper.make_function('own', 'f', ['x'], ['y'], [node('Relu', 'y', ('x',))], [helper.make_opsetid('', 17)])


def half(raw_data: bytes = b'\0' * 8, **fields: object) -> TensorProto:
    """A float16 tensor `half`, of four values by default."""
    return TensorProto(**{'dims': [4], 'data_type': TensorProto.FLOAT16, 'name': 'half', 'raw_data': raw_data} | fields)


def with_half(tensor: TensorProto, *nodes: onnx.NodeProto) -> bytes:
    """The plain file with the initializer `tensor` and with `nodes`."""
    return with_graph(program(*nodes, P, FEATURES), lambda graph: member(5, tensor.SerializeToString()))


def cast(to: int, source: str = 'half') -> onnx.NodeProto:
    return node('Cast', inputs=(source,), to=to)


HALF_DATA = TensorProto(dims=[4], data_type=TensorProto.FLOAT16, name='half', int32_data=[2**20, 0, 0, 0])

REFUSED = {
    'float16 with too few bytes': (with_half(half(b'\0' * 6), cast(1)), 'does not contain the values'),
    'float16 with the bytes of float32': (with_half(half(b'\0' * 16), cast(1)), 'does not contain the values'),
    'float16 with huge dimensions': (with_half(half(dims=[2**31, 2**31]), cast(1)), 'does not contain the values'),
    'float16 as integers beyond 16 bits': (with_half(HALF_DATA, cast(1)), 'has no raw_data'),
    'float16 in a computation': (with_half(half(), node('Relu', inputs=('half',))), 'only a Cast to float32'),
    'float16 as a second input': (with_half(half(), node('Add', inputs=('images', 'half'))), 'only a Cast to float32'),
    'float16 cast to double': (with_half(half(), cast(TensorProto.DOUBLE)), 'only a Cast to float32'),
    'float16 cast to integers': (with_half(half(), cast(TensorProto.INT64)), 'only a Cast to float32'),
    'float16 cast without a type': (with_half(half(), node('Cast', inputs=('half',))), 'only a Cast to float32'),
    'float16 cast and computed with': (
        with_half(half(), cast(1), node('Identity', 'y', ('half',))),
        'only a Cast to float32',
    ),
    'float16 as a constant': (
        program(node('Constant', value=half()), P, FEATURES),
        'which only weights may be',
    ),
    'float16 as a fill value': (
        program(constant('s', [4]), node('ConstantOfShape', inputs=('s',), value=half(dims=[1], raw_data=b'\0\0')), P),
        'which only weights may be',
    ),
    'cast of images to float16': (program(cast(TensorProto.FLOAT16, 'images'), P, FEATURES), 'Cast converts to'),
    'cast to bfloat16': (program(cast(TensorProto.BFLOAT16, 'images'), P, FEATURES), 'Cast converts to'),
    'cast to texts': (program(cast(TensorProto.STRING, 'images'), P, FEATURES), 'Cast converts to'),
    'cast to an unknown type': (program(cast(2**40, 'images'), P, FEATURES), 'Cast converts to'),
    'a computed value of the type float16': (
        with_graph(
            program(cast(1, 'images'), P, FEATURES),
            lambda graph: member(13, helper.make_tensor_value_info('x', TensorProto.FLOAT16, None).SerializeToString()),
        ),
        'not a tensor of numbers',
    ),
    'float16 as an output': (with_half(half(name='p_pneumonia'), FEATURES), 'exists already'),
    'external initializer': (with_graph(PLAIN, lambda graph: member(5, external('/etc/passwd'))), 'other files'),
    'external attribute': (program(external_attribute('../secret'), P, FEATURES), 'other files'),
    'external sparse values': (program(sparse_external('secret'), P, FEATURES), 'sparse'),
    'address instead of a file': (
        with_graph(PLAIN, lambda graph: member(5, external('*/_ORT_MEM_ADDR_/*'))),
        'other files',
    ),
    'data location without entries': (
        with_graph(PLAIN, lambda graph: member(5, b'\x08\x01\x10\x01' + member(8, b'w') + b'\x70\x01')),
        'other files',
    ),
    'padded length of a location': (
        with_graph(PLAIN, lambda graph: member(5, external('secret', b'\x0a\x88\x80\x00location'))),
        'other files',
    ),
    'padded tag': (PLAIN + b'\xa2\x81\x00\x00', 'more bytes than it needs'),
    'padded tag of a tensor': (with_graph(PLAIN, lambda graph: b'\xaa\x80\x00' + b'\x00'), 'more bytes than it needs'),
    'padded integer': (b'\x08\x88\x00' + PLAIN[2:], 'more bytes than it needs'),
    'integer of 70 bits': (b'\x08' + b'\xff' * 9 + b'\x7f' + PLAIN[2:], '64 bits'),
    'unknown field': (PLAIN + member(99, b'x'), 'unknown field 99'),
    'field number 0': (PLAIN + b'\x02\x00', 'unknown field 0'),
    'group': (PLAIN + b'\x3b\x3c', 'wire type 3'),
    'wrong wire type': (PLAIN + b'\x38\x01', 'wire type 0'),
    'second graph': (PLAIN + member(7, b''), 'occurs twice'),
    'truncated': (PLAIN[:-1], 'cut off'),
    'length beyond the end': (PLAIN + b'\x12\xff\xff\xff\xff\x0f', 'cut off'),
    'functions': (program(P, FEATURES, functions=(FUNCTION,)), 'functions'),
    'training instructions': (PLAIN + member(20, b''), 'training'),
    'If': (
        program(
            constant('c', True), node('If', inputs=('c',), then_branch=body('t'), else_branch=body('e')), P, FEATURES
        ),
        'subgraph',
    ),
    'Loop': (program(node('Loop', inputs=('', ''), body=body('b')), P, FEATURES), 'subgraph'),
    'domain of others': (program(P, FEATURES, domains=('', 'evil')), 'evil'),
    'operator of a domain': (program(node('Evil', domain='evil'), P, FEATURES), 'evil.Evil'),
    'operator of Microsoft': (program(node('BeamSearch', domain='com.microsoft'), P, FEATURES), 'com.microsoft'),
    'random numbers': (program(node('RandomNormal', shape=[2]), P, FEATURES), 'RandomNormal'),
    'texts': (program(node('Constant', value_strings=['a']), P, FEATURES), 'a list of texts'),
    'unknown attribute': (program(node('Relu', inputs=('images',), evil=1), P, FEATURES), "attribute 'evil'"),
    'huge window': (
        program(node('MaxPool', inputs=('images',), kernel_shape=[2**31, 2**31]), P, FEATURES),
        'kernel_shape',
    ),
    'negative padding': (
        program(node('MaxPool', inputs=('images',), kernel_shape=[1, 1], pads=[-1, 0, 0, 0]), P, FEATURES),
        'pads',
    ),
    'huge dimensions': (with_graph(PLAIN, lambda graph: member(5, HUGE_DIMS.SerializeToString())), 'dimensions'),
    'values twice': (with_graph(PLAIN, lambda graph: member(5, BOTH.SerializeToString())), 'does not contain'),
    'too few values': (
        with_graph(PLAIN, lambda graph: member(5, TensorProto(dims=[9], data_type=1, name='t').SerializeToString())),
        'does not contain',
    ),
    'output name that is not UTF-8': (
        with_graph(PLAIN, renamed).replace(b'p_pneumoniX', b'p_pneumoni\xff'),
        'name is not UTF-8',
    ),
    'cycle': (program(node('Relu', 'a', ('b',)), node('Relu', 'b', ('a',)), P, FEATURES), 'nothing computes'),
    'value computed twice': (program(P, P, FEATURES), 'exists already'),
    'output not computed': (program(P), 'not computed'),
    'too many nodes': (program(*[node('Relu', f'r{i}', ('images',)) for i in range(MAX_NODES + 1)]), 'nodes'),
    'images of 0 px': (program(P, FEATURES, side=0), 'square grey images'),
    'internal format of ONNX Runtime': (b'\x08\x08\x12\x04ORTM' + PLAIN[2:], 'internal format'),
    'operators of the future': (PLAIN.replace(b'\x10\x11', b'\x10\x7f'), 'version 127 of the operators'),
    'format of the future': (b'\x08\x7f' + PLAIN[2:], 'version 127 of the format'),
    'format without a version': (PLAIN[2:], 'version 0 of the format'),
    'thousands of descriptions': (PLAIN + member(14, b'') * 1000, '1,000 descriptions'),
    'text': (b'x', 'unknown field 15'),
    'zeros': (b'\0' * 100, 'unknown field 0'),
    'nothing': (b'', 'no graph'),
}


@pytest.mark.parametrize(('data', 'reason'), REFUSED.values(), ids=REFUSED)
def test_a_file_is_refused_before_onnx_runtime_sees_it(data, reason):
    with pytest.raises(CXRError, match=r'^m\.onnx: refused, because .*' + reason):
        check_onnx(data, Path('m.onnx'))


def test_a_message_nested_without_end_is_refused():
    data = b''
    for _ in range(1000):
        data = member(7, data)
    with pytest.raises(CXRError, match='refused'):
        check_onnx(data, Path('m.onnx'))


def test_float16_weights_that_are_converted_to_float32_once_are_accepted():
    p, _ = OnnxEngine(with_half(half(), cast(1)), Path('m.onnx'))(np.zeros((2, 64, 64), np.uint8))
    assert p.tolist() == [0.5, 0.5]
    with pytest.raises(CXRError, match='converted more than once'):  # each conversion would need memory of its own
        check_onnx(with_half(half(), cast(1), node('Cast', 'y', ('half',), to=1)), Path('m.onnx'))


@pytest.mark.parametrize('number', [np.nan, np.inf], ids=str)
def test_float16_weights_that_are_no_numbers_fail_the_self_test(number, changed, refused):
    weights = half(np.array([number, 0, 0, 0], np.float16).tobytes())
    nodes = [
        cast(1),
        node('ReduceSum', 's', ('x',)),
        constant('zero', np.float32(0)),
        node('Mul', 'nothing', ('s', 'zero')),
        node('Cast', 'd', ('nothing',), to=TensorProto.DOUBLE),
        constant('half_p', [0.5, 0.5]),
        node('Add', 'p_pneumonia', ('half_p', 'd')),
    ]
    data = with_graph(program(*nodes, FEATURES), lambda graph: member(5, weights.SerializeToString()))
    check_onnx(data, Path('m.onnx'))
    (changed / ONNX).write_bytes(data)
    seal(changed)
    assert refused(changed) == 5


def test_the_plain_file_of_these_tests_is_accepted():
    p, features = OnnxEngine(PLAIN, Path('m.onnx'))(np.zeros((2, 64, 64), np.uint8))
    assert p.tolist() == [0.5, 0.5] and features.shape == (2, 256)


@pytest.mark.parametrize('place', ['weights.bin', '../weights.bin'])
def test_a_bundle_with_tensors_in_other_files_is_refused(place, changed, refused, monkeypatch):
    (changed.parent / 'here').mkdir()
    monkeypatch.chdir(changed.parent / 'here')
    for folder in ('.', '..'):
        Path(folder, 'weights.bin').write_bytes(b'\0' * 4)
    data = (changed / ONNX).read_bytes()
    (changed / ONNX).write_bytes(with_graph(data, lambda graph: member(5, external(place))))
    seal(changed)
    assert refused(changed) == 1


WRONG = {
    'NaN': program(constant('p_pneumonia', [np.nan, np.nan]), FEATURES),
    'one number': program(constant('p_pneumonia', 0.5), FEATURES),
    'too many': program(constant('p_pneumonia', [0.1] * 9), FEATURES),
    'no numbers': program(constant('p_pneumonia', np.zeros(0)), FEATURES),
    'features of another number': program(P, constant('features', np.ones((3, 5), np.float32))),
}


@pytest.mark.parametrize('data', WRONG.values(), ids=WRONG)
def test_wrong_predictions_fail_the_self_test(data, changed, refused):
    (changed / ONNX).write_bytes(data)
    seal(changed)
    assert refused(changed) == 5


def test_a_model_of_images_of_another_size_is_refused(changed, refused):
    (changed / ONNX).write_bytes(program(constant('p_pneumonia', [0.1, 0.1]), FEATURES, side=3))
    seal(changed)
    assert refused(changed) == 1


def test_a_file_that_knows_only_the_reference_images_is_refused(changed, refused):
    stored = load((changed / SELFTEST).read_bytes())['p'][:2]
    (changed / ONNX).write_bytes(program(constant('p_pneumonia', stored), FEATURES))
    (changed / GATE).unlink()
    seal(changed)
    assert refused(changed) == 1


def time_bomb(matrices: int = 400) -> bytes:
    """A file of some kB that multiplies large matrices for minutes when it is loaded."""
    nodes = [
        constant('side', np.array([8192, 8192])),
        node('ConstantOfShape', 'm0', ('side',), value=helper.make_tensor('v', TensorProto.FLOAT, [1], [1e-4])),
        *[node('MatMul', f'm{i + 1}', (f'm{i}', 'm0')) for i in range(matrices)],
        node('ReduceMean', 'sum', (f'm{matrices}',)),
        node('Cast', 'p_pneumonia', ('sum',), to=TensorProto.DOUBLE),
    ]
    return program(*nodes, FEATURES)


MEMORY_BOMBS = {
    'ConstantOfShape': [constant('s', np.array([2**20, 2**20])), node('ConstantOfShape', 'a', ('s',))],
    'Expand': [constant('o', np.ones(1)), constant('s', np.array([2**36])), node('Expand', 'a', ('o', 's'))],
    'Tile': [constant('o', np.ones(9)), constant('s', np.array([2**35])), node('Tile', 'a', ('o', 's'))],
    'Range': [
        *[constant(name, np.float64(value)) for name, value in (('begin', 0), ('end', 2**37), ('step', 1))],
        node('Range', 'a', ('begin', 'end', 'step')),
    ],
}


@pytest.mark.parametrize('nodes', MEMORY_BOMBS.values(), ids=MEMORY_BOMBS)
def test_a_model_that_needs_too_much_memory_is_refused(nodes):
    data = program(*nodes, node('ReduceSum', 'b', ('a',)), node('Cast', 'p_pneumonia', ('b',), to=11), FEATURES)
    with pytest.raises(CXRError, match=r'^m\.onnx: (not a model|the prediction failed)'):
        OnnxEngine(data, Path('m.onnx'), seconds=20)(np.zeros((2, 64, 64), np.uint8))


def test_a_model_that_computes_for_minutes_is_ended():
    with pytest.raises(CXRError, match=r'^m\.onnx: .*took longer than'):
        OnnxEngine(time_bomb(), Path('m.onnx'), seconds=1)(np.zeros((1, 64, 64), np.uint8))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_waits_for_a_model(number, changed, image):
    (changed / ONNX).write_bytes(time_bomb())
    seal(changed)
    code = (
        'import os, signal, sys; from cxr_fastai.cli import main;'
        'signal.signal(signal.SIGINT, signal.default_int_handler);'  # a process in the background may ignore it
        'signal.signal(signal.SIGALRM, lambda *args: os.kill(os.getpid(), int(sys.argv[1])));'
        'signal.setitimer(signal.ITIMER_REAL, 2);'
        'sys.exit(main(["predict", *sys.argv[2:]]))'
    )
    command = [sys.executable, '-c', code, str(int(number)), str(changed), str(image), '--engine', 'onnx']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + number, done.stderr
    assert 'Traceback' not in done.stderr


def test_a_prediction_after_the_process_was_killed_is_an_error_of_one_line():
    engine = OnnxEngine(PLAIN, Path('m.onnx'))
    engine.worker.process.kill()
    with pytest.raises(CXRError, match=r'^m\.onnx: the prediction failed \(its process ended with signal 9\)'):
        engine(np.zeros((2, 64, 64), np.uint8))
