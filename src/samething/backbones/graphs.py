"""A backbone as an ONNX graph for ONNX Runtime and OpenVINO, kept on this disk to be exported once."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import nn

from samething.backbones.network import Backbone, num_bytes, write_graph, write_onnx
from samething.backbones.whole_numbers import LARGEST_FILE
from samething.files import user_cache

MAX_CACHE_BYTES: Final = 8 << 30
"""What the kept graphs may take on disk together; the oldest go first."""

_FILE: Final = "backbone.onnx"


def graph_path(backbone: Backbone) -> Path:
    """Where the graph of this backbone is kept, whether it is there or not.

    That is in ``samething/graphs`` in the user's cache folder (XDG base directories), in a folder named after
    everything that decides the graph: weights, options, shape of the input, and the versions of what writes
    it.
    """
    versions = [importlib.metadata.version(package) for package in ("torch", "onnx")]
    said = json.dumps([backbone.metadata(), versions], sort_keys=True)
    return user_cache() / "graphs" / hashlib.sha256(said.encode()).hexdigest()[:24] / _FILE


@contextlib.contextmanager
def graph(backbone: Backbone) -> Iterator[Path]:
    """The graph of a backbone, from the cache or newly written; valid inside the block.

    A cache that cannot be written (a full or read-only disk) costs only the time of another export.
    """
    path = graph_path(backbone)
    if path.is_file():
        with contextlib.suppress(OSError):
            os.utime(path.parent)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        written = write_onnx(backbone, Path(folder) / _FILE, size=backbone.preprocessing.shape)
        _keep(written, path)
        yield written


def write_with_head(backbone: Backbone, head: nn.Module, target: Path) -> bool:
    """Write backbone and head as one graph from uint8 pixels to vectors, of which only the head is exported.

    Args:
        backbone: its graph comes from the cache.
        head: features (b, width) to vectors.
        target: the file to write.

    Returns:
        False, and nothing is written, where both together are too large for one file.
    """
    import onnx
    from onnx import compose

    if num_bytes(backbone) + num_bytes(head) > LARGEST_FILE:
        return False
    with graph(backbone) as path, tempfile.TemporaryDirectory() as folder:
        example = torch.zeros(2, backbone.width)
        last = onnx.load(write_graph(head, Path(folder) / "head.onnx", features=example))
        first = compose.add_prefix(onnx.load(path), "backbone.", rename_inputs=False)
        whole = compose.merge_models(first, last, io_map=[("backbone.vectors", "features")])
        versions = {entry.domain: entry.version for entry in whole.opset_import}  # it names them twice
        del whole.opset_import[:]
        whole.opset_import.extend(onnx.helper.make_opsetid(*each) for each in versions.items())
        onnx.save(whole, target)
    return True


def _keep(written: Path, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent.parent, prefix=".partial-"))
        try:
            shutil.copytree(written.parent, partial, dirs_exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                partial.rename(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        ages = sorted((one.stat().st_mtime, one) for one in path.parent.parent.iterdir() if one.is_dir())
        sizes = {one: sum(file.stat().st_size for file in one.rglob("*")) for _, one in ages}
        total = sum(sizes.values())
        for _, oldest in ages:
            if total > MAX_CACHE_BYTES and oldest != path.parent:
                shutil.rmtree(oldest, ignore_errors=True)
                total -= sizes[oldest]
