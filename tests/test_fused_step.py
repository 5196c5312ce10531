"""The fused step against autograd, and its update against torch's optimisers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.errors import InputError
from samething.losses import LOSSES, MarginHead, build_margin, class_sweep
from samething.losses.fused_step import FusedMarginStep
from samething.losses.matrix_products import fast_float32_products, medium_precision_is_exact

MARGINS = [(name, {}) for name in LOSSES] + [("adacos", {"dynamic": True}), ("cosface", {"scale": 64.0})]
IDS = [name + "".join(f"-{key}={value}" for key, value in options.items()) for name, options in MARGINS]
NUM_CLASSES = 300


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """64 classes a chunk at least, so that 300 classes make several, the last of them shorter."""
    monkeypatch.setattr(class_sweep, "NUMBERS_A_CHUNK", 1)


def make_head(name, options, *, dtype=torch.float64, num_classes=NUM_CLASSES, dim=16, **head_options):
    torch.manual_seed(0)
    counts = [3 + i % 50 for i in range(num_classes)]
    margin = build_margin(name, num_classes=num_classes, class_counts=counts, **options)
    head = MarginHead(dim, num_classes, margin, **head_options).to(dtype)
    with torch.no_grad():
        head.weight *= 1 + 3 * torch.rand(len(head.weight), 1)  # lengths differ
    return head


def make_batch(head, *, rows=24, seed=1):
    """Some rows near their class, some near a wrong one, some anywhere; labels repeat."""
    g = torch.Generator().manual_seed(seed)
    dtype, dim = head.weight.dtype, head.weight.shape[1]
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    y = torch.randint(head.num_classes, (rows,), generator=g)
    y[1::4] = y[0::4][: len(y[1::4])]
    near = head.weight.detach().double()[y * head.num_centers]
    x[: rows // 3] = 0.3 * x[: rows // 3] + 8 * near[: rows // 3] / near[: rows // 3].norm(
        dim=1, keepdim=True
    )
    x[-rows // 6 :] = 0.1 * x[-rows // 6 :] - near[-rows // 6 :] / near[-rows // 6 :].norm(
        dim=1, keepdim=True
    )
    return (x * torch.linspace(0.5, 30, rows, dtype=torch.float64)[:, None]).to(dtype), y


def by_autograd(head, x, y):
    x = x.clone().requires_grad_()
    loss = head(x, y)
    loss.backward()
    gradient, head.weight.grad = head.weight.grad, None
    return loss.detach(), x.grad, gradient


def by_fused_step(head, x, y, **options):
    loss, x_gradient = FusedMarginStep(head, **options).loss_and_embedding_gradient(x, y)
    gradient, head.weight.grad = head.weight.grad, None
    return loss, x_gradient, gradient


def relative_error(ours, expected):
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("workspace_bytes", [1 << 20, 0], ids=["kept", "computed-twice"])
@pytest.mark.parametrize("num_centers", [1, 2, 3, 7])
@pytest.mark.parametrize("name, options", MARGINS, ids=IDS)
def test_loss_gradients_and_state_are_those_of_autograd(name, options, num_centers, workspace_bytes):
    plain = make_head(name, options, num_centers=num_centers)
    fused = copy.deepcopy(plain)
    for seed in range(3):
        x, y = make_batch(plain, seed=seed)
        expected = by_autograd(plain, x, y)
        ours = by_fused_step(fused, x, y, workspace_bytes=workspace_bytes)
        for ours_value, value in zip(ours, expected, strict=True):
            assert relative_error(ours_value, value) <= 1e-11
        for key, value in plain.state_dict().items():
            assert torch.allclose(fused.state_dict()[key], value, rtol=1e-12, atol=1e-14), key


@pytest.mark.parametrize("num_centers", [1, 3])
@pytest.mark.parametrize("name, options", MARGINS, ids=IDS)
def test_float32_gradients_are_near_those_of_float64(name, options, num_centers):
    head = make_head(name, options, dtype=torch.float32, num_centers=num_centers)
    x, y = make_batch(head)
    exact = copy.deepcopy(head).double()
    expected = by_autograd(exact, x.double(), y)
    ours = by_fused_step(head, x, y)
    limits = (1e-6, 5e-6, 5e-6)  # Li-ArcFace's angles lose digits near 0
    for ours_value, value, limit in zip(ours, expected, limits, strict=True):
        assert relative_error(ours_value, value) <= limit


@pytest.mark.parametrize("num_centers", [1, 3])
@pytest.mark.parametrize("name, options", MARGINS, ids=IDS)
def test_bfloat16_is_a_coarser_writing_of_the_same(name, options, num_centers):
    head = make_head(name, options, dtype=torch.float32, num_centers=num_centers)
    x, y = make_batch(head)
    expected = by_autograd(copy.deepcopy(head).double(), x.double(), y)
    loss, x_gradient, gradient = by_fused_step(head, x, y, precision="bfloat16")
    assert x_gradient.dtype == gradient.dtype == torch.float32
    assert relative_error(loss, expected[0]) <= 2e-3
    assert relative_error(x_gradient, expected[1]) <= 3e-2
    assert relative_error(gradient, expected[2]) <= 3e-2


@given(
    rows=st.integers(1, 40),
    num_classes=st.integers(3, 200),
    num_centers=st.integers(1, 4),
    fraction=st.sampled_from([1.0, 0.5, 0.05]),
    share=st.sampled_from([1.0, 0.25]),
    kept=st.booleans(),
    loss=st.sampled_from(["arcface", "curricularface", "adaface"]),
)
@settings(max_examples=60, deadline=None)
def test_any_sizes_and_class_sampling(rows, num_classes, num_centers, fraction, share, kept, loss):
    head_options = {"num_centers": num_centers, "class_fraction": fraction, "seed": 5}
    plain = make_head(loss, {}, num_classes=num_classes, dim=8, **head_options)
    fused = copy.deepcopy(plain)
    step = FusedMarginStep(fused, workspace_bytes=1 << 24 if kept else 0)
    for size in (rows, max(1, rows // 2)):  # a last, smaller batch in the same workspace
        x, y = make_batch(plain, rows=size)
        expected = by_autograd(plain, x, y)
        value, x_gradient = step.loss_and_embedding_gradient(x, y, share=share)
        gradient, fused.weight.grad = fused.weight.grad, None
        assert value.item() == pytest.approx(share * expected[0].item(), rel=1e-10, abs=1e-12)
        assert torch.allclose(x_gradient, share * expected[1], rtol=1e-8, atol=1e-11)
        assert torch.allclose(gradient, share * expected[2], rtol=1e-8, atol=1e-11)
        assert torch.equal(fused.sampling_state, plain.sampling_state)


def test_equal_sub_centres_give_the_gradient_to_the_first():
    head = make_head("normface", {}, num_centers=3)
    with torch.no_grad():
        head.weight.view(NUM_CLASSES, 3, 16)[:] = head.weight.view(NUM_CLASSES, 3, 16)[:, :1]
    x, y = make_batch(head)
    _, _, gradient = by_fused_step(head, x, y)
    lengths = gradient.view(NUM_CLASSES, 3, 16).norm(dim=2)
    assert bool((lengths[:, 0] > 0).all()) and float(lengths[:, 1:].max()) == 0


OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=2e-2, weight_decay=1e-2, fused=True),
    "adam-plain": lambda p: torch.optim.Adam(p, lr=2e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=1e-1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, weight_decay=1e-3),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=2e-2, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_update_in_chunks_is_the_optimisers_own(name):
    """Along ten steps with a changing rate, beside a second parameter that only ``step()`` moves."""
    plain = make_head("arcface", {}, num_centers=2)
    chunked = copy.deepcopy(plain)
    runs = []
    for head, in_chunks in ((plain, False), (chunked, True)):
        other = torch.nn.Parameter(torch.eye(16, dtype=torch.float64))
        optimiser = OPTIMISERS[name]([other, head.weight])
        runs.append((head, other, optimiser, FusedMarginStep(head, optimiser if in_chunks else None)))
    for i in range(10):
        x, y = make_batch(plain, seed=i)
        for _, other, optimiser, step in runs:
            optimiser.param_groups[0]["lr"] = 0.02 / (1 + i)
            optimiser.zero_grad()
            embeddings = x @ other
            _, gradient = step.loss_and_embedding_gradient(embeddings, y)
            embeddings.backward(gradient)
            optimiser.step()
    assert torch.allclose(plain.weight, chunked.weight, rtol=1e-12, atol=1e-14)
    assert torch.allclose(runs[0][1], runs[1][1], rtol=1e-12, atol=1e-14)
    states = [run[2].state_dict()["state"] for run in runs]
    assert states[0].keys() == states[1].keys()
    for i, state in states[0].items():
        assert state.keys() == states[1][i].keys()
        for key, value in state.items():
            same = torch.allclose(value, states[1][i][key], rtol=1e-12) if value is not None else True
            assert same, key


def test_a_resumed_run_goes_on_bit_for_bit():
    def make():
        head = make_head("curricularface", {}, dtype=torch.float32, num_centers=2)
        optimiser = torch.optim.Adam([head.weight], lr=1e-2)
        return head, optimiser, FusedMarginStep(head, optimiser)

    def go_on(head, step, seeds):
        batches = [make_batch(make_head("arcface", {}, dtype=torch.float32), seed=seed) for seed in seeds]
        return [step.loss_and_embedding_gradient(x, y)[0].item() for x, y in batches]

    head, optimiser, step = make()
    go_on(head, step, range(3))
    saved = copy.deepcopy((head.state_dict(), optimiser.state_dict()))
    expected = go_on(head, step, range(3, 6))
    head, optimiser, step = make()
    head.load_state_dict(saved[0])
    optimiser.load_state_dict(saved[1])
    assert go_on(head, step, range(3, 6)) == expected


def test_weights_that_move_to_another_type_or_memory_are_followed():
    head = make_head("arcface", {}, dtype=torch.float32, num_centers=2)
    step = FusedMarginStep(head)
    x, y = make_batch(head)
    step.loss_and_embedding_gradient(x, y)
    head.weight.grad = None
    head.double()
    with torch.no_grad():
        head.weight.data = head.weight.data + 0.1
    expected = by_autograd(copy.deepcopy(head), x.double(), y)
    loss, x_gradient = step.loss_and_embedding_gradient(x.double(), y)
    assert relative_error(loss, expected[0]) <= 1e-11
    assert relative_error(x_gradient, expected[1]) <= 1e-11
    assert relative_error(head.weight.grad, expected[2]) <= 1e-11


@pytest.mark.parametrize("workspace_bytes", [1 << 20, 0])
@pytest.mark.parametrize("num_centers", [1, 3])
def test_what_went_before_leaves_no_trace_in_the_rounding(monkeypatch, num_centers, workspace_bytes):
    """A run that resumes with the last, smaller batch of an epoch must round as the whole run did."""
    monkeypatch.setattr(class_sweep, "NUMBERS_A_CHUNK", 64 * 24 * num_centers)
    head = make_head("curricularface", {}, dtype=torch.float32, num_centers=num_centers).eval()
    fresh, used = (FusedMarginStep(head, workspace_bytes=workspace_bytes) for _ in range(2))
    for rows in (24, 5, 40, 1):
        used.loss_and_embedding_gradient(*make_batch(head, rows=rows))
    results = []
    for step in (fresh, used):
        head.weight.grad = None
        x, y = make_batch(head, rows=7, seed=4)
        results.append((*step.loss_and_embedding_gradient(x, y), head.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_add_up_where_there_are_some():
    head = make_head("arcface", {}, num_centers=2)
    x, y = make_batch(head)
    step = FusedMarginStep(head)
    step.loss_and_embedding_gradient(x, y)
    once = head.weight.grad.clone()
    step.loss_and_embedding_gradient(x, y)
    assert torch.allclose(head.weight.grad, 2 * once)


def test_a_large_scale_finds_the_maximum_of_rows_far_from_every_class():
    """All classes on one side and the embeddings on the other: every cosine below -0.8, at scale 300."""
    head = make_head("cosface", {"scale": 300.0}, dtype=torch.float32, num_centers=2)
    with torch.no_grad():
        head.weight += 8.0
    x = torch.full((5, 16), -1.0) + 0.1 * torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    y = torch.arange(5)
    expected = by_autograd(copy.deepcopy(head).double(), x.double(), y)
    loss, x_gradient, gradient = by_fused_step(head, x, y)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert relative_error(x_gradient, expected[1]) <= 1e-3 and relative_error(gradient, expected[2]) <= 1e-3


@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 200.0])
def test_extreme_cosines_stay_finite_and_right(scale):
    """Rows at their centre, opposite to it, and at another's, at scales where exp would overflow."""
    head = make_head("arcface", {"scale": scale}, dtype=torch.float32, num_centers=3)
    x, y = make_batch(head, rows=6)
    with torch.no_grad():
        x[0], x[1] = head.weight[3 * y[0]], -5 * head.weight[3 * y[1]]
        x[2] = head.weight[(3 * y[2] + 3) % len(head.weight)]
    expected = by_autograd(copy.deepcopy(head).double(), x.double(), y)
    loss, x_gradient, gradient = by_fused_step(head, x, y)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert bool(x_gradient.isfinite().all()) and bool(gradient.isfinite().all())
    assert relative_error(gradient, expected[2]) <= 1e-4


