"""Proves that the column solver is GPTQ's loop, that the reported loss is the layer's output error, and that learned grids lose less
than GPTQ's and round-to-nearest where inputs are correlated."""

import pytest
import torch

from conftest import damped, generator, hessian, inputs, output_error, weights
from hessian import Factor, Triangular, factorize
from leanquant_grid import Affine, kmeans_levels, local_kmeans_levels, sensitivity
from quant import (
    GRIDS,
    Grid,
    QuantConfig,
    dequantize,
    learn_grid,
    nearest_codes,
    quantize,
    round_to_nearest,
    solve_columns,
)


def factor_of(columns: int, act_order: bool = False, percdamp: float = 0.01) -> Factor:
    return factorize(hessian(columns), percdamp, act_order)


# --- column solver ---------------------------------------------------------------------------------------------


def solve_columns_plainly(W, U, levels, group_of) -> tuple[torch.Tensor, torch.Tensor]:
    """The docstring of solve_columns, a column at a time, in float64."""
    w, U, levels = W.double().clone(), U.square.double(), levels.double()
    codes, loss = torch.empty(W.shape, dtype=torch.uint8), torch.zeros(len(W), dtype=torch.float64)
    for i in range(W.shape[1]):
        table = levels[:, group_of[i]]  # [O, K]
        code = (w[:, i : i + 1] - table).abs().argmin(1, keepdim=True)
        e = (w[:, i] - table.gather(1, code).squeeze(1)) / U[i, i]
        w[:, i + 1 :] -= e.unsqueeze(1) * U[i, i + 1 :]
        codes[:, i] = code.squeeze(1)
        loss += e.square()
    return codes, loss


def assert_same_solution(found, expected) -> None:
    assert found[0].dtype == torch.uint8
    assert (found[0] == expected[0]).double().mean() >= 0.999
    assert float(found[1].sum()) == pytest.approx(float(expected[1].sum()), rel=1e-4)


@pytest.mark.parametrize("block_size", [1, 7, 32, 128])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [4, 2])
def test_solver_is_the_plain_column_loop(bits, grid, block_size):
    W, factor = weights(24, 150), factor_of(150)
    levels = learn_grid(W, factor, QuantConfig(bits, grid)).levels
    one_group = torch.zeros(150, dtype=torch.long)
    assert_same_solution(
        solve_columns(W, factor.U, levels, one_group, block_size),
        solve_columns_plainly(W, factor.U, levels, one_group),
    )


@pytest.mark.parametrize("block_size", [1, 7, 32, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_solver_is_the_plain_column_loop_with_groups(act_order, block_size):
    W, factor = weights(24, 160), factor_of(160, act_order)
    levels = learn_grid(W, factor, QuantConfig(3, "affine", groupsize=32)).levels
    assert levels.shape == (24, 5, 8)
    permuted, group_of = W[:, factor.order], factor.order // 32
    assert_same_solution(
        solve_columns(permuted, factor.U, levels, group_of, block_size),
        solve_columns_plainly(permuted, factor.U, levels, group_of),
    )


@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (40, 1), (1, 1), (3, 33)])
def test_solver_leaves_its_inputs_alone(rows, columns):
    W, U = weights(rows, columns), factor_of(columns).U
    levels = torch.linspace(-1, 1, 4).expand(rows, 1, 4).clone()
    before = W.clone(), U.square.clone(), levels.clone()
    solve_columns(W, U, levels, torch.zeros(columns, dtype=torch.long))
    assert all(torch.equal(now, then) for now, then in zip((W, U.square, levels), before, strict=True))


@pytest.mark.parametrize("groups", [1, 4])
def test_identity_hessian_gives_the_nearest_levels(groups):
    W = weights(16, 64)
    levels = torch.randn(16, groups, 8, generator=generator(2)).sort(2).values
    factor = Factor(torch.eye(64), torch.ones(64), torch.arange(64), torch.zeros(64, dtype=torch.bool), 0.0)
    codes, loss = quantize(W, Grid(levels, None), factor, QuantConfig(3))
    distance = (W.view(16, groups, -1, 1) - levels.unsqueeze(2)).abs()
    assert torch.equal(codes.long(), distance.argmin(3).view(16, 64))
    torch.testing.assert_close(loss, distance.amin(3).square().sum((1, 2)), rtol=1e-5, atol=0)


