import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import losses_reference as pure
import samething
from samething.errors import InputError
from samething.losses import LOSSES, BatchRows, MarginHead, build_margin
from samething.losses.class_margins import cosine_margins, inverse_root_margins
from samething.losses.head import generator_for_step, sample_classes
from samething.losses.similarities import adaface_qualities

GOLDEN = Path(os.environ.get("MARGIN_HEADS_GOLDEN", Path(__file__).parent / "golden/margin_heads.npz"))
EVERY_LOSS = sorted(LOSSES)
NUM_CLASSES = 11
COUNTS = list(range(3, 3 + NUM_CLASSES))


def make_head(
    name, *, dim=8, num_classes=NUM_CLASSES, weight_seed=0, dtype=torch.float64, options=None, **head
):
    torch.manual_seed(weight_seed)
    counts = list(range(3, 3 + num_classes))
    margin = build_margin(name, num_classes=num_classes, class_counts=counts, **(options or {}))
    return MarginHead(dim, num_classes, margin, **head).to(dtype)


def make_batch(*, rows=6, dim=8, num_classes=NUM_CLASSES, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator, dtype=dtype) * 3
    return x, torch.randint(num_classes, (rows,), generator=generator)


# ---- the golden file ---------------------------------------------------------------------------------


def golden_margin(facts, num_classes, class_counts):
    name = facts["name"].lower()
    # JSON may say 30 where 30.0 is meant
    facts = {key: float(value) if type(value) is int else value for key, value in facts.items()}
    options = {
        "arcface": {"scale": facts["s"], "margin_radians": facts["m"]},
        "dynm-arcface": {
            "scale": facts["s"],
            "margin_min_radians": facts["m_min"],
            "margin_max_radians": facts["m_max"],
        },
        "liarcface": {"scale": facts["s"], "margin_radians": facts["m"]},
        "adacos": {"dynamic": facts["dynamic_s"]},
        # t_alpha is AdaFace's; CurricularFace's published code has 0.01, and so has the default here
        "curricularface": {"scale": facts["s"], "margin_radians": facts["m"]},
        "adaface": {
            "scale": facts["s"],
            "margin": facts["m"],
            "h": facts["h"],
            "momentum": facts["t_alpha"],
        },
    }[name]
    return build_margin(name, num_classes=num_classes, class_counts=class_counts, **options)


def golden_cases():
    with np.load(GOLDEN) as arrays:
        return sorted(json.loads(str(arrays["meta"])))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", golden_cases())
def test_values_gradients_and_state_follow_the_golden_file(case, dtype, tolerance):
    with np.load(GOLDEN) as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith(f"{case}/")}
        facts = json.loads(str(archive["meta"]))[case]
        class_counts = archive["class_counts"].tolist()
    weight = arrays[f"{case}/weight"]
    num_classes = len(weight) // facts["k"]
    margin = golden_margin(facts, num_classes, class_counts)
    head = MarginHead(weight.shape[1], num_classes, margin, num_centers=facts["k"]).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
    num_steps = sum(key.endswith("/x") for key in arrays)
    assert num_steps >= 1
    for step in range(num_steps):
        expected = {
            key: arrays[f"{case}/step{step}/{key}"] for key in ("logits", "loss", "grad_x", "grad_weight")
        }
        x = torch.from_numpy(arrays[f"{case}/step{step}/x"]).to(dtype).requires_grad_()
        y = torch.from_numpy(arrays[f"{case}/step{step}/y"])
        head.weight.grad = None
        logits = copy.deepcopy(head).logits(x, y)  # a copy: one batch moves the state once
        loss = head(x, y)
        loss.backward()
        found = {"logits": logits, "loss": loss, "grad_x": x.grad, "grad_weight": head.weight.grad}
        for key, value in expected.items():
            # logits are s times a number of size 1, so their tolerance is per unit of s
            unit = float(head.margins[0].scale) if key == "logits" else 1.0
            np.testing.assert_allclose(
                found[key].detach().numpy(), value, rtol=tolerance, atol=tolerance * unit, err_msg=key
            )


