"""What torch.onnx's exporter makes of the recurrences of ``vmamba_mm.ops.plain``: ONNX's ``Scan``,
along any dimension and in both directions, without a transposed copy in the graph."""

import itertools

import onnx_ir as ir
import torch
from onnxscript import evaluator
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat

_numbers = itertools.count()


class _Body:
    """The graph of a step, written node by node; names are of their own in the whole model."""

    def __init__(self, name: str, dtype: ir.DataType):
        self.name, self.dtype = f'{name}_{next(_numbers)}', dtype
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def input(self) -> ir.Value:
        value = ir.Value(name=f'{self.name}_in{len(self.inputs)}', type=ir.TensorType(self.dtype))
        self.inputs.append(value)
        return value

    def add(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        name = f'{self.name}_{len(self.nodes)}'
        node = ir.Node('', op_type, inputs, name=name, outputs=[ir.Value(
            name=name, type=ir.TensorType(self.dtype))])
        self.nodes.append(node)
        return node.outputs[0]

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        return ir.Graph(self.inputs, outputs, nodes=self.nodes, name=self.name)


def _scan(body: ir.Graph, initial: list, inputs: list, dim: int, reverse: bool) -> list[ir.Value]:
    """The node: the last states, then what the steps gave."""
    gave = len(body.outputs) - len(initial)
    attributes = {'num_scan_inputs': len(inputs), 'scan_input_axes': [dim] * len(inputs),
                  'scan_input_directions': [int(reverse)] * len(inputs),
                  'scan_output_axes': [dim] * gave,
                  'scan_output_directions': [int(reverse)] * gave}
    node = ir.Node('', 'Scan', [*initial, *inputs], num_outputs=len(body.outputs),
                   attributes=[ir.AttrGraph('body', body),
                               *(ir.AttrInt64(key, value) if isinstance(value, int)
                                 else ir.AttrInt64s(key, value)
                                 for key, value in attributes.items())])
    evaluator.default().nodes.append(node)
    return list(node.outputs)


def _zeros(x: TFloat, dim: int) -> TFloat:
    """A step's zeros."""
    return op.Mul(op.Gather(x, 0, axis=dim), 0.0)


def scan_lines(a: TFloat, x: TFloat, dim: int, reverse: bool):
    body = _Body('lines', x.dtype)
    h, p, a_t, x_t = (body.input() for _ in range(4))
    h = body.add('Add', body.add('Mul', a_t, h), x_t)
    p = body.add('Mul', a_t, p)
    graph = body.graph(h, p, body.add('Identity', h), body.add('Identity', p))
    zeros = _zeros(x, dim)
    h, p, states, products = _scan(graph, [zeros, op.Add(zeros, 1.0)], [a, x], dim, reverse)
    return states, products, h, p


def _recur(name: str, a, x, dim: int, reverse: bool, before: bool):
    body = _Body(name, x.dtype)
    h, a_t, x_t = (body.input() for _ in range(3))
    new = body.add('Add', body.add('Mul', a_t, h), x_t)
    graph = body.graph(new, body.add('Identity', h if before else new))
    return _scan(graph, [_zeros(x, dim)], [a, x], dim, reverse)[1]


def scan_carries(a: TFloat, x: TFloat, dim: int, reverse: bool):
    return _recur('carries', a, x, dim, reverse, before=True)


def scan_states(a: TFloat, x: TFloat, dim: int, reverse: bool):
    return _recur('states', a, x, dim, reverse, before=False)


def scan_means(decay: TFloat, k: TFloat, v: TFloat, dim: int, reverse: bool):
    body = _Body('means', k.dtype)
    total, weights, top, k_t, v_t = (body.input() for _ in range(5))
    later = body.add('Sub', top, decay)
    new = body.add('Max', later, k_t)
    past = body.add('Exp', body.add('Sub', later, new))
    own = body.add('Exp', body.add('Sub', k_t, new))
    values = body.add('Add', body.add('Mul', past, total), body.add('Mul', own, v_t))
    sums = body.add('Add', body.add('Mul', past, weights), own)
    graph = body.graph(values, sums, new,
                       *(body.add('Identity', t) for t in (total, weights, top)))
    zeros = _zeros(k, dim)
    return _scan(graph, [zeros, zeros, op.Sub(zeros, 1e30)], [k, v], dim, reverse)[3:]


def softplus(x: TFloat):
    return op.Softplus(x)


def translations() -> dict:
    """For ``torch.onnx.export(..., custom_translation_table=...)`` of a model that was recorded in
    ``vmamba_mm.ops.plain.plain_ops('node')``."""
    ops = torch.ops.vmamba_mm
    return {getattr(ops, function.__name__).default: function
            for function in (scan_lines, scan_carries, scan_states, scan_means, softplus)}
