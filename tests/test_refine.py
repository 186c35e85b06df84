"""Proves that refinement is what it claims, against float64: a sweep takes the best code column by column, fitted levels and
scales are the least squares solution, and no row ever loses."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from conftest import damped, generator, hessian, output_error, weights
from hessian import Factor, Symmetric, factorize, times
from leanquant.packing import affine_levels
from leanquant_grid import Affine
from quant import (
    Grid,
    QuantConfig,
    Quantized,
    _best_step,
    dequantize,
    descend,
    fit_grid,
    learn_grid,
    quantize,
    refine,
    round_to_nearest,
    row_losses,
    without_dead,
)

BITS = pytest.mark.parametrize("bits", [2, 3, 4])
GRIDS = pytest.mark.parametrize(("kind", "groupsize"), [("nonuniform", -1), ("affine", -1), ("affine", 32)])
DEAD = [5, 70]


class Problem(NamedTuple):
    W: torch.Tensor  # zeros in dead columns
    H: torch.Tensor  # damped, float64
    factor: Factor
    config: QuantConfig
    grid: Grid
    solved: Quantized

    @property
    def symmetric(self) -> Symmetric:
        return Symmetric.of(self.H.float())

    def loss(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        return output_error(self.W, codes, grid.levels, self.H)


def dying(columns: int, dead: list[int]) -> torch.Tensor:
    H = hessian(columns)
    H[dead], H[:, dead] = 0, 0
    return H


def problem(bits: int, kind: str, groupsize: int, rows: int = 32, dead=(), **settings) -> Problem:
    H = dying(96, list(dead))
    config = QuantConfig(bits, kind, groupsize=groupsize, percdamp=0.1, act_order=True, grid_partitions=64, block_size=40, **settings)
    factor = factorize(H.clone(), config.percdamp, config.act_order)
    W = without_dead(weights(rows, 96), factor)
    grid = learn_grid(W, factor, config)
    return Problem(W, damped(H, config.percdamp), factor, config, grid, quantize(W, grid, factor, config))


def level_tables(levels: torch.Tensor, columns: int) -> np.ndarray:
    """The levels of every column [O, I, K] in float64."""
    return levels.double().repeat_interleave(columns // levels.shape[1], 1).numpy()


def test_row_losses_are_the_output_error():
    p = problem(3, "nonuniform", -1)
    E = p.W - dequantize(p.solved.codes, p.grid.levels)
    torch.testing.assert_close(row_losses(E, p.symmetric).double(), p.loss(p.solved.codes, p.grid), rtol=1e-5, atol=0)


# --- codes -----------------------------------------------------------------------------------------------------


def assert_steps_are_best(W, before, after, levels, H) -> None:
    """Walk every row through the columns in float64, judging all levels by the whole loss, and see that `after` was chosen.

    A level may differ from the best if the value wanted lies between the two, within 1e-5 of the row's largest level.
    """
    W, H, tables = W.double().numpy(), H.numpy(), level_tables(levels, W.shape[1])
    O, I, K = tables.shape
    for row in range(O):
        e = tables[row, np.arange(I), before[row]] - W[row]
        loss = e @ H @ e
        for j in range(I):
            tried = np.tile(e, (K, 1))
            tried[:, j] = tables[row, j] - W[row, j]
            losses = ((tried @ H) * tried).sum(1)
            best, taken = losses.argmin(), int(after[row, j])
            if tables[row, j, taken] != tables[row, j, best]:
                wanted = tables[row, j, before[row, j]] - (e @ H[j]) / H[j, j]
                distance = np.abs(tables[row, j, [taken, best]] - wanted)
                assert distance[0] - distance[1] <= 1e-5 * np.abs(tables[row]).max(), (row, j)
            assert losses[taken] <= loss * (1 + 1e-6), (row, j)
            e, loss = tried[taken], losses[taken]


@pytest.mark.parametrize("block_size", [7, 40, 128])  # of 96 columns
@BITS
@GRIDS
def test_descent_takes_the_best_code_column_by_column(kind, groupsize, bits, block_size):
    p = problem(bits, kind, groupsize, rows=6)
    codes = round_to_nearest(p.W, p.grid.levels)
    before = codes.clone()
    found = descend(p.W, codes, p.grid.levels, p.symmetric, block_size)
    assert torch.equal(codes, before)
    assert (found.dtype, found.shape) == (torch.uint8, p.W.shape)
    assert (found != codes).any(1).all()
    assert_steps_are_best(p.W, codes, found, p.grid.levels, p.H)
    assert (p.loss(found, p.grid) < p.loss(codes, p.grid)).all()


@BITS
def test_descent_of_independent_columns_is_rounding(bits):
    """From any codes, with ties to the lower level."""
    p = problem(bits, "affine", 32)
    W = torch.cat([p.W, (p.grid.levels[:, :, :-1] + p.grid.levels[:, :, 1:]).repeat_interleave(32, 1)[:, :, 0] / 2])
    levels = p.grid.levels.repeat(2, 1, 1)
    codes = torch.randint(0, 2**bits, W.shape, generator=generator(3), dtype=torch.uint8)
    assert torch.equal(descend(W, codes, levels, Symmetric.of(torch.eye(96))), round_to_nearest(W, levels))


def test_descent_comes_to_rest():
    """Codes that no single change improves stay."""
    p = problem(3, "nonuniform", -1)
    codes = p.solved.codes
    for _ in range(50):
        codes, last = descend(p.W, codes, p.grid.levels, p.symmetric), codes
    assert torch.equal(codes, last)
    assert_steps_are_best(p.W[:4], codes[:4], codes[:4], p.grid.levels[:4], p.H)


# --- levels ----------------------------------------------------------------------------------------------------


def bases(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """B [O, unknowns, I] float64 with q = l B: one-hot codes, or code - zero in the row of the column's group."""
    if grid.affine is None:
        return torch.nn.functional.one_hot(codes.long(), grid.levels.shape[2]).double().transpose(1, 2)
    G, I = grid.levels.shape[1], codes.shape[1]
    group_of = torch.arange(I) // (I // G)
    steps = codes.double() - grid.affine.zero.double()[:, group_of]
    return torch.nn.functional.one_hot(group_of, G).double().T * steps.unsqueeze(1)