def test_ties_go_to_the_lower_level():
    levels, w = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[-1.0, 0.5, 1.5, 2.5, 0.500001, 9.0]])
    expected = [0, 0, 1, 2, 1, 3]
    assert nearest_codes(w, levels)[0].tolist() == expected
    assert round_to_nearest(w, levels.unsqueeze(1))[0].tolist() == expected
    assert solve_columns(w, Triangular(torch.eye(6)), levels.unsqueeze(1), torch.zeros(6, dtype=torch.long))[0][0].tolist() == expected


def test_repeated_levels_are_harmless():
    levels = torch.tensor([[[-1.0, -1.0, 0.5, 0.5]]])
    codes = round_to_nearest(torch.tensor([[-2.0, -1.0, -0.25, 0.4, 0.5, 7.0]]), levels)
    assert dequantize(codes, levels)[0].tolist() == [-1.0, -1.0, -1.0, 0.5, 0.5, 0.5]


# --- loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("grid", "groupsize"), [("nonuniform", -1), ("affine", -1), ("affine", 32), ("minmax", -1), ("minmax", 16)])
def test_loss_is_the_output_error_under_the_damped_hessian(grid, groupsize, act_order, nearest):
    W, H = weights(16, 96), hessian(96)
    config = QuantConfig(3, grid, groupsize=groupsize, act_order=act_order, nearest=nearest, grid_partitions=64, block_size=40)
    factor = factorize(H.clone(), config.percdamp, act_order)
    levels = learn_grid(W, factor, config).levels
    codes, loss = quantize(W, Grid(levels, None), factor, config)
    torch.testing.assert_close(loss.double(), output_error(W, codes, levels, damped(H, config.percdamp)), rtol=1e-4, atol=0)


def test_loss_counts_a_dead_column_as_a_zero_weight():
    W, H = weights(8, 48), hessian(48)
    H[5], H[:, 5] = 0, 0
    factor = factorize(H.clone(), 0.01, act_order=True)
    levels = learn_grid(W, factor, QuantConfig(4)).levels
    codes, loss = quantize(W, Grid(levels, None), factor, QuantConfig(4))
    W[:, 5] = 0
    torch.testing.assert_close(loss.double(), output_error(W, codes, levels, damped(H, 0.01)), rtol=1e-4, atol=0)
    assert torch.equal(codes[:, 5].long(), levels[:, 0].abs().argmin(1)), "a column without input perturbs nothing"


def test_without_a_factor_codes_are_nearest_and_the_loss_is_unknown():
    W = weights(8, 40)
    grid = learn_grid(W, None, QuantConfig(4))
    codes, loss = quantize(W, grid, None, QuantConfig(4))
    assert torch.equal(codes.long(), (W.unsqueeze(2) - grid.levels).abs().argmin(2))
    assert loss.shape == (8,)
    assert loss.isnan().all()


@pytest.fixture(scope="module")
def losses() -> dict[tuple[str, int], float]:
    """Total tr(E H E^T) of each method at each bits on one synthetic layer, measured here and not as reported.

    Wide, because min-max grids suffer from outliers, which come with width; and with inputs of similar size, because a
    sensitivity that few columns dominate makes a row-wise affine grid clip the rest.
    """
    W, X = weights(32, 512, seed=6), inputs(2048, 512, seed=6, spread=0.3)
    H, found = X.T @ X / len(X), {}
    factor, H_damped = factorize(H.clone(), 0.01, act_order=False), damped(H, 0.01)
    methods = {"leanquant": ("nonuniform", False), "affine": ("affine", False), "gptq": ("minmax", False), "rtn": ("minmax", True)}
    for bits in (4, 3, 2):
        for name, (kind, nearest) in methods.items():
            config = QuantConfig(bits, kind, nearest=nearest, grid_partitions=512)
            levels = learn_grid(W, factor, config).levels
            codes = quantize(W, Grid(levels, None), factor, config).codes
            found[name, bits] = float(output_error(W, codes, levels, H_damped).sum())
    return found


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_learned_grids_beat_gptq_which_beats_rounding(losses, bits):
    assert losses["leanquant", bits] < losses["gptq", bits] < losses["rtn", bits]
    assert losses["affine", bits] < losses["gptq", bits]


@pytest.mark.parametrize("method", ["leanquant", "affine", "gptq", "rtn"])
def test_more_bits_lose_less(losses, method):
    assert losses[method, 4] < losses[method, 3] < losses[method, 2]


