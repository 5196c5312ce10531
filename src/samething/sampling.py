"""Which images make a batch.

Every order is a pure function of the seed and the epoch, so a resumed or a distributed run sees the same
batches as an undisturbed one.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np

from samething.arrays import Int
from samething.features.row_reader import GROUP_ROWS

SamplingKind: TypeAlias = Literal[
    "shuffled", "block-shuffled", "class-balanced", "domain-balanced", "domain-round-robin"
]
BLOCK_ROWS: Final = 256
"""Consecutive training rows that stay together in ``block-shuffled``: 590 KB of float16 rows of 1152."""


def epoch_batches(
    classes: Int[np.ndarray, " n"],
    domains: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    kind: SamplingKind,
    temperature: float = 1.0,
) -> list[Int[np.ndarray, " b"]]:
    """Rows of each batch of one epoch; about n rows in all.

    ``shuffled``: every image once. ``block-shuffled``: every image once, in blocks of 256 that follow one
    another in the catalog, 32 random blocks shuffled together, for features larger than memory.
    ``class-balanced``: every class equally often. ``domain-balanced``: a domain of n images in proportion to
    n^(1 / temperature). ``domain-round-robin``: each batch from one domain, in turn.

    Args:
        classes: class of each training row, 0….
        domains: domain of each training row, 0….
        batch_size: rows per batch; the last one of an epoch may be smaller, but has at least 2 rows.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        kind: how rows are drawn.
        temperature: for ``domain-balanced``, at least 1: 1 is proportional to the size of the domains, large
            is equal shares.
    """
    rng = np.random.default_rng([seed, epoch])
    if kind == "domain-round-robin":
        return _round_robin(domains, batch_size, rng)
    if kind == "block-shuffled":
        order = _block_shuffled(len(classes), rng)
    elif kind == "class-balanced":
        order = _class_balanced(classes, rng)
    elif kind == "domain-balanced":
        order = _domain_balanced(domains, temperature, rng)
    else:
        order = rng.permutation(len(classes))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < 2:  # batch statistics need two rows
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def _block_shuffled(num_rows: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Blocks in random order, and rows in random order within groups of blocks.

    Blocks begin at another row each epoch, so neighbours part. The block that is cut short comes last: groups
    before it have exactly ``GROUP_ROWS`` rows, as the reader of a large feature file expects.
    """
    first = int(rng.integers(num_rows))
    num_whole = num_rows // BLOCK_ROWS
    blocks = np.append(rng.permutation(num_whole), num_whole)
    places = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
    order = (places[places < num_rows] + first) % num_rows
    for start in range(0, num_rows, GROUP_ROWS):
        rng.shuffle(order[start : start + GROUP_ROWS])
    return order


def _without_end(rows: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """``count`` rows: whole shuffles of ``rows`` one after another, the last one cut."""
    repeats = -(-count // len(rows))
    return np.concatenate([rng.permutation(rows) for _ in range(repeats)])[:count]


def _class_balanced(classes: Int[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """Classes in shuffled turns; within a class its images in shuffled turns."""
    by_class = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[by_class], np.arange(classes.max() + 2))
    sizes = np.diff(starts)
    turns = _without_end(np.flatnonzero(sizes), len(classes), rng)
    shuffled = by_class[np.lexsort((rng.random(len(classes)), classes[by_class]))]
    # the i-th visit of a class takes its i-th shuffled image, and starts over after the last
    order = np.argsort(turns, kind="stable")
    first = np.searchsorted(turns[order], turns[order])
    visit = np.empty(len(turns), np.int64)
    visit[order] = np.arange(len(turns)) - first
    rows: Int[np.ndarray, " n"] = shuffled[starts[turns] + visit % sizes[turns]]
    return rows


def _domain_balanced(
    domains: Int[np.ndarray, " n"], temperature: float, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    sizes = np.bincount(domains)
    weights = np.where(sizes > 0, sizes.astype(float) ** (1 / temperature), 0.0)
    shares = np.round(len(domains) * weights / weights.sum()).astype(int)
    drawn = [
        _without_end(np.flatnonzero(domains == domain), int(share), rng)
        for domain, share in enumerate(shares)
        if share
    ]
    return rng.permutation(np.concatenate(drawn))


def _round_robin(
    domains: Int[np.ndarray, " n"], batch_size: int, rng: np.random.Generator
) -> list[Int[np.ndarray, " b"]]:
    present = np.unique(domains)
    num_batches = max(1, -(-len(domains) // batch_size))
    turns = np.resize(rng.permutation(present), num_batches)
    streams = {
        domain: _without_end(
            np.flatnonzero(domains == domain), batch_size * int((turns == domain).sum()), rng
        )
        for domain in np.unique(turns)
    }
    batches = []
    for domain in turns:
        batches.append(streams[domain][:batch_size])
        streams[domain] = streams[domain][batch_size:]
    return batches