def exact_fit(p: Problem, codes: torch.Tensor) -> torch.Tensor:
    """The normal equations in float64, row by row, for the unknowns that are used; the others as they are."""
    fitted = (p.grid.levels.squeeze(1) if p.grid.affine is None else p.grid.affine.scale).double()
    for row, B in enumerate(bases(codes, p.grid)):
        B = B[used := B.any(1)]
        fitted[row, used] = torch.linalg.solve(B @ p.H @ B.T, B @ p.H @ p.W[row].double())
    return fitted


def assert_never_worse(p: Problem, codes: torch.Tensor, fitted: Grid) -> None:
    assert (p.loss(codes, fitted) <= p.loss(codes, p.grid) * (1 + 1e-6)).all()


@BITS
@pytest.mark.parametrize("used", ["all levels", "some levels"])
def test_fitted_levels_are_the_least_squares_solution_in_float64(bits, used):
    p = problem(bits, "nonuniform", -1, levels_dtype=torch.float32)  # not rounded
    codes = p.solved.codes if used == "all levels" else p.solved.codes.clamp(1, 2**bits - 2)
    fitted, exact = fit_grid(p.W, codes, p.grid, p.symmetric, p.config), exact_fit(p, codes)
    ascend = (exact.diff(dim=1) >= 0).all(1)
    better = p.loss(codes, Grid(exact.sort(1).values.unsqueeze(1), None)) < p.loss(codes, p.grid)
    assert (ascend & better).sum() > (25 if used == "all levels" else 10)
    torch.testing.assert_close(fitted.levels[:, 0].double()[ascend & better], exact[ascend & better], rtol=1e-4, atol=1e-4)
    assert torch.equal(fitted.levels[~better], p.grid.levels[~better])
    assert fitted.affine is None
    assert (fitted.levels.diff(dim=2) >= 0).all()
    assert_never_worse(p, codes, fitted)


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fitted_levels_are_rounded_as_stored(bits, dtype):
    p = problem(bits, "nonuniform", -1, levels_dtype=dtype)
    codes = p.solved.codes
    fitted = fit_grid(p.W, codes, p.grid, p.symmetric, p.config)
    rounded = Grid(exact_fit(p, codes).float().sort(1).values.to(dtype).float().unsqueeze(1), None)
    better = p.loss(codes, rounded) < p.loss(codes, p.grid) * (1 - 1e-4)
    worse = p.loss(codes, rounded) > p.loss(codes, p.grid) * (1 + 1e-4)
    assert better.sum() > 10
    torch.testing.assert_close(fitted.levels[better], rounded.levels[better], rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(fitted.levels[worse], p.grid.levels[worse])
    assert torch.equal(fitted.levels, fitted.levels.to(dtype).float())
    assert_never_worse(p, codes, fitted)


@BITS
@pytest.mark.parametrize("groupsize", [-1, 32])
def test_fitted_scales_are_the_least_squares_solution_in_float64(bits, groupsize):
    p = problem(bits, "affine", groupsize)
    codes = descend(p.W, p.solved.codes, p.grid.levels, p.symmetric)
    fitted, exact = fit_grid(p.W, codes, p.grid, p.symmetric, p.config), exact_fit(p, codes)
    moved = (fitted.affine.scale != p.grid.affine.scale).any(1) & (exact > 0).all(1)
    assert moved.sum() > 20
    torch.testing.assert_close(fitted.affine.scale.double()[moved], exact[moved], rtol=2**-11 + 1e-5, atol=0)  # half an fp16 step
    rounded = exact.half().float()
    ideal = p.loss(codes, Grid(affine_levels(rounded, p.grid.affine.zero, bits), None))
    assert (p.loss(codes, fitted) <= torch.minimum(ideal, p.loss(codes, p.grid)) * (1 + 1e-4)).all()
    assert_never_worse(p, codes, fitted)


@BITS
@pytest.mark.parametrize("groupsize", [-1, 32])
def test_fitted_scales_are_positive_and_can_be_stored_with_any_codes(bits, groupsize):
    """With random codes, the least squares scale of many a group is negative."""
    p = problem(bits, "affine", groupsize)
    codes = torch.randint(0, 2**bits, p.W.shape, generator=generator(5), dtype=torch.uint8)
    negative = exact_fit(p, codes) < -1e-4
    fitted = fit_grid(p.W, codes, p.grid, p.symmetric, p.config)
    scale, zero = fitted.affine
    assert (scale > 0).all()
    assert negative.any() and torch.equal(scale[negative], p.grid.affine.scale[negative])
    assert (scale != p.grid.affine.scale).any()
    assert torch.equal(scale, scale.half().float())
    assert torch.equal(zero, p.grid.affine.zero) and zero.dtype == torch.uint8
    assert torch.equal(fitted.levels, affine_levels(scale, zero, bits))
    assert_never_worse(p, codes, fitted)


def test_a_level_that_no_code_uses_stays():
    p = problem(2, "nonuniform", -1, levels_dtype=torch.float32)
    fitted = fit_grid(p.W, p.solved.codes.clamp(max=2), p.grid, p.symmetric, p.config)
    kept = (fitted.levels[:, 0] - p.grid.levels[:, 0, 3:]).abs().amin(1)
    assert kept.max() < 1e-5
    assert (fitted.levels != p.grid.levels).any((1, 2)).all()


def test_the_scale_of_a_group_of_zeros_stays():
    p = problem(3, "affine", 32)
    codes = p.solved.codes.clone()
    codes[:, 32:64] = p.grid.affine.zero[:, 1:2]
    fitted = fit_grid(p.W, codes, p.grid, p.symmetric, p.config)
    assert torch.equal(fitted.affine.scale[:, 1], p.grid.affine.scale[:, 1])
    assert (fitted.affine.scale != p.grid.affine.scale)[:, [0, 2]].any(1).sum() > 20


# --- both ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [[], DEAD], ids=["alive", "dead columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BITS
@GRIDS
def test_no_step_of_refinement_raises_a_rows_loss_and_the_sum_falls(kind, groupsize, bits, dtype, dead):
    p = problem(bits, kind, groupsize, dead=dead, levels_dtype=dtype)
    H, codes, grid, losses = p.factor.H, p.solved.codes, p.grid, [p.loss(p.solved.codes, p.grid)]
    for _ in range(p.config.refine):
        codes = descend(p.W, codes, grid.levels, H, p.config.block_size)
        losses.append(p.loss(codes, grid))
        grid = fit_grid(p.W, codes, grid, H, p.config)
        losses.append(p.loss(codes, grid))
    codes = descend(p.W, codes, grid.levels, H, p.config.block_size)
    losses.append(p.loss(codes, grid))
    assert len(losses) == 6
    assert all((after <= before * (1 + 1e-6)).all() for before, after in itertools.pairwise(losses))
    assert all(after.sum() < before.sum() for before, after in itertools.pairwise(losses))

    found_grid, found = refine(p.W, p.grid, p.solved, p.factor, p.config)
    assert torch.equal(found.codes, codes) and torch.equal(found_grid.levels, grid.levels)
    torch.testing.assert_close(found.loss.double(), losses[-1], rtol=1e-5, atol=0)
    assert (found.loss <= p.solved.loss).all()
    assert found.loss.sum() < 0.999 * p.solved.loss.sum()


@BITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_refined_levels_are_those_that_will_be_stored(bits, dtype):
    p = problem(bits, "nonuniform", -1, levels_dtype=dtype)
    levels = refine(p.W, p.grid, p.solved, p.factor, p.config)[0].levels
    assert (levels.dtype, levels.shape) == (torch.float32, (32, 1, 2**bits))
    assert torch.equal(levels, levels.to(dtype).float())
    assert (levels.diff(dim=2) >= 0).all()
    assert not torch.equal(levels, p.grid.levels)


@pytest.mark.parametrize(("kind", "groupsize"), [("nonuniform", -1), ("affine", -1), ("affine", 100)])
def test_wide_rows_are_refined_by_panels(kind, groupsize):
    """More columns than hessian.PANEL, and levels that are fitted in several chunks."""
    X = torch.randn(1500, 1100, generator=generator(3))
    H = X.T @ X / 1500
    config, W = QuantConfig(3, kind, groupsize=groupsize, percdamp=0.1, act_order=True), weights(6, 1100)
    factor, exact = factorize(H.clone(), 0.1, True), damped(H, 0.1).double()
    grid = learn_grid(W, factor, config)
    solved = quantize(W, grid, factor, config)
    EH = times(W - dequantize(solved.codes, grid.levels), factor.H)
    steps = [_best_step(EH, solved.codes, grid, factor.H, chunk) for chunk in (2, 6)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-5)
    found_grid, found = refine(W, grid, solved, factor, config)
    torch.testing.assert_close(found.loss.double(), output_error(W, found.codes, found_grid.levels, exact), rtol=1e-4, atol=0)
    assert (found.loss <= solved.loss * (1 + 1e-5)).all() and found.loss.sum() < 0.99 * solved.loss.sum()


@GRIDS
def test_more_rounds_lose_less(kind, groupsize):
    p = problem(2, kind, groupsize)
    sums = [refine(p.W, p.grid, p.solved, p.factor, QuantConfig(2, kind, refine=rounds))[1].loss.sum() for rounds in range(4)]
    assert all(after < before for before, after in itertools.pairwise([p.solved.loss.sum(), *sums]))


@GRIDS
def test_stacked_rows_are_refined_as_they_are_alone(kind, groupsize):
    """Rows know nothing of each other, whatever chunks they are fitted in."""
    p = problem(3, kind, groupsize)
    grid, found = refine(p.W, p.grid, p.solved, p.factor, p.config)
    some = slice(7, 20)
    alone = Quantized(p.solved.codes[some], p.solved.loss[some])
    its_grid, its = refine(p.W[some], p.grid.rows(some), alone, p.factor, p.config)
    assert (its.codes == found.codes[some]).double().mean() >= 0.999
    torch.testing.assert_close(its.loss, found.loss[some], rtol=1e-3, atol=0)
    torch.testing.assert_close(its_grid.levels, grid.rows(some).levels, rtol=2e-3, atol=1e-3)


def test_a_part_of_a_grid_takes_scales_and_zeros_along():
    affine = Affine(torch.rand(5, 3), torch.arange(15, dtype=torch.uint8).view(5, 3))
    ours, theirs = Grid(torch.rand(5, 3, 4), affine), Grid(torch.rand(5, 3, 4), Affine(-affine.scale, 20 + affine.zero))
    keep = torch.tensor([True, False, True, False, False])
    mixed = ours.where(keep, theirs)
    for found, ours_part, theirs_part in zip(
        (mixed.levels, *mixed.affine), (ours.levels, *ours.affine), (theirs.levels, *theirs.affine), strict=True
    ):
        assert all(torch.equal(found[row], (ours_part if keep[row] else theirs_part)[row]) for row in range(5))
    part = ours.rows(slice(1, 3))
    assert torch.equal(part.levels, ours.levels[1:3]) and torch.equal(part.affine.zero, affine.zero[1:3])
    assert Grid(ours.levels, None).where(keep, Grid(theirs.levels, None)).affine is None


@pytest.mark.parametrize("groupsize", [-1, 16])
def test_a_row_of_zeros_keeps_its_scale(groupsize):
    """All its codes stand for 0, so that the least squares problem of its scale is singular."""
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(5, 32, generator=generator), torch.randn(100, 32, generator=generator)
    W[2] = 0
    config = QuantConfig(bits=3, grid="affine", groupsize=groupsize)
    factor = factorize((X.T @ X / 100).triu(), 0.1, False)
    grid = learn_grid(W, factor, config)
    found_grid, found = refine(W, grid, quantize(W, grid, factor, config), factor, config)
    assert torch.equal(found_grid.affine.scale[2], grid.affine.scale[2])
    assert found.loss[2] == 0