# --- grids, order, stacking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 16])
def test_codes_come_back_in_original_column_order(groupsize, act_order):
    """Each column lives at an offset of its own, so that a code in a wrong column or group shows."""
    offset = torch.linspace(-8, 8, 64)
    W = 0.1 * weights(12, 64) + offset
    H = 0.02 * hessian(64) + torch.diag(torch.rand(64, generator=generator(7)) + 0.5)
    factor = factorize(H, 0.01, act_order)
    config = QuantConfig(4, "affine", groupsize=groupsize, act_order=act_order, grid_partitions=128)
    grid = learn_grid(W, factor, config)
    restored = dequantize(quantize(W, grid, factor, config).codes, grid.levels)
    step = grid.affine.scale.amax(1, keepdim=True)
    assert ((restored - W).abs() <= 2 * step).double().mean() > 0.99
    assert act_order == (factor.order.tolist() != list(range(64)))


@pytest.mark.parametrize("grid", ["affine", "minmax"])
def test_affine_levels_are_scale_times_code_minus_zero(grid):
    W, factor = weights(6, 64), factor_of(64)
    levels, (scale, zero) = learn_grid(W, factor, QuantConfig(3, grid, groupsize=16, grid_partitions=64))
    assert levels.shape == (6, 4, 8)
    assert scale.shape == zero.shape == (6, 4)
    for o in range(6):
        for g in range(4):
            assert levels[o, g].tolist() == [float(scale[o, g]) * (k - int(zero[o, g])) for k in range(8)]


def test_groups_are_learned_from_their_own_columns():
    W, factor = weights(5, 96), factor_of(96, act_order=True)
    config = QuantConfig(4, "minmax", groupsize=32)
    grouped = learn_grid(W, factor, config).levels
    for g in range(3):
        alone = learn_grid(W[:, 32 * g : 32 * g + 32], None, QuantConfig(4, "minmax")).levels
        assert torch.equal(grouped[:, g : g + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nonuniform_levels_are_those_that_will_be_stored(dtype):
    W, factor = weights(10, 80), factor_of(80)
    levels, affine = learn_grid(W, factor, QuantConfig(4, levels_dtype=dtype))
    assert affine is None
    assert levels.dtype == torch.float32
    assert torch.equal(levels.to(dtype).float(), levels)
    assert (levels.diff(dim=2) >= 0).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_the_local_grid_is_learned_where_the_exact_one_is_not_wanted(act_order):
    W, factor = weights(10, 80), factor_of(80, act_order)
    a = torch.empty(80, dtype=torch.float64)
    a[factor.order] = sensitivity(factor.U.diagonal(), 3.0)
    learn = lambda **settings: learn_grid(W, factor, QuantConfig(4, exponent=3.0, **settings)).levels[:, 0]  # noqa: E731
    assert torch.equal(learn(), kmeans_levels(W, a, 4).half().float())
    for seed in (0, 5):
        assert torch.equal(learn(kmeans="published", kmeans_seed=seed), local_kmeans_levels(W, a, 4, seed).half().float())


@pytest.mark.parametrize("kind", GRIDS)
def test_stacked_matrices_get_the_codes_they_get_alone(kind):
    first, second = weights(20, 96, seed=8), weights(7, 96, seed=9)
    factor, config = factor_of(96, act_order=True), QuantConfig(3, kind, act_order=True, grid_partitions=128)
    together = learn_grid(torch.cat([first, second]), factor, config)
    codes, loss = quantize(torch.cat([first, second]), together, factor, config)
    parts = zip((first, second), together.split([20, 7]), codes.split([20, 7]), loss.split([20, 7]), strict=True)
    for W, part, part_codes, part_loss in parts:
        alone = learn_grid(W, factor, config)
        assert torch.equal(part.levels, alone.levels)
        assert_same_solution((part_codes, part_loss), quantize(W, alone, factor, config))


def test_split_grid_keeps_rows_together():
    scale, zero = torch.rand(5, 3), torch.arange(15, dtype=torch.uint8).view(5, 3)
    levels = torch.randn(5, 3, 4)
    parts = Grid(levels, Affine(scale, zero)).split([2, 0, 3])
    assert [len(part.levels) for part in parts] == [2, 0, 3]
    assert torch.equal(torch.cat([part.levels for part in parts]), levels)
    assert torch.equal(torch.cat([part.affine.scale for part in parts]), scale)
    assert torch.equal(parts[2].affine.zero, zero[2:])
    assert all(part.affine is None for part in Grid(levels, None).split([4, 1]))


def test_the_same_call_twice_gives_the_same_bits():
    W, factor, config = weights(16, 130), factor_of(130), QuantConfig(4)
    grid = learn_grid(W, factor, config)
    first, second = quantize(W, grid, factor, config), quantize(W.clone(), learn_grid(W, factor, config), factor, config)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.loss, second.loss)
