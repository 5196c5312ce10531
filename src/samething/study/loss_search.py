"""Every loss with a search of its own, under one budget of trials and epochs: which is best, and is it?"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import cyclopts
import numpy as np

from samething.arrays import Float
from samething.errors import InputError
from samething.features import FeatureSet
from samething.pages import Table, bars_url
from samething.progress import progress_bar
from samething.statistics import percent
from samething.study.contest import Contender, Contest, Questions, short_training, trained_head
from samething.study.study_folder import StudyFolder
from samething.study.study_report import (
    StudyResult,
    conclude,
    domain_table,
    queries_said,
    said_of_others,
    shown,
)

if TYPE_CHECKING:
    import optuna

    from samething.heads import Head
    from samething.training import TrainConfig

SCALES: Final = (8.0, 64.0)
"""Range of the search for s, logarithmic."""
MARGINS: Final[Mapping[str, tuple[float, float]]] = {
    "cosface": (0.05, 0.5),
    "arcface": (0.1, 0.8),
    "dynm-arcface": (0.25, 0.9),
    "liarcface": (0.1, 0.8),
    "curricularface": (0.1, 0.8),
    "adaface": (0.1, 0.7),
}
"""Range of the search for m, in radians (cosface and adaface: of the cosine); dynm-arcface: its largest."""
LARGEST_K: Final = 3

PerSeed: TypeAlias = Float[np.ndarray, "_ _"]
"""Scores of every query, a row per seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossStudy:
    """The parts of the study that do not change while it runs."""

    features: FeatureSet
    contest: Contest
    config: TrainConfig
    losses: tuple[str, ...]
    num_trials: int
    num_seeds: int
    seed: int

    def contender(self, loss: str, params: Mapping[str, Any], seeds: Sequence[int]) -> Contender:
        """Heads trained with a loss and some parameters, a seed each."""

        def head(seed: int, work: Path) -> Head:
            config = dataclasses.replace(self.config, loss=loss, seed=seed, **params)
            train = np.flatnonzero(self.features.catalog.has_role("train"))
            return trained_head(self.features, train, config, work)

        tried = {"loss": loss, "params": dict(params)}
        return Contender(name=loss, tried=tried, features=self.features, head=head, seeds=seeds)


