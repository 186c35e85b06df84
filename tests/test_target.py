"""Proves that the target is a ridge regression: the weights that do on the quantized model's inputs what the original weights
do on the unquantized model's, judged on the tokens themselves in float64. And that what it is made of is summed exactly.

W* minimises mean ||W* x - (W x' + r)||^2 + lambda ||W* - W||^2, x the quantized model's input of a token, x' the unquantized
one's, r what the residual stream lacks. The gradient is zero where W* (H + lambda) = W mean(x' x^T) + mean(r x^T) + lambda W,
H = mean(x x^T); with S = mean((W (x' - x) + r) x^T), or W C for C = mean((x' - x) x^T), that is W* = W + S inv(H + lambda). With a
strength below 1 it goes only so far from x to x' and from 0 to r.
"""

from typing import NamedTuple

import pytest
import torch

import hessian
from conftest import generator, inputs, weights
from hessian import Factor, Statistics, factorize
from modelutils import GroupInput
from quant import shifted_target, target

MATMUL = torch.backends.mkldnn.matmul
CPU = torch.device("cpu")
I, O, DEAD = 40, 24, [3, 17]
FORMS = pytest.mark.parametrize(("rows", "residual"), [(O, False), (50, False), (O, True)], ids=["outputs", "inputs", "residual"])


class Tokens(NamedTuple):
    """Float32 [n, T, .]: what a group reads and the residual stream it writes to, in the quantized and the unquantized model."""

    x: torch.Tensor
    x_original: torch.Tensor
    h: torch.Tensor
    h_original: torch.Tensor

    def batches(self, dtype=torch.float32) -> list[tuple[GroupInput, GroupInput]]:
        """Unevenly split, as the last batch of a text is."""
        x, x_original, h, h_original = (t.to(dtype).split([4, 4, 1]) for t in self)
        return list(zip(map(GroupInput, x, h), map(GroupInput, x_original, h_original), strict=True))


def tokens(dead=()) -> Tokens:
    """Part of each difference can be told from x, part of it cannot."""
    x = inputs(9 * 30, I, seed=2).view(9, 30, I)
    x_original = x + 0.2 * x.roll(1, -1) + 0.1 * inputs(9 * 30, I, seed=3).view(9, 30, I)
    x[..., list(dead)] = 0
    h = torch.randn(9, 30, O, generator=generator(4))
    return Tokens(x, x_original, h, h + 2 * x[..., :O] + torch.randn(9, 30, O, generator=generator(5)))


def summed(W: torch.Tensor, t: Tokens, residual: bool = False, shift: bool = True, dtype=torch.float32) -> Statistics:
    statistics = Statistics([W.to(dtype)], shift, residual, CPU)
    for ours, theirs in t.batches(dtype):
        statistics.add(ours, theirs if shift else None)
    return statistics


def mean_statistics(W, t: Tokens, residual: bool, act_order: bool, percdamp: float = 0.1) -> tuple[Statistics, Factor]:
    statistics = summed(W, t, residual)
    statistics.divide()
    return statistics, factorize(statistics.H.clone(), percdamp, act_order)


def ridge_regression(W: torch.Tensor, t: Tokens, residual: bool, percdamp: float, strength: float = 1.0) -> torch.Tensor:
    """W* from the tokens, as one least squares problem without normal equations: lambda is rows of its own."""
    x, x_original, h, h_original = (tensor.double().flatten(0, 1) for tensor in t)
    wanted = (x + strength * (x_original - x)) @ W.double().T + (strength * (h_original - h) if residual else 0)
    damping = percdamp * x.square().mean(0).mean()
    rows = torch.cat([x / len(x) ** 0.5, damping.sqrt() * torch.eye(x.shape[1])])
    values = torch.cat([wanted / len(x) ** 0.5, damping.sqrt() * W.double().T])
    return torch.linalg.lstsq(rows, values, driver="gelsd").solution.T


def assert_close(found: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    """Up to a share of the root mean square."""
    assert (found.double() - exact).abs().max() <= share * exact.square().mean().sqrt()


def assert_product(found: torch.Tensor, a: torch.Tensor, x: torch.Tensor, share: float) -> None:
    """`found` is a^T x, each entry up to a share of what it can be at most."""
    most = a.norm(dim=0).unsqueeze(1) * x.norm(dim=0)
    assert ((found.double() - a.T @ x).abs() <= share * most).all()


# --- target ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [[], DEAD], ids=["alive", "dead columns"])
@FORMS
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("percdamp", "strength"), [(0.01, 1.0), (0.1, 1.0), (0.1, 0.6)])
def test_target_is_the_ridge_regression_on_the_tokens(percdamp, strength, act_order, rows, residual, dead):
    W, t = weights(rows, I), tokens(dead)
    before = W.clone()
    statistics, factor = mean_statistics(W, t, residual, act_order, percdamp)
    assert (statistics.C is None, statistics.S is None) == (rows == O, rows != O)
    assert act_order == (factor.order.tolist() != list(range(I)))
    found, exact = target(W, statistics, factor, strength), ridge_regression(W, t, residual, percdamp, strength)
    if dead:
        torch.testing.assert_close(exact[:, dead], W[:, dead].double())  # nothing but the ridge speaks of them
        exact[:, dead] = 0
        assert (found[:, dead] == 0).all()
    assert_close(found, exact, 1e-4)
    assert (exact - W).norm() > 0.05 * W.norm()  # else agreement would mean little
    assert torch.equal(W, before)


