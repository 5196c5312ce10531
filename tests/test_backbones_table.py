"""Every row of the table against the libraries' own configuration, architecture, preprocessing and output."""

import dataclasses
import functools

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
import transformers

from samething.backbones import BACKBONES, BackboneRow
from samething.backbones.loading import PACKAGED_ARCHITECTURE
from samething.backbones.network import Backbone
from samething.backbones.open_clip_networks import open_clip_network
from samething.backbones.processor_settings import processor_preprocessing
from samething.backbones.timm_networks import timm_network
from samething.backbones.transformers_networks import TransformersNetwork
from samething.heads import Head, HeadConfig
from samething.images import Preprocessing, prepare
from scenes import photographs

TIMM = [row for row in BACKBONES.values() if row.loader == "timm"]
OPEN_CLIP = [row for row in BACKBONES.values() if row.loader == "open_clip"]
WITH_TWIN = [row for row in BACKBONES.values() if row.same_as]

# Millions of parameters of the image encoder as published: open_clip's docs/model_profile.csv (column
# image_mparams) where a row has a twin there, else the paper or the model's card. Rows with a projection.
PUBLISHED_WITH_PROJECTION = {
    "clip_openai_base32_224": 87.85, "clip_openai_base_224": 86.19, "clip_openai_large_224": 303.97,
    "clip_openai_large_336": 304.29, "clip_laion2b_base32_224": 87.85, "clip_laion2b_base_224": 86.19,
    "clip_laion2b_large_224": 303.97, "clip_laion2b_huge_224": 632.08, "clip_laion2b_giant_224": 1012.65,
    "clip_laion2b_gigantic_224": 1844.91, "clip_datacomp_base32_256": 87.86,
    "clip_laion400m_base_plus_240": 117.21, "convnext_clip_base_256": 88.22,
    "convnext_clip_base_aesthetic_320": 88.22, "convnext_clip_large_256": 199.77,
    "convnext_clip_large_320": 199.77, "convnext_clip_xxlarge_256": 846.54, "clipa_large_224": 303.96,
    "clipa_large_336": 304.29, "clipa_huge_224": 632.07, "clipa_huge_336": 632.48,
    "clipa_gigantic_224": 1844.9, "clipa_gigantic_336": 1845.44, "eva02_clip_base_224": 86.26,
    "eva02_clip_large_224": 304.11, "eva02_clip_large_336": 304.43, "eva02_clip_enormous_224": 4350.56,
    "eva02_clip_enormous_plus_224": 4350.56, "metaclip_base_224": 86.19, "metaclip_large_224": 303.97,
    "metaclip_huge_224": 632.08, "metaclip_gigantic_224": 1844.91, "metaclip2_huge_224": 632.08,
    "clip_dfn_base_224": 86.19, "clip_dfn_large_224": 303.97, "clip_dfn_huge_224": 632.08,
}  # fmt: skip
# Without a projection; the second number is the rounding of the source.
PUBLISHED = {
    # open_clip's docs/model_profile.csv
    "siglip_base_224": (92.88, 0.01), "siglip_base_256": (92.93, 0.01), "siglip_base_384": (93.18, 0.01),
    "siglip_base_512": (93.52, 0.01), "siglip_large_256": (315.96, 0.01), "siglip_large_384": (316.28, 0.01),
    "siglip_so400m_224": (427.68, 0.01), "siglip_so400m_384": (428.23, 0.01),
    # Florek et al. 2024: 428 M; Tschannen et al. 2025: 86 M (without the head), 303, 400, 1 B are rounded;
    # the model cards of timm/*.v2_webli
    "siglip2_so400m_384": (428, 1), "siglip2_giant_384": (1163, 1.5), "siglip2_large_384": (316, 1),
    "siglip2_base_224": (93, 0.5),
    # Oquab et al. 2023, table 17 of the appendix, and the model cards: 21, 86, 300, 1,100 without rounding up
    "dinov2_small_518": (22, 0.5), "dinov2_base_518": (86.6, 0.5), "dinov2_large_518": (304, 1),
    "dinov2_giant_518": (1136, 1),
    # Siméoni et al. 2025, model cards: 21.6, 29, 86, 303, 840, 6,716
    "dinov3_small_256": (21.6, 0.1), "dinov3_small_plus_256": (29, 0.5), "dinov3_base_256": (86, 0.5),
    "dinov3_large_256": (303, 0.5), "dinov3_huge_plus_256": (840, 1), "dinov3_7b_256": (6716, 1),
    "dinov3_convnext_tiny_224": (28, 1), "dinov3_convnext_small_224": (50, 1),
    "dinov3_convnext_base_224": (88, 1), "dinov3_convnext_large_224": (197, 1),
    # Bolya et al. 2025, table 3: 0.09 B, 0.32 B, 1.88 B
    "pe_core_base_224": (93, 1), "pe_core_large_336": (317, 2), "pe_core_gigantic_448": (1880, 5),
    # Kirillov et al. 2023: 91, 308, 636 with the neck of about 1 M, and prompt and mask decoder of 4 M
    "sam_base_1024": (90, 2), "sam_large_1024": (308, 2), "sam_huge_1024": (636, 2),
    # Tan & Le's EfficientNet-Lite0: 4.7 M, less the classifier of 1.28 M
    "efficientnet_lite0": (3.37, 0.05),
}  # fmt: skip


