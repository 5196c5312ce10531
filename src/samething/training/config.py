"""What a training run is told: one small dataclass, and the recipes, which are functions that return one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from samething.errors import InputError
from samething.files import Json


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
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further options of the loss by their names in docs/losses.md, such as dynamic of adacos."""

    head: Literal["linear", "batchnorm-linear", "mlp"] = "linear"
    """The map that is trained."""
    hidden_dim: int = 512
    """Width of the hidden layer of --head mlp."""
    embedding_dim: int = 64
    """Numbers in an embedding."""
    train_dim: int = 0
    """Numbers in an embedding while it is trained; at the end its principal components over the training
    images bring it to embedding_dim. 0: the same."""
    members: int = 1
    """Heads that are trained one after the other from the seeds seed, seed + 1, …; the principal components
    of all their embeddings together bring them to embedding_dim, as one linear map."""
    whiten: float = 0.0
    """Whitening of these components (train_dim, members), in [0, 1]: each is divided by its standard
    deviation to this power."""
    bias: bool = True
    """Whether the linear map has a bias."""
    standardise: bool = True
    """Bring features to unit length, centre and scale them before the head."""
    initialise: Literal["random", "pca", "whitened-pca"] = "random"
    """Start of the linear map: random, or the (whitened) principal components of the training features."""
    pull_to_start: float = 0.0
    """Strength of an L2 pull of the head's weights towards their start, for unseen domains; 0: none."""
    distill: float = 0.0
    """Strength of keeping the backbone's own similarities within a batch, for unseen domains; 0: none."""
    interpolate: float = 1.0
    """Share of the trained weights in the result, in [0, 1]; the rest are the head's weights at the start."""
    dropout: float = 0.2
    """Share of the feature's numbers that are dropped in a training step, in [0, 1)."""

    optimiser: Literal["sgd", "adam", "adamw"] = "adamw"
    """adam adds the decay to the gradient (L2, as the paper does), adamw applies it by itself (decoupled)."""
    sam_rho: float = 0.0
    """Radius of sharpness-aware minimisation over the optimiser; 0 switches it off, the paper's is 0.05."""
    learning_rate: float = 1e-2
    """Highest learning rate."""
    final_learning_rate: float = 1e-5
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = 2.0
    """Length of the warm-up, in warmup_unit."""
    warmup_unit: Literal["epochs", "steps", "images"] = "epochs"
    """What warmup counts."""
    warmup_shape: Literal["linear", "exponential"] = "linear"
    """Course of the warm-up."""
    weight_decay: float = 1e-4
    """Weight decay of head and class weights."""
    momentum: float = 0.9
    """Momentum of sgd."""
    gradient_clip: float = 0.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay a step of the moving average of the head's weights, which is then the result; 0: none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and optimiser stay float32."""
    compile: bool = False
    """On a CPU: let this machine's C compiler translate the elementwise part of the step first; on one thread
    an eighth to a quarter faster, the same up to rounding."""

    epochs: float = 40.0
    """Passes over the training images."""
    iterations: int | None = None
    """Number of steps, instead of epochs."""
    batch_size: int = 256
    """Images a step, over all processes."""
    sampling: Literal[
        "shuffled", "block-shuffled", "class-balanced", "domain-balanced", "domain-round-robin"
    ] = "shuffled"
    """How images are drawn; block-shuffled is for features that are larger than memory."""
    sampling_temperature: float = 1.0
    """For domain-balanced: 1 is proportional to the size of the domains, large is equal shares."""
    margin_growth: tuple[float, float] = (1.0, 1.0)
    """Multiples of the margin at the start and at the end of the run; 0.6 1.6 grows 0.5 from 0.3 to 0.8."""
    class_sample_ratio: float = 1.0
    """Partial FC: share of the other classes that a step looks at, in (0, 1]."""
    feature_sample_ratio: float = 1.0
    """UNICOM: share of the embedding's numbers that a step looks at, in (0, 1]."""
    matryoshka_dims: tuple[int, ...] = ()
    """Prefixes of the embedding that are trained together with the whole, such as 16 32."""

    validate_every: float = 5.0
    """Epochs between two validations by mMP@5 on unseen instances; a checkpoint is written at each."""
    checkpoint_every: float = 0.0
    """Further checkpoints, so many checkpoint_unit apart, for long runs; 0: none."""
    checkpoint_unit: Literal["epochs", "steps", "images"] = "epochs"
    """What checkpoint_every counts."""
    keep_checkpoints: bool = False
    """Keep the head of every checkpoint as checkpoints/head-STEP.safetensors."""
    patience: int = 0
    """Stop after so many validations without a better score; 0: never."""
    keep: Literal["best", "last"] = "best"
    """Which head is the result: that of the best validation, or the last."""
    seed: int = 0
    """Decides initial weights, order of the images and dropout."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "float":  # 20 and 20.0 are the same run
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        for name, low, high, words in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value}", expected=words, next_step=f"give another {flag}")
        if self.dropout >= 1:
            raise InputError(
                "--dropout 1", expected="a share below 1", next_step="the paper's is --dropout 0.2"
            )
        if self.initialise != "random" and self.head != "linear":
            raise InputError(
                f"--initialise {self.initialise} with --head {self.head}",
                expected="--head linear",
                next_step="use --head linear, or --initialise random",
            )
        if (self.train_dim or self.members > 1) and (self.head != "linear" or self.matryoshka_dims):
            raise InputError(
                f"--train-dim {self.train_dim}, --members {self.members} with --head {self.head} and "
                f"prefixes {self.matryoshka_dims}",
                expected="--head linear and no --matryoshka-dims",
                next_step="set --train-dim 0 --members 1",
            )
        if 0 < self.train_dim < self.embedding_dim:
            raise InputError(
                f"--train-dim {self.train_dim} with --embedding-dim {self.embedding_dim}",
                expected="at least the embedding's own dimension",
                next_step="give a larger --train-dim, or 0",
            )
        if any(not 0 < dim < self.embedding_dim for dim in self.matryoshka_dims):
            raise InputError(
                f"--matryoshka-dims {' '.join(map(str, self.matryoshka_dims))}",
                expected=f"prefixes shorter than --embedding-dim {self.embedding_dim}",
                next_step="leave out those that are not",
            )

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        return {
            **dataclasses.asdict(self),
            "matryoshka_dims": list(self.matryoshka_dims),
            "margin_growth": list(self.margin_growth),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> TrainConfig:
        """The inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        return cls(**fields)


