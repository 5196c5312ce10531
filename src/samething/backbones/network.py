"""A frozen network with its preprocessing, its fingerprint, and its graph for other runtimes.

A backbone maps uint8 pixels (b, 3, height, width) to float32 features (b, w). Normalisation happens inside,
so every caller, the exported model included, feeds it the same thing.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samething.arrays import Float, UInt8
from samething.backbones.whole_numbers import LARGEST_FILE
from samething.errors import InputError
from samething.files import Json
from samething.images import Preprocessing


class Backbone(nn.Module):
    """A frozen network with its preprocessing: uint8 pixels (b, 3, height, width) to float32 features (b, w).

    Args:
        network: any module that maps normalised pixels, float32 (b, 3, height, width), to features (b, w).
        name: what it is called in fingerprints.
        width: numbers in one feature.
        preprocessing: how images are prepared for it.
        licence: licence of the weights.
        options: how it was loaded where that differs from the row's own way; part of the fingerprint.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        width: int,
        preprocessing: Preprocessing,
        licence: str = "unknown",
        options: Mapping[str, Json] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.width = width
        self.preprocessing = preprocessing
        self.licence = licence
        self.options = dict(options or {})
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b w"]:
        """Features of prepared images; float32 whatever the network computes in."""
        features: Tensor = self.network((pixels.float() / 255 - self.mean) / self.std)
        return features.float()

    def train(self, mode: bool = True) -> Backbone:
        """A frozen network stays in evaluation mode."""
        del mode
        super().train(False)
        return self

    def with_preprocessing(self, preprocessing: Preprocessing) -> Backbone:
        """The same network fed with images that are prepared otherwise.

        Raises:
            InputError: the shape of its input would change.
        """
        if preprocessing.shape != self.preprocessing.shape or (
            preprocessing.views != self.preprocessing.views
        ):
            raise InputError(
                f"pixels of {preprocessing.shape[0]}×{preprocessing.shape[1]} for {self.name}",
                expected="×".join(map(str, self.preprocessing.shape)) + " pixels, as it was loaded",
                next_step="load the backbone with another size or other views instead",
            )
        return Backbone(
            self.network,
            name=self.name,
            width=self.width,
            preprocessing=preprocessing,
            licence=self.licence,
            options=self.options,
        )

    @property
    def num_parameters(self) -> int:
        """Numbers that the network was trained with."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def metadata(self) -> dict[str, Json]:
        """Everything that decides its features, for fingerprints: name, weights, preprocessing, width.

        Also ``options`` (pooling, views, sizes), where they are not the row's own.
        """
        described: dict[str, Json] = {
            "name": self.name,
            "weights": weights_fingerprint(self.network),
            "width": self.width,
            "preprocessing": self.preprocessing.to_json(),
        }
        if self.options:
            described["options"] = dict(self.options)
        return described


def weights_fingerprint(network: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 over all parameters and buffers: name, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def bytes_of(tensor: Any) -> memoryview:
    """The raw bytes of a tensor, in C order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def num_bytes(network: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def write_onnx(network: nn.Module, target: Path, *, size: int | tuple[int, int]) -> Path:
    """Write a network that maps uint8 pixels (b, 3, height, width) to vectors as ONNX, with a dynamic batch.

    ``size``: the side of a square input, or height and width. The graph's input is ``pixels``, its output
    ``vectors``. Graphs above 2 GB, which one file cannot hold, keep their weights in ``<target>.data``
    beside it.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return write_graph(network, target, pixels=torch.zeros(2, 3, height, width, dtype=torch.uint8))


def write_graph(network: nn.Module, target: Path, **example: Tensor) -> Path:
    """Write a network of one input as ONNX; its example gives the name and the shape of a row."""
    [(name, rows)] = example.items()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        torch.onnx.export(
            network.cpu().eval(),
            (rows,),
            target,
            input_names=[name],
            output_names=["vectors"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=num_bytes(network) > LARGEST_FILE,
            verbose=False,
        )
    return target
