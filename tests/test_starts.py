"""Where training starts from: what is chosen, on what, and what is said of it."""

import dataclasses

import numpy as np
import pytest

from samething.errors import InputError
from samething.evaluation import evaluate, evaluate_embeddings
from samething.files import write_manifest
from samething.heads import HeadConfig, Scatter, fitted_head, lda_head
from samething.retrieval.codes import Coder, as_kept
from samething.training import TrainConfig, train
from samething.training.data import TrainingData
from samething.training.loop import HeadTrainer, run_training
from samething.training.run import Run
from samething.training.starts import SHRINKAGES, parts_to_leave_out
from scenes import feature_folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return feature_folder(tmp_path_factory.mktemp("lda") / "features", num_classes=48, num_domains=3)


def score(head, features):
    return evaluate_embeddings(head.embed(features.rows), features.catalog, num_resamples=2).value("mmp@5")


def test_a_head_in_closed_form_is_ahead_of_pca_and_needs_no_steps(features, tmp_path):
    run = train(features.folder, output=tmp_path / "run", recipe="universal", embedding_dim=12, epochs=0.0)
    pca = fitted_head(
        HeadConfig(kind="pca", embedding_dim=12), features.rows[features.catalog.has_role("train")]
    )
    assert score(run.head, features) > score(pca, features) + 0.05
    assert run.manifest.content["num_steps"] == 0 and run.manifest.content["shrinkage"] in SHRINKAGES
    assert run.best_score == run.records[-1]["val/mmp@5"]
    assert "12-d int4, 0 steps" in run.__rich__()
    again = train(features.folder, output=tmp_path / "run", recipe="universal", embedding_dim=12, epochs=0.0)
    assert again.was_finished and np.array_equal(
        again.head.embed(features.rows), run.head.embed(features.rows)
    )


def test_only_training_images_are_looked_at(features, tmp_path):
    """Neither head nor shrinkage nor codes may depend on validation or test images."""
    training = features.catalog.has_role("train")
    spoilt = np.array(features.rows)
    spoilt[~training] = np.random.default_rng(0).normal(size=(int((~training).sum()), spoilt.shape[1]))
    other = dataclasses.replace(features, rows=spoilt)
    config = TrainConfig(start="lda", embedding_dim=12, power=0.5, codes="int4", epochs=2.0, keep="last")
    one = run_training(features, config, tmp_path / "one", resume=True)
    two = run_training(other, config, tmp_path / "two", resume=True)
    assert np.array_equal(one.head.embed(features.rows), two.head.embed(features.rows))
    assert one.best_score != two.best_score


def test_the_shrinkage_is_the_best_on_what_is_left_out(features, tmp_path):
    """Said again from the start: fit without each domain, whiten, search the domain, take the best mean."""
    run = train(features.folder, output=tmp_path / "run", recipe="universal", epochs=0.0)
    data = TrainingData.of(features)
    assert np.array_equal(parts_to_leave_out(data), data.domains)
    rows = np.asarray(features.rows, np.float64)
    shaped = np.sign(rows) * np.abs(rows) ** 0.5
    shaped /= np.linalg.norm(shaped, axis=1, keepdims=True)
    means = np.zeros(len(SHRINKAGES))
    for left_out in range(3):
        rest = [
            Scatter.of(features.rows, data.rows[own], data.classes[own], power=0.5)
            for own in (data.domains == domain for domain in range(3) if domain != left_out)
        ]
        within = np.mean([each.within for each in rest], axis=0)
        values, vectors = np.linalg.eigh(within / (np.trace(within) / len(within)))
        own = data.domains == left_out
        for place, shrinkage in enumerate(SHRINKAGES):
            added = shrinkage * (1 + 100 / sum(each.num_certain for each in rest))
            inputs = (shaped[data.rows[own]] - np.mean([each.mean for each in rest], axis=0)) @ vectors
            white = inputs / np.sqrt(values + added)
            white /= np.linalg.norm(white, axis=1, keepdims=True)
            cosines = white @ white.T
            np.fill_diagonal(cosines, -2)
            best = np.argsort(-cosines, axis=1)[:, :5]
            means[place] += (data.classes[own][best] == data.classes[own][:, None]).mean()
    assert means.max() > means.min()
    assert run.manifest.content["shrinkage"] == SHRINKAGES[int(means.argmax())]


@pytest.mark.parametrize(("num_classes", "num_domains", "num_parts"), [(8, 2, 1), (48, 2, 3), (48, 4, 4)])
def test_what_is_left_out(num_classes, num_domains, num_parts, tmp_path):
    found = feature_folder(tmp_path / "f", num_classes=num_classes, num_domains=num_domains)
    data = TrainingData.of(found)
    parts = parts_to_leave_out(data)
    assert len(np.unique(parts)) == num_parts
    for label in np.unique(data.classes):  # a class is never on both sides
        assert len(np.unique(parts[data.classes == label])) == 1


def test_two_instances_are_enough_and_a_narrow_backbone_too(tmp_path):
    """Eight images make a covariance of next to no rank; their codes must not cut off what comes later."""
    found = feature_folder(tmp_path / "f", num_classes=6, per_class=4, num_domains=1, width=48)
    labels = found.catalog.strings("label")
    few = found.subset(~found.catalog.has_role("train") | np.isin(labels, ["c0", "c1"]))
    head_only = lda_head(
        HeadConfig(embedding_dim=48, power=0.5),
        Scatter.of(few.rows, np.flatnonzero(few.catalog.has_role("train")), np.repeat([0, 1], 4), power=0.5),
        0.5,
    )
    embeddings = head_only.embed(few.rows)
    training = embeddings[few.catalog.has_role("train")]
    back = as_kept(embeddings, training, "int4")
    assert (back * embeddings).sum(1).min() > 0.5
    assert np.isfinite(back).all()


