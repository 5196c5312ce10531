"""Studies: what they remember, that the test is looked at once, and that greedy choice does what it says."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething import study
from samething.catalog import Catalog
from samething.cli import build_app
from samething.curate.curate_config import CurateConfig
from samething.errors import ArtefactError, FingerprintError, InputError
from samething.features import FeatureSet
from samething.statistics import Estimate
from samething.study import StudyFolder, select
from samething.study.backbone_comparison import pareto_front
from samething.study.contest import Questions
from samething.study.data_mix import Terms, mixed_rows
from samething.study.loss_search import defaults_of, search_space
from samething.training import TrainConfig
from scenes import feature_folder

SMALL = {"embedding_dim": 8, "epochs": 2.0}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return feature_folder(
        tmp_path_factory.mktemp("with space é") / "features", num_classes=36, num_domains=3
    ).folder


# ---- the folder


def test_a_trial_in_the_log_is_not_run_again(tmp_path):
    asked = []

    def measure(work):
        asked.append(work)
        return np.array([0.2, np.nan, 1 / 3])

    for _ in range(2):
        with StudyFolder.claimed(tmp_path / "study", {"of": "x"}) as folder:
            values = folder.scores({"seed": 0, "loss": "arcface"}, measure)
            again = folder.scores({"loss": "arcface", "seed": 0}, measure)  # the order of keys is nothing
            np.testing.assert_array_equal(values, [0.2, np.nan, 0.333333])
            np.testing.assert_array_equal(values, again)
    assert len(asked) == 1 and not asked[0].exists()


def test_a_half_written_line_is_cut_and_its_trial_run_again(tmp_path):
    with StudyFolder.claimed(tmp_path, {"of": "x"}) as folder:
        folder.scores({"seed": 0}, lambda work: np.array([0.5]))
        folder.scores({"seed": 1}, lambda work: np.array([0.25]))
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    with StudyFolder.claimed(tmp_path, {"of": "x"}) as folder:
        assert len(folder.trials) == 1
        assert folder.scores({"seed": 1}, lambda work: np.array([0.25])) == [0.25]
        assert folder.num_new == 1
    assert log.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    with StudyFolder.claimed(tmp_path, {"of": "x"}) as folder:
        folder.scores({"seed": 0}, lambda work: np.array([0.5]))
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"{oh\n" + log.read_bytes())
    with (
        pytest.raises(ArtefactError, match="line 1 of"),
        StudyFolder.claimed(tmp_path, {"of": "x"}),
    ):
        pass


def test_the_test_is_looked_at_once(tmp_path):
    looks = []

    def measure(value):
        looks.append(value)
        return {"chosen": np.array([value, np.nan])}

    for value in (0.5, 0.9):  # a second look returns what the first one saw
        with StudyFolder.claimed(tmp_path, {"of": "x"}) as folder:
            seen = folder.tested({"mix": ["a"]}, lambda value=value: measure(value))
            np.testing.assert_array_equal(seen["chosen"], [0.5, np.nan])
    assert looks == [0.5]
    with (
        StudyFolder.claimed(tmp_path, {"of": "x"}) as folder,
        pytest.raises(ArtefactError, match="another choice"),
    ):
        folder.tested({"mix": ["b"]}, lambda: measure(1.0))
    assert looks == [0.5]


def test_a_folder_of_another_study_is_refused(tmp_path):
    with StudyFolder.claimed(tmp_path, {"of": "x"}):
        pass
    with pytest.raises(FingerprintError), StudyFolder.claimed(tmp_path, {"of": "y"}):
        pass


# ---- the choice


def by_force(parts, score):
    """Every mix, the smallest of the best first."""
    mixes = [mix for size in range(1, len(parts) + 1) for mix in itertools.combinations(parts, size)]
    return max(mixes, key=lambda mix: (score(mix), -len(mix)))


def comparing(score):
    def compare(first, second):
        gain = score(first) - (score(second) if second else 0.0)
        return Estimate(gain, gain, gain)

    return compare


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6))
def test_greedy_choice_is_the_best_where_gains_add_up(gains):
    values = dict(enumerate(gains))

    def score(mix):
        return float(sum(values[part] for part in mix))

    mix, steps = select(list(values), comparing(score))
    assert score(mix) == score(by_force(list(values), score))
    assert all(step.gain.value > 0 for step in steps[1:] if step.kind == "add")


@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=5))
def test_greedy_cover_is_within_its_known_bound(sets):
    """Coverage is submodular and without costs: greedy reaches at least 1 - 1/e of the best of its size."""
    named = dict(enumerate(sets))

    def score(mix):
        return float(len(set().union(*(named[part] for part in mix))))

    mix, _ = select(list(named), comparing(score))
    best = max(score(other) for other in itertools.combinations(named, len(mix)))
    assert score(mix) >= (1 - 1 / np.e) * best
    # nothing is left to gain, and nothing could be left away
    assert score(mix) == score(tuple(named))
    assert all(score([part for part in mix if part != left]) < score(mix) for left in mix if len(mix) > 1)


def test_the_backward_check_drops_what_was_overtaken():
    scores = {"a": 5.0, "b": 4.0, "c": 4.0, "ab": 6.0, "ac": 6.0, "abc": 9.0, "bc": 9.5}
    mix, steps = select(list("abc"), comparing(lambda mix: scores["".join(sorted(mix))]))
    assert [(step.kind, step.part) for step in steps] == [
        ("add", "a"), ("add", "b"), ("add", "c"), ("drop", "a"),
    ]  # fmt: skip
    assert mix == ("b", "c") == by_force(list("abc"), lambda mix: scores["".join(sorted(mix))])


def test_it_stops_at_a_gain_that_is_unsure_or_too_small():
    def unsure(first, second):
        return (
            Estimate(1.0, 0.5, 1.5) if second is None else Estimate(0.2 * (len(first) > 1) or -0.2, -0.1, 0.5)
        )

    mix, steps = select(["a", "b"], unsure)
    assert mix == ("a",) and steps[-1].kind == "stop"
    small = comparing(lambda mix: 1.0 + 0.001 * len(mix))
    assert len(select(["a", "b"], small, min_gain=0.01)[0]) == 1
    assert len(select(["a", "b"], small)[0]) == 2


def test_one_cap_a_group():
    worth = {("a", 0): 3.0, ("a", 5): 4.0, ("b", 0): 2.0, ("b", 5): 1.0}
    mix, _ = select(
        list(worth), comparing(lambda mix: sum(worth[part] for part in mix)), group_of=lambda part: part[0]
    )
    assert mix == (("a", 5), ("b", 0))


# ---- the rows of a mix


@settings(max_examples=40)
@given(
    budget=st.integers(4, 80),
    cap=st.sampled_from([0, 2, 3]),
    groups=st.sets(st.sampled_from("xyz"), min_size=1),
)
def test_a_mix_keeps_to_its_budget_caps_and_groups(budget, cap, groups):
    rows = [
        {"image": f"{domain}{label}{number}", "label": f"{domain}{label}", "domain": domain,
         "role": "train" if label < 5 else "val"}
        for domain in "xyz" for label in range(7) for number in range(2 + label)
    ]  # fmt: skip
    catalog = Catalog.from_rows(rows, root=Path("/"))
    mix = [(group, cap) for group in sorted(groups)]
    kept = mixed_rows(catalog, mix, Terms(budget=budget))
    labels, counts = np.unique(catalog.strings("label")[kept].astype(str), return_counts=True)
    assert len(kept) <= budget and np.all(np.diff(kept) > 0)
    assert set(catalog.strings("domain")[kept]) <= groups
    assert catalog.has_role("train")[kept].all()
    assert not cap or counts.max(initial=0) <= cap
    assert counts.min(initial=2) >= 2
    without = mixed_rows(catalog, mix, Terms(budget=budget, share="equal"), without="x")
    assert "x" not in set(catalog.strings("domain")[without])
    assert len(labels) <= 5 * len(groups)


def test_instances_in_two_parts_are_refused(features):
    found = FeatureSet.open(features)
    roles = found.catalog.strings("role").copy()
    roles[np.flatnonzero(roles == "val")[0]] = "train"
    mixed = FeatureSet(found.folder, found.manifest, found.rows, found.catalog.with_column("role", roles), ())
    with pytest.raises(InputError, match="trained on and asked for"):
        Questions.of(mixed, "val")


# ---- the commands


def read_all(folder):
    names = ("report.md", "report.html", "chosen.json", "log.jsonl")
    return {name: (folder / name).read_bytes() for name in names} | {
        "rows": pq.read_table(folder / "results.parquet").to_pylist()
    }


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_after(monkeypatch, num_trials):
    """Let the study die when it has written so many lines."""
    append = StudyFolder._append

    def dying(folder, record):
        append(folder, record)
        if folder.num_new == num_trials:
            raise KilledError

    monkeypatch.setattr(StudyFolder, "_append", dying)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("out_of_domain", [False, True])
def test_study_datasets_resumes_to_the_same_result(features, tmp_path, monkeypatch, out_of_domain):
    options = {**SMALL, "seeds": 1, "cap": (0, 3), "budget": 40, "leave_one_domain_out": out_of_domain}
    whole = study.datasets(features, output=tmp_path / "whole", **options)
    for lines in (3, 4):
        with monkeypatch.context() as patched, pytest.raises(KilledError):
            kill_after(patched, lines)
            study.datasets(features, output=tmp_path / "killed", **options)
    again = study.datasets(features, output=tmp_path / "killed", **options)
    assert whole.num_new - again.num_new == 7
    assert read_all(tmp_path / "whole") == read_all(tmp_path / "killed")
    third = study.datasets(features, output=tmp_path / "killed", **options)
    assert third.num_new == 0 and third.rows == whole.rows
    looks = [
        record for record in map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines())
        if record["tried"]["part"] == "test"
    ]  # fmt: skip
    assert len(looks) == 1


@pytest.mark.heavy
def test_what_study_datasets_chose_can_be_used(features, tmp_path):
    study.datasets(features, output=tmp_path / "out", **SMALL, seeds=1, budget=40)
    recipe = json.loads((tmp_path / "out" / "chosen.json").read_text())
    curate = {
        name: tuple(value) if isinstance(value, list) else value for name, value in recipe["curate"].items()
    }
    assert CurateConfig(**curate).budget_images == 40
    assert TrainConfig.from_json(recipe["train"]).embedding_dim == 8
    chosen = Catalog.read(tmp_path / "out" / "chosen.parquet")
    assert 4 <= chosen.has_role("train").sum() <= 40
    assert set(chosen.strings("domain")[chosen.has_role("train")]) <= {
        row["domain"] for row in recipe["groups"]
    }
    whole = FeatureSet.open(features).catalog
    assert (~chosen.has_role("train")).sum() == (~whole.has_role("train")).sum()


@pytest.mark.slow
def test_study_losses_resumes_to_the_same_result(features, tmp_path, monkeypatch):
    options = {**SMALL, "loss": ("arcface", "adacos", "normface"), "trials": 3, "seeds": 2}
    whole = study.losses(features, output=tmp_path / "whole", **options)
    assert {row["loss"] for row in whole.rows} == {"arcface", "adacos", "normface"}
    assert whole.num_new <= 3 * (3 + 2) + 1
    with monkeypatch.context() as patched, pytest.raises(KilledError):
        kill_after(patched, 5)
        study.losses(features, output=tmp_path / "killed", **options)
    study.losses(features, output=tmp_path / "killed", **options)
    assert read_all(tmp_path / "whole") == read_all(tmp_path / "killed")
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "whole" / "optuna.log"))
    )
    search = optuna.load_study(study_name="arcface", storage=storage)
    assert len(search.trials) == 3 and search.trials[0].params == defaults_of("arcface")


@pytest.mark.heavy
def test_every_loss_is_searched_within_its_bounds():
    from samething.losses import LOSSES

    for loss in LOSSES:
        defaults = defaults_of(loss)
        assert set(defaults) == {"num_centers", *search_space(loss)}
        for name, (low, high) in search_space(loss).items():
            assert low <= defaults[name] <= high, loss


@pytest.mark.heavy
def test_study_backbones_by_the_command_line(features, tmp_path):
    other = feature_folder(tmp_path / "wide", num_classes=36, num_domains=3, width=64, seed=0)
    arguments = ["study", "backbones", str(features), str(other.folder)]
    result = build_app()(
        [*arguments, "-o", str(tmp_path / "out"), "--dim", "8", "--epochs", "2", "--seeds", "1"]
    )
    assert len(result.rows) == 8 and result.chosen["backbone"] in {row["backbone"] for row in result.rows}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "linear probe" in page and "not recorded" in page
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pydict()
    assert all(
        low <= value <= high
        for low, value, high in zip(*(table[n] for n in ("test_low", "test", "test_high")), strict=True)
    )


def test_backbones_of_different_catalogs_are_refused(features, tmp_path):
    other = feature_folder(tmp_path / "other", num_classes=24)
    with pytest.raises(InputError, match="different catalogs"):
        study.backbones(features, other.folder, output=tmp_path / "out", dim=8)
    with pytest.raises(InputError, match="twice"):
        study.backbones(features, features, output=tmp_path / "out", dim=8)


@pytest.mark.parametrize("options", [{"budget": 1}, {"seeds": 0}, {"cap": (-1,)}, {"budget": 10**6}])
def test_study_datasets_refuses_what_cannot_be_asked(features, tmp_path, options):
    with pytest.raises(InputError, match="budget"):
        study.datasets(features, output=tmp_path / "out", **{"budget": 40, **SMALL, **options})


@pytest.mark.heavy
def test_an_unknown_loss_is_refused(features, tmp_path):
    with pytest.raises(InputError, match="triplet"):
        study.losses(features, output=tmp_path / "out", loss=("triplet",))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_pareto_front_against_its_definition(points):
    front = pareto_front([cost for cost, _ in points], [score for _, score in points])
    for (cost, score), is_on_front in zip(points, front, strict=True):
        beaten = any((a < cost and b >= score) or (a <= cost and b > score) for a, b in points)
        assert is_on_front != beaten
