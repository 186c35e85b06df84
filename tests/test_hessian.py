"""Proves that the Hessian and its factor are what they claim, that both live in one square without harm to each other, and that
products by panels are the products."""

import pytest
import torch

from conftest import damped, generator, hessian
from hessian import (
    NotPositiveDefinite,
    Symmetric,
    Triangular,
    accumulate_hessian,
    factorize,
    inverse_cholesky_,
    times,
    times_inverse_,
)

# --- the factor ------------------------------------------------------------------------------------------------


def upper_factor(H: torch.Tensor, size: int = 64) -> torch.Tensor | None:
    """U of `H`, in panels of `size`, with rubbish below the diagonal, which has to stay."""
    square = H.triu() + 7 * torch.ones_like(H).tril(-1)
    if not inverse_cholesky_(square, size):
        return None
    assert (square.tril(-1) == 7 * torch.ones_like(H).tril(-1)).all()
    return square.triu()


@pytest.mark.parametrize("size", [1, 7, 64, 1024])
@pytest.mark.parametrize("columns", [1, 2, 33, 200])
def test_inverse_cholesky_is_upper_and_inverts(columns, size):
    H = damped(hessian(columns), 0.01)
    U = upper_factor(H, size)
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.T @ U @ H, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [30, 1024])
def test_inverse_cholesky_in_float32_is_near_the_float64_factor(size):
    H = damped(hessian(100), 0.01)
    U, exact = upper_factor(H.float(), size).double(), upper_factor(H, 1024)
    assert (U - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("size", [2, 1024])
@pytest.mark.parametrize("H", [-torch.eye(4), torch.zeros(4, 4), torch.ones(3, 3), torch.full((2, 2), float("nan"))])
def test_a_matrix_that_has_no_factor_is_refused(H, size):
    assert upper_factor(H, size) is None


@pytest.mark.parametrize("size", [6, 1024])
def test_an_indefinite_matrix_is_refused(size):
    H = hessian(20)
    H[3, 7] = H[7, 3] = 2 * (H[3, 3] * H[7, 7]).sqrt()
    assert upper_factor(H, size) is None


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("percdamp", [0.01, 0.1])
def test_factor_inverts_the_damped_ordered_hessian(percdamp, act_order):
    H = hessian(80)
    factor = factorize(H.triu(), percdamp, act_order)
    expected = damped(H, percdamp)[factor.order][:, factor.order]
    U = factor.square.triu().double()
    assert factor.percdamp == percdamp
    torch.testing.assert_close(U.T @ U @ expected, torch.eye(80, dtype=torch.float64), rtol=0, atol=1e-3)


def test_factorize_reads_the_upper_triangle_only():
    H = hessian(30)
    spoiled = H.triu() + 1e6 * torch.ones(30, 30).tril(-1)
    assert torch.equal(factorize(spoiled, 0.01, False).square, factorize(H.clone(), 0.01, False).square)


def test_act_order_is_by_falling_diagonal_and_stable():
    diagonal = torch.tensor([2.0, 5.0, 2.0, 0.5, 5.0, 9.0])
    assert factorize(torch.diag(diagonal), 0.01, act_order=True).order.tolist() == [5, 1, 4, 0, 2, 3]
    assert factorize(torch.diag(diagonal), 0.01, act_order=False).order.tolist() == [0, 1, 2, 3, 4, 5]


def test_dead_columns_are_named_in_original_order():
    H = hessian(10)
    H[[2, 7]] = 0
    H[:, [2, 7]] = 0
    factor = factorize(H, 0.01, act_order=True)
    assert factor.dead.nonzero().flatten().tolist() == [2, 7]
    assert torch.isfinite(factor.square).all()


def test_all_dead_columns_still_factorize():
    factor = factorize(torch.zeros(6, 6), 0.01, act_order=True)
    assert factor.dead.all()
    torch.testing.assert_close(factor.square, torch.eye(6))


def with_eigenvalue(smallest: float, columns: int = 12) -> torch.Tensor:
    """Symmetric, mean diagonal 1, one eigenvalue `smallest`, the others equal."""
    Q = torch.linalg.qr(torch.randn(columns, columns, generator=generator(4), dtype=torch.float64))[0]
    others = (columns - smallest) / (columns - 1)
    return (Q @ torch.diag(torch.tensor([smallest] + [others] * (columns - 1), dtype=torch.float64)) @ Q.T).float()


@pytest.mark.parametrize(
    ("H", "percdamp", "needed"),
    [
        (torch.ones(5, 5), 0.0, 0.01),  # singular
        (with_eigenvalue(-0.004), 0.0, 0.01),
        (with_eigenvalue(-0.004), 0.001, 0.01),
        (with_eigenvalue(-0.05), 0.01, 0.1),
        (with_eigenvalue(-0.5), 0.001, 1.0),
        (with_eigenvalue(-0.05), 0.1, 0.1),
    ],
)
def test_damping_is_raised_tenfold_until_it_suffices(H, percdamp, needed):
    factor = factorize(H.clone(), percdamp, act_order=False)
    assert factor.percdamp == pytest.approx(needed)
    U = factor.square.triu().double()
    torch.testing.assert_close(torch.linalg.inv(U.T @ U), damped(H, needed), rtol=0, atol=1e-3)


@pytest.mark.parametrize("H", [with_eigenvalue(-20), torch.full((4, 4), float("nan")), torch.tensor([[1.0, 1e6], [1e6, 1.0]])])
def test_a_hopeless_hessian_is_refused(H):
    with pytest.raises(NotPositiveDefinite):
        factorize(H.clone(), 0.01, act_order=False)


# --- sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 5, 1023, 1024, 1500])
def test_accumulated_hessian_is_x_transposed_x_above_the_diagonal(columns):
    batches = [inputs_plain(13, columns, seed) for seed in (1, 2)]
    H = torch.zeros(columns, columns)
    for X in batches:
        accumulate_hessian(H, X)
    X = torch.cat(batches).double()
    torch.testing.assert_close(H.triu().double(), (X.T @ X).triu(), rtol=1e-4, atol=1e-4)


def inputs_plain(tokens: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=generator(seed))


def test_accumulation_takes_half_precision_inputs():
    X = inputs_plain(50, 12, 3).bfloat16()
    H = torch.zeros(12, 12)
    accumulate_hessian(H, X)
    torch.testing.assert_close(H.triu(), (X.float().T @ X.float()).triu(), rtol=1e-5, atol=1e-5)


# --- two triangles in one square -------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [[], [5, 70]], ids=["alive", "dead columns"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("percdamp", [0.01, 0.1])
def test_the_damped_hessian_stays_beside_its_factor(percdamp, act_order, dead):
    H = hessian(96)
    H[dead], H[:, dead] = 0, 0
    expected, factor = damped(H, percdamp), factorize(H.triu(), percdamp, act_order)
    assert act_order == (factor.order.tolist() != list(range(96)))
    for parts in ([slice(0, 96)], [slice(0, 31), slice(31, 32), slice(32, 96)]):
        torch.testing.assert_close(torch.cat([factor.H.rows(part) for part in parts]), expected.float(), rtol=1e-6, atol=0)
    ordered = expected[factor.order][:, factor.order]
    U = factor.square.triu().double()
    torch.testing.assert_close(U.T @ U @ ordered, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-3)


def test_views_of_a_triangle_are_its_rows_and_columns():
    square = torch.randn(50, 50, generator=generator(1))
    U, whole = Triangular(square), square.triu()
    for part in (slice(0, 50), slice(0, 7), slice(7, 8), slice(30, 50)):
        assert torch.equal(U.rows(part), whole[part, part.start :]) and not whole[part, : part.start].any()
        assert torch.equal(U.columns(part), whole[: part.stop, part]) and not whole[part.stop :, part].any()
    torch.testing.assert_close(U.column_norms(), whole.double().norm(dim=0))
    assert torch.equal(U.diagonal(), square.diagonal())


COLUMNS = 2100  # three panels


@pytest.fixture(scope="module")
def wide() -> tuple[torch.Tensor, torch.Tensor]:
    """A positive definite matrix that needs several panels, and a few rows to multiply with it."""
    X = torch.randn(COLUMNS, COLUMNS, generator=generator(2))
    return X @ X.T / COLUMNS + 0.3 * torch.eye(COLUMNS), torch.randn(5, COLUMNS, generator=generator(3))


def assert_near(found: torch.Tensor, exact: torch.Tensor, share: float) -> None:
    assert (found.double() - exact).norm() <= share * exact.norm()


@pytest.mark.parametrize("act_order", [False, True])
def test_a_wide_hessian_is_factorized_and_multiplied_by_panels(wide, act_order):
    H, A = wide
    factor = factorize(H.triu(), 0.01, act_order)
    expected = damped(H, 0.01)
    ordered = expected[factor.order][:, factor.order]
    U = factor.square.triu().double()
    assert act_order == (factor.order.tolist() != list(range(COLUMNS)))
    assert (U.T @ U @ ordered - torch.eye(COLUMNS)).abs().max() <= 1e-3
    assert_near(times(A, factor.H), A.double() @ expected, 1e-5)
    assert_near(times_inverse_(A.clone(), factor.U), torch.linalg.solve(ordered, A.double(), left=False), 1e-4)
    assert_near(factor.U.column_norms().square(), torch.linalg.inv(ordered).diagonal(), 1e-4)


def test_products_with_plain_matrices_by_panels(wide):
    H, A = wide
    lopsided = H.triu()
    assert_near(times(A, lopsided), A.double() @ lopsided.double(), 1e-6)
    assert_near(times(A, Symmetric.of(H)), A.double() @ H.double(), 1e-6)
