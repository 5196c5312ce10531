import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from samething.errors import InputError
from samething.heads import (
    BatchStandardise,
    Head,
    HeadConfig,
    build_head,
    fitted_head,
    head_from_state,
    mean_and_covariance,
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
