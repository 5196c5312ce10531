"""A finished model once more, in whole numbers: for an index whose images decide whether that will do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samething.arrays import PixelBatch
from samething.backbones.whole_numbers import write_int8
from samething.checksums import checksums_of
from samething.embedder import FORMAT_VERSION, KIND, Embedder
from samething.errors import ImageError, InputError
from samething.export.card import card
from samething.files import (
    Manifest,
    disk_errors,
    is_finished,
    only_one_writer,
    read_manifest,
    require_same,
    write_json,
    write_manifest,
    write_text,
)
from samething.images import Source, in_threads


def write_int8_model(embedder: Embedder, images: Sequence[Source], output: Path) -> Path:
    """Write a model folder that computes a model in whole numbers; one that is there is taken as it is.

    Args:
        embedder: a model in float32.
        images: of the job: some decide the ranges, others are what both are compared on.
        output: the folder to write.

    Raises:
        InputError: a model in another form, or retrieval that may be too much worse.
        FingerprintError: the folder holds another model.
        MissingExtraError: the package onnx is not installed.
    """
    form = embedder.form
    if "form" not in embedder.config or form["precision"] != "float32" or form["input"] != "pixels":
        raise InputError(
            f"--runtime int8 for {embedder.name}",
            expected="a model that samething exported in float32, without --preprocessing-inside",
            next_step="export it so, or leave --runtime int8 out",
        )
    made_from = {"model": embedder.fingerprint, "precision": "int8"}
    with only_one_writer(output), disk_errors(output):
        if is_finished(output):
            manifest = read_manifest(output, kind=KIND, format_version=FORMAT_VERSION)
            require_same(
                made_from,
                {name: manifest.made_from.get(name) for name in made_from},
                what=f"{output} is another model",
                next_step="remove it, or choose another place for the index",
            )
            return output

        def read(rows: Sequence[int]) -> tuple[list[int], PixelBatch]:
            prepared = in_threads(
                lambda file: embedder.prepare(embedder.unpacked(file)), [images[row] for row in rows]
            )
            pairs = [
                (row, own) for row, own in zip(rows, prepared, strict=True) if not isinstance(own, ImageError)
            ]
            empty = np.empty((0, 3, *embedder.preprocessing.shape), np.uint8)
            return [row for row, _ in pairs], np.stack([own for _, own in pairs]) if pairs else empty

        change = write_int8(
            embedder.folder / "model.onnx", output / "model.onnx", read,
            [image.label for image in images], [image.domain for image in images],
            num_threads=os.cpu_count() or 1,
        )  # fmt: skip
        if embedder.coder is not None:
            shutil.copyfile(embedder.folder / "codes.npz", output / "codes.npz")
        config = {
            **embedder.config,
            "name": f"{embedder.name}-int8",
            "form": {**form, "precision": "int8"},
            "int8": change,
            "calibration": None,  # of other scores
            "no_match": None,
        }
        write_json(output / "config.json", config)
        write_text(output / "README.md", card(config))
        # which images decided the ranges is told by the graph
        content = checksums_of(output)
        made_from["graph"] = content["sha256"]["model.onnx"]
        write_manifest(
            output, Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content=content)
        )
    return output