PREFIXES = [{"prefixes": (4, 16)}, {"prefixes": (8, 3)}, {"prefixes": (4, 10, 16), "class_fraction": 0.3}]


@pytest.mark.parametrize("loss", ["arcface", "curricularface", "adacos"])
@pytest.mark.parametrize("head_options", PREFIXES, ids=str)
def test_prefixes_are_swept_in_turn(head_options, loss):
    options = {"dynamic": True} if loss == "adacos" else {}
    plain = make_head(loss, options, num_centers=2, **head_options)
    fused = copy.deepcopy(plain)
    optimisers = [torch.optim.AdamW([head.weight], lr=0.05, fused=True) for head in (plain, fused)]
    step = FusedMarginStep(fused, optimisers[1])
    for seed in range(3):
        x, y = make_batch(plain, seed=seed)
        for optimiser in optimisers:
            optimiser.zero_grad()
        x_plain = x.clone().requires_grad_()
        expected = plain(x_plain, y) * 0.5
        expected.backward()
        loss_value, x_gradient = step.loss_and_embedding_gradient(x, y, share=0.5)
        assert loss_value.item() == pytest.approx(expected.item(), rel=1e-11)
        assert relative_error(x_gradient, x_plain.grad) <= 1e-10
        assert relative_error(fused.weight.grad, plain.weight.grad) <= 1e-10
        for optimiser in optimisers:
            optimiser.step()
        for name, value in plain.state_dict().items():
            assert torch.allclose(fused.state_dict()[name], value, rtol=1e-8, atol=1e-10), name


