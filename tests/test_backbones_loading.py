"""Names, checkpoints, pooling, views, sizes and several backbones as one; and the list of them."""

import itertools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from samething.backbones import BACKBONES, Backbone, load_backbone, load_from_metadata, write_onnx
from samething.backbones.backbone_list import backbones
from samething.backbones.pooling import PooledNetwork, generalised_mean, possible_poolings
from samething.backbones.views import PRESETS, VIEWS, named_views
from samething.cli import main
from samething.errors import ArtefactError, InputError
from samething.images import Preprocessing, prepare
from scenes import photographs
from test_backbones import TINY, save_tiny

VIT = "test_vit.r160_in1k"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder of checkpoints named after two tiny backbones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny(folder / f"timm-{TINY}.pth")
    save_tiny(folder / f"timm-{VIT}.pth", VIT)
    return folder


def tiny(checkpoints: Path, name: str = f"timm:{VIT}", **options: object) -> Backbone:
    return load_backbone(name, weights=checkpoints, **options)


def describe(backbone: Backbone, images: list[Image.Image]) -> torch.Tensor:
    pixels = np.stack([prepare(image, backbone.preprocessing) for image in images])
    with torch.inference_mode():
        return backbone(torch.from_numpy(pixels))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """A wide, a tall and a square image."""
    return [photographs()[1], photographs()[2].crop((100, 0, 260, 400)), photographs()[0]]


# ---- pooling


def test_poolings_are_what_they_are_called(checkpoints, images):
    own = tiny(checkpoints)
    network = own.network
    pixels = torch.from_numpy(np.stack([prepare(image, own.preprocessing) for image in images]))
    with torch.inference_mode():
        tokens = network.forward_features((pixels.float() / 255 - own.mean) / own.std)
    num_prefix = tokens.shape[1] - (own.preprocessing.size // network.patch_embed.patch_size[0]) ** 2
    assert num_prefix == network.num_prefix_tokens == 1
    first, patches = tokens[:, 0], tokens[:, 1:]
    norm = network.fc_norm
    cubes = patches.clamp(min=1e-6).double().pow(3).mean(1).pow(1 / 3).float()
    expected = {"class": first, "mean": patches.mean(1), "gem": cubes}
    for pooling, features in expected.items():
        pooled = tiny(checkpoints, pooling=pooling)
        assert torch.allclose(describe(pooled, images), norm(features), atol=1e-5), pooling
        assert pooled.metadata()["options"] == {"pooling": pooling}
    both = tiny(checkpoints, pooling="class+mean")
    assert both.width == 2 * own.width
    assert torch.allclose(
        describe(both, images), torch.cat([norm(first), norm(patches.mean(1))], 1), atol=1e-5
    )


def test_attention_pooling_is_siglips_own():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, depth=1).eval()
    assert possible_poolings(network) == ("own", "mean", "gem", "map")
    inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(PooledNetwork(network, "map", name="x")(inputs), network(inputs))


def test_a_convolutional_network_pools_its_map(checkpoints, images):
    own, mean = (tiny(checkpoints, f"timm:{TINY}", pooling=pooling) for pooling in ("own", "mean"))
    assert torch.allclose(describe(own, images), describe(mean, images), atol=1e-5)
    gem = describe(tiny(checkpoints, f"timm:{TINY}", pooling="gem"), images)
    assert (gem >= describe(mean, images).clamp(min=0) - 1e-5).all()  # power means grow with the exponent


@pytest.mark.parametrize(("name", "pooling"), [(TINY, "class"), (TINY, "map"), (VIT, "map")])
def test_a_pooling_that_the_architecture_does_not_allow(checkpoints, name, pooling):
    with pytest.raises(InputError, match=pooling) as caught:
        tiny(checkpoints, f"timm:{name}", pooling=pooling)
    assert "mean" in caught.value.expected


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.floats(1, 8))
def test_the_generalised_mean_lies_between_mean_and_maximum(values, exponent):
    patches = torch.tensor(values, dtype=torch.float64)[None, :, None]
    found = float(generalised_mean(patches, exponent=exponent))
    assert np.mean(values) * (1 - 1e-9) <= found <= max(values) * (1 + 1e-9)
    assert float(generalised_mean(patches, exponent=1.0)) == pytest.approx(np.mean(values))


# ---- views and sizes


