"""ONNX graphs: half the weights, and resizing inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from samething.backbones.whole_numbers import LARGEST_FILE
from samething.errors import InputError
from samething.images import Preprocessing

_SMALLEST_HALVED: Final = 1024
"""Numbers; smaller tensors (biases, scales) stay in float32, where they cost nothing."""
_RESIZE_MODES: Final = {"bicubic": "cubic", "bilinear": "linear"}


def save(model: onnx.ModelProto, target: Path) -> None:
    """Write a graph; one above 2 GB keeps its weights in ``<target>.data`` beside it."""
    outside = model.ByteSize() > LARGEST_FILE
    onnx.save_model(
        model, target, save_as_external_data=outside, location=f"{target.name}.data" if outside else None
    )


def halve_weights(graph: Path) -> None:
    """Keep the weights in float16 and compute in float32, in place.

    Each large tensor is followed by a cast, which onnxruntime carries out once while it loads the graph. Half
    the file, the same speed on a CPU; few CPUs compute faster in float16.
    """
    model = onnx.load(graph)
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < _SMALLEST_HALVED:
            continue
        halved = values.astype(np.float16)
        if not np.isfinite(halved).all():  # a weight beyond 65,504: rare, and then it stays
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halved, f"{name}.float16"))
        casts.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=TensorProto.FLOAT))
        for info in [info for info in model.graph.value_info if info.name == name]:
            model.graph.value_info.remove(info)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save(model, graph)


def with_preprocessing_inside(graph: Path, preprocessing: Preprocessing) -> None:
    """Let a graph take images of any size, uint8 (b, 3, height, width) named ``images``, in place.

    The arithmetic is that of :func:`samething.images.prepare` with two differences: Pillow rounds to whole
    numbers between its two passes, and strips longer than 64 times their width are not cut first.

    Raises:
        InputError: the filter is one that ONNX does not have (lanczos).
    """
    if preprocessing.interpolation not in _RESIZE_MODES:
        raise InputError(
            f"--preprocessing-inside for the filter {preprocessing.interpolation}",
            expected=" or ".join(_RESIZE_MODES),
            next_step="leave it out: the embedder prepares images by itself",
        )
    model = onnx.load(graph)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    front = _preprocessing_graph(preprocessing, opset=opset, ir_version=model.ir_version).graph
    # the front's nodes before the model's; ``pixels`` becomes an inner value
    nodes = [*front.node, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(front.initializer)
    model.graph.input.extend(front.input)
    save(model, graph)


def _preprocessing_graph(preprocessing: Preprocessing, *, opset: int, ir_version: int) -> onnx.ModelProto:
    """``images`` uint8 (b, 3, height, width) to ``pixels`` uint8 (b, 3, size, size)."""
    size = preprocessing.size
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: Any, dtype: Any = np.int64) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), f"resize.{name}"))
        return f"resize.{name}"

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = name if name == "pixels" else f"resize.{name}"
        nodes.append(helper.make_node(kind, inputs, [output], name=f"resize.node.{name}", **attributes))
        return output

    sides = node("Shape", ["images"], "sides", start=2, end=4)
    if preprocessing.resize == "squash":
        target = constant("target", [size, size])
    elif preprocessing.resize == "longer_side_pad":
        longest = node("ReduceMax", [sides, constant("axis", [0])], "longest", keepdims=1)
        as_float = node("Cast", [sides], "sides_float", to=TensorProto.DOUBLE)
        largest = node("Cast", [longest], "longest_float", to=TensorProto.DOUBLE)
        scale = node("Div", [constant("size_float", [size], np.float64), largest], "scale")
        rounded = node("Round", [node("Mul", [as_float, scale], "scaled")], "scaled_round")
        whole = node("Cast", [rounded], "scaled_whole", to=TensorProto.INT64)
        target = node("Max", [whole, constant("one", [1])], "target")
    else:
        short = int(size / preprocessing.crop_fraction)
        shortest = node("ReduceMin", [sides, constant("axis", [0])], "shortest", keepdims=1)
        longer = node("Mul", [sides, constant("short", [short])], "longer")
        target = node("Div", [longer, shortest], "target")
    floats = node("Cast", ["images"], "floats", to=TensorProto.FLOAT)
    resized = node(
        "Resize",
        [floats, "", "", target],
        "resized",
        mode=_RESIZE_MODES[preprocessing.interpolation],
        cubic_coeff_a=-0.5,  # Pillow's
        antialias=1,
        coordinate_transformation_mode="half_pixel",
        axes=[2, 3],
    )
    whole_numbers = node("Round", [resized], "rounded")
    limits = [constant("black", 0, np.float32), constant("white", 255, np.float32)]
    clipped = node("Clip", [whole_numbers, *limits], "clipped")
    if preprocessing.resize == "longer_side_pad":
        clipped = _padded(preprocessing, node, constant, clipped, target)
    elif preprocessing.resize == "short_side_crop":
        spare = node("Sub", [target, constant("size", [size, size])], "spare")
        half = node("Mul", [node("Cast", [spare], "spare_float", to=TensorProto.FLOAT),
                            constant("half", [0.5], np.float32)], "half_spare")  # fmt: skip
        start = node("Cast", [node("Round", [half], "start_float")], "start", to=TensorProto.INT64)
        end = node("Add", [start, constant("size_again", [size, size])], "end")
        clipped = node("Slice", [clipped, start, end, constant("axes", [2, 3])], "cropped")
    node("Cast", [clipped], "pixels", to=TensorProto.UINT8)
    image = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, "height", "width"])
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 3, size, size])
    graph = helper.make_graph(nodes, "preprocessing", [image], [pixels], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _padded(preprocessing: Preprocessing, node: Any, constant: Any, images: str, target: str) -> str:
    """The image in the middle of a square of the mean colour; subtracting it first makes the fill zero."""
    size = preprocessing.size
    colour = np.asarray([round(255 * channel) for channel in preprocessing.mean], np.float32)
    fill = constant("fill", colour[None, :, None, None], np.float32)
    spare = node("Sub", [constant("size", [size, size]), target], "spare")
    before = node("Div", [spare, constant("two", [2])], "before")
    after = node("Sub", [spare, before], "after")
    pads = node("Concat", [before, after], "pads", axis=0)
    relative = node("Sub", [images, fill], "relative")
    padded = node(
        "Pad", [relative, pads, constant("nothing", 0, np.float32), constant("axes", [2, 3])], "padded"
    )
    return str(node("Add", [padded, fill], "filled"))