# ---- a second writing of every loss, one number at a time --------------------------------------------


class LoopedLoss:
    """Every loss again, with math and loops over rows and classes; defaults of the modules."""

    def __init__(self, name, num_classes, counts):
        self.name, self.num_classes = name, num_classes
        self.scale = {"liarcface": 64.0, "adacos": math.sqrt(2) * math.log(num_classes - 1)}.get(name, 30.0)
        self.t, self.mean, self.std = 0.0, 20.0, 100.0
        low, high = min(counts), max(counts)
        self.class_margin = [
            0.2 + 0.15 * (1 + math.cos(math.pi * (n - low) / max(high - low, 1))) for n in counts
        ]

    def __call__(self, x, weight, y, k):
        cosines, norms = self.cosines(x, weight, k)
        own = [cosines[i][int(label)] for i, label in enumerate(y)]
        if self.name == "curricularface":
            self.t = 0.01 * sum(own) / len(own) + 0.99 * self.t
        if self.name == "adaface":
            lengths = [min(max(n, 0.001), 100.0) for n in norms]
            self.mean = 0.01 * float(np.mean(lengths)) + 0.99 * self.mean
            self.std = 0.01 * float(np.std(lengths, ddof=1)) + 0.99 * self.std
        total = 0.0
        for i, label in enumerate(y.tolist()):
            z = [self.other(c, own[i]) for c in cosines[i]]
            z[label] = self.target(own[i], label, norms[i])
            z = [self.scale * v for v in z]
            peak = max(z)
            total += peak + math.log(sum(math.exp(v - peak) for v in z)) - z[label]
        return total / len(y)

    def cosines(self, x, weight, k):
        norms = [math.sqrt(sum(v * v for v in row)) for row in x.tolist()]
        rows = []
        for row, norm in zip(x.tolist(), norms, strict=True):
            best = []
            for label in range(self.num_classes):
                found = []
                for center in weight[label * k : (label + 1) * k].tolist():
                    dot = sum(a * b for a, b in zip(row, center, strict=True))
                    found.append(dot / norm / math.sqrt(sum(v * v for v in center)))
                best.append(max(found))
            rows.append(best)
        return rows, norms

    def target(self, c, label, norm):
        theta = math.acos(max(-1.0, min(1.0, c)))
        if self.name in ("normface", "adacos"):
            return c
        if self.name == "cosface":
            return c - 0.35
        if self.name == "liarcface":
            return (math.pi - 2 * (theta + 0.45)) / math.pi
        if self.name == "adaface":
            quality = (min(max(norm, 0.001), 100.0) - self.mean) / (self.std + 0.001) * 0.333
            quality = min(max(quality, -1.0), 1.0)
            theta = math.acos(max(-0.999, min(0.999, c))) - 0.4 * quality
            return math.cos(min(max(theta, 0.001), math.pi - 0.001)) - (0.4 + 0.4 * quality)
        m = self.class_margin[label] if self.name == "dynm-arcface" else 0.5
        return math.cos(theta + m) if theta < math.pi - m else c - m * math.sin(m)

    def other(self, c, own):
        if self.name == "liarcface":
            return (math.pi - 2 * math.acos(max(-1.0, min(1.0, c)))) / math.pi
        if self.name == "adaface":
            return max(-0.999, min(0.999, c))
        hard = c > math.cos(math.acos(max(-1.0, min(1.0, own))) + 0.5)
        return c * (self.t + c) if self.name == "curricularface" and hard else c


