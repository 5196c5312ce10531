"""What a training run is told: two small dataclasses, and recipes, which are functions that return one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from samething.configuration import changed, check_ranges
from samething.errors import InputError
from samething.files import Json
from samething.retrieval.codes import StoredCodes
from samething.sampling import SamplingKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a head is trained from cached features.

    A recipe is a whole configuration by name; ``--recipe paper`` is the paper's winning run.
    """

    loss: str = "arcface"
    """normface, cosface, arcface, dynm-arcface, liarcface, adacos, curricularface or adaface."""
    num_centers: int = 1
    """Sub-centres per class; above 1 the loss becomes its sub-centre form."""
    scale: float | None = None
    """s, the factor of the cosines; by default the loss's own."""
    margin: float | None = None
    """m, in radians (cosface and adaface: of the cosine); by default the loss's own."""
    loss_options: dict[str, float | bool | str] = dataclasses.field(default_factory=dict)
    """Further options of the loss by their names in docs/losses.md, such as --loss-options.h 0.3 for adaface,
    --loss-options.dynamic true for adacos and --loss-options.schedule inverse_root for dynm-arcface."""

    head: Literal["linear", "batchnorm-linear", "mlp"] = "linear"
    """The map that is trained."""
    hidden_dim: int = 512
    """Width of the hidden layer of the head mlp."""
    embedding_dim: int = 64
    """Numbers in an embedding; with the start lda the width of the features, if that is less."""
    codes: StoredCodes = "float32"
    """How embeddings are kept, and so measured: float32, or int8 or int4 (8 or 4 bits per number)."""
    start: Literal["random", "lda"] = "random"
    """What the head starts from; lda: shrunk discriminants, in closed form, for a linear head."""
    shrinkage: float = 0.0
    """Of lda: weight of an even spread within classes; 0: chosen on training images that are left out."""
    bias: bool = True
    """Whether the linear map has a bias."""
    standardise: bool = True
    """Bring features to unit length, centre and scale them before the head."""
    power: float = 1.0
    """With standardise: the features' numbers first become their magnitudes to this power, in (0, 1]."""
    whiten: float = 0.0
    """Whitening of the trained head's embeddings, in [0, 1]: the spread in each direction is divided by its
    standard deviation to this power. It keeps what few training classes do not ask for; 0: none."""
    dropout: float = 0.2
    """Share of the feature's numbers that are dropped in a training step, in [0, 1)."""

    optimiser: Literal["sgd", "adam", "adamw"] = "adamw"
    """adam adds the decay to the gradient (L2, as the paper does), adamw applies it by itself (decoupled)."""
    learning_rate: float = 1e-2
    """Highest learning rate."""
    final_learning_rate: float = 1e-5
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = 2.0
    """Length of the warm-up, in warmup_unit."""
    warmup_unit: Literal["epochs", "steps"] = "epochs"
    """What warmup counts."""
    weight_decay: float = 1e-4
    """Weight decay of head and class weights."""
    momentum: float = 0.9
    """Momentum of sgd."""
    gradient_clip: float = 0.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and optimiser stay float32."""

    epochs: float = 40.0
    """Passes over the training images; 0 with the start lda: its closed form alone."""
    iterations: int | None = None
    """Number of steps, instead of epochs."""
    batch_size: int = 256
    """Images per step, over all processes."""
    sampling: SamplingKind = "shuffled"
    """How images are drawn; block-shuffled is for features that are larger than memory."""
    sampling_temperature: float = 1.0
    """For domain-balanced: 1 is proportional to the size of the domains, large is equal shares."""
    class_sample_ratio: float = 1.0
    """Partial FC: share of the other classes that a step looks at, in (0, 1]."""
    matryoshka_dims: tuple[int, ...] = ()
    """Prefixes of the embedding that are trained together with the whole, such as 16 32."""

    validate_every: float = 5.0
    """Epochs between two validations by mMP@5 on unseen instances; a checkpoint is written at each."""
    checkpoint_every: float = 0.0
    """Epochs between further checkpoints, for long runs, such as 0.1; 0: none."""
    keep_checkpoints: bool = False
    """Keep the head of every checkpoint as checkpoints/head-STEP.safetensors."""
    patience: int = 0
    """Stop after so many validations without a better score; 0: never."""
    keep: Literal["best", "last"] = "best"
    """Which head is the result: that of the best validation, or the last."""
    seed: int = 0
    """Decides initial weights, order of the images and dropout."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if any(not 0 < dim < self.embedding_dim for dim in self.matryoshka_dims):
            raise InputError(
                f"--matryoshka-dims {' '.join(map(str, self.matryoshka_dims))}",
                expected=f"prefixes shorter than --embedding-dim {self.embedding_dim}",
                next_step="leave out those that are not",
            )
        if self.start == "lda" and (self.head != "linear" or not self.standardise):
            raise InputError(
                f"--start lda with head = {self.head!r} and standardise = {self.standardise}",
                expected="a linear head on standardised features",
                next_step="leave these out, or take --start random",
            )
        if self.start == "random" and self.epochs == 0:
            raise InputError(
                f"--epochs {self.epochs}",
                expected="above 0",
                next_step="give another --epochs, or --start lda",
            )

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "matryoshka_dims": list(self.matryoshka_dims)}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> TrainConfig:
        """The inverse of :meth:`to_json`; options of earlier versions that are gone are passed over."""
        fields: dict[str, Any] = {name: item for name, item in value.items() if name not in REMOVED}
        if fields.get("warmup_unit") == "images":
            fields |= {"warmup": fields["warmup"] / fields["batch_size"], "warmup_unit": "steps"}
        return changed(cls(), fields)


