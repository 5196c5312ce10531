"""Images in their own shape (``--views whole``), against Pillow and torch, one image at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from samething.backbones import Backbone, load_backbone, load_from_metadata
from samething.backbones.runtimes import choose_runtime
from samething.datasets import catalog
from samething.errors import InputError
from samething.export import export
from samething.features import FeatureSet, features
from samething.features.inference import Accelerator
from samething.images import Preprocessing, prepare
from samething.training import train
from scenes import photographs
from test_backbones import TINY, save_tiny

VIT, EVA = "test_vit3.r160_in1k", "eva02_tiny_patch14_224"
SIDE = 150
"""No whole number of patches of 16 or 14 pixels."""


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Photographs in six shapes, some of them twice, and one smaller than the input."""
    first, second, *_ = photographs()
    cut = [
        (0, 0, 200, 200),
        (0, 0, 200, 130),
        (10, 5, 210, 135),
        (0, 0, 90, 200),
        (0, 0, 61, 40),
        (0, 0, 200, 3),
    ]
    return [image.crop(box) for box in cut for image in (first, second)]


def by_hand(model: nn.Module, image: Image.Image, patch: int) -> torch.Tensor:
    """The longer side to SIDE pixels, the other rounded down; black around it up to whole patches."""
    wide, tall = image.size
    if wide > tall:
        small = image.resize((SIDE, max(1, int(SIDE * (tall / wide)))))
    else:
        small = image.resize((max(1, int(SIDE * (wide / tall))), SIDE))
    assert max(small.size) == SIDE
    config = model.pretrained_cfg
    values = torch.from_numpy(np.array(small)).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(config[name], dtype=torch.float64)[:, None, None] for name in ("mean", "std"))
    values = ((values - mean) / std).float()
    high, broad = (-(-side // patch) * patch for side in values.shape[1:])
    around = torch.zeros(1, 3, high, broad)
    top, left = (high - values.shape[1]) // 2, (broad - values.shape[2]) // 2
    around[0, :, top : top + values.shape[1], left : left + values.shape[2]] = values
    with torch.inference_mode():
        return model(around)[0]


@pytest.mark.parametrize(
    ("name", "patch"), [(TINY, 1), (VIT, 16), pytest.param(EVA, 14, marks=pytest.mark.slow)]
)
def test_a_batch_of_several_shapes_equals_one_image_at_a_time(images, tmp_path, name, patch):
    """ILIAS' authors fill nothing up; there was only --views pad, which fills the image up to a square."""
    dynamic = {"dynamic_img_size": True} if patch > 1 else {}
    own = save_tiny(tmp_path / "tiny.pth", name, num_classes=0, **dynamic)
    backbone = load_backbone(f"timm:{name}", weights=tmp_path / "tiny.pth", views="whole", sizes=(SIDE,))
    pixels = torch.from_numpy(np.stack([prepare(image, backbone.preprocessing) for image in images]))
    with torch.inference_mode():
        found = backbone(pixels)
    expected = torch.stack([by_hand(own, image, patch) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    padded = Accelerator(
        backbone, batch_size=len(images) + 2, device="cpu"
    )  # to the largest batch, with zeros
    torch.testing.assert_close(torch.from_numpy(padded.extract(pixels)), found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], expected[2], atol=1e-2)


@pytest.fixture(scope="module")
def extracted(images, tmp_path_factory):
    """A folder with features of the images, and the network that they are of."""
    folder = tmp_path_factory.mktemp("whole")
    own = save_tiny(folder / "tiny.pth", VIT, num_classes=0, dynamic_img_size=True)
    rows = []
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
        rows.append(f"{number:02}.png,{number // 2}\n")
    (folder / "list.csv").write_text("image,label\n" + "".join(rows), encoding="utf-8")
    catalog(folder / "list.csv", output=folder / "catalog.parquet")
    options = {"backbone": f"timm:{VIT}", "weights": folder / "tiny.pth", "views": "whole", "sizes": (SIDE,)}
    options |= {"decoding": "exact", "batch_size": 7, "runtime": "torch"}
    features(folder / "catalog.parquet", output=folder / "features", **options)
    return folder, own


def test_features_of_whole_images_are_extracted(images, extracted):
    folder, own = extracted
    made = FeatureSet.open(folder / "features")
    names = made.catalog.strings("image").tolist()
    expected = np.stack([by_hand(own, images[int(name[:2])], 16).numpy() for name in names])
    np.testing.assert_allclose(np.asarray(made.rows, np.float32), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_head_on_whole_images_is_refused_by_the_export(extracted):
    """A graph computes images of one shape only, so features of whole images have no model."""
    folder, _ = extracted
    train(folder / "features", output=folder / "run")
    with pytest.raises(InputError, match=r"features of --views whole[\s\S]*--views pad"):
        export(folder / "run", output=folder / "model", weights=folder / "tiny.pth")
    described = FeatureSet.open(folder / "features").backbone
    again = load_from_metadata(described, weights=folder / "tiny.pth")
    assert again.metadata() == described
    sample = torch.zeros(2, 3, *again.preprocessing.shape, dtype=torch.uint8)
    left_out = choose_runtime(again, sample).record["left_out"]
    assert left_out["openvino"] == left_out["onnxruntime"] == "images of any shape have no graph"


def fixed() -> Backbone:
    """A network that computes 8 × 8 pixels and nothing else."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return Backbone(network, name="fixed", width=3, preprocessing=Preprocessing(size=8))


def test_networks_of_one_shape_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot compute 8×5 pixels[\s\S]*any shape[\s\S]*--views pad"):
        load_backbone("python:test_whole_images:fixed", views="whole")
    with pytest.raises(InputError, match=r"whole\+crop[\s\S]*whole alone"):
        load_backbone("efficientnet_lite0", views="whole+crop")
