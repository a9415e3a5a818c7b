"""ONNX files through the reader of the format; what it accepts is loaded and predicts two images."""

import random
from functools import cache
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from cxr_fastai.core.errors import CXRError
from cxr_fastai.inference.engines import OnnxEngine

DEADLINE = 30
SECONDS = 5
SIDE = 16
IMAGES = np.zeros((2, SIDE, SIDE), np.uint8)


@cache
def seeds() -> list[bytes]:
    """Return a small classifier, with its weights as initializers and as constants."""
    weights = {
        'w': np.ones((3, 1, 3, 3), np.float32),
        'd': np.full((3, 2), 0.1, np.float32),
        'i': np.array([1], np.int64),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    constants = [helper.make_node('Constant', [], [tensor.name], value=tensor) for tensor in initializers]
    return [classifier(initializers, []), classifier([], constants)]


def classifier(initializers: list[TensorProto], constants: list) -> bytes:
    """Return a convolution, global pooling and a linear layer, with the names of our inputs and outputs."""
    nodes = [
        *constants,
        helper.make_node('Cast', ['images'], ['x'], to=TensorProto.FLOAT),
        helper.make_node('Conv', ['x', 'w'], ['c'], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node('GlobalAveragePool', ['c'], ['g']),
        helper.make_node('Flatten', ['g'], ['features'], axis=1),
        helper.make_node('MatMul', ['features', 'd'], ['l']),
        helper.make_node('Cast', ['l'], ['l64'], to=TensorProto.DOUBLE),
        helper.make_node('Softmax', ['l64'], ['s'], axis=1),
        helper.make_node('Gather', ['s', 'i'], ['q'], axis=1),
        helper.make_node('Squeeze', ['q', 'i'], ['p_pneumonia']),
    ]
    images = helper.make_tensor_value_info('images', TensorProto.UINT8, ['n', 1, SIDE, SIDE])
    outputs = [
        helper.make_tensor_value_info('p_pneumonia', TensorProto.DOUBLE, ['n']),
        helper.make_tensor_value_info('features', TensorProto.FLOAT, ['n', 3]),
    ]
    graph = helper.make_graph(nodes, 'g', [images], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8).SerializeToString()


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Return a valid ONNX file with one change: of an operator, an attribute, a name, dimensions or values."""
    model = ModelProto.FromString(data)
    graph = model.graph
    node = draw.choice(graph.node)
    change = draw.choice(('operator', 'input', 'output', 'integer', 'tensor', 'remove', 'copy', 'shape'))
    if change == 'operator':
        node.op_type = draw.choice(('Relu', 'Expand', 'Tile', 'Resize', 'Range', 'Pad', 'Reshape', 'Split', 'Einsum'))
    elif change == 'input' and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(['', 'images', *[n.output[0] for n in graph.node]])
    elif change == 'output':
        node.output[0] = draw.choice(['p_pneumonia', 'features', 'z'])
    elif change == 'integer':
        for attribute in node.attribute:
            attribute.i = draw.choice((0, -1, 2**31, 7, 2**62))
            if attribute.ints:
                attribute.ints[0] = draw.choice((0, -1, 5, 4096, 2**62))
    elif change == 'tensor' and graph.initializer:
        tensor = draw.choice(graph.initializer)
        tensor.dims.append(draw.choice((0, 1, -1, 2**31)))
        tensor.data_type = draw.choice((1, 2, 6, 7, 9, 11, 16, 20))
    elif change == 'remove':
        graph.node.remove(node)
    elif change == 'copy':
        graph.node.append(node)
    elif change == 'shape':
        graph.input[0].type.tensor_type.shape.dim[draw.randrange(4)].dim_value = draw.choice((0, 1, 8, 2**31))
    return model.SerializeToString()


def check(data: bytes) -> None:
    """Load `data` and predict two images; an error of one line is expected."""
    engine = None
    try:
        engine = OnnxEngine(data, Path('model.onnx'), threads=1, size=SIDE, seconds=SECONDS)
        engine(IMAGES)
    except CXRError as error:
        assert '\n' not in str(error)
    finally:
        if engine:
            engine.worker.close()
