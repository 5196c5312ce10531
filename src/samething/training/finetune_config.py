"""What fine-tuning is told: which part of the backbone learns, how fast, and for how long."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from samething.errors import InputError
from samething.files import Json


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
    """Images a step of fine-tuning."""
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
        for field in dataclasses.fields(self):
            if field.type == "float":  # 3 and 3.0 are the same run
                object.__setattr__(self, field.name, float(getattr(self, field.name)))
        if self.unfreeze not in ("", "all") and not (self.unfreeze.isdigit() and int(self.unfreeze) > 0):
            raise InputError(
                f"--unfreeze {self.unfreeze}",
                expected="all, or a number of layers from 1",
                next_step="for instance --unfreeze 2",
            )
        for name, low, high, words in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value}", expected=words, next_step=f"give another {flag}")
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

    def to_json(self) -> dict[str, Json]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


_LARGE: Final = 1e12
_RANGES: Final = (
    ("tune_epochs", 1e-9, _LARGE, "above 0"),
    ("tune_batch_size", 2, _LARGE, "at least 2"),
    ("tune_learning_rate", 0, _LARGE, "at least 0"),
    ("backbone_rate", 0, 1, "a share in [0, 1]"),
    ("layer_decay", 1e-9, 1, "a factor in (0, 1]"),
    ("lora_rank", 0, _LARGE, "at least 0"),
    ("lora_alpha", 0, _LARGE, "at least 0"),
    ("tune_validate_every", 1e-9, _LARGE, "above 0"),
)
