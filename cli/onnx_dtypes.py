"""Storage of ONNX graphs in fewer bits, by onnxruntime's own converters, and of weights that graphs share.

float16      weights and operators, with inputs and outputs in float32
int8, int4   weights of matrix products, in blocks that have a scale and a zero point each; the embedding table in
             float16, everything else in float32
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BITS = {"int8": 8, "int4": 4}
BLOCK_SIZES = {"int8": 64, "int4": 32}  # weights per scale
FASTEST_PRODUCTS = 4  # onnxruntime may compute products with activations in 8 bits
NUM_FREE_BYTES = 1024  # smaller tensors stay in the graph's file


def convert_graph(file: Path, dtype: str) -> Any:
    """Read a graph in float32 and convert it.

    Args:
        file: The graph; its weights may be in another file.
        dtype: "float16", "int8" or "int4".

    Returns:
        The graph as an `onnx_ir.Model`.
    """
    import onnx
    import onnx_ir

    if dtype == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        return onnx_ir.from_proto(convert_float_to_float16(str(file), keep_io_types=True))
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # it logs every product
    model = onnx.load(file)
    _transpose_weights(model.graph)
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZES[dtype], accuracy_level=FASTEST_PRODUCTS, bits=BITS[dtype]
    )
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    _halve_tables(quantizer.model.model.graph)
    return onnx_ir.from_proto(quantizer.model.model)


def _transpose_weights(graph: Any) -> None:
    """Transpose weights once and for all where the graph does so, as for an embedding table that is also the head."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        values = np.ascontiguousarray(numpy_helper.to_array(weights[node.input[0]]).transpose(axes))
        graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)
    _remove_unused(graph)


def _halve_tables(graph: Any) -> None:
    """Store the tables from which rows are gathered in float16, and convert the rows."""
    from onnx import TensorProto, helper, numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    tables = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Gather"
        and node.input[0] in weights
        and len(weights[node.input[0]].dims) > 1
        and weights[node.input[0]].data_type == TensorProto.FLOAT
    }
    tables -= {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    for name in tables:
        values = numpy_helper.to_array(weights[name]).astype(np.float16)
        weights[name].CopyFrom(numpy_helper.from_array(values, name))
    for place, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Gather" and node.input[0] in tables:
            rows, node.output[0] = node.output[0], f"{node.output[0]}_float16"
            cast = helper.make_node("Cast", [node.output[0]], [rows], f"{node.name}_to_float32", to=TensorProto.FLOAT)
            graph.node.insert(place + 1, cast)


def _remove_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def save(model: Any, file: Path, other: Path | None = None) -> None:
    """Save a graph, and its weights in a file beside it, named after it and `.data`.

    Traces of the exporter, such as the paths of its source files, are removed.

    Args:
        model: The graph, an `onnx_ir.Model`.
        file: The file to write.
        other: Another graph in the same folder. Weights that it has are not stored again.
    """
    import onnx_ir

    _remove_traces(model)
    known = {} if other is None else dict(_external_tensors(other))
    for value in model.graph.initializers.values():
        key = _content_key(value.const_value)
        value.const_value = known.get(key, value.const_value)
    if other is None:
        onnx_ir.save(model, file, external_data=f"{file.name}.data", size_threshold_bytes=NUM_FREE_BYTES)
    else:
        onnx_ir.save(model, file)


def _external_tensors(file: Path) -> Iterator[tuple[tuple, Any]]:
    import onnx_ir

    for value in onnx_ir.load(file).graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            yield _content_key(value.const_value), value.const_value


def _content_key(tensor: Any) -> tuple:
    """A key that equal tensors share, because their names differ between the graphs."""
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()


def _remove_traces(model: Any) -> None:
    for item in (model, model.graph, *model.graph.all_nodes(), *model.functions.values()):
        item.metadata_props.clear()
        item.doc_string = None
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
