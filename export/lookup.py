"""Replaces elementwise operators of a quantised model by lookup tables, exact because uint8 has only 256 values.

After DequantizeLinear an activation is a chain of elementwise operators in float32. It becomes one lookup whose table
holds onnxruntime's result for each of the 256 values: the same results, without the passes over memory. A
QuantizeLinear that follows is included in the table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Clip", "Exp", "Log", "Erf", "Tanh", "Sigmoid"}
ACTIVATIONS = {"Softplus", "Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Mish", "HardSigmoid", "HardSwish"}
MOVES_PAST = ("MaxPool", "Reshape", "Flatten")  # quantisation preserves order, so it may be moved before them
ROWS = 8  # onnxruntime's lookup gives each row to one thread


@dataclass
class _Chain:
    """Elementwise `nodes` from the DequantizeLinear `start` to the tensor `last`. `end`: the QuantizeLinear that
    follows, if any; `path`: the nodes of MOVES_PAST between."""

    start: onnx.NodeProto
    nodes: list[onnx.NodeProto]
    last: str
    path: list[onnx.NodeProto]
    end: onnx.NodeProto | None


def with_tables(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model with the same logits, in which every such chain is a lookup."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    nodes = list(found.graph.node)
    constants = {i.name: i for i in found.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in nodes if n.op_type == "Constant"}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in onnx.shape_inference.infer_shapes(found).graph.value_info}
    for chain in list(_chains(found, nodes, constants)):
        sizes = [d.dim_value for d in shapes.get(chain.start.input[0], [])]
        rows = math.gcd(ROWS, math.prod(sizes[1:])) if sizes and all(sizes[1:]) else 1
        made = _lookup(found, chain, np.tile(_table(found, chain, constants), (rows, 1)), images=len(sizes) == 4)
        places = {id(node): [] for node in [chain.end, *chain.nodes]} | {id(chain.start): made}
        nodes = [new for node in nodes for new in places.get(id(node), [node])]
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    del found.graph.value_info[:]  # intermediate types have changed
    return found


def _chains(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> Iterator[_Chain]:
    takers: dict[str, list[onnx.NodeProto | None]] = {output.name: [None] for output in model.graph.output}
    for node in nodes:
        for name in node.input:
            takers.setdefault(name, []).append(node)

    def scalar(name: str) -> bool:
        return name in constants and int(np.prod(constants[name].dims)) == 1

    for start in nodes:
        if start.op_type != "DequantizeLinear" or not _is_uint8(start, constants):
            continue
        known, inside = {start.output[0]}, list[onnx.NodeProto]()
        for node in nodes:  # in topological order
            own = {name for name in node.input if name}
            follows = bool(own & known) and all(name in known or scalar(name) for name in own)
            if follows and node.op_type in ARITHMETIC | ACTIVATIONS:
                inside.append(node)
                known.add(node.output[0])
        leaving = [
            (name, taker) for name in known for taker in takers.get(name, []) if all(taker is not n for n in inside)
        ]
        if not inside or {name for name, _ in leaving} != {inside[-1].output[0]}:
            continue
        path, after = list[onnx.NodeProto](), leaving[0][1] if len(leaving) == 1 else None
        while after is not None and after.op_type in MOVES_PAST and len(takers.get(after.output[0], [])) == 1:
            path.append(after)
            after = takers[after.output[0]][0]
        if after is not None and after.op_type == "QuantizeLinear" and _is_uint8(after, constants):
            yield _Chain(start, inside, inside[-1].output[0], path, after)
        else:
            yield _Chain(start, inside, inside[-1].output[0], [], None)


def _is_uint8(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether the node's tensor is uint8 with a single scale."""
    scale_and_zero = [constants.get(name) for name in node.input[1:3]]
    if len(scale_and_zero) != 2 or any(c is None or int(np.prod(c.dims)) != 1 for c in scale_and_zero):
        return False
    zero = scale_and_zero[1]
    return zero is not None and bool(zero.data_type == onnx.TensorProto.UINT8)


def _table(model: onnx.ModelProto, chain: _Chain, constants: dict[str, onnx.TensorProto]) -> np.ndarray:
    """The chain's result for each uint8 value: [256], uint8 or float32."""
    start = helper.make_node("DequantizeLinear", ["given", *chain.start.input[1:]], list(chain.start.output))
    end = helper.make_node("Identity", [chain.last], ["found"])
    if chain.end is not None:
        end = helper.make_node("QuantizeLinear", [chain.last, *chain.end.input[1:]], ["found"])
    used = {name for node in (start, *chain.nodes, end) for name in node.input}
    weights = []
    for name in used & set(constants):
        copied = onnx.TensorProto()
        copied.CopyFrom(constants[name])
        copied.name = name
        weights.append(copied)
    uint8 = onnx.TensorProto.UINT8
    kind = onnx.TensorProto.FLOAT if chain.end is None else uint8
    graph = helper.make_graph(
        [start, *chain.nodes, end],
        "table",
        [helper.make_tensor_value_info("given", uint8, [256])],
        [helper.make_tensor_value_info("found", kind, [256])],
        weights,
    )
    small = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"given": np.arange(256, dtype=np.uint8)})[0]
    return found


def _lookup(model: onnx.ModelProto, chain: _Chain, table: np.ndarray, images: bool) -> list[onnx.NodeProto]:
    """Nodes that look up the chain's input values in `table` [rows, 256]; the nodes of its `path` then process uint8.

    Images are looked up as [N, H, W, C]: onnxruntime uses that layout between quantised convolutions, so the
    transpositions there and back cancel against its own.
    """
    given, name = chain.start.input[0], chain.last if chain.end is None else chain.end.output[0]
    result = name
    if chain.path:
        result = chain.path[0].input[0] = f"{name}/found"
        chain.path[-1].output[0] = name
    for suffix, values in (("table", table), ("rows", np.array([len(table), -1], np.int64))):
        model.graph.initializer.append(numpy_helper.from_array(values, f"{name}/{suffix}"))
    inner, outer = (f"{name}/given", f"{name}/answered") if images else (given, result)
    made = [
        helper.make_node("Shape", [inner], [f"{name}/shape"]),
        helper.make_node("Cast", [inner], [f"{name}/integers"], to=onnx.TensorProto.INT32),
        helper.make_node("Reshape", [f"{name}/integers", f"{name}/rows"], [f"{name}/indices"]),
        helper.make_node("GatherElements", [f"{name}/table", f"{name}/indices"], [f"{name}/values"], axis=1),
        helper.make_node("Reshape", [f"{name}/values", f"{name}/shape"], [outer]),
    ]
    if images:
        made.insert(0, helper.make_node("Transpose", [given], [inner], perm=[0, 2, 3, 1]))
        made.append(helper.make_node("Transpose", [outer], [result], perm=[0, 3, 1, 2]))
    return made
