"""The submission of the Google Universal Image Embedding Challenge: TorchScript that needs torch alone.

It is checked in a fresh Python process that knows neither this package nor timm.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samething.arrays import Shaped, UInt8
from samething.errors import ArtefactError, InputError
from samething.export.embedding_model import EmbeddingModel
from samething.files import atomic_path
from samething.images import Preprocessing, decode, prepare

LARGEST_DIM: Final = 64
"""Numbers in an embedding that the challenge accepts."""
LEAST_COSINE: Final = 0.98
"""Between the challenge's model, which resizes by itself, and the same image prepared by Pillow."""
_SCRIPT_NAME: Final = "saved_model.pt"
_TIMEOUT_S: Final = 600


class PreparedInside(nn.Module):
    """An image of any size, resized, cropped and embedded: uint8 (b, 3, height, width) to vectors (b, d).

    The arithmetic of :func:`samething.images.prepare` in torch; Pillow rounds between its two passes, this
    only after them.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        if preprocessing.interpolation not in ("bicubic", "bilinear"):
            raise InputError(
                f"resizing inside the model with the filter {preprocessing.interpolation}",
                expected="bicubic or bilinear, which torch has with antialiasing",
                next_step="use a backbone that is prepared with one of these",
            )
        self.network = network
        self.size = preprocessing.size
        self.short = int(preprocessing.size / preprocessing.crop_fraction)
        self.resize: str = preprocessing.resize
        self.mode: str = preprocessing.interpolation
        fill = torch.tensor([float(round(255 * channel)) for channel in preprocessing.mean])
        self.register_buffer("fill", fill.view(1, 3, 1, 1))

    @no_type_check  # a checking wrapper would hide this module's names from the script compiler
    def forward(self, images: Tensor) -> Tensor:
        """Unit-length vectors."""
        height, width = images.shape[2], images.shape[3]
        size = self.size
        new_height, new_width = size, size
        if self.resize == "longer_side_pad":
            scale = size / max(height, width)
            new_height = max(1, int(round(height * scale)))  # noqa: RUF046 (a float in TorchScript)
            new_width = max(1, int(round(width * scale)))  # noqa: RUF046
        if self.resize == "short_side_crop":
            shorter = min(height, width)
            new_height, new_width = self.short * height // shorter, self.short * width // shorter
        pixels = F.interpolate(
            images.float(),
            size=[new_height, new_width],
            mode=self.mode,
            align_corners=False,
            antialias=True,
        )
        pixels = pixels.round().clamp(0, 255)
        if self.resize == "longer_side_pad":
            square = self.fill.expand(pixels.shape[0], 3, size, size).clone()
            top, left = (size - new_height) // 2, (size - new_width) // 2
            square[:, :, top : top + new_height, left : left + new_width] = pixels
            pixels = square
        if self.resize == "short_side_crop":
            top = int(round((new_height - size) / 2.0))  # noqa: RUF046
            left = int(round((new_width - size) / 2.0))  # noqa: RUF046
            pixels = pixels[:, :, top : top + size, left : left + size]
        vectors: Tensor = self.network(pixels.to(torch.uint8))
        return vectors


def write_submission(
    model: EmbeddingModel, target: Path, pixels: UInt8[np.ndarray, "b 3 height width"]
) -> float:
    """Write ``submission.zip`` and check it as the host loads it.

    Args:
        model: what is written, with resizing inside: the network traced, the sizes scripted.
        target: the file.
        pixels: prepared images to check it on, at least two.

    Returns:
        Largest difference of a number to the model's vectors of the same images prepared by Pillow.

    Raises:
        InputError: more dimensions than the challenge accepts.
        ArtefactError: it does not load elsewhere, or gives other vectors.
    """
    if model.head.embedding_dim > LARGEST_DIM:
        raise InputError(
            f"an embedding of {model.head.embedding_dim} numbers for --format guiec",
            expected=f"at most {LARGEST_DIM}, the challenge's rule",
            next_step=f"train with --embedding-dim {LARGEST_DIM}, or export with --dim "
            f"{LARGEST_DIM} if its prefixes were trained",
        )
    with atomic_path(target) as partial, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / _SCRIPT_NAME
        _scripted(model).save(str(file))
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            archive.write(file, _SCRIPT_NAME)
    # doubled, a prepared image is one of another size that must give nearly the same vector
    images = [np.repeat(np.repeat(image, 2, axis=1), 2, axis=2) for image in pixels[:4]]
    found = np.stack(in_fresh_process(_HOST_SEQUENCE, target, [image[None] for image in images]))
    prepared = [
        prepare(decode(np.ascontiguousarray(image.transpose(1, 2, 0))), model.backbone.preprocessing)
        for image in images
    ]
    with torch.inference_mode():
        expected = np.concatenate([model(torch.from_numpy(each[None])).numpy() for each in prepared])
    cosines = (found * expected).sum(axis=1)
    if cosines.min() < LEAST_COSINE:
        raise ArtefactError(
            f"the challenge's model gives other vectors than torch (cosine {cosines.min():.4f})",
            expected=f"cosines of at least {LEAST_COSINE}",
            next_step="report this with the backbone's name; the run itself is unharmed",
        )
    return float(np.abs(found - expected).max())


def _scripted(model: EmbeddingModel) -> torch.jit.ScriptModule:
    """Attention is written out in products, because the host's torch 1.11 has no fused one."""
    plain = copy.deepcopy(model).cpu().eval()
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 (nn.Module declares no such field)
    preprocessing = model.backbone.preprocessing
    example = torch.zeros(1, 3, preprocessing.size, preprocessing.size, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of sizes that are fixed here
        traced = torch.jit.trace(plain, example, check_trace=False)  # type: ignore[no-untyped-call]
        scripted: torch.jit.ScriptModule = torch.jit.script(PreparedInside(traced, preprocessing).eval())
    return scripted


# The calls of the challenge's host: load, evaluation mode, one image at its own size, first output row.
_HOST_SEQUENCE: Final = """
import sys, zipfile, tempfile, numpy as np, torch
for name in ("samething", "timm", "torchvision", "open_clip"):
    sys.modules[name] = None
archive, given, made = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    zipfile.ZipFile(archive).extract("saved_model.pt", folder)
    model = torch.jit.load(folder + "/saved_model.pt")
model.eval()
with np.load(given) as stored, torch.no_grad():
    vectors = [torch.flatten(model(torch.from_numpy(stored[name]))[0]).cpu().numpy() for name in stored.files]
assert all(len(vector) <= 64 for vector in vectors)
np.savez(made, *vectors)
"""


def in_fresh_process(
    code: str, program: Path, inputs: Sequence[UInt8[np.ndarray, "_ 3 _ _"]]
) -> list[Shaped[np.ndarray, ...]]:
    """Run a program in a Python process of its own, without this package.

    Args:
        code: reads the program's path, an ``.npz`` of inputs and the path of an ``.npz`` of outputs from its
            arguments.
        program: the file to load.
        inputs: images, each a call.

    Raises:
        ArtefactError: it failed there; the error's last line is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.npz", Path(folder) / "made.npz"
        named: dict[str, Any] = {f"{number:04d}": image for number, image in enumerate(inputs)}
        np.savez(given, **named)
        # isolated: neither this folder nor PYTHONPATH is searched
        arguments = [sys.executable, "-I", "-c", code, str(program.resolve()), str(given), str(made)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode or not made.exists():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ArtefactError(
                f"{program} does not run in a fresh process ({json.dumps(lines[-1][:300])})",
                expected="a program that needs torch alone",
                next_step="report this with the backbone's name; the run itself is unharmed",
            )
        with np.load(made) as stored:
            return [stored[name] for name in stored.files]