@pytest.mark.parametrize("k", range(1, 11))
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_sub_centres_agree_with_a_loop_over_classes_for_three_steps(name, k):
    head = make_head(name, num_centers=k, weight_seed=k)
    looped = LoopedLoss(name, NUM_CLASSES, COUNTS)
    for step in range(3):
        x, y = make_batch(seed=step)
        assert float(head(x, y).detach()) == pytest.approx(looped(x, head.weight.detach(), y, k), abs=1e-10)


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_only_the_nearest_sub_centre_of_a_class_gets_a_gradient(k):
    head = make_head("arcface", num_centers=k)
    x, y = make_batch(rows=1)
    head(x, y).backward()
    touched = (head.weight.grad.abs().sum(dim=1) > 0).view(NUM_CLASSES, k)
    assert (touched.sum(dim=1) == 1).all()
    cosines = F.cosine_similarity(x, head.weight.detach()).view(NUM_CLASSES, k)
    assert torch.equal(touched.int().argmax(dim=1), cosines.argmax(dim=1))


@given(
    margin=st.floats(0, 0.5),
    cosine=st.floats(-1, 1),
    growth=st.floats(0, 1),
    name=st.sampled_from(EVERY_LOSS),
)
@settings(max_examples=150, deadline=None)
def test_no_similarity_exceeds_its_bound(margin, cosine, growth, name):
    option = {"cosface": "margin", "adaface": "margin", "arcface": "margin_radians"}.get(name)
    head = make_head(name, options={option: margin} if option else None)
    own = torch.tensor([cosine, -cosine, growth], dtype=torch.float64)
    context = head.margins[0].prepare(
        BatchRows(target_cosines=own, norms=own.abs() * 50 + 0.1, labels=torch.tensor([0, 1, 2]))
    )
    bound = head.margins[0].similarity_bound(context) + 1e-12
    grid = torch.linspace(-1, 1, 41, dtype=torch.float64).repeat(3, 1)
    assert float(head.margins[0].target_similarity(own, context).max()) <= bound
    assert float(head.margins[0].other_similarity(grid, context).max()) <= bound


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_the_elementwise_derivative_is_the_derivative(name):
    margin = make_head(name).margins[0]
    own = torch.tensor([0.9, 0.1, -0.95], dtype=torch.float64)
    context = margin.prepare(BatchRows(target_cosines=own, norms=own.abs() * 9, labels=torch.arange(3)))
    cosines = torch.linspace(-0.9985, 0.9985, 60, dtype=torch.float64).view(3, 20).requires_grad_()
    (expected,) = torch.autograd.grad(margin.other_similarity(cosines, context).sum(), cosines)
    found = margin.other_similarity_derivative(cosines.detach(), context)
    found = torch.ones_like(cosines) if found is None else found
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_module_and_pure_function_give_the_same_logits(name):
    margin = make_head(name).margins[0]
    cosines = torch.rand(4, NUM_CLASSES, dtype=torch.float64) * 2 - 1
    labels, norms = torch.tensor([0, 3, 3, 10]), torch.tensor([5.0, 20.0, 50.0, 300.0], dtype=torch.float64)
    found = margin.logits(cosines, labels, norms=norms, labels=labels)
    call = {
        "normface": lambda: pure.normface_logits(cosines, labels, scale=30.0),
        "cosface": lambda: pure.cosface_logits(cosines, labels, scale=30.0, margin=0.35),
        "arcface": lambda: pure.arcface_logits(cosines, labels, scale=30.0, margin_radians=0.5),
        "dynm-arcface": lambda: pure.arcface_logits(
            cosines, labels, scale=30.0, margin_radians=margin.class_margins[labels]
        ),
        "liarcface": lambda: pure.li_arcface_logits(cosines, labels, scale=64.0, margin_radians=0.45),
        "adacos": lambda: pure.adacos_logits(cosines, labels, scale=margin.scale),
        "curricularface": lambda: pure.curricularface_logits(
            cosines, labels, scale=30.0, margin_radians=0.5, t=margin.t
        ),
        "adaface": lambda: pure.adaface_logits(
            cosines,
            labels,
            scale=30.0,
            margin=0.4,
            qualities=adaface_qualities(norms, h=0.333, norm_mean=margin.norm_mean, norm_std=margin.norm_std),
        ),
    }[name]
    torch.testing.assert_close(found, call(), rtol=1e-12, atol=1e-12)