# Model type and configuration of transformers' rows, to build them without a network.
ARCHITECTURES = {
    "DeepGlint-AI/mlcd-vit-base-patch32-224": (
        "clip_vision_model",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "patch_size": 32},
    ),
    "DeepGlint-AI/mlcd-vit-large-patch14-336": (
        "clip_vision_model",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "image_size": 336, "patch_size": 14},
    ),
    "DeepGlint-AI/mlcd-vit-bigG-patch14-336": ("mlcd_vision_model", {"image_size": 336}),
    "DeepGlint-AI/mlcd-vit-bigG-patch14-448": ("mlcd_vision_model", {"image_size": 448}),
}  # fmt: skip


def random_network(row: BackboneRow) -> torch.nn.Module:
    """The row's real architecture with random weights; inside ``torch.device("meta")`` without memory."""
    if row.loader == "package":
        return timm_network(PACKAGED_ARCHITECTURE)
    if row.loader == "timm":
        return timm_network(row.identifier, projection=row.projection)
    if row.loader == "open_clip":
        device = "meta" if torch.empty(0).is_meta else "cpu"
        return open_clip_network(row.identifier, projection=row.projection, pretrained=False, device=device)
    model_type, settings = ARCHITECTURES[row.identifier]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    return TransformersNetwork(transformers.AutoModel.from_config(config))


@functools.cache
def architecture_millions(loader: str, architecture: str, projection: bool, name: str) -> float:
    with torch.device("meta"):
        return millions(random_network(BACKBONES[name]))


def millions(network: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def architecture_of(row: BackboneRow) -> str:
    """What rows share that differ in their weights alone."""
    if row.loader == "transformers":
        return row.identifier
    return row.identifier.split("." if row.loader == "timm" else "/")[0]


FIRST_OF_ITS_KIND = {
    (row.loader, architecture_of(row), row.projection): row.name for row in reversed(BACKBONES.values())
}


def real_millions(row: BackboneRow) -> float:
    """Parameters of the row's architecture, built without memory; once for all rows that share it."""
    kind = (row.loader, architecture_of(row), row.projection)
    return architecture_millions(*kind, FIRST_OF_ITS_KIND[kind])


# ---- the table as a whole


def test_the_paper_and_today():
    families = {row.family.split(" (")[0] for row in BACKBONES.values()}
    assert families >= {
        "OpenCLIP ViT", "OpenCLIP ConvNeXt", "CLIPA", "EVA-02-CLIP", "MetaCLIP", "SigLIP", "DINOv2",
        "Segment Anything",
    }  # fmt: skip  # the eight of the paper
    assert families >= {"SigLIP 2", "DINOv3", "Perception Encoder", "TIPSv2", "MetaCLIP 2", "DFN CLIP"}
    assert any("UNICOM" in row.family for row in BACKBONES.values())
    early = {
        "efficientnet_lite0", "siglip_so400m_384", "siglip2_so400m_384", "siglip2_base_224",
        "dinov2_large_518", "dinov2_small_518", "clip_dfn_huge_378",
    }  # fmt: skip
    assert early <= set(BACKBONES)
    for row in BACKBONES.values():
        assert row.good_at and row.licence and row.weights, row.name
        twin = BACKBONES.get(f"{row.name}_proj")
        if twin is not None:
            assert (row.projection, twin.projection) == (False, True)
            assert twin.identifier == row.identifier
            assert twin.parameters_millions > row.parameters_millions


@pytest.mark.parametrize("row", TIMM, ids=lambda row: row.name)
def test_timm_rows_say_what_timm_says(row):
    configured = timm.get_pretrained_cfg(row.identifier)
    assert configured is not None
    assert configured.input_size == (3, row.preprocessing.size, row.preprocessing.size)
    assert row.preprocessing.mean == pytest.approx(configured.mean)
    assert row.preprocessing.std == pytest.approx(configured.std)
    assert row.hub == configured.hf_hub_id
    if not row.same_as:
        assert row.preprocessing.interpolation == configured.interpolation
        assert row.preprocessing.crop_fraction == configured.crop_pct
        assert (row.preprocessing.resize == "squash") == (configured.crop_mode == "squash")
    if row.projection:
        assert row.width == configured.num_classes
    said = row.licence.lower().replace("licence", "license")
    # timm gives its copies of OpenAI's and LAION's weights its own licence; the publishers' is MIT
    if not (row.licence == "MIT" and configured.license == "apache-2.0"):
        names = {"apple-ascl": "apple sample code license", "dinov3-license": "dinov3 license"}
        assert said == names.get(configured.license, configured.license)


@pytest.mark.parametrize("row", WITH_TWIN, ids=lambda row: row.name)
def test_rows_with_a_twin_in_open_clip_take_its_preprocessing(row):
    architecture, tag = row.same_as.split("/")
    configured = open_clip.get_pretrained_cfg(architecture, tag)
    model = open_clip.get_model_config(architecture)
    policies = {"shortest": "short_side_crop", "squash": "squash"}
    assert row.preprocessing == Preprocessing(
        size=model["vision_cfg"]["image_size"],
        resize=policies[configured["resize_mode"]],
        interpolation=configured["interpolation"],
        mean=configured["mean"],
        std=configured["std"],
    )
    if row.projection:
        assert row.width == model["embed_dim"]
    if row.loader == "timm" and "ViT" in architecture:  # the activation that the weights were trained with
        quick = bool(configured.get("quick_gelu"))
        assert ("quickgelu" in row.identifier) == quick, (
            "another activation than the weights were trained with"
        )
    if row.loader == "open_clip":
        assert row.hub == configured["hf_hub"].strip("/")
        assert ("quickgelu" in architecture) == bool(configured.get("quick_gelu"))


# ---- architectures, without memory


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if place % 8 == 0 else pytest.mark.slow)
        for place, row in enumerate(BACKBONES.values())
    ],
    ids=lambda row: row.name,
)
def test_rows_say_the_size_of_the_real_architecture(row):
    assert real_millions(row) == pytest.approx(row.parameters_millions, abs=0.006)