def test_views_lie_below_each_other_and_change_nothing(images):
    own = Preprocessing(size=64, mean=(0.1, 0.2, 0.3))
    parts = named_views("aspect+mirror+five", own)
    canvas = Preprocessing(size=64, views=parts)
    assert canvas.shape == (64 * 9, 64)
    for image in images:
        pixels = prepare(image, canvas)
        for place, part in enumerate(parts):
            assert np.array_equal(pixels[:, place * 64 : place * 64 + 64], prepare(image, part))
    assert Preprocessing.from_json(json.loads(json.dumps(canvas.to_json()))) == canvas
    assert set(own.to_json()) == {"size", "resize", "crop_fraction", "interpolation", "mean", "std"}


def test_views_show_what_their_names_say():
    """An image whose brightness is its column: each view shows the columns it should."""
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    image = Image.fromarray(np.ascontiguousarray(columns))
    own = Preprocessing(size=100)
    shown = {name: prepare(image, view(own))[0, 50] for name, view in VIEWS.items()}
    assert (shown["start"][0], shown["crop"][0], shown["end"][-1]) == (0, 50, 199)
    assert np.array_equal(shown["mirror"], shown["own"][::-1])
    assert shown["squash"][0] < 3 and shown["squash"][-1] > 196
    assert shown["top-left"][0] < 2 and shown["bottom-right"][-1] > 197
    assert shown["zoom"][0] > shown["crop"][0]
    padded = prepare(image, VIEWS["pad"](own))[0]
    assert (padded[:25] == 128).all() and (padded[75:] == 128).all()


@pytest.mark.parametrize("views", [*PRESETS, "own+mirror"])
def test_features_of_views_are_averaged_or_kept(checkpoints, images, views):
    parts = [describe(tiny(checkpoints, views=name), images) for name in PRESETS.get(views, views).split("+")]
    averaged, kept = (tiny(checkpoints, views=views, combine=combine) for combine in ("average", "keep"))
    assert averaged.width == parts[0].shape[1]
    assert kept.width == len(parts) * averaged.width
    assert torch.allclose(describe(averaged, images), torch.stack(parts).mean(0), atol=1e-5)
    assert torch.allclose(describe(kept, images), torch.cat(parts, 1), atol=1e-5)


def test_another_size_and_several(checkpoints, images):
    own = tiny(checkpoints)
    sizes = (own.preprocessing.size, 96)
    parts = [describe(tiny(checkpoints, sizes=(size,)), images) for size in sizes]
    assert torch.equal(parts[0], describe(own, images))
    several = tiny(checkpoints, sizes=sizes, combine="keep")
    assert several.preprocessing.shape == (sum(sizes), max(sizes))
    assert torch.allclose(describe(several, images), torch.cat(parts, 1), atol=1e-5)
    # as timm itself builds the other size from the checkpoint
    with torch.inference_mode():
        network = timm.create_model(
            VIT, num_classes=0, img_size=96, pretrained=True,
            pretrained_cfg_overlay={"file": str(checkpoints / f"timm-{VIT}.pth")},
        ).eval()  # fmt: skip
        single = tiny(checkpoints, sizes=(96,))
        pixels = torch.from_numpy(np.stack([prepare(image, single.preprocessing) for image in images]))
        assert torch.allclose(network((pixels.float() / 255 - own.mean) / own.std), parts[1], atol=1e-5)
    with pytest.raises(InputError, match="multiple of its patch"):
        tiny(checkpoints, sizes=(97,))
    with pytest.raises(InputError, match="at least 1 pixel"):
        tiny(checkpoints, sizes=(0,))


def test_a_view_that_does_not_exist(checkpoints):
    with pytest.raises(InputError, match="corner") as caught:
        tiny(checkpoints, views="crop+corner")
    assert "top-left" in caught.value.expected


# ---- several backbones as one


def test_several_backbones_stand_side_by_side(checkpoints, images):
    names = [f"timm:{TINY}", f"timm:{VIT}"]
    parts = [describe(tiny(checkpoints, name), images) for name in names]
    both = tiny(checkpoints, "+".join(names))
    features = describe(both, images)
    assert both.width == sum(part.shape[1] for part in parts)
    unit = [torch.nn.functional.normalize(part, dim=1) for part in parts]
    together = torch.nn.functional.normalize(features, dim=1)
    assert torch.allclose(together, torch.cat(unit, 1) / 2**0.5, atol=1e-5)
    cosines = [part @ part.T for part in unit]
    assert torch.allclose(together @ together.T, sum(cosines) / 2, atol=1e-5)
    assert features.square().mean() == pytest.approx(1, abs=1e-4)  # numbers of about unit size


