"""``samething tokens``: a backbone's patches as an ONNX graph for the second look."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from samething.arrays import Float, Int
from samething.backbones import load_backbone
from samething.backbones.network import num_bytes, write_onnx
from samething.backbones.whole_numbers import LARGEST_FILE
from samething.catalog import Catalog
from samething.errors import ImageError, InputError
from samething.features import BackboneChoice
from samething.files import atomic_path, require_writable
from samething.images import decode, in_threads, prepare
from samething.progress import progress_bar
from samething.rerank.tokens import (
    BYTES_PER_TOKEN,
    METADATA,
    MOST_TOKENS,
    Likeness,
    TokenSettings,
    content_of,
    likeness,
    tokens_of,
)
from samething.training.token_head import Components, TokenHead, TokenNetwork, train_token_head

TEMPERATURE: Final = 0.1
"""Of optimal transport, in units of the cosine."""
_FITTED_TO: Final = 200
"""Images whose tokens the components are fitted to."""
_BATCH: Final = 16
_BASELINE: Final = 0.99
"""Share of the pairs of different instances that say nothing."""


@dataclasses.dataclass(frozen=True)
class TokenGraph:
    """What was written."""

    path: Path
    num_tokens: int
    """Per image; of more than 256 the heaviest are kept."""
    num_images: int
    """That the components were fitted to, and the trained part learned from."""
    settings: TokenSettings

    def __rich__(self) -> str:
        return (
            f"{self.path}: {self.num_tokens} tokens per image, "
            f"{BYTES_PER_TOKEN * min(self.num_tokens, MOST_TOKENS):,} bytes kept of each\n"
            f"use it with: samething find IMAGE --rerank {self.path}"
        )


def tokens(
    catalog: Path,
    *,
    backbone: BackboneChoice,
    output: Path = Path("tokens.onnx"),
    weights: Path | None = None,
    likeness: Likeness = "chamfer",
    steps: int = 0,
    most_images: int = 1000,
    seed: int = 0,
) -> TokenGraph:
    """Write the tokens of a backbone's patches as a graph for --rerank, with or without a trained part.

    Principal components bring tokens to 128 numbers. Searching with the graph needs no torch.

    Args:
        catalog: its training images are fitted to and learned from; all of them where none is for training.
        backbone: a name as in samething features; one of a ViT is meant, any that gives patches will do.
        output: the ONNX file.
        weights: a checkpoint on this disk, instead of the backbone's own source.
        likeness: chamfer: each part of the query meets the nearest of a candidate; sinkhorn: parts are
            assigned to each other once, by optimal transport.
        steps: of training the small part, from the labels; 0: no training.
        most_images: drawn at random from the catalog.
        seed: of what is drawn.

    Raises:
        InputError: the backbone has no tokens, or labels that cannot be learned from.
    """
    require_writable(output)
    network = load_backbone(backbone, weights=weights)
    if (size := num_bytes(network)) > LARGEST_FILE:
        raise InputError(
            f"{size:,} bytes of weights of {network.name}",
            expected=f"at most {LARGEST_FILE:,}, which one graph can hold",
            next_step="choose a smaller backbone",
        )
    images = Catalog.read(catalog)
    rows = np.flatnonzero(images.has_role("train"))
    rows = rows if len(rows) else np.arange(len(images))
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:most_images])
    plain = TokenNetwork(network, nn.Identity(), nn.Identity())
    extracted = _extracted(plain, images, rows)
    first = list(itertools.islice(extracted, _FITTED_TO))
    if not first:
        raise InputError(
            f"no image of {catalog} can be read", expected="images", next_step="check where they are"
        )
    components = Components.of(torch.cat([own for _, own in first]))
    kept = [(row, components(own).half()) for row, own in first]
    kept += [(row, components(own).half()) for row, own in extracted]
    classes = images.class_ids()[[row for row, _ in kept]]
    stacked = torch.stack([own for _, own in kept])
    head = train_token_head(
        stacked, classes, likeness=likeness, temperature=TEMPERATURE, steps=steps, seed=seed
    )
    settings = TokenSettings(
        preprocessing=network.preprocessing.to_json(), likeness=likeness, temperature=TEMPERATURE,
        nowhere=float(head.nowhere.detach()), baseline=0.0,
    )  # fmt: skip
    settings = dataclasses.replace(settings, baseline=_baseline(head, stacked, classes, settings, seed))
    with atomic_path(output) as partial:
        write_onnx(TokenNetwork(network, components, head), partial, size=network.preprocessing.shape)
        _describe(partial, settings)
    return TokenGraph(output, stacked.shape[1], len(kept), settings)


def _extracted(
    network: TokenNetwork, images: Catalog, rows: Int[np.ndarray, " r"]
) -> Iterator[tuple[int, Float[Tensor, "n w"]]]:
    """Row and tokens of each image that can be read."""

    def pixels(row: int) -> np.ndarray:
        return prepare(decode(images.source(row)), network.backbone.preprocessing)

    with progress_bar("images") as progress:
        task = progress.add_task("tokens", total=len(rows))
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH].tolist()
            read = [
                (row, own)
                for row, own in zip(part, in_threads(pixels, part), strict=True)
                if not isinstance(own, ImageError)
            ]
            if read:
                with torch.inference_mode():
                    found = network(torch.from_numpy(np.stack([own for _, own in read])))
                yield from ((row, own.clone()) for (row, _), own in zip(read, found, strict=True))
            progress.advance(task, len(part))


def _baseline(
    head: TokenHead,
    components: Float[Tensor, "i n 128"],
    classes: Int[np.ndarray, " i"],
    settings: TokenSettings,
    seed: int,
) -> float:
    """Likeness, as kept, that 99 of 100 pairs of different instances do not reach, of up to 48 images."""
    chosen = np.random.default_rng(seed + 1).permutation(len(classes))[:48]
    with torch.inference_mode():
        found = head(components[torch.from_numpy(chosen)].float()).numpy()
    kept = [tokens_of(content_of(own)) for own in found]
    different = [
        likeness(kept[one], kept[other], settings)
        for one, other in itertools.permutations(range(len(kept)), 2)
        if classes[chosen[one]] != classes[chosen[other]]
    ]
    return float(np.quantile(different, _BASELINE)) if different else 0.0


def _describe(graph: Path, settings: TokenSettings) -> None:
    """Put the settings into the graph's metadata."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(dataclasses.asdict(settings))})
    onnx.save(model, graph)