@pytest.mark.parametrize("name", PUBLISHED_WITH_PROJECTION)
def test_encoders_with_projection_have_the_published_size(name):
    assert BACKBONES[f"{name}_proj"].parameters_millions == pytest.approx(
        PUBLISHED_WITH_PROJECTION[name], abs=0.011
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_encoders_have_the_published_size(name):
    published, rounding = PUBLISHED[name]
    assert BACKBONES[name].parameters_millions == pytest.approx(published, abs=rounding)


def test_the_papers_431_million():
    """Florek et al. 2024: 431 M with the head and a centre per class of 34.8k, of which 2.3 M are trained."""
    row = BACKBONES["siglip_so400m_384"]
    with torch.device("meta"):
        head = Head(HeadConfig(embedding_dim=64), width=row.width)
    trained = millions(head) + 34_800 * 64 / 1e6
    assert trained == pytest.approx(2.3, abs=0.05)
    assert real_millions(row) + trained == pytest.approx(431, abs=0.6)


# ---- preprocessing against the libraries' own, on real images


def normalised(image, preprocessing: Preprocessing) -> torch.Tensor:
    pixels = torch.from_numpy(prepare(image, preprocessing)).double().div(255)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return pixels.sub(mean).div(std).float()


def distinct_preprocessings() -> dict[tuple, BackboneRow]:
    """One row of each preprocessing, and of each library that it is compared with."""
    return {(row.preprocessing, bool(row.same_as), row.loader): row for row in BACKBONES.values()}


@pytest.mark.parametrize("row", distinct_preprocessings().values(), ids=lambda row: row.name)
def test_preprocessing_is_the_librarys_own(row):
    """Every distinct preprocessing of the table, against open_clip's, timm's or transformers' transform."""
    if row.same_as:
        architecture, tag = row.same_as.split("/")
        configured = open_clip.get_pretrained_cfg(architecture, tag)
        transform = open_clip.image_transform(
            row.preprocessing.size,
            is_train=False,
            mean=configured["mean"],
            std=configured["std"],
            resize_mode=configured["resize_mode"],
            interpolation=configured["interpolation"],
        )
    elif row.loader == "transformers":
        processor = clip_processor(row.preprocessing.size)
        assert processor_preprocessing(processor) == row.preprocessing
        transform = lambda image: processor(image, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    else:
        architecture = row.identifier if row.loader == "timm" else "tf_efficientnet_lite0"
        overlay = {} if row.loader == "timm" else {"pretrained_cfg": {}}
        with torch.device("meta"):
            model = timm.create_model(architecture)
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model, **overlay))
    for image in photographs()[:4]:
        assert (normalised(image, row.preprocessing) - transform(image)).abs().max() < 2e-5


