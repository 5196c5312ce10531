"""An ONNX graph in whole numbers (int8), and what that costs retrieval on the images of a job.

Needs the package onnx, and no torch.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from samething.arrays import Embeddings, Int, PixelBatch
from samething.errors import InputError, needed
from samething.files import Json, atomic_path
from samething.progress import say
from samething.retrieval import exact_topk
from samething.sessions import open_session
from samething.statistics import paired_difference

if TYPE_CHECKING:
    import onnx

LARGEST_FILE: Final = 1_900_000_000
"""Bytes; Protobuf files end at 2 GB, larger weights lie beside the graph."""
CALIBRATION_BATCH: Final = 16
NUM_CALIBRATION: Final = 256
"""Images that decide the ranges of whole numbers."""
NUM_JUDGED: Final = 1024
"""Images that whole numbers are judged on, none of which decided the ranges where there are enough."""
LARGEST_FALL: Final = {"labels": 0.03, "neighbours": 0.1}
"""How far the lower end of the 95 % interval may lie below float32: of R@1 by labels, and of the share of
nearest neighbours that are still among the first five."""
_LEAST_LABELLED: Final = 100
_OF_ONE_LABEL: Final = 4
_EARLY: Final = 6
"""Convolutions, stem and first blocks of a network of more than twice as many, that stay in float32: their
channels differ much in range. In whole numbers they cost EfficientNet-Lite0 three points of R@1, not one."""

Read: TypeAlias = Callable[[Sequence[int]], tuple[list[int], PixelBatch]]
"""From rows to those whose images can be read, and their pixels."""


def write_int8(
    graph: Path, target: Path, read: Read, labels: Sequence[str], domains: Sequence[str], *, num_threads: int
) -> dict[str, Json]:
    """Write a graph in whole numbers, if it retrieves nearly as well on images of the job as in float32.

    Args:
        graph: maps ``pixels`` to ``vectors`` in float32.
        target: the file to write.
        read: gives the job's images.
        labels: of each of them; empty where there is none.
        domains: of each of them.
        num_threads: for the measurement.

    Returns:
        What was measured, of :func:`judged`.

    Raises:
        InputError: too few images, a graph of more than one file, or retrieval that may be too much worse.
        MissingExtraError: onnx is not installed.
    """
    rows = judged_rows(labels)
    others = np.setdiff1d(np.arange(len(labels)), rows)
    others = others if len(others) >= CALIBRATION_BATCH else rows
    calibration = others[:: max(1, len(others) // NUM_CALIBRATION)][:NUM_CALIBRATION]
    _, seen = read(calibration.tolist())
    found, asked = read(rows.tolist())
    if min(len(seen), len(asked)) < CALIBRATION_BATCH or graph.with_name(f"{graph.name}.data").exists():
        raise InputError(
            f"--runtime int8 with {len(seen)} readable images, {graph.stat().st_size / 1e6:,.0f} MB of graph",
            expected=f"at least {CALIBRATION_BATCH} images, which decide the ranges, and a graph of one file",
            next_step="leave --runtime int8 out",
        )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.onnx"
        shutil.copyfile(graph, whole)
        quantise(whole, seen)
        before, after = (_computed(each, asked, num_threads) for each in (graph, whole))
        change = judged(before, after, [labels[row] for row in found], [domains[row] for row in found])
        say(said(change))
        require_near(change)
        with atomic_path(target) as partial:
            shutil.copyfile(whole, partial)
    return change


def _computed(graph: Path, pixels: PixelBatch, num_threads: int) -> Embeddings:
    session = open_session(graph, "cpu", num_threads=num_threads)
    parts = (pixels[at : at + CALIBRATION_BATCH] for at in range(0, len(pixels), CALIBRATION_BATCH))
    return np.concatenate([session.run(None, {"pixels": part})[0] for part in parts])


def judged_rows(labels: Sequence[str]) -> Int[np.ndarray, " r"]:
    """Rows to judge whole numbers on: images of labels that several have, or any where these are few.

    An empty label is none.

    >>> judged_rows(["a", "b", "a", ""]).tolist()  # too few to go by labels
    [0, 1, 2, 3]
    """
    generator = np.random.default_rng(0)
    by_label: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        by_label.setdefault(label, []).append(row)
    groups = [rows for label, rows in by_label.items() if label and len(rows) > 1]
    chosen: list[int] = []
    for place in generator.permutation(len(groups)).tolist():
        chosen += generator.permutation(groups[place])[:_OF_ONE_LABEL].tolist()
    if len(chosen) < _LEAST_LABELLED:
        chosen = generator.permutation(len(labels)).tolist()
    return np.sort(np.asarray(chosen[:NUM_JUDGED], np.int64))


def judged(
    before: Embeddings, after: Embeddings, labels: Sequence[str], domains: Sequence[str]
) -> dict[str, Json]:
    """What whole numbers cost: each image asks for the others, by vectors of float32 and of int8.

    With labels that at least 100 images share with another: R@1. Else: whether the nearest neighbour by
    float32 is among the first five by int8. Difference and interval are paired, of the mean over domains.

    Args:
        before: vectors of float32.
        after: of the same images by int8.
        labels: of each image; empty where there is none.
        domains: of each image.

    Returns:
        Plain JSON: ``by`` (labels or neighbours), ``before`` and ``after`` in [0, 1], ``difference``, ``low``
        and ``high`` of its 95 % interval, ``num_queries``.
    """
    others = np.arange(len(before))
    near = exact_topk(before, before, 5, leave_out=others).indices
    near_after = exact_topk(after, after, 5, leave_out=others).indices
    names, groups = np.asarray(labels), np.unique(np.asarray(domains), return_inverse=True)[1]
    _, own, counts = np.unique(names, return_inverse=True, return_counts=True)
    shared = (counts[own] > 1) & (names != "")
    if by_labels := int(shared.sum()) >= _LEAST_LABELLED:
        values = [np.where(shared, names[rows[:, 0]] == names, np.nan) for rows in (near, near_after)]
    else:
        values = [np.ones(len(near)), (near_after == near[:, :1]).any(axis=1).astype(float)]
    change = paired_difference(values[1], values[0], groups)
    return {
        "by": "labels" if by_labels else "neighbours",
        "before": round(float(np.nanmean(values[0])), 4),
        "after": round(float(np.nanmean(values[1])), 4),
        "difference": round(change.difference, 4),
        "low": round(change.low, 4),
        "high": round(change.high, 4),
        "num_queries": change.num_queries,
    }


def said(change: Json) -> str:
    """What :func:`judged` found, in a line."""
    what = {"labels": "R@1", "neighbours": "nearest neighbours among the first five"}[change["by"]]
    difference, low, high = (f"{100 * change[name]:+.1f}" for name in ("difference", "low", "high"))
    before, after = (f"{100 * change[name]:.1f}" for name in ("before", "after"))
    return (
        f"int8 against float32 on {change['num_queries']:,} images: {what} {before} → {after} %, "
        f"{difference} ({low} to {high})"
    )


def require_near(change: Json) -> None:
    """Refuse whole numbers that may cost too much.

    Raises:
        InputError: the interval reaches further down than :data:`LARGEST_FALL`.
    """
    bound = LARGEST_FALL[change["by"]]
    if not change["low"] >= -bound:
        raise InputError(
            said(change),
            expected=f"a fall of surely less than {100 * bound:.0f} points: the interval's lower end decides",
            next_step="leave --runtime int8 out, or give more images if the interval is wide",
        )


def quantise(graph: Path, pixels: PixelBatch) -> None:
    """Whole-number weights (a scale a channel) and activations, in place; both ends stay in float32.

    Args:
        graph: maps ``pixels`` to ``vectors``.
        pixels: prepared images whose activations decide the ranges (static quantisation).

    Raises:
        MissingExtraError: onnx is not installed.
    """
    onnx = needed("onnx", extra="train")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The images, a batch at a time."""

        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = (
                {"pixels": pixels[start : start + CALIBRATION_BATCH]}
                for start in range(0, len(pixels), CALIBRATION_BATCH)
            )

        def get_next(self) -> dict[str, Any] | None:
            """The next batch, or None."""
            return next(self.batches, None)

    large = graph.stat().st_size > LARGEST_FILE or graph.with_name(f"{graph.name}.data").exists()
    level = logging.getLogger().level
    with tempfile.TemporaryDirectory(dir=graph.parent) as folder:
        ready = Path(folder) / "ready.onnx"
        logging.getLogger().setLevel(logging.ERROR)  # the library speaks through the root logger
        try:
            quant_pre_process(graph, ready, skip_symbolic_shape=True, save_as_external_data=large)
            prepared = onnx.load(ready, load_external_data=False)
            left_out = _nodes_of_input_and_head(prepared)
            onnx.save(prepared, ready)  # with names for all nodes
            quantize_static(
                ready,
                graph,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # in 7 bits: CPUs without VNNI add pairs of products in 16 bits, which 8 bits overflow
                reduce_range=True,
                op_types_to_quantize=["Conv", "MatMul", "Gemm", "Add", "Mul", "Clip", "Relu",
                                      "GlobalAveragePool", "ReduceMean", "MaxPool", "AveragePool"],
                nodes_to_exclude=left_out,
                use_external_data_format=large,
            )  # fmt: skip
        finally:
            logging.getLogger().setLevel(level)


def _nodes_of_input_and_head(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that scale the pixels, of early layers, and of those behind the backbone's last one.

    The first convolution or matrix product ends the scaling; the head is everything from the first node
    that reads one of its own weights.
    """
    nodes = list(model.graph.node)
    for number, node in enumerate(nodes):
        node.name = node.name or f"node_{number}"
    weighty = [place for place, node in enumerate(nodes) if node.op_type in ("Conv", "MatMul", "Gemm")]
    convolutions = [place for place in weighty if nodes[place].op_type == "Conv"]
    first = weighty[0] if weighty else 0
    if len(convolutions) > 2 * _EARLY:
        first = convolutions[_EARLY]
    own = [
        place
        for place, node in enumerate(nodes)
        if any("head." in name and "backbone." not in name for name in node.input)
    ]
    start = min(own, default=len(nodes))
    last = max((place for place in weighty if place < start), default=0)
    # a feature is brought to unit length before the head's own weights come in
    norms = [place for place in range(last, start) if nodes[place].op_type == "ReduceL2"]
    start = min([*norms, start])
    return [node.name for node in (*nodes[:first], *nodes[start:])]