def test_what_it_does_not_cover_goes_by_autograd_under_the_same_call():
    plain = make_head("curricularface", {}, num_centers=2, dtype=torch.bfloat16)
    fused = copy.deepcopy(plain)
    assert not FusedMarginStep.covers(fused)
    x, y = make_batch(plain)
    expected = by_autograd(plain, x, y)
    assert all(torch.equal(a, b) for a, b in zip(by_fused_step(fused, x, y), expected, strict=True))


def test_unfit_batches_are_refused_before_anything_moves():
    head = make_head("arcface", {}, num_centers=2)
    x, y = make_batch(head)
    step = FusedMarginStep(head, torch.optim.Adam([head.weight], lr=0.1))
    with pytest.raises(InputError, match="from 0 to 299"):
        step.loss_and_embedding_gradient(x, y + NUM_CLASSES)
    with pytest.raises(InputError, match="embedding 2 has length 0"):
        step.loss_and_embedding_gradient(x * (torch.arange(len(x)) != 2)[:, None], y)
    with torch.no_grad():
        head.weight[77] = 0
    before = head.weight.clone()
    with pytest.raises(InputError, match="class weight 77 has length 0"):
        step.loss_and_embedding_gradient(x, y)
    assert torch.equal(head.weight, before)
    with pytest.raises(ValueError, match="does not hold"):
        FusedMarginStep(
            make_head("arcface", {}), torch.optim.Adam([head.weight])
        ).loss_and_embedding_gradient(x, y)


def test_autocast_around_it_changes_nothing():
    head = make_head("arcface", {}, dtype=torch.float32, num_centers=2)
    x, y = make_batch(head)
    expected = by_fused_step(head, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        ours = by_fused_step(head, x, y)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_precision_setting_is_left_as_it_was():
    assert torch.get_float32_matmul_precision() == "highest"
    with fast_float32_products():
        expected = "medium" if medium_precision_is_exact() else "highest"
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"
