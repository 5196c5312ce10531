"""Averages of runs that share their start (model soups), and points on the line from start to end.

Wortsman et al., *Model soups*, ICML 2022; *Robust fine-tuning of zero-shot models* (WiSE-FT), CVPR 2022.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from samething.backbones import load_from_metadata
from samething.checksums import require_whole
from samething.errors import InputError
from samething.export.embedding_model import Source, backbone_of, source_of
from samething.features import FeatureSet
from samething.files import Json
from samething.heads import Head, head_from_state, whitened_head
from samething.training.data import TrainingData
from samething.training.run import BACKBONE_NAME, START_NAME, Run
from samething.training.starts import starting_head
from samething.training.validation import validation_scores

Soup: TypeAlias = Literal["uniform", "greedy"]


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a model's weights are averaged from."""

    runs: tuple[Path, ...] = ()
    """Further runs, beside the first."""
    soup: Soup = "uniform"
    """``uniform``: all of them; ``greedy``: best validation first, each kept only if the average with it does
    not get worse on the validation images."""
    interpolate: float = 1.0
    """Share of the trained weights, in [0, 1]; the rest is the common start."""

    def __post_init__(self) -> None:
        if not 0 <= self.interpolate <= 1:
            raise InputError(
                f"--interpolate {self.interpolate}",
                expected="a share in [0, 1]: 1 is the trained model, 0 its start",
                next_step="for instance --interpolate 0.5",
            )

    @property
    def mixes(self) -> bool:
        """Whether it is anything but one run as it was trained."""
        return bool(self.runs) or self.interpolate != 1


def mixed_source(runs: Sequence[Run], mix: Mix, *, weights: Path | None) -> Source:
    """One model from several runs, or from a run and its start.

    Args:
        runs: the first gives features and backbone.
        mix: how.
        weights: the backbone's checkpoint, if the features were made from one.

    Raises:
        InputError: the runs do not share their start, features or head.
    """
    for each in runs:
        config = each.manifest.made_from["config"]
        if not is_tuned(each) and (config.get("members", 1) > 1 or config.get("train_dim", 0)):
            # a run of an earlier version: its head is on no line from a start
            raise InputError(
                f"{each.folder} was brought to {each.config.embedding_dim} numbers after its training",
                expected="runs whose heads are as they were trained: others have no start to average from",
                next_step="train it again, with this version",
            )
    run = runs[0]
    source = source_of(run, weights=weights)
    ours = start_of(run, source.features).state_dict()
    for other in runs[1:]:
        same_features = run.manifest.made_from["features"] == other.manifest.made_from["features"]
        theirs: Mapping[str, Tensor] = {}
        if same_features and is_tuned(run) == is_tuned(other):
            theirs = start_of(other, other.features()).state_dict()
        same = ours.keys() == theirs.keys() and all(
            ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name]) for name in ours
        )
        if not same:
            reason = "another start" if same_features else "other features"
            raise InputError(
                f"{other.folder} and {run.folder} have {reason}",
                expected="runs of the same features that began with the same head: their average means "
                "something only then",
                next_step="train them with one --seed, and vary other options",
            )
    chosen = greedy_choice(runs, source.features) if mix.soup == "greedy" and len(runs) > 1 else runs
    shares = (mix.interpolate, 1 - mix.interpolate)
    state = average([each.head.state_dict() for each in chosen])
    if mix.interpolate < 1:
        state = average([state, ours], shares=shares)
    head = copy.deepcopy(run.head)
    head.load_state_dict(state)
    tuned = is_tuned(run) and (len(chosen) > 1 or mix.interpolate < 1)
    if tuned:
        networks = [backbone_of(each, each.features(), weights=None).network for each in chosen]
        mean = average([network.state_dict() for network in networks])
        if mix.interpolate < 1:
            original = load_from_metadata(source.features.backbone, weights=weights)
            mean = average([mean, original.network.state_dict()], shares=shares)
        backbone = copy.deepcopy(source.backbone)
        backbone.network.load_state_dict(mean)
        source = dataclasses.replace(source, backbone=backbone)
    mixed: dict[str, Json] = {
        "runs": [each.manifest.fingerprint for each in chosen],
        "names": [each.folder.name for each in chosen],
        "left_out": [each.folder.name for each in runs if each not in chosen],
        "soup": mix.soup,
        "interpolate": mix.interpolate,
    }
    return dataclasses.replace(source, head=head.eval(), mix=mixed, described=not tuned)


def average(
    states: Sequence[Mapping[str, Tensor]], *, shares: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Weighted mean of tensors of the same names, in float64; whole numbers are those of the first.

    >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    {'w': tensor([2.])}
    """
    parts = shares or [1 / len(states)] * len(states)
    mean = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            mean[name] = first
            continue
        total = torch.stack(
            [share * state[name].double() for share, state in zip(parts, states, strict=True)]
        )
        mean[name] = total.sum(0).to(first.dtype)
    return mean


def is_tuned(run: Run) -> bool:
    """Whether the run changed its backbone."""
    return (run.folder / BACKBONE_NAME).exists()


def start_of(run: Run, features: FeatureSet) -> Head:
    """The head that a run began with."""
    if is_tuned(run):
        require_whole(run.folder, run.manifest, [START_NAME])
        state = safetensors.torch.load_file(run.folder / START_NAME)
        return head_from_state(dataclasses.asdict(run.head.config), run.head.width, state)
    data = TrainingData.of(features)
    head, _ = starting_head(features, data, run.config)
    if run.config.whiten:
        return whitened_head(head, features.rows, run.config.whiten, rows=data.rows)
    return head.eval()


def greedy_choice(runs: Sequence[Run], features: FeatureSet) -> list[Run]:
    """The runs whose average is best on the validation images, chosen one by one.

    Raises:
        InputError: no validation images, or fine-tuned runs, whose average has no cached features.
    """
    val = np.flatnonzero(features.catalog.has_role("val"))
    if len(val) == 0 or is_tuned(runs[0]):
        raise InputError(
            "--soup greedy " + ("of fine-tuned runs" if len(val) else "without validation images"),
            expected="runs over one frozen backbone, and validation images to choose by",
            next_step="use --soup uniform",
        )
    rows, catalog = np.asarray(features.rows[val]), features.catalog.take(val)

    def score(places: Sequence[int]) -> float:
        head = copy.deepcopy(runs[0].head)
        head.load_state_dict(average([runs[place].head.state_dict() for place in places]))
        return validation_scores(head.eval().embed(rows), catalog)[0]

    alone = [score([place]) for place in range(len(runs))]
    order = sorted(range(len(runs)), key=lambda place: -alone[place])
    chosen, best = [order[0]], alone[order[0]]
    for place in order[1:]:
        together = score([*chosen, place])
        if together >= best:
            chosen, best = [*chosen, place], together
    return [runs[place] for place in sorted(chosen)]
