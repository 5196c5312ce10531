import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from samething.errors import InputError
from samething.heads import (
    SURE_AFTER,
    BatchStandardise,
    Head,
    HeadConfig,
    Scatter,
    build_head,
    fitted_head,
    head_from_state,
    lda_head,
    mean_and_covariance,
    powered,
    whitened_head,
)

RNG = np.random.default_rng(0)
FEATURES = (RNG.normal(size=(300, 40)) @ RNG.normal(size=(40, 40)) + 1).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(st.integers(2, 60), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_average_pool_equals_torchs(width, dim):
    if dim > width:
        return
    rows = torch.randn(3, width)
    head = Head(HeadConfig(kind="average", embedding_dim=dim, standardise=False), width)
    torch.testing.assert_close(head(rows), torch.nn.AdaptiveAvgPool1d(dim)(rows))


def test_average_pool_is_not_trained():
    head = Head(HeadConfig(kind="average", embedding_dim=8, standardise=False), 40)
    assert not [parameter for parameter in head.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("standardise", [False, True])
def test_pca_equals_scikit_learns(standardise):
    rows = unit(FEATURES) if standardise else FEATURES
    head = fitted_head(HeadConfig(kind="pca", embedding_dim=5, standardise=standardise), FEATURES)
    expected = PCA(5, svd_solver="full").fit(rows).transform(rows)
    ours = head(torch.from_numpy(FEATURES)).detach().numpy()
    scale = float(head.standardise.scale) if standardise else 1.0
    for column in range(5):
        sign = np.sign((ours[:, column] * expected[:, column]).sum())
        np.testing.assert_allclose(ours[:, column] * scale, sign * expected[:, column], atol=2e-3)


def test_fit_to_some_rows_is_fit_to_a_copy_of_them(monkeypatch):
    """Bit for bit, a part at a time, so that features may be larger than memory."""
    monkeypatch.setattr("samething.heads._ROWS_AT_A_TIME", 64)
    rows = np.sort(RNG.permutation(len(FEATURES))[:200])
    config = HeadConfig(kind="pca", embedding_dim=6)
    some, copy = build_head(config, 40), build_head(config, 40)
    some.fit(FEATURES, rows)
    copy.fit(FEATURES[rows])
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in some.state_dict().items())


def test_covariance_of_float16_rows_in_parts(monkeypatch):
    rows = FEATURES.astype(np.float16)
    whole = mean_and_covariance(rows, unit_length=False)
    monkeypatch.setattr("samething.heads._ROWS_AT_A_TIME", 7)
    parts = mean_and_covariance(rows, unit_length=False)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-12)
    np.testing.assert_allclose(whole[1], np.cov(rows.astype(np.float64).T, bias=True), atol=1e-9)


def test_standardised_features_have_mean_zero_and_unit_scale():
    head = fitted_head(HeadConfig(kind="none"), FEATURES)
    rows = head(torch.from_numpy(FEATURES))
    assert rows.mean(0).abs().max() < 1e-5
    assert abs(float(rows.var(0, unbiased=False).mean()) - 1) < 1e-4


def test_batch_standardise_equals_batchnorm():
    ours, theirs = BatchStandardise(40), torch.nn.BatchNorm1d(40, affine=False)
    for start in (0, 100, 200):
        batch = torch.from_numpy(FEATURES[start : start + 100])
        torch.testing.assert_close(ours(batch), theirs(batch), atol=2e-5, rtol=1e-4)
    ours.eval(), theirs.eval()
    batch = torch.from_numpy(FEATURES)
    torch.testing.assert_close(ours(batch), theirs(batch), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "batchnorm-linear", "mlp", "average", "pca", "none"])
def test_embeddings_are_unit_float32_and_survive_storage(kind):
    head = fitted_head(HeadConfig(kind=kind, embedding_dim=8), FEATURES)
    embeddings = head.embed(FEATURES.astype(np.float16))
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (300, 40 if kind == "none" else 8)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    config = {**vars(head.config), "initialise": "random"}  # which earlier versions wrote
    stored = head_from_state(config, 40, head.state_dict())
    assert np.array_equal(stored.embed(FEATURES.astype(np.float16)), embeddings)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["linear", "batchnorm-linear", "mlp"])
def test_a_whitened_head_evens_out_its_embeddings(kind, power):
    head = fitted_head(HeadConfig(kind=kind, embedding_dim=6), FEATURES)
    rows = np.arange(0, 300, 2)
    pca = PCA(svd_solver="full").fit(head.embed(FEATURES[rows]))
    with torch.no_grad():
        raw = head(torch.from_numpy(FEATURES)).numpy()
    expected = unit(raw @ pca.components_.T / pca.explained_variance_ ** (power / 2))
    ours = whitened_head(head, FEATURES, power, rows=rows)
    found = ours.embed(FEATURES)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-4)
    assert not np.array_equal(found, head.embed(FEATURES)) and ours.config == head.config
    same = whitened_head(head, FEATURES, 0.0)
    np.testing.assert_allclose(same.embed(FEATURES), head.embed(FEATURES), atol=1e-5)


