"""Proves that the grids are what they claim: k-means and the affine search against independent exact optima in float64,
min-max against GPTQ's own formula, the sensitivity against its definition, and all of them on hostile rows."""

import math

import numpy as np
import pytest
import torch

import leanquant_grid
from leanquant_grid import (
    Affine,
    affine_search,
    kmeans_levels,
    local_kmeans_levels,
    minmax_affine,
    sensitivity,
    symmetric_search,
    with_middle_zero,
)
from live_tensors import LiveTensors

BITS = (4, 3, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator(seed))


def laplace(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    u = torch.rand(2, rows, columns, generator=generator(seed)).clamp(min=1e-7)
    return (u[0] / u[1]).log()


def heavy(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """A sensitivity with the spread that real layers have."""
    return (1.5 * torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)).exp()


def kmeans_cost(W: torch.Tensor, a: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """sum_i a_i (w_i - nearest level)^2 by rows, in float64, from the definition."""
    return (a * (W.double().unsqueeze(2) - levels.double().unsqueeze(1)).square().amin(2)).sum(1)


def total_energy(W: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Weighted variance of each row, times its weight: the cost of a single level."""
    mean = (a * W.double()).sum(1, keepdim=True) / a.sum(1, keepdim=True)
    return (a * (W.double() - mean).square()).sum(1)


# --- non-uniform -----------------------------------------------------------------------------------------------


def run_costs(w: np.ndarray, a: np.ndarray) -> np.ndarray:
    """cost[i, j] of the points i..j-1 of a sorted row around their own weighted mean. No prefix sums: every run grows by
    one point at a time (West's update), which adds positive numbers only and loses nothing at any spread of `a`."""
    n = len(w)
    cost = np.full((n + 1, n + 1), np.inf)
    weight, mean, spread = np.zeros(n), np.zeros(n), np.zeros(n)
    for length in range(1, n + 1):
        starts = n - length + 1
        w_new, a_new, weight, mean, spread = w[length - 1 :], a[length - 1 :], weight[:starts], mean[:starts], spread[:starts]
        step, total = w_new - mean, weight + a_new
        spread = spread + weight * a_new / total * step**2
        mean, weight = mean + a_new / total * step, total
        cost[np.arange(starts), np.arange(starts) + length] = spread
    return cost


def optimal_costs(w: torch.Tensor, a: torch.Tensor, most: int) -> list[float]:
    """The least k-means cost with 1, 2, ..., `most` levels: the textbook O(n^2 K) dynamic program."""
    order = np.argsort(w.numpy(), kind="stable")
    cost = run_costs(w.double().numpy()[order], a.double().numpy()[order])
    best, found = cost[0], []
    for _ in range(most):
        found.append(best[-1])
        best = np.minimum(best, (best[:, None] + cost).min(0))
    return found


def optima(W: torch.Tensor, a: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([optimal_costs(w, a_row, 2**bits)[-1] for w, a_row in zip(W, a, strict=True)], dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [30, 60, 120])
@pytest.mark.parametrize("weights", [gaussian, laplace])
def test_kmeans_is_the_exact_optimum_where_bins_reach_the_columns(weights, columns, bits):
    W, a = weights(8, columns, seed=columns), heavy(8, columns, seed=columns + 1)
    excess = kmeans_cost(W, a, kmeans_levels(W, a, bits)) / optima(W, a, bits) - 1
    assert excess.min() > -1e-9, "the oracle is not optimal"
    assert excess.max() < 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("weights", "columns"), [(gaussian, 400), (laplace, 600)])
def test_kmeans_with_fewer_bins_stays_near_the_optimum(weights, columns, bits):
    W, a = weights(20, columns, seed=3), heavy(20, columns, seed=4)
    optimum = optima(W, a, bits)
    coarse, fine = (kmeans_cost(W, a, kmeans_levels(W, a, bits, bins)) / optimum - 1 for bins in (128, 256))
    assert coarse.min() > -1e-9, "the oracle is not optimal"
    assert coarse.mean() <= 1e-3
    assert coarse.max() <= 1.5e-2
    assert fine.mean() <= coarse.mean()


def hostile_rows() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(W, a) of each kind; narrow (every position a bin) and wide (fewer bins than points)."""
    cases = {}
    for columns in (40, 300):
        few = torch.randint(0, 3, (4, columns), generator=generator(5)).float() - 1
        a = heavy(4, columns, seed=6)
        spread = 10 ** (40 * torch.rand(4, columns, generator=generator(7), dtype=torch.float64) - 20)
        cases |= {
            f"constant-{columns}": (torch.full((4, columns), 0.37), a),
            f"zero-{columns}": (torch.zeros(4, columns), a),
            f"three-values-{columns}": (few, a),
            f"denormal-{columns}": (gaussian(4, columns) * 1e-40, a),
            f"denormal-three-values-{columns}": (few * 1e-40, a),
            f"outlier-{columns}": (torch.cat([gaussian(4, columns - 1), torch.full((4, 1), 1e4)], 1), a),
            f"huge-sensitivity-range-{columns}": (gaussian(4, columns), spread),
            f"huge-sensitivity-range-three-values-{columns}": (few, spread),
            f"one-row-{columns}": (gaussian(1, columns), a[:1]),
        }
    return cases | {"one-column": (gaussian(4, 1), heavy(4, 1)), "one-column-one-row": (gaussian(1, 1), heavy(1, 1))}


FEW_VALUES = ("constant", "zero", "one-column")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", hostile_rows())
@pytest.mark.parametrize("learn", [kmeans_levels, local_kmeans_levels])
def test_kmeans_of_hostile_rows_is_finite_and_ascending(learn, name, bits):
    W, a = hostile_rows()[name]
    levels = learn(W, a, bits)
    assert levels.shape == (len(W), 2**bits)
    assert levels.dtype == torch.float32
    assert torch.isfinite(levels).all()
    assert (levels.diff(dim=1) >= 0).all()
    assert (levels.amin(1) >= W.amin(1)).all()
    assert (levels.amax(1) <= W.amax(1)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [name for name in hostile_rows() if name.startswith(FEW_VALUES) or "three-values" in name])
def test_kmeans_costs_nothing_where_every_value_can_have_its_level(name, bits):
    W, a = hostile_rows()[name]
    assert all(len(row.unique()) <= 2**bits for row in W)
    assert (kmeans_cost(W, a, kmeans_levels(W, a, bits)) <= 1e-12 * total_energy(W, a)).all()


@pytest.mark.parametrize("bits", BITS)
def test_kmeans_is_near_the_optimum_under_a_huge_sensitivity_range(bits):
    """Judged against the total, since a cost 1e-12 of it is beyond any table of gains."""
    W, a = hostile_rows()["huge-sensitivity-range-40"]
    optimum = optima(W, a, bits)
    assert (kmeans_cost(W, a, kmeans_levels(W, a, bits)) <= 1.001 * optimum + 1e-6 * total_energy(W, a)).all()


@pytest.mark.parametrize("factor", [1e-20, 1e-10, 1e10, 1e20, 1e26])
def test_kmeans_does_not_depend_on_the_unit_of_the_sensitivity(factor):
    W, a = gaussian(4, 200), heavy(4, 200)
    optimum = optima(W, a, 4)
    assert (kmeans_cost(W, a, kmeans_levels(W, a * factor, 4)) <= 1.01 * optimum).all()


@pytest.mark.parametrize("power", [-100, -60, -30, 30, 60])
def test_kmeans_does_not_depend_on_the_unit_of_the_weights(power):
    W, a = gaussian(4, 200), heavy(4, 200)
    optimum = optima(W, a, 4)
    levels = kmeans_levels(W * 2.0**power, a, 4) * 2.0**-power
    assert (kmeans_cost(W, a, levels) <= 1.01 * optimum).all()


@pytest.mark.parametrize("learn", [kmeans_levels, local_kmeans_levels])
@pytest.mark.parametrize("bits", BITS)
def test_kmeans_takes_one_sensitivity_for_all_rows(learn, bits):
    W, a = gaussian(6, 150), heavy(1, 150)
    assert torch.equal(learn(W, a[0], bits), learn(W, a.expand(6, -1), bits))


# --- non-uniform, as the published code ------------------------------------------------------------------------


def lloyd_step(w: np.ndarray, a: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Every level moves to the weighted mean of the points nearest to it; ties to the lower level."""
    nearest = np.abs(w[:, None] - levels).argmin(1)
    assert set(nearest) == set(range(len(levels))), "a level without points: choose other rows"
    return np.array([np.average(w[nearest == k], weights=a[nearest == k]) for k in range(len(levels))])


def lloyd_from_equal_spacing(w: np.ndarray, a: np.ndarray, K: int) -> np.ndarray:
    levels = np.linspace(w.min(), w.max(), K)
    for _ in range(100):
        levels, last = lloyd_step(w, a, levels), levels
        if np.array_equal(levels, last):
            return levels
    pytest.fail("Lloyd's iteration has not come to rest")


@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize("columns", [200, 400])
@pytest.mark.parametrize("spread", [0, 1], ids=["equal sensitivity", "heavy sensitivity"])
def test_local_kmeans_of_few_levels_is_lloyd_from_equal_spacing(bits, columns, spread):
    W, a = gaussian(12, columns, seed=31), heavy(12, columns, seed=32) ** spread
    for levels, w, a_row in zip(local_kmeans_levels(W, a, bits), W.double().numpy(), a.numpy(), strict=True):
        np.testing.assert_allclose(levels.numpy(), lloyd_from_equal_spacing(w, a_row, 2**bits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("bits", BITS)
def test_local_kmeans_is_a_local_optimum_and_no_better_than_the_exact_one(bits, seed):
    W, a = gaussian(12, 400, seed=33), heavy(12, 400, seed=34)
    levels = local_kmeans_levels(W, a, bits, seed)
    assert (levels.diff(dim=1) > 0).all()
    for found, w, a_row in zip(levels.double().numpy(), W.double().numpy(), a.numpy(), strict=True):
        np.testing.assert_allclose(found, lloyd_step(w, a_row, found), rtol=1e-5, atol=1e-5)
    cost, optimum = kmeans_cost(W, a, levels), optima(W, a, bits)
    assert (cost >= optimum * (1 - 1e-6)).all()
    assert (cost > optimum * 1.001).any(), "not one row was caught in a local optimum"
    assert (cost <= optimum * 3).all()


def test_local_kmeans_depends_on_its_seed_at_4_bits_only():
    W, a = gaussian(12, 400, seed=35), heavy(12, 400, seed=36)
    for bits in BITS:
        first, again, other = (local_kmeans_levels(W, a, bits, seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (bits != 4)


def test_local_kmeans_starts_where_it_is_told():
    W, a = gaussian(12, 300), heavy(12, 300)
    for bits in (2, 3, 4):
        uniform, plusplus, published = (local_kmeans_levels(W, a, bits, 0, start) for start in ("uniform", "plusplus", "published"))
        assert torch.equal(published, plusplus if bits == 4 else uniform)
        assert not torch.equal(uniform, plusplus)


def test_local_kmeans_leaves_the_global_random_numbers_alone():
    before = torch.get_rng_state()
    local_kmeans_levels(gaussian(4, 60), heavy(4, 60), 4)
    assert torch.equal(torch.get_rng_state(), before)


# --- affine ----------------------------------------------------------------------------------------------------


def affine_cost(w: np.ndarray, a: np.ndarray, scale: float, zero: int, K: int) -> float:
    code = np.clip(np.rint(w / scale) + zero, 0, K - 1)
    return float(np.dot(a, (w - scale * (code - zero)) ** 2))


def candidates(w: np.ndarray, K: int, T: int) -> set[tuple[float, int]]:
    """Every (scale, zero) that the docstring of affine_search names, one pair (t_min, t_max) at a time."""
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    R, found = high - low, set()
    for t_min in range(T // 2):
        for t_max in range(T // 2):
            new_low = low + t_min * R / T
            rest = R - (t_min + t_max) * R / T
            scale = float(np.float16(min(max(rest / (K - 1), 2.0**-24), 65504)))
            found.add((scale, int(min(max(np.rint(-new_low / scale), 0), K - 1))))
    return found


def brute_force(w: torch.Tensor, a: torch.Tensor, K: int, T: int) -> float:
    w, a = w.double().numpy(), a.double().numpy()
    return min(affine_cost(w, a, scale, zero, K) for scale, zero in candidates(w, K, T))


def affine_rows(name: str) -> torch.Tensor:
    W = gaussian(3, 24, seed=8)
    return {
        "gaussian": torch.cat([W, gaussian(9, 24, seed=9) + 0.5]),
        "laplace": laplace(6, 24, seed=10),
        "lopsided": torch.cat([gaussian(6, 24, seed=11).abs() - 0.3, 0.3 - gaussian(6, 24, seed=12).abs()]),
        "far-cluster": torch.cat([gaussian(6, 23, seed=13) * 0.05 + 3, torch.linspace(-5, -0.1, 6).unsqueeze(1)], 1),
        "positive": W.abs() + 0.1,
        "negative": -W.abs() - 0.1,
        "constant": torch.tensor([[0.37], [-2.5], [1.0]]).expand(3, 24),
        "zero": torch.zeros(2, 24),
        "denormal": W * 1e-40,
        "tiny": W * 1e-6,
        "one-column": W[:, :1],
    }[name]


AFFINE_ROWS = ["gaussian", "laplace", "lopsided", "far-cluster", "positive", "negative", "constant", "zero", "denormal", "tiny"]
AFFINE_ROWS += ["one-column"]


def rows_of_cost(W: torch.Tensor, a: torch.Tensor, found, K: int) -> list[float]:
    return [
        affine_cost(w.double().numpy(), a_row.double().numpy(), float(scale), int(zero), K)
        for w, a_row, scale, zero in zip(W, a, found.scale, found.zero, strict=True)
    ]


@pytest.mark.parametrize("partitions", [8, 32, 64])
@pytest.mark.parametrize("name", AFFINE_ROWS)
def test_exhaustive_affine_search_finds_the_brute_force_minimum(name, partitions):
    W = affine_rows(name)
    a = heavy(*W.shape, seed=14)
    for bits in BITS:
        costs = rows_of_cost(W, a, affine_search(W, a, bits, partitions, exhaustive=True), 2**bits)
        for w, a_row, cost in zip(W, a, costs, strict=True):
            best = brute_force(w, a_row, 2**bits, partitions)
            noise = 1e-13 * float((a_row * w.double().square()).sum())  # of float64 prefix sums
            assert cost <= best * (1 + 1e-9) + noise
            assert cost >= best * (1 - 1e-9) - noise, "the winner is not one of the candidates"


@pytest.mark.parametrize("partitions", [4, 8, 16])
def test_exhaustive_affine_search_misses_no_clamped_zero(partitions):
    """A few heavy points far from 0 and coarse steps: ranges that exclude 0 on one side, so that clamping decides the zero."""
    W = torch.randn(160, 10, generator=generator(22)) ** 3 + torch.randn(160, 1, generator=generator(23))
    a = heavy(160, 10, seed=24) ** 3
    for bits in BITS:
        costs = rows_of_cost(W, a, affine_search(W, a, bits, partitions, exhaustive=True), 2**bits)
        best = [brute_force(w, a_row, 2**bits, partitions) for w, a_row in zip(W, a, strict=True)]
        np.testing.assert_allclose(costs, best, rtol=1e-9, atol=1e-13 * float((a * W.double().square()).sum(1).max()))


@pytest.mark.parametrize("bits", BITS)
def test_exhaustive_affine_search_finds_the_minimum_of_the_million_candidates(bits):
    W, a = torch.cat([gaussian(1, 64, seed=15), laplace(1, 64, seed=16)]), heavy(2, 64, seed=17)
    costs = rows_of_cost(W, a, affine_search(W, a, bits, exhaustive=True), 2**bits)
    for w, a_row, cost in zip(W.double().numpy(), a.numpy(), costs, strict=True):
        scale, zero = million_candidates(w, 2**bits)
        code = np.clip(np.rint(w / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
        best = ((w - scale[:, None] * (code - zero[:, None])) ** 2 @ a_row).min()
        assert cost == pytest.approx(best, rel=1e-9)


def million_candidates(w: np.ndarray, K: int, T: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (scale, zero) among all (T/2)^2 pairs."""
    low, high = min(w.min(), 0.0), max(w.max(), 0.0)
    t_min, t_max = np.meshgrid(np.arange(T // 2), np.arange(T // 2), indexing="ij")
    scale = ((high - low) - (t_min + t_max) * (high - low) / T) / (K - 1)
    scale = scale.astype(np.float16).astype(np.float64)
    zero = np.clip(np.rint(-(low + t_min * (high - low) / T) / scale), 0, K - 1)
    distinct = np.unique(scale + 1j * zero)
    return distinct.real, distinct.imag


@pytest.mark.parametrize("bits", BITS)
def test_coarse_to_fine_is_close_to_exhaustive(bits):
    W, a = torch.cat([gaussian(100, 96, seed=18), laplace(100, 96, seed=19)]), heavy(200, 96, seed=20)
    exact = np.array(rows_of_cost(W, a, affine_search(W, a, bits, exhaustive=True), 2**bits))
    fast = np.array(rows_of_cost(W, a, affine_search(W, a, bits), 2**bits))
    assert (fast >= exact * (1 - 1e-9)).all()
    assert (fast <= exact * 1.03).all()
    assert np.mean(fast <= exact * (1 + 1e-9)) >= 0.95


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("partitions", [66, 1000, 2048])
@pytest.mark.parametrize("columns", [1, 64, 576])
def test_scales_that_are_not_judged_could_not_have_been_among_the_best(monkeypatch, columns, partitions, bits):
    odd = [gaussian(1, columns)[0] * scale for scale in (0, 1e-9, 1e6)]
    odd += [torch.linspace(0.3, 1, columns), gaussian(1, columns)[0].round(), gaussian(1, columns)[0].sign()]
    outlier = gaussian(1, columns, seed=24)[0]
    outlier[0] = 100
    W = torch.cat([gaussian(30, columns, seed=21), laplace(30, columns, seed=22), torch.stack([*odd, outlier])])
    a = torch.cat([heavy(len(W) - 20, columns, seed=23), torch.empty(20, columns).uniform_(-40, 40, generator=generator(25)).exp()])
    judged, gains = [], leanquant_grid._gains
    monkeypatch.setattr(leanquant_grid, "_gains", lambda *args: judged.append(args[5].numel()) or gains(*args))
    found = affine_search(W, a, bits, partitions)
    few, judged[:] = sum(judged), []
    monkeypatch.setattr(leanquant_grid, "BLOCK", 10_000)
    expected = affine_search(W, a, bits, partitions)
    assert torch.equal(found.scale, expected.scale) and torch.equal(found.zero, expected.zero)
    if partitions == 2048 and columns > 1:
        assert few < (0.8 if bits == 4 else 1) * sum(judged)


@pytest.mark.parametrize("columns, partitions", [(64, 2048), (64, 16384), (2048, 2048)])
@pytest.mark.parametrize("search", [affine_search, symmetric_search])
def test_a_search_keeps_to_its_memory(search, columns, partitions):
    """A chunk of sorted rows and the tables of some of them, each as large as SEARCH_BYTES."""
    W, a = gaussian(2**17 // columns, columns), heavy(1, columns)[0].double()
    with LiveTensors() as held:
        search(W, a, 4, partitions)
    assert held.peak - W.nbytes - a.nbytes < 2.1 * leanquant_grid.SEARCH_BYTES["cpu"]


@pytest.mark.parametrize("exhaustive", [True, False])
@pytest.mark.parametrize("name", AFFINE_ROWS)
def test_symmetric_search_finds_the_best_of_its_scales(name, exhaustive):
    """Against every candidate that the docstring names, one at a time; coarse to fine is exact on all but a few rows."""
    W, T = affine_rows(name), 256
    a = heavy(*W.shape, seed=14)
    for bits in BITS:
        K, gaps = 2**bits, []
        found = symmetric_search(W, a, bits, T, exhaustive)
        assert set(found.zero.tolist()) <= {K // 2, K // 2 - 1}
        for w, a_row, cost in zip(W.double().numpy(), a.numpy(), rows_of_cost(W, a, found, K), strict=True):
            scales = np.abs(w).max() / (K // 2 - 1) * (1 - np.arange(T) / T)
            scales = scales.clip(2.0**-24, 65504).astype(np.float16).astype(np.float64)
            best = min(affine_cost(w, a_row, scale, zero, K) for scale in scales for zero in (K // 2, K // 2 - 1))
            noise = 1e-13 * (a_row * w**2).sum()
            assert cost >= best * (1 - 1e-9) - noise
            gaps.append((cost - noise) / max(best, 1e-300) - 1)
        assert max(gaps) <= (1e-9 if exhaustive else 0.15)
        assert np.mean(np.array(gaps) <= 1e-9) >= (1 if exhaustive else 0.6)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_search_beats_symmetric_minmax(bits):
    W, a = torch.cat([gaussian(50, 128, seed=18), laplace(50, 128, seed=19)]), heavy(100, 128, seed=20)
    learned, minmax = (
        np.array(rows_of_cost(W, a, found, 2**bits)) for found in (symmetric_search(W, a, bits), minmax_affine(W, bits, True))
    )
    assert np.mean(learned <= minmax) >= 0.98  # min-max scales lie between the candidates
    assert learned.sum() < {4: 0.9, 3: 0.8, 2: 0.7}[bits] * minmax.sum()


def test_rows_whose_largest_weight_is_positive_get_their_ninth_level_there():
    """At 4 bits 8 levels lie on one side of 0 and 7 on the other; a row and its mirror image are quantized alike."""
    W, a = laplace(200, 32, seed=21), torch.ones(32)
    found, mirrored = symmetric_search(W, a, 4), symmetric_search(-W, a, 4)
    largest_is_positive = W.amax(1) > -W.amin(1)
    assert ((found.zero == 7) == largest_is_positive).float().mean() > 0.8
    assert torch.equal(found.scale, mirrored.scale)
    assert (found.zero.int() + mirrored.zero.int() == 15).float().mean() > 0.9  # others need neither end


@pytest.mark.parametrize("bits", BITS)
def test_zeros_in_the_middle_leave_the_weights_as_they_are(bits):
    K, g = 2**bits, torch.Generator().manual_seed(0)
    codes = torch.randint(0, K, (6, 8), generator=g, dtype=torch.uint8)
    affine = Affine(torch.rand(6, 2, generator=g).half().float(), K // 2 - torch.randint(0, 2, (6, 2), generator=g, dtype=torch.uint8))
    value = lambda codes, affine: affine.scale[..., None] * (codes.view(6, 2, 4).float() - affine.zero[..., None].float())  # noqa: E731
    stored = with_middle_zero(codes, affine, bits)
    assert (stored[1].zero == K // 2).all() and (stored[1].scale < 0).any() and (stored[1].scale > 0).any()
    assert torch.equal(value(*stored), value(codes, affine))


def affine_of(W: torch.Tensor, bits: int, method: str):
    if method == "minmax":
        return minmax_affine(W, bits)
    if method == "minmax-sym":
        return minmax_affine(W, bits, sym=True)
    if method.startswith("symmetric"):
        return symmetric_search(W, heavy(*W.shape), bits, exhaustive=method.endswith("exhaustive"))
    return affine_search(W, heavy(*W.shape), bits, exhaustive=method == "exhaustive")


@pytest.mark.parametrize("method", ["minmax", "minmax-sym", "search", "exhaustive", "symmetric", "symmetric-exhaustive"])
@pytest.mark.parametrize("name", AFFINE_ROWS)
def test_affine_results_can_be_stored(name, method):
    W = affine_rows(name)
    for bits in BITS:
        scale, zero = affine_of(W, bits, method)
        assert scale.shape == zero.shape == (len(W),)
        assert zero.dtype == torch.uint8
        assert int(zero.max()) <= 2**bits - 1
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        assert torch.equal(scale.half().to(scale.dtype), scale)


@pytest.mark.parametrize("partitions", [0, 1, 7, -2])
def test_affine_search_refuses_odd_partitions(partitions):
    with pytest.raises(ValueError, match="partitions"):
        affine_search(gaussian(1, 8), torch.ones(8), 4, partitions)


def find_params(row: torch.Tensor, bits: int, sym: bool) -> tuple[float, int]:
    """GPTQ's Quantizer.find_params for one row, with its scale rounded to the stored fp16 before the zero is taken."""
    maxq = 2**bits - 1
    xmin, xmax = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    if sym:
        xmax = max(abs(xmin), xmax)
        if xmin < 0:
            xmin = -xmax
    if xmin == 0 and xmax == 0:
        xmin, xmax = -1.0, 1.0
    scale = max(float(np.float16((xmax - xmin) / maxq)), 2.0**-24)
    zero = (maxq + 1) // 2 if sym else min(max(round(-xmin / scale), 0), maxq)
    return scale, zero


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("name", AFFINE_ROWS)
def test_minmax_is_that_of_gptq(name, sym):
    W = affine_rows(name)
    for bits in BITS:
        found = minmax_affine(W, bits, sym)
        expected = [find_params(row, bits, sym) for row in W]
        assert list(zip(found.scale.tolist(), found.zero.tolist(), strict=True)) == expected


# --- sensitivity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0, 4.0])
def test_sensitivity_is_the_power_of_the_diagonal_up_to_a_factor(exponent):
    diagonal = torch.rand(50, generator=generator(21)) + 0.01
    a = sensitivity(diagonal, exponent)
    ratio = a / diagonal.double() ** -exponent
    assert a.dtype == torch.float64
    torch.testing.assert_close(ratio, ratio[:1].expand(50), rtol=1e-12, atol=0)
    assert math.isclose(a.log().sum(), 0, abs_tol=1e-9), "the geometric mean is not 1"


@pytest.mark.parametrize("diagonal", [[1e-10] * 8, [1e-10] + [1.0] * 63, [1e-30, 1e30], [1e-38, 1.0, 1e10]])
def test_sensitivity_does_not_overflow(diagonal):
    a = sensitivity(torch.tensor(diagonal), 4.0)
    assert torch.isfinite(a.float()).all()
    assert (a.float() > 0).all()
    assert (a.diff() <= 0).all(), "a larger U_ii means a smaller sensitivity"


# --- determinism and dtypes ------------------------------------------------------------------------------------


def all_grids(W: torch.Tensor, a: torch.Tensor) -> list[torch.Tensor]:
    return [kmeans_levels(W, a, 4), local_kmeans_levels(W, a, 4), *affine_search(W, a, 3), *symmetric_search(W, a, 3), *minmax_affine(W, 2)]


def test_the_same_call_twice_gives_the_same_bits():
    W, a = laplace(12, 300), heavy(12, 300)
    for first, second in zip(all_grids(W, a), all_grids(W.clone(), a.clone()), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_what_their_float32_values_give(dtype):
    W, a = gaussian(6, 200).to(dtype), heavy(6, 200)
    for half, full in zip(all_grids(W, a), all_grids(W.float(), a), strict=True):
        assert half.dtype == full.dtype
        assert torch.equal(half, full)


def test_inputs_are_left_alone():
    W, a = gaussian(4, 60), heavy(4, 60)
    before = W.clone(), a.clone()
    all_grids(W, a)
    assert torch.equal(W, before[0])
    assert torch.equal(a, before[1])