def clip_processor(size: int) -> transformers.CLIPImageProcessor:
    """The processor of CLIP's checkpoints on the hub, which MLCD's use, with Pillow as backend."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=3,
        do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True, do_convert_rgb=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
    )  # fmt: skip


# ---- output against the libraries' own forward pass


def library_features(row: BackboneRow, ours: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The features of a model that the library itself built, with our network's weights."""
    state = ours.state_dict()
    if row.loader == "timm":
        model = timm.create_model(row.identifier, **({} if row.projection else {"num_classes": 0}))
        if row.identifier.startswith("samvit"):
            # the encoder without its neck, pooled: written out
            missing = model.load_state_dict(state, strict=False)
            assert all(key.startswith("neck.") for key in missing.missing_keys)
            model.eval()
            hidden = model.norm_pre(model.pos_drop(model.patch_embed(inputs) + model.pos_embed))
            return model.blocks(hidden).mean((1, 2))
        if row.identifier.startswith("convnext_large_mlp") and not row.projection:
            # what open_clip's trunk gives: the norm of the pooled last stage
            model.load_state_dict(state, strict=False)
            model.eval()
            return model.head.norm(model.forward_features(inputs).mean((2, 3), keepdim=True)).flatten(1)
        model.load_state_dict(state)
        return model.eval()(inputs)
    if row.loader == "open_clip":
        architecture = row.identifier.split("/")[0]
        tower = open_clip.create_model(architecture, pretrained=None).visual.eval()
        tower.load_state_dict(state, strict=row.projection)
        if row.projection:
            return tower(inputs)
        tokens = tower.transformer(tower._embeds(inputs))
        if tower.pool_type == "avg":  # CLIPA: the mean of the patches, then the norm
            return tower.ln_post(tokens[:, 1:].mean(1))
        return tower.ln_post(tokens)[:, 0]  # the class token, written out
    model_type, settings = ARCHITECTURES[row.identifier]
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModel.from_config(config).eval()
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()}, strict=False)
    return model(pixel_values=inputs).pooler_output


def check_output(row: BackboneRow) -> None:
    torch.manual_seed(0)
    network = random_network(row).eval()
    backbone = Backbone(network, name=row.name, width=row.width, preprocessing=row.preprocessing)
    pixels = torch.from_numpy(prepare(photographs()[1], row.preprocessing)[None])
    inputs = (pixels.float() / 255 - backbone.mean) / backbone.std
    with torch.inference_mode():
        features = backbone(pixels)
        expected = library_features(row, network, inputs)
    assert features.shape == (1, row.width)
    assert features.std() > 0
    assert (features - expected).abs().max() <= 1e-6 * expected.abs().max()


LIGHT = ["pe_core_tiny_384", "pe_core_tiny_384_proj", "dinov3_small_256", "dinov3_convnext_tiny_224"]


@pytest.mark.parametrize("name", LIGHT)
def test_output_is_the_librarys_own(name):
    check_output(BACKBONES[name])


def distinct_architectures() -> list[str]:
    """A row of each architecture that is not among the light ones, up to 700 million parameters."""
    found = {}
    for row in BACKBONES.values():
        if row.loader != "package" and row.parameters_millions < 700 and row.name not in LIGHT:
            architecture = row.identifier.split("." if row.loader == "timm" else "/")[0]
            key = (architecture if row.loader != "transformers" else row.identifier, row.projection)
            found.setdefault((*key, row.preprocessing.size), row.name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", distinct_architectures())
def test_output_is_the_librarys_own_at_full_size(name):
    check_output(BACKBONES[name])


GIANTS = [row for row in BACKBONES.values() if row.parameters_millions >= 700]


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in GIANTS if row.loader == "timm"], ids=lambda row: row.name)
def test_output_of_giants_with_two_blocks(row, monkeypatch):
    """Too large to compute here whole: the same architecture and width, with two blocks instead of all."""
    create = timm.create_model

    def shallow(name, **options):
        depth = {"depths": (1, 1, 1, 1)} if name.startswith("convnext") else {"depth": 2}
        return create(name, **options, **depth)

    monkeypatch.setattr(timm, "create_model", shallow)
    check_output(dataclasses.replace(row))


def test_every_row_is_compared_somewhere():
    covered = {*LIGHT, *distinct_architectures(), *(row.name for row in GIANTS), "efficientnet_lite0"}
    architectures = {BACKBONES[name].identifier.split(".")[0].split("/")[0] for name in covered}
    assert {row.identifier.split(".")[0].split("/")[0] for row in BACKBONES.values()} <= architectures


def test_features_tell_images_apart():
    """Even random weights give different images different features: the pixels reach the output."""
    row = BACKBONES["pe_core_tiny_384"]
    torch.manual_seed(1)
    network = random_network(row).eval()
    pixels = np.stack([prepare(image, row.preprocessing) for image in photographs()[:2]])
    with torch.inference_mode():
        one, other = Backbone(network, name=row.name, width=row.width, preprocessing=row.preprocessing)(
            torch.from_numpy(pixels)
        )
    assert not torch.allclose(one, other)
