"""One group of linear layers that read the same input: its Hessian, the inverse Cholesky factor, the column solver.

Free functions on tensors; the caller owns the Hessian and the weights. No model, no files.
Legend: O rows (out_features, of one linear or of a group stacked), I columns (in_features), K = 2**bits levels,
G groups of columns, N tokens. "Solver order": columns permuted by act-order.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from leanquant import kernels
from leanquant.packing import affine_levels
from leanquant_grid import (
    CUDA_SOURCE,
    Affine,
    affine_search,
    kmeans_levels,
    local_kmeans_levels,
    minmax_affine,
    sensitivity,
    stored_scale,
    symmetric_search,
)

GRIDS = ("nonuniform", "affine", "minmax")
KMEANS = ("exact", "published", "uniform", "plusplus")
SENSITIVITIES = ("cholesky", "inverse")
# Of an expert, for each of its inputs: with fewer, a Hessian loses against rounding to nearest (docs/accuracy.md, Few tokens).
LEAST_TOKENS = 2
# fused_kernel.cu: w, U; levels, group_of, codes, errors; B, O, K
SOLVE_BLOCK = kernels.Kernel(
    CUDA_SOURCE, "solve_block", (*2 * [torch.float32], torch.float32, torch.int32, torch.uint8, torch.float32, int, int, int)
)
DESCEND_BLOCK = kernels.Kernel(CUDA_SOURCE, "descend_block", (torch.float32, *SOLVE_BLOCK.parameters))
# Columns that the kernels take at once, rows that one of their thread blocks takes, and its threads.
MAX_COLUMNS, TILE, THREADS = 128, 16, 256
MOST_WEIGHTS = 2**27  # that are solved at a time


@dataclass(frozen=True)
class QuantConfig:
    """What decides the codes of a linear, given its weight and its inputs."""

    bits: int  # 2, 3 or 4
    grid: str = "nonuniform"  # one of GRIDS
    exponent: float = 4.0  # of the sensitivity; minmax has none
    sensitivity: str = "cholesky"  # one of SENSITIVITIES: of which diagonal
    groupsize: int = -1  # columns that share a scale and zero; -1 = the whole row; not for nonuniform
    sym: bool = False  # zero points fixed at 2**(bits-1); not for nonuniform
    nearest: bool = False  # round to nearest: no error compensation
    percdamp: float = 0.01  # damping, as a share of the Hessian's mean diagonal
    act_order: bool = False  # columns in the order of descending Hessian diagonal
    block_size: int = 128  # columns whose errors are propagated together
    grid_partitions: int = 2048  # T of the affine search
    exhaustive: bool = False  # affine search over every distinct candidate
    kmeans_bins: int = 128  # m of the non-uniform grid
    kmeans: str = "exact"  # one of KMEANS; non-uniform: the optimal grid, or Lloyd's iteration from one of these starts
    kmeans_seed: int = 0  # of the random start
    shift: float = 0.5  # how far to aim at the unquantized model's outputs on its own inputs: 0 = not at all, 1 = all the way
    residual: bool = True  # with shift: also at what the residual stream lacks
    refine: int = 2  # rounds of coordinate descent on the codes and least squares on the levels
    levels_dtype: torch.dtype = torch.float16  # of stored non-uniform levels
    round_levels: bool = True  # the solver sees non-uniform levels rounded as they are stored


class Factor(NamedTuple):
    """What the solver needs of a Hessian. `U` [I, I] is upper, U^T U = inv(H + damping), in solver order.

    order [I]: the original column at each solver position. dead [I]: original columns whose input is always 0.
    """

    U: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    percdamp: float


class Grid(NamedTuple):
    """Levels [O, G, K], ascending float32, and the (scale, zero) [O, G] that gave them if they are affine."""

    levels: torch.Tensor
    affine: Affine | None

    @property
    def bits(self) -> int:
        return self.levels.shape[2].bit_length() - 1

    def rows(self, index) -> "Grid":
        """The grid of some of the rows."""
        return Grid(self.levels[index], self.affine and Affine(*(t[index] for t in self.affine)))

    def where(self, keep: torch.Tensor, other: "Grid") -> "Grid":
        """This grid in the rows where `keep` [O] is true, `other` elsewhere."""
        levels = torch.where(keep.view(-1, 1, 1), self.levels, other.levels)
        if self.affine is None:
            return Grid(levels, None)
        return Grid(levels, Affine(*(torch.where(keep.view(-1, 1), a, b) for a, b in zip(self.affine, other.affine, strict=True))))

    @classmethod
    def joined(cls, grids: Sequence["Grid"]) -> "Grid":
        """One grid for matrices stacked by rows."""
        affine = None if grids[0].affine is None else Affine(*map(torch.cat, zip(*(grid.affine for grid in grids), strict=True)))
        return cls(torch.cat([grid.levels for grid in grids]), affine)

    def split(self, rows: list[int]) -> list["Grid"]:
        """One grid for each of the matrices that were stacked."""
        levels = self.levels.split(rows)
        if self.affine is None:
            return [Grid(part, None) for part in levels]
        pairs = zip(*(t.split(rows) for t in self.affine), strict=True)
        return [Grid(part, Affine(*pair)) for part, pair in zip(levels, pairs, strict=True)]


class Quantized(NamedTuple):
    """codes uint8 [O, I] in original column order; loss [O], tr(E H E^T) per token with the damped H."""

    codes: torch.Tensor
    loss: torch.Tensor


class NotPositiveDefinite(ArithmeticError):
    """The Hessian could not be factorized, however much it was damped."""


class Statistics:
    """Sums, then means, over tokens of products of a group's input x [I].

    H [I, I]: x x^T, upper triangle. C [I, I]: (x' - x) x^T, x' the unquantized model's input. R [O, I]: (h' - h) x^T, h' and
    h the residual streams that the group's one linear writes to. C and R are None where they are not wanted. tokens: how many.
    """

    def __init__(self, I: int, residual: int, shift: bool, device: torch.device):
        zeros = lambda rows: torch.zeros(rows, I, device=device)  # noqa: E731
        self.H = zeros(I)
        self.C = zeros(I) if shift else None
        self.R = zeros(residual) if shift and residual else None
        self.tokens = 0

    def add(self, ours, theirs) -> None:
        """Count one batch: what the group reads in the quantized model and in the unquantized one, or None."""
        self.tokens += ours.X[..., 0].numel()
        X = ours.X.flatten(0, -2).to(self.H.device)
        with _products_of(X):
            X = X if _on_tensor_cores(X) else X.float()
            accumulate_hessian(self.H, X)
            if self.C is not None:
                accumulate_product(self.C, _difference(theirs.X, X), X)
            if self.R is not None:
                accumulate_product(self.R, _difference(theirs.residual, ours.residual.to(X)), X)

    def is_finite(self) -> bool:
        return all(total is None or bool(torch.isfinite(total).all()) for total in (self.H, self.C, self.R))

    def divide(self) -> None:
        """Make the sums means."""
        for total in (self.H, self.C, self.R):
            if total is not None:
                total /= max(self.tokens, 1)


# --- Hessian ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _products_of(X: torch.Tensor) -> Iterator[None]:
    """For the block: matrix products on a CPU may round their factors to bfloat16 if `X` comes in bfloat16.

    Products of such numbers are exact in float32, in which they are summed, and CPUs with bfloat16 units make them 3 to 5
    times faster. Differences between two such inputs are rounded, by less than either input already is.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if X.dtype == torch.bfloat16 and X.device.type == "cpu":
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _on_tensor_cores(X: torch.Tensor) -> bool:
    """Can a GPU multiply what `X` holds in 16 bits and sum it in float32? That is as exact as float32, and ten times faster."""
    return kernels.on_gpu(X) and X.dtype in (torch.float16, torch.bfloat16)


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """theirs - ours [N, J], taken in float32, in the dtype and on the device of `ours`."""
    ours = ours.view(-1, ours.shape[-1])
    return (theirs.to(ours.device).float().view_as(ours) - ours).to(ours)