def test_what_changes_features_changes_the_description(checkpoints):
    changes = [
        {}, {"pooling": "mean"}, {"views": "mirror"}, {"views": "own+mirror"},
        {"views": "own+mirror", "combine": "keep"}, {"sizes": (96,)}, {"resize": "squash"},
        {"views": "own+mirror", "resize": "squash"}, {"name": f"timm:{VIT}+timm:{TINY}"},
    ]  # fmt: skip
    described = [tiny(checkpoints, **change).metadata() for change in changes]
    for one, other in itertools.combinations(described, 2):
        assert one != other
    for description in described:
        stored = json.loads(json.dumps(description))
        assert load_from_metadata(stored, weights=checkpoints).metadata() == description
    assert "options" not in described[0]  # what was described before there were options stays valid


@pytest.mark.slow
def test_a_canvas_goes_through_onnx(checkpoints, images, tmp_path):
    both = tiny(checkpoints, f"timm:{VIT}+timm:{TINY}", views="crop+pad")
    graph = write_onnx(both, tmp_path / "both.onnx", size=both.preprocessing.shape)
    pixels = np.stack([prepare(image, both.preprocessing) for image in images])
    found = onnxruntime.InferenceSession(graph).run(None, {"pixels": pixels})[0]
    assert np.abs(found - describe(both, images).numpy()).max() < 1e-3


# ---- checkpoints


def test_checkpoints_by_name(checkpoints, tmp_path):
    own = tiny(checkpoints).metadata()
    assert load_backbone(f"timm:{VIT}", weights=checkpoints / f"timm-{VIT}.pth").metadata() == own
    with pytest.raises(ArtefactError, match="holds no checkpoint") as caught:
        load_backbone(f"timm:{VIT}", weights=tmp_path)
    assert f"timm-{VIT}.safetensors" in caught.value.expected
    with pytest.raises(InputError, match="one checkpoint"):
        load_backbone(f"timm:{VIT}+timm:{TINY}", weights=checkpoints / f"timm-{VIT}.pth")


def test_your_own_module(images):
    class Brightness(torch.nn.Module):
        def forward(self, inputs):
            return inputs.mean((2, 3))

    own = Backbone(Brightness(), name="brightness", width=3, preprocessing=Preprocessing(size=32))
    assert load_backbone(own) is own
    assert describe(own, images).shape == (3, 3)