_LARGE: Final = 1e12
_RANGES: Final = (
    ("num_centers", 1, _LARGE, "at least 1"),
    ("embedding_dim", 1, _LARGE, "at least 1"),
    ("members", 1, _LARGE, "at least 1"),
    ("whiten", 0, 1, "a power in [0, 1]"),
    ("hidden_dim", 1, _LARGE, "at least 1"),
    ("dropout", 0, 1, "a share in [0, 1)"),
    ("sam_rho", 0, _LARGE, "at least 0"),
    ("learning_rate", 0, _LARGE, "at least 0"),
    ("final_learning_rate", 0, _LARGE, "at least 0"),
    ("warmup", 0, _LARGE, "at least 0"),
    ("weight_decay", 0, _LARGE, "at least 0"),
    ("momentum", 0, 1, "a share in [0, 1]"),
    ("gradient_clip", 0, _LARGE, "at least 0"),
    ("ema_decay", 0, 1, "a share in [0, 1]"),
    ("pull_to_start", 0, _LARGE, "at least 0"),
    ("distill", 0, _LARGE, "at least 0"),
    ("interpolate", 0, 1, "a share in [0, 1]"),
    ("epochs", 1e-9, _LARGE, "above 0"),
    ("batch_size", 2, _LARGE, "at least 2"),
    ("class_sample_ratio", 1e-9, 1, "a share in (0, 1]"),
    ("feature_sample_ratio", 1e-9, 1, "a share in (0, 1]"),
    ("validate_every", 1e-9, _LARGE, "above 0"),
    ("checkpoint_every", 0, _LARGE, "at least 0"),
    ("patience", 0, _LARGE, "at least 0"),
)


def demo() -> TrainConfig:
    """Sub-Center ArcFace for a few thousand images: seconds on two cores."""
    return TrainConfig(num_centers=2)


def universal() -> TrainConfig:
    """Chosen on domains left out of training (docs/studies.md): two wide heads, brought to 64 numbers."""
    return TrainConfig(train_dim=256, num_centers=1, members=2, whiten=0.5)


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
        warmup_shape="linear",
        weight_decay=1e-4,
        epochs=10.0,
        batch_size=128,
        validate_every=1.0,
        keep="last",
        seed=42,
    )


RECIPES: Final[Mapping[str, Callable[[], TrainConfig]]] = {
    "universal": universal,
    "demo": demo,
    "paper": paper,
}
"""Whole runs by name."""
