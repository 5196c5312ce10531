"""Image encoders of Hugging Face transformers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samething.backbones.processor_settings import processor_preprocessing
from samething.errors import ArtefactError, InputError, needed
from samething.images import Preprocessing


class TransformersNetwork(nn.Module):
    """An image encoder of transformers that maps normalised pixels (b, 3, height, width) to features (b, w).

    Its own feature is the pooled output; where there is none the class token, after the last norm.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = getattr(model, "vision_model", model)
        parameters = inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    def forward(self, inputs: Tensor) -> Tensor:
        """Features of normalised pixels."""
        found = self.model(pixel_values=inputs, **self._options)
        pooled = getattr(found, "pooler_output", None)
        features: Tensor = found.last_hidden_state[:, 0] if pooled is None else pooled
        return features.flatten(1)

    def tokens(self, inputs: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token and patches."""
        hidden = self.model(pixel_values=inputs, **self._options).last_hidden_state
        if hidden.ndim == 4:
            return None, hidden.flatten(2).transpose(1, 2)
        num_registers = int(getattr(self.model.config, "num_register_tokens", 0) or 0)
        has_class_token = "siglip" not in self.model.config.model_type
        num_prefix = num_registers + 1 if has_class_token else 0
        return (hidden[:, 0] if has_class_token else hidden.mean(1)), hidden[:, num_prefix:]


def transformers_network(
    name: str, *, size: int | None = None, checkpoint: Path | None = None
) -> TransformersNetwork:
    """An image encoder of transformers, from the hub, its cache, or a folder in transformers' layout.

    Raises:
        ArtefactError: the folder does not exist or lacks weights of the network.
        InputError: the architecture has a fixed input size.
        MissingExtraError: transformers is not installed.
    """
    transformers = needed("transformers", extra="hf")
    if checkpoint is not None and not (checkpoint / "config.json").is_file():
        raise ArtefactError(
            f"{checkpoint} is not a model folder of transformers",
            expected="a folder with config.json and model.safetensors",
            next_step=f"fetch it with: hf download {name} --local-dir FOLDER",
        )
    model, found = transformers.AutoModel.from_pretrained(
        str(checkpoint or name), output_loading_info=True, dtype=torch.float32
    )
    missing = [key for key in found["missing_keys"] if "text_model" not in key]
    if missing:
        raise ArtefactError(
            f"the weights of {checkpoint or name} lack {', '.join(sorted(missing)[:3])}",
            expected="weights of the whole image encoder",
            next_step="check that configuration and weights belong together",
        )
    network = TransformersNetwork(model)
    own = getattr(network.model.config, "image_size", size)
    if size is not None and size != own:
        try:
            with torch.inference_mode():
                network.eval()(torch.zeros(1, 3, size, size))
        except Exception as error:
            raise InputError(
                f"size={size} with {name}",
                expected=f"its own {own} pixels, or another size that its architecture allows",
                next_step="leave the size out, or choose another backbone",
            ) from error
    return network


def transformers_settings(name: str, checkpoint: Path | None = None) -> Preprocessing:
    """Preprocessing of the model's own image processor."""
    processor = needed("transformers", extra="hf").AutoImageProcessor.from_pretrained(str(checkpoint or name))
    return processor_preprocessing(processor)