def test_the_target_beats_the_weights_on_the_tokens():
    W, t = weights(O, I), tokens()
    x, x_original, h, h_original = (tensor.flatten(0, 1) for tensor in t)
    error = lambda weight: (x @ weight.T - (x_original @ W.T + h_original - h)).square().mean()  # noqa: E731
    with_residual, without = (
        error(target(W, *mean_statistics(W, t, residual, act_order=True, percdamp=0.01), 1.0)) for residual in (True, False)
    )
    assert with_residual < 0.95 * without < 0.9 * error(W)


def test_shifted_target_is_the_formula_in_float64():
    W, shift = weights(O, I), torch.randn(O, I, generator=generator(6))
    H = mean_statistics(W, tokens(), False, False)[0].H.double()
    H = H.triu() + H.triu(1).T
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(I)
    for act_order in (False, True):
        found = shifted_target(W, shift, factorize(H.float(), 0.1, act_order))
        assert_close(found, W + shift.double() @ torch.linalg.inv(damped), 1e-4)


def test_equal_inputs_leave_the_weights_alone():
    W, t = weights(O, I), tokens()
    statistics, factor = mean_statistics(W, Tokens(t.x, t.x, t.h, t.h), True, act_order=True)
    assert torch.equal(target(W, statistics, factor, 1.0), W)


@pytest.mark.parametrize("more", [9, 50], ids=["outputs", "inputs"])
def test_stacked_linears_get_the_targets_they_get_alone(more):
    first, second, t = weights(O, I, seed=7), weights(more, I, seed=8), tokens(DEAD)
    statistics = Statistics([first, second], True, False, CPU)
    for ours, theirs in t.batches():
        statistics.add(ours, theirs)
    statistics.divide()
    factor = factorize(statistics.H.clone(), 0.1, True)
    together = target(torch.cat([first, second]), statistics, factor, 1.0).split([O, more])
    for W, found, rows in zip((first, second), together, (slice(O), torch.arange(O, O + more)), strict=True):
        torch.testing.assert_close(found, target(W, *mean_statistics(W, t, False, True), 1.0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, target(W, statistics, factor, 1.0, rows), rtol=1e-5, atol=1e-5)


def test_without_a_shift_the_target_is_the_weights_with_dead_columns_zero():
    W = weights(O, I)
    statistics = summed(W, tokens(DEAD), True, shift=False)
    assert statistics.C is None and statistics.S is None
    found = target(W, statistics, factorize(statistics.H / 270, 0.1, True), 1.0)
    assert (found[:, DEAD] == 0).all()
    alive = [i for i in range(I) if i not in DEAD]
    assert torch.equal(found[:, alive], W[:, alive])


# --- statistics ------------------------------------------------------------------------------------------------


@FORMS
def test_statistics_are_means_over_all_tokens_of_all_batches(rows, residual):
    W, t = weights(rows, I), tokens()
    statistics = summed(W, t, residual)
    statistics.divide()
    x, x_original, h, h_original = (tensor.double().flatten(0, 1) for tensor in t)
    assert statistics.tokens == 270
    assert_product(270 * statistics.H.triu() + 270 * statistics.H.triu(1).T, x, x, 1e-5)
    if statistics.S is None:
        assert_product(270 * statistics.C, x_original - x, x, 1e-5)
    else:
        assert_product(270 * statistics.S, (x_original - x) @ W.double().T + (h_original - h if residual else 0), x, 1e-5)


@FORMS
def test_bfloat16_inputs_are_summed_exactly(rows, residual):
    """Products of their numbers are exact in float32; differences of two of them, and what the weights make of those, are rounded
    once more."""
    t = Tokens(*(tensor.bfloat16().float() for tensor in tokens()))
    W = weights(rows, I).bfloat16().float()
    x, x_original, h, h_original = (tensor.double().flatten(0, 1) for tensor in t)
    statistics = summed(W, t, residual, dtype=torch.bfloat16)
    assert all(total.dtype == torch.float32 for total in statistics.sums())
    assert_product(statistics.H.triu() + statistics.H.triu(1).T, x, x, 1e-5)
    if statistics.S is None:
        assert_product(statistics.C, x_original - x, x, 2**-9)
    else:
        assert_product(statistics.S, (x_original - x) @ W.double().T + (h_original - h if residual else 0), x, 2**-8)


@pytest.fixture
def precision():
    """Sets the precision of float32 products for a test."""
    before = MATMUL.fp32_precision
    yield lambda value: setattr(MATMUL, "fp32_precision", value)
    MATMUL.fp32_precision = before


@pytest.mark.parametrize("before", ["none", "ieee"])
@pytest.mark.parametrize(("dtype", "during"), [(torch.bfloat16, "bf16"), (torch.float16, None), (torch.float32, None)])
@pytest.mark.parametrize("fails", [False, True])
def test_the_precision_of_products_is_lowered_for_bfloat16_only_and_restored(monkeypatch, precision, before, dtype, during, fails):
    def record(*_):
        seen.append(MATMUL.fp32_precision)
        if fails:
            raise RuntimeError("a bug")

    seen = []
    monkeypatch.setattr(hessian, "accumulate_hessian", record)
    precision(before)
    if fails:
        with pytest.raises(RuntimeError, match="a bug"):
            summed(weights(O, I), tokens(), dtype=dtype)
    else:
        summed(weights(O, I), tokens(), dtype=dtype)
    assert set(seen) == {during or before}
    assert MATMUL.fp32_precision == before