def losses(
    features: Path,
    *,
    output: Path = Path("study-losses"),
    loss: Annotated[tuple[str, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    trials: int = 12,
    seeds: int = 3,
    epochs: float = 10.0,
    embedding_dim: int = 64,
    seed: int = 0,
) -> StudyResult:
    """Compare the losses, each with the best of a search of its own over scale, margin and sub-centres.

    Every loss gets the same number of trials of the same length (Optuna's TPE, its first trial the loss's own
    defaults), judged on validation instances. The best of each is trained again from seeds that the search
    did not use, and all are looked at once on the test instances.

    Args:
        features: the feature folder; its catalog has train, val and test images.
        output: the study folder; a killed study goes on there. optuna.log in it opens in Optuna's dashboard.
        loss: names of the losses that are compared, by default all.
        trials: trials per loss.
        seeds: trainings of the best of each.
        epochs: passes over the training images in every training.
        embedding_dim: numbers in an embedding.
        seed: of the searches.

    Raises:
        InputError: an unknown loss, no validation or test images, instances in both.
        FingerprintError: the folder is of another study or of other features.
    """
    from samething.losses import LOSSES

    compared = tuple(dict.fromkeys(loss or LOSSES))
    if not set(compared) <= set(LOSSES) or trials < 1 or seeds < 1:
        raise InputError(
            f"losses {', '.join(compared)} with {trials} trials and {seeds} seeds",
            expected=f"some of {', '.join(LOSSES)}; trials and seeds from 1",
            next_step="change --loss, --trials or --seeds",
        )
    found = FeatureSet.open(Path(features))
    val, test = Questions.of(found, "val"), Questions.of(found, "test")
    config = short_training(epochs, embedding_dim)
    made_from = {
        "study": "losses",
        "features": found.manifest.fingerprint,
        "losses": list(compared),
        "trials": trials,
        "seeds": seeds,
        "seed": seed,
        "config": config.to_json(),
    }
    with StudyFolder.claimed(Path(output), made_from) as folder:
        study = LossStudy(
            features=found, contest=Contest(folder, val, test), config=config, losses=compared,
            num_trials=trials, num_seeds=seeds, seed=seed,
        )  # fmt: skip
        return _concluded(study, *_best_of_each(study))


def _best_of_each(study: LossStudy) -> tuple[list[Contender], dict[str, PerSeed]]:
    """Each loss with the parameters of its best trial, and its validation scores from seeds of their own."""
    searches = {}
    # seeds that the search has not seen, so that a lucky one is not chosen and then counted
    seeds = range(study.seed + 1000, study.seed + 1000 + study.num_seeds)
    with progress_bar("trainings") as bar:
        task = bar.add_task("losses", total=len(study.losses) * (study.num_trials + study.num_seeds))

        def advance() -> None:
            bar.advance(task)

        for loss in study.losses:
            bar.update(task, description=loss)
            searches[loss] = _searched(study, loss, advance)
        best = [study.contender(loss, searches[loss].best_trial.params, seeds) for loss in study.losses]
        values = {one.name: study.contest.on_validation(one, advance) for one in best}
    # an Optuna journal, for its dashboard and plots, written anew from the log each time
    import optuna
    from optuna.storages.journal import JournalFileBackend

    target = study.contest.folder.folder / "optuna.log"
    target.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(target)))
        for loss, search in searches.items():
            copy = optuna.create_study(direction="maximize", study_name=loss, storage=storage)
            copy.add_trials(search.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
    return best, values


def search_space(loss: str) -> dict[str, tuple[float, float]]:
    """What is searched of a loss: the range of each parameter that it has.

    >>> search_space("normface")
    {'scale': (8.0, 64.0)}
    """
    from samething.losses import LOSSES

    accepted = inspect.signature(LOSSES[loss]).parameters
    space = {"scale": SCALES} if "scale" in accepted else {}
    return space | ({"margin": MARGINS[loss]} if loss in MARGINS else {})


def defaults_of(loss: str) -> dict[str, Any]:
    """The loss's own defaults, as the search writes them; the first trial of each search.

    >>> defaults_of("arcface")
    {'num_centers': 1, 'scale': 30.0, 'margin': 0.5}
    """
    from samething.losses import LOSSES

    accepted = inspect.signature(LOSSES[loss]).parameters
    named = {"scale": "scale", "margin": "margin", "margin_radians": "margin", "margin_max_radians": "margin"}
    own = {named[name]: accepted[name].default for name in named if name in accepted}
    return {"num_centers": 1, **own}


def _searched(study: LossStudy, loss: str, advance: Any) -> optuna.Study:
    """One loss's search. The log is its memory: what it says is told again, in order, to the same sampler.

    The sampler of trial n is seeded by n, so that a search that goes on asks what an undisturbed one asks.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = optuna.create_study(direction="maximize", study_name=loss)
    search.enqueue_trial(defaults_of(loss))
    for number in range(study.num_trials):
        search.sampler = optuna.samplers.TPESampler(
            seed=1000 * study.seed + number, n_startup_trials=max(2, study.num_trials // 3)
        )
        trial = search.ask()
        params: dict[str, Any] = {"num_centers": trial.suggest_int("num_centers", 1, LARGEST_K)}
        for name, (low, high) in search_space(loss).items():
            params[name] = trial.suggest_float(name, low, high, log=name == "scale")
        values = study.contest.on_validation(study.contender(loss, params, [study.seed]), advance)
        search.tell(trial, study.contest.val.mean(values[0]))
    return search


def _concluded(study: LossStudy, best: Sequence[Contender], on_val: Mapping[str, PerSeed]) -> StudyResult:
    contest, found = study.contest, study.features
    ranked = sorted(best, key=lambda one: -contest.val.mean(on_val[one.name].mean(axis=0)))
    params = {one.name: one.tried["params"] for one in ranked}
    ranking = list(params)
    chosen = {"loss": ranking[0], "params": params}
    on_test = contest.on_test(ranked, chosen)
    rows = [
        {
            "loss": loss, **{name: params[loss].get(name) for name in ("num_centers", "scale", "margin")},
            **contest.val.row(on_val[loss]), **contest.test.row(on_test[loss], on_test[ranking[0]]),
        }
        for loss in ranking
    ]  # fmt: skip
    facts = {
        "features": f"{found.backbone['name']}, {found.rows.shape[1]} numbers, "
        f"fingerprint {found.manifest.fingerprint}",
        "budget": f"{study.num_trials} trials of {study.config.epochs:g} epochs for each loss, "
        f"then {study.num_seeds} seeds",
        "queries": queries_said(contest),
    }
    ends = [(row["test"], row["test_low"], row["test_high"]) for row in rows]
    findings = [
        f"Best on validation: {ranking[0]}; on test it reaches {percent(*ends[0])} % mMP@5.",
        said_of_others({row["loss"]: row["gain_high"] for row in rows[1:]}),
    ]
    tables = [_table(rows, study.num_seeds), domain_table(rows, contest.test, ["loss"])]
    bars = bars_url(ranking, {"": ends}, label="test mMP@5 %, 95 % interval over queries")
    return conclude(
        contest.folder, "Losses", facts, findings, tables, rows, {"Test score": bars}, chosen=chosen
    )


def _table(rows: Sequence[Mapping[str, Any]], num_seeds: int) -> Table:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return Table(
        "Losses, each with the best of its search",
        ["loss", "k", "scale", "margin", "validation mMP@5 %", "test mMP@5 %", "test, minus the chosen"],
        [
            [
                row["loss"], str(row["num_centers"]), number(row["scale"]), number(row["margin"]),
                shown(row, "val"), shown(row, "test"), shown(row, "gain", sign=True) if place else "",
            ]
            for place, row in enumerate(rows)
        ],
        note=f"Means of {num_seeds} seeds that the searches did not use; in brackets 95 % bootstrap "
        "intervals over queries, ± the standard deviation over seeds. Chosen on validation, looked at once "
        "on test. adacos sets its scale itself; adacos and normface have no margin.",
        featured=0,
    )  # fmt: skip