def save_transformers(folder: Path, kind: str, *, lacking: str = "") -> torch.nn.Module:
    """A tiny random model of transformers with its image processor, as a folder."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "clip":
            config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
            model = transformers.CLIPVisionModel(config)
        else:
            del sizes["intermediate_size"]
            config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)
            model = transformers.Dinov2Model(config)
    state = {key: value for key, value in model.state_dict().items() if not (lacking and lacking in key)}
    model.save_pretrained(folder, state_dict=state)
    side = config.image_size
    (folder / "preprocessor_config.json").write_text(
        json.dumps({
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side},
            "do_center_crop": True, "crop_size": {"height": side, "width": side}, "resample": 3,
            "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
        })
    )  # fmt: skip
    return model.eval()


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_any_model_of_transformers(tmp_path, images, kind):
    model = save_transformers(tmp_path, kind)
    backbone = load_backbone("hf:someone/something", weights=tmp_path)
    assert backbone.width == 32
    assert backbone.preprocessing.mean == (0.5, 0.4, 0.3)
    pixels = torch.from_numpy(np.stack([prepare(image, backbone.preprocessing) for image in images]))
    with torch.inference_mode():
        found = model(pixel_values=(pixels.float() / 255 - backbone.mean) / backbone.std)
    assert torch.allclose(describe(backbone, images), found.pooler_output, atol=1e-6)
    mean = load_backbone("hf:someone/something", weights=tmp_path, pooling="mean")
    assert torch.allclose(describe(mean, images), found.last_hidden_state[:, 1:].mean(1), atol=1e-6)
    larger = load_backbone("hf:someone/something", weights=tmp_path, sizes=(56,))
    assert describe(larger, images).shape == (3, 32)


def test_a_folder_of_transformers_that_is_none_or_not_whole(tmp_path):
    with pytest.raises(ArtefactError, match="not a model folder"):
        load_backbone("hf:someone/something", weights=tmp_path / "nothing")
    save_transformers(tmp_path, "clip", lacking="layers.1.mlp")
    with pytest.raises(ArtefactError, match=r"lack .*layers\.1\.mlp"):
        load_backbone("hf:someone/something", weights=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("projection", [True, False])
def test_a_checkpoint_of_open_clip(tmp_path, images, projection):
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    row = "clip_dfn_base_224_proj" if projection else "clip_dfn_base_224"
    ours = load_backbone(row, weights=tmp_path / "model.pt")
    any_name = load_backbone("open_clip:ViT-B-16-quickgelu/dfn2b", weights=tmp_path / "model.pt")
    transform = open_clip.image_transform(224, is_train=False)
    with torch.inference_mode():
        inputs = torch.stack([transform(image) for image in images])
        encoded = model.encode_image(inputs)
        if not projection:
            model.visual.proj = None
            assert ours.width == 768
        expected = model.encode_image(inputs)
    assert torch.allclose(describe(ours, images), expected, atol=1e-4)
    assert torch.allclose(describe(any_name, images), encoded, atol=1e-4)
    pooled = load_backbone("clip_dfn_base_224", weights=tmp_path / "model.pt", pooling="class")
    if not projection:
        assert torch.allclose(describe(pooled, images), expected, atol=1e-4)
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="does not fit"):
        load_backbone(row, weights=tmp_path / "bad.pt")


def test_a_projection_has_its_own_pooling(checkpoints, monkeypatch):
    network = timm.create_model("vit_pe_core_tiny_patch16_384")
    monkeypatch.setattr("samething.backbones.loading.timm_network", lambda *_, **__: network)
    with pytest.raises(InputError, match="trained on that") as caught:
        load_backbone("pe_core_tiny_384_proj", pooling="mean")
    assert "pe_core_tiny_384 " in caught.value.next_step


# ---- names, and no network


@pytest.mark.parametrize(
    "name", ["open_clip:ViT-B-16", "open_clip:ViT-B-16/nothing", "open_clip:X/y", "hf:", "timm:"]
)
def test_names_that_no_library_knows(name):
    with pytest.raises(InputError) as caught:
        load_backbone(name)
    assert name in caught.value.given


def test_a_mistyped_row_is_met_with_the_nearest():
    with pytest.raises(InputError, match=r"did you mean .*siglip2_base_224"):
        load_backbone("siglip2_bse_224")


@pytest.mark.parametrize(
    "name",
    [
        "siglip2_base_224",
        "clip_dfn_base_224",
        "mlcd_base32_224",
        "hf:google/vit",
        "open_clip:ViT-B-32/openai",
    ],
)
def test_without_a_network_every_loader_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtefactError) as caught:
        load_backbone(name)
    assert name in caught.value.given
    for said in ("hf download", str(tmp_path), "--weights", "efficientnet_lite0"):
        assert said in caught.value.next_step


# ---- the list


def test_the_list_shows_every_row_and_what_is_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--timm--vit_base_patch16_siglip_224.v2_webli" / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert set(backbones("siglip2").on_disk) == set()  # a configuration alone is not the weights
    (snapshot / "model.safetensors").touch()
    everything = backbones(json=tmp_path / "rows.json")
    assert [row.name for row in everything.rows] == list(BACKBONES)
    assert set(everything.on_disk) == {"efficientnet_lite0", "siglip2_base_224"}
    written = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert written["siglip2_base_224"]["on_disk"] == str(snapshot / "model.safetensors")
    assert written["siglip_so400m_384"]["on_disk"] is None
    with pytest.raises(SystemExit) as done:
        main(["backbones", "so400m", "--details"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    for said in (
        "siglip_so400m_384",
        "1,152",
        "384",
        "428",
        "no",
        "timm/vit_so400m_patch14_siglip_384.webli",
        "squash",
    ):
        assert said in " ".join(printed.split()), said


def test_the_list_of_what_is_here(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert [row.name for row in backbones(on_disk=True).rows] == ["efficientnet_lite0"]
    with pytest.raises(InputError, match="no backbone"):
        backbones("nothing of that name")
