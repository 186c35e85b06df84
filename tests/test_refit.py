"""Levels fitted to their codes are the least squares solution under the damped Hessian; refitting never raises a loss."""

import pytest
import torch

import quant


def problem(bits: int):
    """W [64, 96], its damped Hessian in float64, settings, factor, grid and first solution."""
    generator = torch.Generator().manual_seed(bits)
    X = torch.randn(1000, 96, generator=generator) @ torch.randn(96, 96, generator=generator) / 96**0.5
    W = torch.randn(64, 96, generator=generator) / 96**0.5
    config = quant.QuantConfig(bits, exponent=4.0, percdamp=0.1, act_order=True)
    H = (X.T @ X / len(X)).double()
    damped = H + config.percdamp * H.diagonal().mean() * torch.eye(96)
    factor = quant.factorize(H.float(), config.percdamp, config.act_order)
    grid = quant.learn_grid(W, factor, config)
    return W, damped, config, factor, grid, quant.quantize(W, grid, factor, config)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_levels_are_the_least_squares_solution_in_float64(bits):
    W, H, _, factor, grid, solved = problem(bits)
    fitted = quant.fit_levels(W, solved.codes, grid.levels.squeeze(1), factor)
    compared = 0
    for row in range(len(W)):
        P = torch.nn.functional.one_hot(solved.codes[row].long(), 2**bits).double()
        if P.any(0).all():
            exact = torch.linalg.solve(P.T @ H @ P, P.T @ H @ W[row].double()).sort().values
            torch.testing.assert_close(fitted[row].double(), exact, rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared > 20


def test_a_level_that_no_code_uses_stays():
    W, _, _, factor, grid, solved = problem(2)
    fitted = quant.fit_levels(W, solved.codes.clamp(max=2), grid.levels.squeeze(1), factor)
    kept = (fitted - grid.levels[:, 0, 3:]).abs().amin(1)
    assert kept.max() < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refitting_never_raises_a_rows_loss_and_lowers_the_sum(bits):
    W, H, config, factor, grid, solved = problem(bits)
    refitted_grid, refitted = quant.refit(W, grid, solved, factor, config)
    assert (refitted.loss <= solved.loss).all()
    assert refitted.loss.sum() < 0.999 * solved.loss.sum()
    E = (W - quant.dequantize(refitted.codes, refitted_grid.levels)).double()
    torch.testing.assert_close(refitted.loss.double(), ((E @ H) * E).sum(1), rtol=1e-3, atol=1e-6)
    assert torch.equal(refitted_grid.levels, refitted_grid.levels.half().float())
    assert (refitted_grid.levels.diff(dim=2) >= 0).all()