# ---- margins by class size ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30))
@settings(deadline=None)
def test_class_size_margins_agree_with_a_loop(counts):
    cosine = cosine_margins(counts, margin_min_radians=0.2, margin_max_radians=0.5)
    root = inverse_root_margins(counts, margin_min_radians=0.2, margin_max_radians=0.5)
    low, high = min(counts), max(counts)
    for count, found_cosine, found_root in zip(counts, cosine, root, strict=True):
        n, r = 0.0, 1.0
        if high > low:
            n = (count - low) / (high - low)
            r = (count**-0.25 - high**-0.25) / (low**-0.25 - high**-0.25)
        assert found_cosine == pytest.approx(0.2 + 0.15 * (1 + math.cos(math.pi * n)), abs=1e-12)
        assert found_root == pytest.approx(0.2 + 0.3 * r, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "inverse_root"])
@pytest.mark.parametrize("counts", [[7, 7, 7], [1, 1, 1]])
def test_equal_class_counts_get_the_widest_margin(schedule, counts):
    margin = build_margin("dynm-arcface", num_classes=3, class_counts=counts, schedule=schedule)
    assert margin.class_margins.tolist() == [0.5, 0.5, 0.5]


# ---- rows that break careless code -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradients_are_finite_at_cosine_one_and_minus_one_and_for_duplicates(name, dtype):
    head = make_head(name, dim=4, num_centers=2, dtype=dtype)
    with torch.no_grad():
        head.weight[0] = torch.tensor([1.0, 0, 0, 0])
        head.weight[1] = head.weight[0]  # two equal sub-centres
        head.weight[2] = torch.tensor([-2.0, 0, 0, 0])
        head.weight[3] = torch.tensor([-3.0, 0, 0, 0])
    x = torch.tensor([[5.0, 0, 0, 0], [5.0, 0, 0, 0], [-7.0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    for labels in ([0, 0, 0], [1, 1, 1], [0, 0, 1]):
        loss = head(x, torch.tensor(labels))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_single_image_is_a_batch(name):
    head = make_head(name)
    x, y = make_batch(rows=1)
    head(x, y).backward()
    assert torch.isfinite(head.weight.grad).all()
    assert all(torch.isfinite(v).all() for v in head.state_dict().values())


def test_rows_without_a_direction_are_refused():
    head = make_head("arcface")
    x, y = make_batch()
    x[2] = 0
    with pytest.raises(InputError, match="embedding 2 has length 0"):
        head(x, y)
    x[2, 3] = math.nan
    with pytest.raises(InputError, match="embedding 2 has length nan"):
        head(x, y)
    x, y = make_batch()
    with torch.no_grad():
        head.weight[5] = 0
    with pytest.raises(InputError, match="class weight 5"):
        head(x, y)


def test_unfit_arguments_are_refused_in_words():
    with pytest.raises(InputError, match="curricularface"):
        build_margin("arc", num_classes=3)
    for name, options in (
        ("adaface", {"h": "wide"}),
        ("adacos", {"dynamic": "perhaps"}),
        ("dynm-arcface", {"schedule": 3.0}),
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            build_margin(name, num_classes=3, class_counts=[1, 2, 3], **options)
    assert build_margin("adacos", num_classes=3, dynamic=1.0).dynamic is True
    with pytest.raises(InputError, match="option h"):
        build_margin("arcface", num_classes=3, h=0.3)
    with pytest.raises(InputError, match="2 class counts for 3 classes"):
        build_margin("dynm-arcface", num_classes=3, class_counts=[1, 2])
    with pytest.raises(InputError, match="no class counts"):
        build_margin("dynm-arcface", num_classes=3)
    with pytest.raises(InputError, match="below 1"):
        build_margin("dynm-arcface", num_classes=2, class_counts=[0, 4])
    with pytest.raises(InputError, match="margin_radians"):
        build_margin("arcface", num_classes=3, margin_radians=28.6)
    with pytest.raises(InputError, match="num_classes"):
        build_margin("adacos", num_classes=2)
    margin = build_margin("arcface", num_classes=3)
    for wrong in (
        {"num_centers": 0},
        {"class_fraction": 0.0},
        {"prefixes": (9,)},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            MarginHead(8, 3, margin, **wrong)
    head = make_head("arcface")
    x, y = make_batch()
    for labels in (y + NUM_CLASSES, y - NUM_CLASSES, y[:0]):
        with pytest.raises(InputError, match="labels"):
            head(x[: len(labels)], labels)
    with pytest.raises(InputError, match="7 dimensions"):
        head(x[:, :7], y)


# ---- state -------------------------------------------------------------------------------------------

EVERY_OPTION = {"prefixes": (4, 8), "class_fraction": 0.6, "seed": 3}


@pytest.mark.parametrize("head_options", [{}, {"num_centers": 3, **EVERY_OPTION}])
@pytest.mark.parametrize("name", [*EVERY_LOSS, "adacos-dynamic"])
def test_a_resumed_head_takes_the_same_next_step(name, head_options, tmp_path):
    options = {"dynamic": True} if name == "adacos-dynamic" else None
    name = name.removesuffix("-dynamic")
    head = make_head(name, options=options, **head_options)
    for step in range(2):
        head(*make_batch(seed=step))
    torch.save(head.state_dict(), tmp_path / "state.pt")
    other_seed = head_options | ({"seed": 8} if head_options else {})
    resumed = make_head(name, options=options, weight_seed=99, **other_seed)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    results = []
    for each in (head, resumed):
        x, y = make_batch(seed=7)
        x.requires_grad_()
        loss = each(x, y)
        loss.backward()
        results.append([loss, x.grad, each.weight.grad, *each.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["adacos", "curricularface", "adaface"])
def test_state_moves_in_training_and_rests_in_evaluation(name):
    head = make_head(name, options={"dynamic": True} if name == "adacos" else None, **EVERY_OPTION)
    before = copy.deepcopy(head.state_dict())
    head.eval()
    head(*make_batch())
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    head.train()
    head(*make_batch())
    moved = {k.split(".")[-1] for k, v in head.state_dict().items() if not torch.equal(v, before[k])}
    remembered = {"adacos": {"scale"}, "curricularface": {"t"}, "adaface": {"norm_mean", "norm_std"}}[name]
    assert moved == remembered | {"sampling_state"}


def test_dynamic_scale_agrees_with_sums_over_the_matrix():
    head = make_head("adacos", options={"dynamic": True}, num_centers=2)
    scale = math.sqrt(2) * math.log(NUM_CLASSES - 1)
    for step in range(4):
        x, y = make_batch(rows=6, seed=step)
        cosines = F.cosine_similarity(x[:, None], head.weight.detach()[None], dim=2)
        cosines = cosines.view(6, NUM_CLASSES, 2).amax(dim=2).numpy()
        own = sorted(math.acos(cosines[i, c]) for i, c in enumerate(y.tolist()))
        wrong = [math.exp(scale * cosines[i, j]) for i in range(6) for j in range(NUM_CLASSES) if j != y[i]]
        scale = math.log(sum(wrong) / 6) / math.cos(min(math.pi / 4, own[2]))
        head(x, y)
        assert float(head.margins[0].scale) == pytest.approx(scale, abs=1e-10)


# ---- beyond the paper --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_prefixes_are_the_mean_of_the_losses_of_each(name):
    head = make_head(name, prefixes=(2, 5, 8), num_centers=2)
    x, y = make_batch()
    expected = []
    for prefix in (2, 5, 8):
        alone = make_head(name, dim=prefix, num_centers=2)
        with torch.no_grad():
            alone.weight.copy_(head.weight[:, :prefix])
        expected.append(float(alone(x[:, :prefix], y).detach()))
    assert float(head(x, y).detach()) == pytest.approx(sum(expected) / 3, abs=1e-12)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_class_sampling_is_the_loss_over_those_classes(name):
    head = make_head(name, class_fraction=0.5, num_centers=2, weight_seed=5)
    full = make_head(name, num_centers=2, weight_seed=5)
    x, y = make_batch(rows=3)
    # the generator is public and seeded, so the draw can be repeated
    classes = sample_classes(y, num_classes=NUM_CLASSES, fraction=0.5, generator=generator_for_step(0, 0))
    assert len(classes) == 6 and set(y.tolist()) <= set(classes.tolist())
    logits = full.logits(x, y)[:, classes]
    if name != "adacos":  # its scale is from all classes in both
        assert float(full.margins[0].scale) == float(head.margins[0].scale)
    loss = head(x, y)
    loss.backward()
    expected = F.cross_entropy(logits, torch.searchsorted(classes, y))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    others = [c for c in range(NUM_CLASSES) if c not in classes.tolist()]
    assert head.weight.grad.view(NUM_CLASSES, -1)[others].abs().max() == 0


@given(num_classes=st.integers(2, 60), fraction=st.floats(0.01, 1), seed=st.integers(0, 9), data=st.data())
@settings(deadline=None, max_examples=60)
def test_sampled_classes_hold_all_positives(num_classes, fraction, seed, data):
    present = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=20))
    found = sample_classes(
        torch.tensor(present),
        num_classes=num_classes,
        fraction=fraction,
        generator=generator_for_step(seed, 4),
    ).tolist()
    assert found == sorted(set(found)) and set(present) <= set(found)
    assert len(found) == max(math.ceil(fraction * num_classes), len(set(present)))


# ---- several processes -------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from samething.losses import MarginHead, build_margin
from samething.losses.fused_step import FusedMarginStep
torch.set_num_threads(1)
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
result = {}
for name in sys.argv[4].split(","):
    for class_fraction, fused in ((1.0, False), (0.5, False), (1.0, True)):
        torch.manual_seed(0)
        options = {"dynamic": True} if name == "adacos" else {}
        margin = build_margin(name, num_classes=9, class_counts=list(range(1, 10)), **options)
        head = MarginHead(4, 9, margin, num_centers=2, class_fraction=class_fraction).double()
        # an update within the call would part the processes' weights: they must get gradients to sum
        optimiser = torch.optim.Adam([head.weight]) if world > 1 else None
        fused_step = FusedMarginStep(head, optimiser)
        for step in range(3):
            x, y = torch.randn(8, 4, dtype=torch.float64) * 5, torch.randint(9, (8,))
            part = slice(rank * 8 // world, (rank + 1) * 8 // world)
            head.weight.grad = None
            if fused:
                loss, _ = fused_step.loss_and_embedding_gradient(x[part], y[part])
            else:
                loss = head(x[part], y[part])
                loss.backward()
            loss, gradient = loss.detach(), head.weight.grad
            if world > 1:
                dist.all_reduce(loss), dist.all_reduce(gradient)
            key = f"{name}/{class_fraction}/{fused}/{step}/"
            result |= {key + "loss": loss / world, key + "gradient": gradient / world}
            result |= {key + k: v.clone() for k, v in head.state_dict().items()}
torch.save(result, f"{folder}/{world}-{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_give_the_loss_and_the_state_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    env = os.environ | {"PYTHONPATH": str(Path(samething.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path), ",".join(EVERY_LOSS)], env=env
        )
        for world in (1, 2)
        for rank in range(world)
    ]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for rank in range(2):
        two = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-11, atol=1e-12, msg=key)