REMOVED: Final[Mapping[str, Json]] = {
    "train_dim": 0,
    "members": 1,
    "initialise": "random",
    "pull_to_start": 0.0,
    "distill": 0.0,
    "interpolate": 1.0,
    "warmup_shape": "linear",
    "compile": False,
    "margin_growth": [1.0, 1.0],
    "feature_sample_ratio": 1.0,
    "checkpoint_unit": "epochs",
    "sam_rho": 0.0,
    "ema_decay": 0.0,
}
"""Options that earlier versions had, with their defaults. A run that used one is a head like any other; only
training it again from its configuration is not possible."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The stage after the head: the backbone learns too.

    The head is trained first, on cached features, so that the backbone is not torn by a head that knows
    nothing (LP-FT, Kumar et al., ICLR 2022).
    """

    unfreeze: str = ""
    """Which layers of the backbone learn after the head: all, or the number of last ones; by default none."""
    stage: Literal["lp-ft", "locked-head"] = "lp-ft"
    """lp-ft: head, classes and backbone learn together; locked-head: the backbone alone, as the challenge's
    winner did."""
    tune_epochs: float = 3.0
    """Passes over the training images with the backbone unfrozen."""
    tune_batch_size: int = 32
    """Images per step of fine-tuning."""
    tune_learning_rate: float = 1e-3
    """Highest learning rate of head and classes while the backbone learns."""
    backbone_rate: float = 1e-2
    """Learning rate of the backbone's last layer as a share of it; the winner's were 1e-2 to 1e-3."""
    layer_decay: float = 0.9
    """Each earlier layer learns slower by this factor, in (0, 1]; 1: all alike."""
    lora_rank: int = 0
    """Rank of LoRA updates (peft) instead of whole weights, merged at the end; 0: whole weights."""
    lora_alpha: int = 16
    """LoRA updates are multiplied by lora_alpha / lora_rank."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    tune_validate_every: float = 1.0
    """Epochs between two validations of fine-tuning; also the stride of its checkpoints."""

    def __post_init__(self) -> None:
        check_ranges(self, _TUNE_RANGES)
        if self.unfreeze not in ("", "all") and not (self.unfreeze.isdigit() and int(self.unfreeze) > 0):
            raise InputError(
                f"--unfreeze {self.unfreeze}",
                expected="all, or a number of layers from 1",
                next_step="for instance --unfreeze 2",
            )
        plain = FinetuneConfig.__dataclass_fields__
        changed = [name for name in plain if getattr(self, name) != plain[name].default]
        if changed and not self.unfreeze:
            flag = "--" + changed[0].replace("_", "-")
            raise InputError(
                f"{flag} without --unfreeze",
                expected="--unfreeze all or --unfreeze NUMBER, because the backbone is frozen otherwise",
                next_step=f"add --unfreeze, or leave {flag} out",
            )

    @property
    def num_layers(self) -> int | None:
        """Last layers that learn; None: all."""
        return None if self.unfreeze == "all" else int(self.unfreeze)


_LARGE: Final = 1e12
_NOT_NEGATIVE: Final = (
    "shrinkage", "learning_rate", "final_learning_rate", "warmup", "weight_decay", "gradient_clip", "epochs",
    "checkpoint_every", "patience",
)  # fmt: skip
_RANGES: Final = (
    *((name, 0, _LARGE, "at least 0") for name in _NOT_NEGATIVE),
    *((name, 1, _LARGE, "at least 1") for name in ("num_centers", "embedding_dim", "hidden_dim")),
    ("whiten", 0, 1, "a power in [0, 1]"),
    ("power", 1e-9, 1, "a power in (0, 1]"),
    ("dropout", 0, 1 - 1e-9, "a share in [0, 1), such as the paper's 0.2"),
    ("momentum", 0, 1, "a share in [0, 1]"),
    ("batch_size", 2, _LARGE, "at least 2"),
    ("sampling_temperature", 1, _LARGE, "at least 1 (1: proportional to size; large: equal shares)"),
    ("class_sample_ratio", 1e-9, 1, "a share in (0, 1]"),
    ("validate_every", 1e-9, _LARGE, "above 0"),
)
_TUNE_RANGES: Final = (
    *((name, 0, _LARGE, "at least 0") for name in ("tune_learning_rate", "lora_rank", "lora_alpha")),
    *((name, 1e-9, _LARGE, "above 0") for name in ("tune_epochs", "tune_validate_every")),
    ("tune_batch_size", 2, _LARGE, "at least 2"),
    ("backbone_rate", 0, 1, "a share in [0, 1]"),
    ("layer_decay", 1e-9, 1, "a factor in (0, 1]"),
)


def universal() -> TrainConfig:
    """A few epochs of ArcFace from shrunk discriminants of square-rooted features: 512 numbers in 256 bytes.

    What is best within these on domains that training has not seen (docs/studies.md).
    """
    return TrainConfig(
        start="lda",
        embedding_dim=512,
        codes="int4",
        power=0.5,
        learning_rate=1e-3,
        warmup=10.0,
        warmup_unit="steps",
        epochs=4.0,
        validate_every=1.0,
    )


def plain() -> TrainConfig:
    """ArcFace with one centre per class, 64 numbers, half whitened: the default of earlier versions."""
    return TrainConfig(whiten=0.5)


def demo() -> TrainConfig:
    """Sub-Center ArcFace for a few thousand images: seconds on two cores."""
    return TrainConfig(num_centers=2)


def paper() -> TrainConfig:
    """The winning recipe of Florek et al., GCPR 2024.

    Dropout 0.2, Linear(w, 64), Sub-Center ArcFace with k = 3, s = 30, m = 0.5; Adam with L2 decay 1e-4,
    batch 128, 10 epochs, linear warm-up over one epoch to 2e-2, cosine per step to 1e-3, seed 42; the last
    epoch counts.
    """
    return TrainConfig(
        loss="arcface",
        num_centers=3,
        scale=30.0,
        margin=0.5,
        head="linear",
        embedding_dim=64,
        standardise=False,
        dropout=0.2,
        optimiser="adam",
        learning_rate=2e-2,
        final_learning_rate=1e-3,
        schedule="cosine",
        warmup=1.0,
        warmup_unit="epochs",
        weight_decay=1e-4,
        epochs=10.0,
        batch_size=128,
        validate_every=1.0,
        keep="last",
        seed=42,
    )


RECIPES: Final[Mapping[str, Callable[[], TrainConfig]]] = {
    "universal": universal,
    "plain": plain,
    "demo": demo,
    "paper": paper,
}
"""Whole runs by name."""