def test_same_seed_same_head():
    config = HeadConfig(embedding_dim=4)
    one, two, other = (build_head(config, 40, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(one["projection.weight"], two["projection.weight"])
    assert not torch.equal(one["projection.weight"], other["projection.weight"])


@pytest.mark.parametrize("dim", [0, 41])
def test_dimensions_that_cannot_be(dim):
    with pytest.raises(InputError, match="embedding_dim"):
        Head(HeadConfig(embedding_dim=dim), 40)


def test_an_embedding_of_length_zero_is_refused():
    head = build_head(HeadConfig(kind="linear", embedding_dim=4, standardise=False, bias=False), 40)
    with pytest.raises(InputError, match="row 1"):
        head.embed(np.concatenate([FEATURES[:1], np.zeros((1, 40), np.float32)]))


# ---- discriminants


def labelled(num_classes=30, per_class=6, width=24, seed=0):
    """Features of classes whose centres differ along some directions, and whose images along others."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, width)) * np.linspace(2, 0.1, width)
    classes = np.repeat(np.arange(num_classes), per_class)
    spread = np.linspace(0.1, 2, width)
    return (centres[classes] + rng.normal(size=(len(classes), width)) * spread).astype(np.float32), classes


@pytest.mark.parametrize("shrinkage", [0.3, 4.0])
def test_discriminants_equal_the_generalised_eigenproblem_of_scipy(shrinkage):
    """Written again class by class, and solved by LAPACK's own routine for T v = e W v."""
    features, classes = labelled()
    rows = np.arange(3, len(features))
    head = lda_head(
        HeadConfig(embedding_dim=5, power=0.5),
        Scatter.pooled([Scatter.of(features, rows, classes[rows], power=0.5)]),
        shrinkage,
    )
    shaped = unit(np.sign(features) * np.sqrt(np.abs(features.astype(np.float64))))
    inside = np.concatenate(
        [shaped[rows][classes[rows] == c] - shaped[rows][classes[rows] == c].mean(0) for c in range(30)]
    )
    num_certain = len(rows) - 30
    within = inside.T @ inside / num_certain
    within /= np.trace(within) / len(within)
    within += shrinkage * (1 + SURE_AFTER / num_certain) * np.eye(len(within))
    values, vectors = scipy.linalg.eigh(np.cov(shaped[rows].T, bias=True), within)
    expected = (shaped - shaped[rows].mean(0)) @ vectors[:, ::-1][:, :5]
    ours = head.embed(features)
    signs = np.sign((ours * expected).sum(0))
    np.testing.assert_allclose(ours, unit(expected * signs), atol=1e-4)
    assert values[-1] > 1.5 * values[-5]


def test_much_shrinkage_leaves_the_principal_components():
    features, classes = labelled()
    scatter = Scatter.pooled([Scatter.of(features, np.arange(len(features)), classes, power=1.0)])
    ours = lda_head(HeadConfig(embedding_dim=6), scatter, 1e9).embed(features)
    expected = fitted_head(HeadConfig(kind="pca", embedding_dim=6, bias=False), features).embed(features)
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-3)


def test_domains_are_pooled_evenly_and_their_distance_is_no_spread():
    """A domain of twenty times the images, far away, leaves the small one nearly half of the weight."""
    (few, its), (many, others) = labelled(20, 20, seed=1), labelled(400, 20, seed=2)
    one = Scatter.of(few, np.arange(len(few)), its, power=1.0)
    two = Scatter.of(many + 5, np.arange(len(many)), others, power=1.0)
    both = Scatter.pooled([one, two])
    share = 1 / (1 + (len(many) / (len(many) + SURE_AFTER)) / (len(few) / (len(few) + SURE_AFTER)))
    assert 0.4 < share < 0.5
    np.testing.assert_allclose(both.within, share * one.within + (1 - share) * two.within)
    np.testing.assert_allclose(both.total, share * one.total + (1 - share) * two.total)
    assert both.num_certain == len(few) + len(many) - 420


def test_a_head_with_a_power_comes_back():
    features, classes = labelled()
    scatter = Scatter.of(features, np.arange(len(features)), classes, power=0.5)
    head = lda_head(HeadConfig(embedding_dim=6, power=0.5), scatter, 1.0)
    again = head_from_state(dataclasses.asdict(head.config), 24, head.state_dict())
    assert np.array_equal(again.embed(features), head.embed(features))
    # prefixes of discriminants are the discriminants of fewer numbers
    fewer = lda_head(HeadConfig(embedding_dim=3, power=0.5), scatter, 1.0)
    np.testing.assert_allclose(fewer.embed(features), unit(head.embed(features)[:, :3]), atol=1e-5)


def test_power_on_negative_numbers_keeps_their_sign():
    config = HeadConfig(kind="pca", embedding_dim=2, power=0.5)
    head = build_head(config, 2)
    numbers = head.standardise(torch.tensor([[-4.0, 9.0]]))
    torch.testing.assert_close(numbers, torch.tensor([[-2.0, 3.0]]) / 13**0.5)
    rows = powered(np.array([[-4.0, 9.0]], np.float32), 0.5)
    np.testing.assert_allclose(rows, np.array([[-2.0, 3.0]]) / 13**0.5)