def accumulate_hessian(H: torch.Tensor, X: torch.Tensor) -> None:
    """Add X^T X to `H` [I, I] in place, its upper triangle only; `X` [N, I].

    By column panels: four products that stop at the diagonal do 5/8 of the work of one full product.
    """
    I = H.shape[0]
    panel = I if I < 1024 else -(-I // 4)
    for start in range(0, I, panel):
        stop = min(start + panel, I)
        accumulate_product(H[:stop, start:stop], X[:, :stop], X[:, start:stop])


def accumulate_product(S: torch.Tensor, A: torch.Tensor, X: torch.Tensor) -> None:
    """Add A^T X to `S` [J, I] float32 in place; `A` [N, J] and `X` [N, I] of one dtype."""
    if _on_tensor_cores(X):
        S += torch.mm(A.T, X, out_dtype=torch.float32)
    else:
        S.addmm_(A.to(S).T, X.to(S))


def factorize(H: torch.Tensor, percdamp: float, act_order: bool) -> Factor:
    """Damp, order and factorize a Hessian given by its upper triangle, [I, I] float32, mean over tokens; overwrites `H`.

    Damping adds percdamp * mean(diag H). A Hessian that is still not positive definite gets ten times more, up to
    three times; then NotPositiveDefinite is raised. Columns that saw no input get a unit diagonal.
    """
    _mirror(H)
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    H.diagonal()[dead] = 1
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    mean = diagonal.mean().clamp(min=torch.finfo(H.dtype).tiny)
    backward = order.flip(0)
    H.copy_(H[backward[:, None], backward])
    undamped = H.diagonal().clone()
    for _ in range(4):
        H.diagonal().copy_(undamped + percdamp * mean)
        L = _cholesky(H)
        if L is not None:
            return Factor(_reversed_inverse(L, H), order, dead, percdamp)
        percdamp = 10 * max(percdamp, 1e-3)
    raise NotPositiveDefinite


def _mirror(H: torch.Tensor, panel: int = 1024) -> None:
    """Copy the upper triangle of `H` onto the lower one, in place and by panels: a wide Hessian is copied only once."""
    for start in range(0, len(H), panel):
        stop = start + panel
        corner = H[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        H[stop:, start:stop] = H[start:stop, stop:].T


def inverse_cholesky(H: torch.Tensor) -> torch.Tensor | None:
    """U [I, I] upper with U^T U = inv(H), or None where H is not positive definite.

    H reversed in rows and columns has the factor L; then U = inv(L) reversed. One factorization and one
    triangular inverse instead of cholesky, cholesky_inverse, cholesky: half the work, one matrix less.
    """
    backward = H.flip(0, 1)
    L = _cholesky(backward)
    return None if L is None else _reversed_inverse(L, backward)


def _cholesky(H: torch.Tensor) -> torch.Tensor | None:
    L, failed = torch.linalg.cholesky_ex(H)
    return None if failed or not torch.isfinite(L.diagonal()).all() else L


def _reversed_inverse(L: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """inv(L) reversed in rows and columns, in the memory of `scratch` [I, I]; overwrites `L`."""
    invert_triangular(L)
    for rows in blocks(len(L), 1024, torch.device("cpu")):
        scratch[rows] = L[len(L) - rows.stop : len(L) - rows.start].flip(0, 1)
    return scratch


def invert_triangular(L: torch.Tensor, panel: int = 1024) -> None:
    """Replace the lower triangular `L` [I, I] by its inverse, by panels of columns from the last to the first: in its own memory, and
    with a third of the work of solving for the identity.

    With L = [[A, 0], [B, D]] and inv(D) in its place, inv(L) = [[inv(A), 0], [-inv(D) B inv(A), inv(D)]].
    """
    for columns in reversed(list(blocks(len(L), panel, torch.device("cpu")))):
        below = slice(columns.stop, len(L))
        A = L[columns, columns]
        inverse = torch.linalg.solve_triangular(A, torch.eye(len(A), dtype=L.dtype, device=L.device), upper=False)
        L[below, columns] = (L[below, below] @ L[below, columns]).neg_() @ inverse
        L[columns, columns] = inverse


# --- grids -----------------------------------------------------------------------------------------------------


def learn_grid(W: torch.Tensor, factor: Factor | None, config: QuantConfig) -> Grid:
    """The levels of each row or group of `W` [O, I] (original column order).

    Groups are static: learned from the original weights, for consecutive original columns. Without a factor every
    column counts the same.
    """
    O, I = W.shape
    a = torch.ones(I, dtype=torch.float64, device=W.device)
    if factor is not None and config.grid != "minmax":
        a[factor.order.to(W.device)] = sensitivity(factor.U, config.exponent, config.sensitivity).to(W.device)
    if config.grid == "nonuniform":
        if config.kmeans == "exact":
            levels = kmeans_levels(W, a, config.bits, config.kmeans_bins)
        else:
            levels = local_kmeans_levels(W, a, config.bits, config.kmeans_seed, config.kmeans)
        return Grid(rounded(levels, config).unsqueeze(1), None)
    size = I if config.groupsize == -1 else config.groupsize
    groups = W.reshape(-1, size)
    if config.grid == "minmax":
        found = minmax_affine(groups, config.bits, config.sym)
    else:
        a = a.view(1, -1, size).expand(O, -1, -1).reshape(-1, size)
        search = symmetric_search if config.sym else affine_search
        found = search(groups, a, config.bits, config.grid_partitions, config.exhaustive)
    affine = Affine(*(t.view(O, -1) for t in found))
    return Grid(affine_levels(affine.scale, affine.zero, config.bits), affine)


def rounded(levels: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """Non-uniform `levels` in float32, as the solver is to see them."""
    return levels.to(config.levels_dtype).float() if config.round_levels else levels


def nearest_codes(w: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of the ascending `levels` [O, K] for each of `w` [O, n]; a tie goes to the lower level."""
    return torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), w.contiguous())


# --- solver ----------------------------------------------------------------------------------------------------


def quantize(W: torch.Tensor, grid: Grid, factor: Factor | None, config: QuantConfig) -> Quantized:
    """Codes of `W` [O, I] float32 on `grid`. Without a factor: the nearest level, loss NaN."""
    if config.nearest or factor is None:
        codes = round_to_nearest(W, grid.levels)
        return Quantized(codes, _damped_loss(W - dequantize(codes, grid.levels), factor))
    W = without_dead(W, factor)
    order = factor.order.to(W.device)
    group_of = order // (W.shape[1] // grid.levels.shape[1])
    solved, loss = solve_columns(W[:, order], factor.U, grid.levels, group_of, config.block_size)
    codes = torch.empty_like(solved)
    codes[:, order] = solved
    return Quantized(codes, loss)


def without_dead(W: torch.Tensor, factor: Factor) -> torch.Tensor:
    """`W` with zeros in the columns whose input is always 0; copied only if there are any."""
    return W.masked_fill(factor.dead.to(W.device), 0) if factor.dead.any() else W


def row_pieces(rows: int, columns: int) -> list[slice]:
    """A matrix in equal pieces of up to MOST_WEIGHTS: what a solver takes grows with them."""
    count = -(-rows * columns // MOST_WEIGHTS)
    step = -(-rows // count)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


# --- target ----------------------------------------------------------------------------------------------------


def target(W: torch.Tensor, statistics: Statistics, factor: Factor, strength: float, rows: slice = slice(None)) -> torch.Tensor:
    """What `W` [O, I], `rows` of a linear or all, is replaced by before it is quantized: `shifted_target`, and zeros where the input
    always is 0."""
    if statistics.C is not None:
        shift = product(W, statistics.C)
        if statistics.R is not None:
            shift += statistics.R[rows].to(W)
        W = shifted_target(W, shift.mul_(strength), factor)
    return without_dead(W, factor)


def shifted_target(W: torch.Tensor, shift: torch.Tensor, factor: Factor) -> torch.Tensor:
    """The weights that do on the quantized model's inputs what `W` [O, I] does on the unquantized model's.

    With x the quantized model's input of a token, x' the unquantized one's, and r = h' - h what the residual stream
    lacks where the output is added to it (else 0), the least squares solution of W* x = W x' + r is
    W* = W + (W C + R) inv(H + damping), C = mean (x' - x) x^T, R = mean r x^T; `shift` [O, I] is W C + R, or a share of
    it: few calibration tokens make C noisy, and the whole step would fit that noise.
    """
    order = factor.order.to(W.device)
    step = product(product(shift[:, order], factor.U.T), factor.U)
    target = W.clone()
    target[:, order] += step
    return target


def product(A: torch.Tensor, M: torch.Tensor, panel: int = 2048) -> torch.Tensor:
    """A M. A wide `M` may lie on another device: it then comes by panels of columns."""
    if M.device == A.device:
        return A @ M
    found = A.new_empty(A.shape[0], M.shape[1])
    for start in range(0, M.shape[1], panel):
        columns = slice(start, start + panel)
        found[:, columns] = A @ M[:, columns].to(A)
    return found


# --- refinement ------------------------------------------------------------------------------------------------


def damped_hessian(factor: Factor) -> torch.Tensor:
    """H + damping [I, I] in original column order: the inverse of U^T U. Beside U there is never more than it and a panel of it."""
    H, original = torch.cholesky_inverse(factor.U, upper=True).T, torch.argsort(factor.order)  # symmetric, and its rows contiguous
    for _ in range(2):  # H is symmetric: its columns, then, transposed, its rows
        for rows in blocks(len(H), 1024, torch.device("cpu")):
            H[rows] = H[rows][:, original]
        transpose(H)
    return H


def transpose(M: torch.Tensor, panel: int = 1024) -> None:
    """Transpose a square matrix in its own memory."""
    for rows in blocks(len(M), panel, torch.device("cpu")):
        for columns in blocks(rows.stop, panel, torch.device("cpu")):
            upper = M[columns, rows].T.clone()
            M[columns, rows] = M[rows, columns].T.clone()
            M[rows, columns] = upper


def refine(W: torch.Tensor, grid: Grid, solved: Quantized, factor: Factor, config: QuantConfig, H=None) -> tuple[Grid, Quantized]:
    """Alternate between better codes and better levels for `W` [O, I] under the damped Hessian `H`, damped_hessian(factor) if unset.

    Each of config.refine rounds is a sweep of coordinate descent over the codes, then a least-squares fit of the levels,
    rounded as stored and taken by the rows that gain from it. The loss of a row, tr(E H E^T), never rises.
    """
    H, codes = damped_hessian(factor) if H is None else H, solved.codes
    for _ in range(config.refine):
        codes = descend(W, codes, grid.levels, H, config.block_size)
        grid = fit_grid(W, codes, grid, H, config)
    codes = descend(W, codes, grid.levels, H, config.block_size)
    return grid, Quantized(codes, row_losses(W - dequantize(codes, grid.levels), H))


def row_losses(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T) by rows: `E` [O, I] -> [O]."""
    return product(E, H).mul_(E).sum(1)


def descend(W: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, H: torch.Tensor, block_size: int = 128) -> torch.Tensor:
    """One sweep of coordinate descent over the columns: each code becomes the best one given all others.

    With e = q - w, the loss e H e^T is least in column j at t = q_j - (e H)_j / H_jj: take the level nearest to it.
    `W` [O, I], `codes` uint8 [O, I], `levels` [O, G, K], `H` [I, I] positive definite. Returns codes.
    """
    q = dequantize(codes, levels).T.contiguous()
    E, codes = q - W.T, torch.empty_like(codes.T, memory_format=torch.contiguous_format)
    group_of = torch.arange(len(E), dtype=torch.int32, device=W.device) // (len(E) // levels.shape[1])
    levels = levels.transpose(0, 1).contiguous()  # [G, O, K]
    for block in blocks(len(E), block_size, W.device):
        H_rows = H[block].to(W.device)
        E[block] += descend_block(q[block], H_rows @ E, H_rows[:, block], levels, group_of[block], codes[block])
    return codes.T.contiguous()


def descend_block(q, slope, H, levels, group_of, codes: torch.Tensor) -> torch.Tensor:
    """The loop of `descend` within one block: writes `codes` uint8 [B, O], returns the changes of q [B, O].

    `q` and `slope` (e H)^T [B, O] float32, `H` [B, B], `levels` [G, O, K], `group_of` [B] int32.
    """
    return kernels.run(_descend_block_cuda, _descend_block, q, slope, H, levels, group_of, codes)


def _descend_block_cuda(q, slope, H, levels, group_of, codes) -> torch.Tensor:
    return _launch_block(DESCEND_BLOCK, q, slope, H.contiguous(), levels, group_of, codes)


def _descend_block(q, slope, H, levels, group_of, codes: torch.Tensor) -> torch.Tensor:
    """`descend_block` in torch. The products with earlier columns' changes are made when a column is reached."""
    changes, group_of = torch.empty_like(q), group_of.tolist()
    inverse, midpoints = (1 / H.diagonal()).tolist(), _midpoints(levels, group_of)
    for j, group in enumerate(group_of):
        g = torch.addmv(slope[j], changes[:j].T, H[:j, j]) if j else slope[j]
        wanted = torch.add(q[j], g, alpha=-inverse[j])
        code = torch.searchsorted(midpoints[group], wanted.unsqueeze(1))
        torch.sub(levels[group].gather(1, code).squeeze(1), q[j], out=changes[j])
        codes[j] = code.squeeze(1)
    return changes


def fit_grid(W: torch.Tensor, codes: torch.Tensor, grid: Grid, H: torch.Tensor, config: QuantConfig) -> Grid:
    """The levels, or the scales of an affine grid, that minimise (w - q) H (w - q)^T for fixed codes, rounded as stored.

    Least squares: a row's q is l B, with unknown l: its K levels and B [K, I] its one-hot codes, or its G scales and
    B [G, I] its code - zero, each group's in its own row. (B H B^T) l = B H w^T, with a ridge of 1e-6 of the mean
    diagonal towards the old l, which keeps a level without codes where it is. Products in float32, the solve in float64.
    Rows that lose by it (through rounding) keep what they have.
    """
    times_H = _products_with(H) if H.device == W.device else lambda B: product(B, H)
    old = grid.levels.squeeze(1) if grid.affine is None else grid.affine.scale
    fitted, chunk = [], max(1, (2**21 if W.device.type == "cpu" else 2**26) // (old.shape[1] * W.shape[1]))
    for start in range(0, len(W), chunk):
        rows = slice(start, start + chunk)
        B = _basis(codes[rows], grid.rows(rows))
        BH = times_H(B.view(-1, B.shape[2])).view(B.shape)
        A = (BH @ B.transpose(1, 2)).double()
        b = (BH @ W[rows].unsqueeze(2)).double().squeeze(2)
        ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
        ridge = torch.where(ridge > 0, ridge, 1)  # a row of codes that all stand for 0 says nothing about its scale
        A += ridge * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        fitted.append(torch.linalg.solve(A, b + ridge.squeeze(2) * old[rows].double()))
    fitted = torch.cat(fitted).float()
    if grid.affine is None:
        new = Grid(rounded(fitted.sort(1).values, config).unsqueeze(1), None)
    else:
        scale = stored_scale(torch.where(fitted > 0, fitted, old))
        new = Grid(affine_levels(scale, grid.affine.zero, config.bits), Affine(scale, grid.affine.zero))
    losses = [row_losses(W - dequantize(codes, g.levels), H) for g in (new, grid)]
    return new.where(losses[0] < losses[1], grid)


def _basis(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """B of `fit_grid`, float32 [R, K or G, I]."""
    R, I = codes.shape
    if grid.affine is None:
        return torch.zeros(R, grid.levels.shape[2], I, device=codes.device).scatter_(1, codes.long().unsqueeze(1), 1)
    G = grid.levels.shape[1]
    B = torch.zeros(R, G, G, I // G, device=codes.device)
    B.diagonal(dim1=1, dim2=2).copy_((codes.view(R, G, -1).float() - grid.affine.zero.unsqueeze(2)).transpose(1, 2))
    return B.view(R, G, I)


def _products_with(H: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from B [N, I], small whole numbers in float32, to B H.

    On a GPU, B and the three parts of 8 bits that make up a float32 are exact in bfloat16, and three products on tensor cores
    take a fifth of the time of one in float32.
    """
    if not kernels.on_gpu(H):
        return lambda B: B @ H
    parts = torch.empty(3, *H.shape, dtype=torch.bfloat16, device=H.device)
    for rows in torch.arange(len(H), device=H.device).split(1024):
        rest = H[rows]
        for part in parts:
            part[rows] = rest.bfloat16()
            rest = rest - part[rows]
    return lambda B: sum(torch.mm(B.bfloat16(), part, out_dtype=torch.float32) for part in parts)


def dequantize(codes: torch.Tensor, levels: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """levels[codes]: codes [O, I], levels [O, G, K] -> [O, I] in `dtype`, or that of the levels. By rows: indices take 8 bytes."""
    O, G, _ = levels.shape
    found = torch.empty(codes.shape, dtype=dtype or levels.dtype, device=codes.device)
    for rows in blocks(O, max(1, 2**24 // codes.shape[1]), torch.device("cpu")):
        found[rows] = levels[rows].gather(2, codes[rows].reshape(len(codes[rows]), G, -1).long()).view(-1, codes.shape[1])
    return found


def round_to_nearest(W: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [O, I] of the level nearest to each weight; `levels` [O, G, K]."""
    O, G, K = levels.shape
    return nearest_codes(W.reshape(O * G, -1), levels.reshape(O * G, K)).to(torch.uint8).view(O, -1)


def _damped_loss(E: torch.Tensor, factor: Factor | None) -> torch.Tensor:
    """tr(E H E^T) by rows, from inv(H) = U^T U: the squared norm of E U^-1."""
    if factor is None:
        return torch.full_like(E[:, 0], float("nan"))
    scaled = torch.linalg.solve_triangular(factor.U.to(E.device), E[:, factor.order.to(E.device)], upper=True, left=False)
    return scaled.square().sum(1)


def solve_columns(W: torch.Tensor, U: torch.Tensor, levels: torch.Tensor, group_of: torch.Tensor, block_size: int = 128):
    """GPTQ's loop (paper, algorithm 1): quantize column by column, push each error onto the columns not yet done.

    For i = 0..I-1: c_i = nearest level(w_i), e = (w_i - level[c_i]) / U_ii, w_j -= e U_ij for j > i.
    `W` [O, I] in solver order; `U` [I, I], may lie on another device; `levels` [O, G, K] ascending; `group_of` [I]
    the group of each column. Returns codes uint8 [O, I] in solver order and loss [O] = sum_i e_i^2 = tr(E H E^T).
    """
    columns = W.T.clone(memory_format=torch.contiguous_format)  # [I, O]: a column is a vector
    levels = levels.transpose(0, 1).contiguous()  # [G, O, K]
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=W.device)
    loss = torch.zeros(W.shape[0], device=W.device)
    group_of = group_of.int()
    for block in blocks(len(columns), block_size, W.device):
        U_rows = U[block, block.start :].to(W.device)
        size = len(U_rows)
        errors = solve_block(columns[block], U_rows[:, :size], levels, group_of[block], codes[block])
        loss += errors.square().sum(0)
        columns[block.stop :].addmm_(U_rows[:, size:].T, errors, alpha=-1)
    return codes.T.contiguous(), loss


def blocks(columns: int, block_size: int, device: torch.device) -> Iterator[slice]:
    """Consecutive blocks of columns, no larger than the kernels take."""
    step = block_size if device.type == "cpu" else min(block_size, MAX_COLUMNS)
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def solve_block(w, U, levels, group_of, codes: torch.Tensor) -> torch.Tensor:
    """The loop of `solve_columns` within one block: writes `codes` uint8 [B, O], returns the errors e [B, O].

    `w` [B, O] float32, `U` [B, B], `levels` [G, O, K], `group_of` [B] int32.
    """
    return kernels.run(_solve_block_cuda, _solve_block, w, U, levels, group_of, codes)


def _solve_block_cuda(w, U, levels, group_of, codes) -> torch.Tensor:
    return _launch_block(SOLVE_BLOCK, w, U.contiguous(), levels, group_of, codes)


def _launch_block(kernel: kernels.Kernel, *args: torch.Tensor) -> torch.Tensor:
    """One block of columns on a GPU: (w or q, [slope,] U or H, levels, group_of, codes) -> errors or changes."""
    *columns, U, levels, group_of, codes = args
    B, O = codes.shape
    K = levels.shape[2]
    if B > MAX_COLUMNS or K not in (4, 8, 16):
        raise ValueError(f"{kernel.name} takes up to {MAX_COLUMNS} columns and 4, 8 or 16 levels, not {B} and {K}")
    if any(c.shape != (B, O) for c in columns) or U.shape != (B, B) or levels.shape[1] != O or group_of.shape != (B,):
        raise ValueError(f"{kernel.name}: sizes do not fit: {[tuple(t.shape) for t in args]}")
    errors = torch.empty_like(columns[0])
    shared = 4 * (B * (B + 1) // 2 + B * (TILE + 1)) + B * TILE
    kernels.launch(kernel, (-(-O // TILE), 1), THREADS, shared, *args, errors, B, O, K)
    return errors


def _solve_block(w, U, levels, group_of, codes: torch.Tensor, sub: int = 32) -> torch.Tensor:
    """`solve_block` in torch; `w` is overwritten.

    Each column first collects what the columns before it left: from earlier sub-blocks in one product, within its
    sub-block by a matrix-vector product; nothing is written ahead.
    """
    errors = torch.empty_like(w)
    scales, group_of = U.diagonal().tolist(), group_of.tolist()
    midpoints = _midpoints(levels, group_of)
    for start in range(0, len(w), sub):
        stop = min(start + sub, len(w))
        if start:
            w[start:stop].addmm_(U[:start, start:stop].T, errors[:start], alpha=-1)
        for j in range(start, stop):
            column = torch.addmv(w[j], errors[start:j].T, U[start:j, j], alpha=-1) if j > start else w[j]
            code = torch.searchsorted(midpoints[group_of[j]], column.unsqueeze(1))
            level = levels[group_of[j]].gather(1, code).squeeze(1)
            torch.div(column.sub_(level), scales[j], out=errors[j])
            codes[j] = code.squeeze(1)
    return errors


def _midpoints(levels: torch.Tensor, groups: list[int]) -> dict[int, torch.Tensor]:
    """Halfway between neighbouring levels [G, O, K] -> [O, K-1], for each of `groups`."""
    return {g: (levels[g, :, 1:] + levels[g, :, :-1]) / 2 for g in set(groups)}
