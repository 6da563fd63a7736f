"""Exported files that somebody else wrote, in folders with valid manifests, and what `export.predict` says of them."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from harness.run import storage

SIDE, CLASSES = 4, ["a", "b"]
WEIGHTS = np.random.default_rng(0).standard_normal((48, 2)).astype(np.float32)


def model(nodes=None, weights=None, outputs=None, opset=20, **more) -> onnx.ModelProto:
    """[N, 3, 4, 4] -> logits [N, 2]: a flattening and a matrix product, unless others are given."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    nodes = nodes or [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    weights = [numpy_helper.from_array(WEIGHTS, "weights")] if weights is None else weights
    graph = helper.make_graph(nodes, "graph", [images], outputs or [logits], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **more)


def external(location):
    tensor = numpy_helper.from_array(WEIGHTS, "weights")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model(weights=[tensor])


def looping() -> onnx.ModelProto:
    """A Loop that does not end."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond"], ["cond_out"]),
            helper.make_node("Identity", ["x"], ["x_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE]),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x_out", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE]),
        ],
    )
    many = numpy_helper.from_array(np.array(2**62, np.int64), "many")
    yes = numpy_helper.from_array(np.array(True), "yes")
    nodes = [
        helper.make_node("Loop", ["many", "yes", "images"], ["looped"], body=body),
        helper.make_node("Flatten", ["looped"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    return model(nodes, [numpy_helper.from_array(WEIGHTS, "weights"), many, yes])


def nested_functions(depth=3000) -> onnx.ModelProto:
    functions = [
        helper.make_function(
            "own",
            f"f{n}",
            ["x"],
            ["y"],
            [
                helper.make_node(
                    f"f{n + 1}" if n < depth else "Identity", ["x"], ["y"], domain="own" if n < depth else ""
                )
            ],
            [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)],
        )
        for n, domain in enumerate(["own"] * depth + [""])
    ]
    nodes = [
        helper.make_node("f0", ["images"], ["same"], domain="own"),
        helper.make_node("Flatten", ["same"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    found = model(nodes, functions=functions)
    found.opset_import.append(helper.make_opsetid("own", 1))
    return found


def filling(count) -> onnx.ModelProto:
    """Fills memory with `count` numbers before it answers."""
    shape = numpy_helper.from_array(np.array([count], np.int64), "shape")
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["right"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Exp", ["zeros"], ["ones"]),
        helper.make_node("ReduceMean", ["ones"], ["one"], keepdims=0),
        helper.make_node("Mul", ["right", "one"], ["logits"]),
    ]
    return model(nodes, [numpy_helper.from_array(WEIGHTS, "weights"), shape])


def of_weights(values) -> onnx.ModelProto:
    return model(weights=[numpy_helper.from_array(values.astype(np.float32), "weights")])


def two_outputs() -> onnx.ModelProto:
    logits = helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["batch", 48])
    return model(outputs=[logits])


def safetensors(header: bytes | dict, body=b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


# Content of the file, and what the error says.
ONNX = {
    "text": (b"hello", "no ONNX file"),
    "empty": (b"", ""),
    "HTML": (b"<html>404</html>", ""),
    "truncated": (model().SerializeToString()[:100], ""),
    "random": (np.random.default_rng(0).bytes(5000), ""),
    "pickle": (pickle.dumps({"a": 1}), "no ONNX file"),
    "external data, absolute": (external("/etc/passwd").SerializeToString(), "has weights in other files"),
    "external data, above": (external("../secret").SerializeToString(), "has weights in other files"),
    "external data, beside it": (external("secret").SerializeToString(), "has weights in other files"),
    "external data, a FIFO": (external("fifo").SerializeToString(), "has weights in other files"),
    "a Loop without end": (looping().SerializeToString(), "no answer within"),
    "3,000 nested functions": (nested_functions().SerializeToString(), ""),
    "12 GB of zeros": (filling(3 * 10**9).SerializeToString(), ""),
    "10^18 zeros": (filling(10**18).SerializeToString(), ""),
    "NaN weights": (of_weights(WEIGHTS * np.nan).SerializeToString(), "not finite"),
    "infinite weights": (of_weights(WEIGHTS * np.inf).SerializeToString(), "not finite"),
    "3 classes": (of_weights(np.ones((48, 3))).SerializeToString(), "it answers [1, 3], not logits [1, 2]"),
    "another output": (two_outputs().SerializeToString(), "it answers [1, 48]"),
    "of another input size": (of_weights(np.ones((49, 2))).SerializeToString(), "cannot be served"),
    "an unknown operator": (model([helper.make_node("Nothing", ["images"], ["logits"])]).SerializeToString(), ""),
    "an operator of another domain": (
        model([helper.make_node("Op", ["images"], ["logits"], domain="evil")]).SerializeToString(),
        "",
    ),
    "answers of text": (
        model(
            [helper.make_node("Constant", [], ["logits"], value_strings=[b"a", b"b"])],
            outputs=[helper.make_tensor_value_info("logits", TensorProto.STRING, [2])],
        ).SerializeToString(),
        "",
    ),
    "answers of integers": (
        model(
            [
                helper.make_node("Flatten", ["images"], ["flat"]),
                helper.make_node("MatMul", ["flat", "weights"], ["found"]),
                helper.make_node("Cast", ["found"], ["logits"], to=TensorProto.INT64),
            ],
            outputs=[helper.make_tensor_value_info("logits", TensorProto.INT64, ["batch", 2])],
        ).SerializeToString(),
        "it answers int64 [1, 2], not logits [1, 2]",
    ),
    "opset 99": (model(opset=99).SerializeToString(), ""),
    "no nodes": (model([helper.make_node("Identity", ["nothing"], ["logits"])]).SerializeToString(), ""),
}
TORCH = {
    "text": (b"hello", ""),
    "empty": (b"", ""),
    "a pickle": ("pickle", ""),
    "header of 4 GB": (struct.pack("<Q", 1 << 32) + b"{}", "its header has"),
    "header of 2^63": (struct.pack("<Q", 2**63) + b"{}", "its header has"),
    "header that is no JSON": (safetensors(b"not json"), ""),
    "nested header": (safetensors(b'{"a":' * 50_000), ""),
    "offsets outside": (safetensors({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), ""),
    "negative shape": (safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), ""),
    "overlapping": (
        safetensors({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234"),
        "",
    ),
    "unknown type": (safetensors({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), ""),
    "1.2 million empty tensors": (
        safetensors({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(1_200_000)}),
        "its header has",
    ),
    "of another network": (safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), ""),
}


def folder_of(place: Path, name: str, content: bytes, **changes) -> Path:
    """A model folder with this file and its manifest; beside it what external data would read."""
    place.mkdir(parents=True)
    (place / name).write_bytes(content)
    (place / "secret").write_bytes(WEIGHTS.tobytes())
    (place.parent / "secret").write_bytes(WEIGHTS.tobytes())
    kind = "onnx" if name.endswith(".onnx") else "torch"
    shape = ["batch", 3, SIDE, SIDE]
    entry = {"format": kind, "sha256": storage.sha256(place / name), "input": {"shape": shape}}
    config = {"architecture": "baseline", "options": {"widths": [4], "hidden": [4], "kernel_size": 3}}
    manifest = {
        "id": "x",
        "config": config,
        "weights_sha256": storage.sha256(place / name),
        "classes": CLASSES,
        "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "input_size": SIDE,
        "files": {name: entry},
    }
    storage.write_json(place / "manifest.json", manifest | changes)
    Image.new("RGB", (SIDE, SIDE), "red").save(place / "image.png")
    return place / name


# What is changed in the manifest, and what the error says.
MANIFESTS = [
    ({"input_size": 1_000_000}, "input_size: input should be less than or equal to 4096"),
    ({"input_size": 0}, "input_size"),
    ({"classes": []}, "classes"),
    ({"classes": "ab"}, "classes"),
    ({"normalization": {"std": [0, 0, 0]}}, "std"),
    ({"normalization": {"mean": "x"}}, "mean"),
    ({"normalization": {"mean": [0.5] * 3, "std": [1e-320] * 3}}, "not finite"),
    ({"normalization": {"mean": [1e308] * 3, "std": [0.25] * 3}}, ""),
    ({"files": {}}, "no such exported file"),
    ({"files": 3}, "files"),
    ({"config": {"architecture": "nothing"}}, ""),
    ({"config": {"architecture": 3}}, ""),
    ({"config": {}}, ""),
]