def test_a_run_is_measured_under_its_codes(features, tmp_path):
    """evaluate measured the head's float32 numbers, whatever the vectors were to be kept in."""
    run = train(features.folder, output=tmp_path / "run", recipe="universal", embedding_dim=12)
    found = evaluate(run.folder)
    tested = features.catalog.has_role("query+index")
    embeddings = run.head.embed(features.rows[tested])
    coder = Coder.fit(run.head.embed(features.rows[features.catalog.has_role("train")]), "int4")
    kept = coder.decode(coder.encode(embeddings))
    expected = evaluate_embeddings(kept, features.catalog.take(tested))
    assert found.results["run"].values("map").tolist() == expected.values("map").tolist()
    whole = evaluate_embeddings(embeddings, features.catalog.take(tested))
    assert found.results["run"].values("map").tolist() != whole.values("map").tolist()
    assert "PCA-12 int4" in found.results


def test_a_head_that_is_worse_than_the_backbones_own_reduction_says_so(tmp_path):
    """What tells the validation images apart is what the training labels call spread within an instance."""
    found = feature_folder(tmp_path / "f", num_classes=40, per_class=8)
    rng = np.random.default_rng(0)
    training = np.flatnonzero(found.catalog.has_role("train"))
    labels, instances = found.catalog.strings("label").copy(), found.catalog.class_ids()
    own = rng.permutation(np.repeat(np.arange(20), 8))
    labels[training] = [f"c{number}" for number in own]
    rows = rng.normal(size=found.rows.shape) * 0.05
    rows[:, :10] += rng.normal(size=(40, 10))[instances]
    rows[training, 10:20] += rng.normal(size=(20, 10))[own]
    catalog = found.catalog.with_column("label", labels).with_column("domain", ["d"] * len(labels))
    mixed = dataclasses.replace(found, catalog=catalog, rows=rows.astype(np.float16))
    config = TrainConfig(start="lda", embedding_dim=10, shrinkage=0.01, epochs=0.0)
    run = run_training(mixed, config, tmp_path / "run", resume=True)
    assert "principal components are better" in run.manifest.content["notes"][-1]
    assert run.manifest.content["notes"][-1] in run.__rich__()


def test_descent_goes_on_from_the_discriminants(features, tmp_path):
    """Near them: an embedding hardly turns, and training images fit better."""
    runs = [
        train(features.folder, output=tmp_path / str(n), recipe="universal", epochs=float(n), keep="last")
        for n in (0, 4)
    ]
    assert [run.manifest.content["num_steps"] for run in runs] == [0, 4]
    start, end = (run.head.embed(features.rows) for run in runs)
    assert 0.9 < (start * end).sum(1).mean() < 0.99999
    assert runs[1].records[0]["step"] == 0 and runs[1].best_score >= runs[0].best_score
    # seeds share the start, so that their heads may be averaged
    other = train(features.folder, output=tmp_path / "other", recipe="universal", epochs=0, seed=3)
    assert np.array_equal(other.head.embed(features.rows), start)


def test_classes_start_where_their_images_are(features, tmp_path):
    config = TrainConfig(start="lda", embedding_dim=12, num_centers=2)
    data = TrainingData.of(features)
    trainer = HeadTrainer(features, data, config, tmp_path)
    embeddings = trainer.head.embed(features.rows[data.rows])
    weight = trainer.margin_head.weight.detach().numpy()
    cosines = embeddings @ (weight / np.linalg.norm(weight, axis=1, keepdims=True)).T
    means = np.stack([cosines[data.classes == label].mean(0) for label in range(len(data.class_counts))])
    assert np.array_equal(means.argmax(1) // 2, np.arange(len(means)))
    assert not np.array_equal(weight[::2], weight[1::2])


@pytest.mark.slow
def test_a_killed_run_from_discriminants_ends_as_an_undisturbed_one(features, tmp_path, monkeypatch):
    settings = {"recipe": "universal", "epochs": 6.0, "batch_size": 16, "embedding_dim": 12}
    whole = train(features.folder, output=tmp_path / "whole", **settings)
    save = HeadTrainer._save

    def save_and_die(self):
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HeadTrainer, "_save", save_and_die)
        train(features.folder, output=tmp_path / "part", **settings)
    part = train(features.folder, output=tmp_path / "part", **settings)
    assert part.records == whole.records
    assert np.array_equal(part.head.embed(features.rows), whole.head.embed(features.rows))


def test_what_does_not_go_with_a_start_is_refused():
    with pytest.raises(InputError, match=r"--start lda with head = 'mlp'"):
        TrainConfig(start="lda", head="mlp")
    with pytest.raises(InputError, match=r"--epochs 0\.0"):
        TrainConfig(epochs=0.0)
    assert TrainConfig(start="lda", epochs=0.0).epochs == 0


def test_runs_of_earlier_versions_open_without_the_new_options(features, tmp_path):
    """A head's configuration of before had neither power nor codes."""
    run = train(features.folder, output=tmp_path / "run", recipe="plain", epochs=1.0, embedding_dim=8)
    content, config = run.manifest.content, run.manifest.made_from["config"]
    del content["head"]["power"]
    for name in ("power", "codes", "shrinkage", "start"):
        del config[name]
    write_manifest(run.folder, run.manifest)
    again = Run.open(run.folder)
    assert np.array_equal(again.head.embed(features.rows), run.head.embed(features.rows))
    assert again.config == run.config
