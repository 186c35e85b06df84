"""One group of linear layers that read the same input: its grids, target, the column solver, refinement.

Free functions on tensors; the Hessian and its factor are hessian.py's, the caller owns them and the weights. No model, no files.
Legend: O rows (out_features, of one linear or of a group stacked), I columns (in_features), K = 2**bits levels,
G groups of columns, N tokens. "Solver order": columns permuted by act-order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from hessian import PANEL, Factor, Statistics, Symmetric, Triangular, panels, times, times_inverse_, times_whole
from leanquant import kernels
from leanquant.packing import affine_levels
from leanquant_grid import (
    CUDA_SOURCE,
    Affine,
    affine_search,
    digits_affine,
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
HEAD_TOKENS = 4  # for each of the head's inputs: with so many, half of its shift is noise (docs/accuracy.md, The head)
# fused_kernel.cu: w, U; levels, group_of, codes, errors; B, O, K
SOLVE_BLOCK = kernels.Kernel(
    CUDA_SOURCE, "solve_block", (*2 * [torch.float32], torch.float32, torch.int32, torch.uint8, torch.float32, int, int, int)
)
DESCEND_BLOCK = kernels.Kernel(CUDA_SOURCE, "descend_block", (torch.float32, *SOLVE_BLOCK.parameters))
# Columns that the kernels take at once, rows that one of their thread blocks takes, and its threads.
MAX_COLUMNS, TILE, THREADS = 128, 16, 256
MOST_WEIGHTS = 2**27  # that are solved at a time
FIT_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # of what is multiplied with H, in the fit of levels and scales, at a time
FIT_EQUATIONS = 2**24  # coefficients of the fit that are held at a time, in float64


@dataclass(frozen=True)
class QuantConfig:
    """What decides the codes of a linear, given its weight and its inputs."""

    bits: int  # 2, 3 or 4; of embeddings and head 8 too
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
    shift_head: bool = True  # with shift: so is a head that is not the embeddings, further and not rounded
    refine: int = 2  # rounds of coordinate descent on the codes and least squares on the levels
    levels_dtype: torch.dtype = torch.float16  # of stored non-uniform levels
    round_levels: bool = True  # the solver sees non-uniform levels rounded as they are stored

    def of_vocabulary(self, bits: int) -> "QuantConfig":
        """For embeddings and head in so many bits. 8 need no search: to the nearest of a row's levels the model hardly feels them."""
        if bits < 8:
            return replace(self, bits=bits)
        return replace(self, bits=bits, grid="minmax", groupsize=-1, nearest=True, refine=0)


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


# --- grids -----------------------------------------------------------------------------------------------------


def learn_grid(W: torch.Tensor, factor: Factor | None, config: QuantConfig) -> Grid:
    """The levels of each row or group of `W` [O, I] (original column order).

    Groups are static: learned from the original weights, for consecutive original columns. Without a factor every
    column counts the same.
    """
    O, I = W.shape
    a = torch.ones(I, dtype=torch.float64, device=W.device)
    if factor is not None and config.grid != "minmax":
        diagonal = factor.U.diagonal() if config.sensitivity == "cholesky" else factor.U.column_norms().square()
        a[factor.order.to(W.device)] = sensitivity(diagonal, config.exponent).to(W.device)
    if config.grid == "nonuniform":
        if config.kmeans == "exact":
            levels = kmeans_levels(W, a, config.bits, config.kmeans_bins)
        else:
            levels = local_kmeans_levels(W, a, config.bits, config.kmeans_seed, config.kmeans)
        return Grid(rounded(levels, config).unsqueeze(1), None)
    size = I if config.groupsize == -1 else config.groupsize
    groups = W.reshape(-1, size)
    if config.bits == 8:
        found = digits_affine(groups)
    elif config.grid == "minmax":
        found = minmax_affine(groups, config.bits, config.sym)
    else:
        search = symmetric_search if config.sym else affine_search
        found = search(groups, a.view(-1, size), config.bits, config.grid_partitions, config.exhaustive)
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
        E = W - dequantize(codes, grid.levels)
        return Quantized(codes, torch.full_like(E[:, 0], float("nan")) if factor is None else row_losses(E, factor.H))
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


def target(W: torch.Tensor, statistics: Statistics, factor: Factor, strength: float, rows=slice(None)) -> torch.Tensor:
    """What `W` [O, I] is replaced by before it is quantized: `shifted`, and zeros where the input always is 0."""
    return without_dead(shifted(W, statistics, factor, strength, rows), factor)


def shifted(W: torch.Tensor, statistics: Statistics, factor: Factor, strength: float, rows=slice(None)) -> torch.Tensor:
    """`shifted_target` of `W` [O, I], or `W` where `statistics` have none. rows: which of the rows that they are about it is, a slice or
    indices."""
    if statistics.C is not None:
        return shifted_target(W, times(W, statistics.C).mul_(strength), factor)
    if statistics.S is not None:
        return shifted_target(W, strength * statistics.S[rows].to(W), factor)
    return W


def shifted_target(W: torch.Tensor, shift: torch.Tensor, factor: Factor) -> torch.Tensor:
    """The weights that do on the quantized model's inputs what `W` [O, I] does on the unquantized model's.

    With x the quantized model's input of a token, x' the unquantized one's, and r = h' - h what the residual stream
    lacks where the output is added to it (else 0), the least squares solution of W* x = W x' + r is
    W* = W + S inv(H + damping), S = mean (W (x' - x) + r) x^T; `shift` [O, I] is S, or a share of it: few calibration tokens
    make S noisy, and the whole step would fit that noise.
    """
    order = factor.order.to(W.device)
    step = shift[:, order]
    del shift  # which may be the last to know of it
    times_inverse_(step, factor.U)
    return step[:, torch.argsort(order)].add_(W)


# --- refinement ------------------------------------------------------------------------------------------------


def refine(W: torch.Tensor, grid: Grid, solved: Quantized, factor: Factor, config: QuantConfig) -> tuple[Grid, Quantized]:
    """Alternate between better codes and better levels for `W` [O, I] under the damped Hessian.

    Each of config.refine rounds is a sweep of coordinate descent over the codes, then a least-squares fit of the levels,
    rounded as stored and taken by the rows that gain from it. The loss of a row, tr(E H E^T), never rises.
    """
    H, codes = factor.H, solved.codes
    for _ in range(config.refine):
        codes = descend(W, codes, grid.levels, H, config.block_size)
        grid = fit_grid(W, codes, grid, H, config)
    codes = descend(W, codes, grid.levels, H, config.block_size)
    return grid, Quantized(codes, row_losses(W - dequantize(codes, grid.levels), H))


def row_losses(E: torch.Tensor, H: Symmetric) -> torch.Tensor:
    """tr(E H E^T) by rows: `E` [O, I] -> [O]."""
    return times(E, H).mul_(E).sum(1)


def descend(W: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor, H: Symmetric, block_size: int = 128) -> torch.Tensor:
    """One sweep of coordinate descent over the columns: each code becomes the best one given all others.

    With e = q - w, the loss e H e^T is least in column j at t = q_j - (e H)_j / H_jj: take the level nearest to it.
    `W` [O, I], `codes` uint8 [O, I], `levels` [O, G, K], `H` [I, I] positive definite. Returns codes.
    """
    q = dequantize(codes, levels).T.contiguous()
    E, codes = q - W.T, torch.empty_like(codes.T, memory_format=torch.contiguous_format)
    group_of = torch.arange(len(E), dtype=torch.int32, device=W.device) // (len(E) // levels.shape[1])
    levels = levels.transpose(0, 1).contiguous()  # [G, O, K]
    for block in blocks(len(E), block_size, W.device):
        H_rows = H.rows(block).to(W.device)
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


def fit_grid(W: torch.Tensor, codes: torch.Tensor, grid: Grid, H: Symmetric, config: QuantConfig) -> Grid:
    """The levels, or the scales of an affine grid, that minimise (w - q) H (w - q)^T for fixed codes, rounded as stored.

    Least squares: a row's q is l B, with unknown l: its K levels and B [K, I] its one-hot codes, or its G scales and
    B [G, I] its code - zero, each group's in its own row. With e = w - q for the old l, the step d to the best one solves
    (B H B^T) d = B H e^T, with a ridge of 1e-6 of the mean diagonal, which keeps a level without codes where it is. Products in
    float32, the solve in float64. Rows that lose by it (through rounding) keep what they have.
    """
    is_affine = grid.affine is not None
    old = grid.affine.scale if is_affine else grid.levels.squeeze(1)
    chunk, block = fit_rows(old.shape[1], W.shape[1], is_affine, W.device.type == "cpu")
    E = W - dequantize(codes, grid.levels)
    EH = times(E, H)
    loss = E.mul_(EH).sum(1)
    del E
    rows = panels(len(W), min(chunk, block) if H.square.device == W.device else block)
    fitted = old + torch.cat([_best_step(EH[part], codes[part], grid.rows(part), H, chunk) for part in rows])
    if is_affine:
        scale = stored_scale(torch.where(fitted > 0, fitted, old))
        new = Grid(affine_levels(scale, grid.affine.zero, config.bits), Affine(scale, grid.affine.zero))
    else:
        new = Grid(rounded(fitted.sort(1).values, config).unsqueeze(1), None)
    del EH
    return new.where(row_losses(W - dequantize(codes, new.levels), H) < loss, grid)


def fit_rows(unknowns: int, columns: int, is_affine: bool, on_cpu: bool) -> tuple[int, int]:
    """For how many rows `fit_grid` makes products with H at a time, and for how many a Hessian from afar is fetched once."""
    chunk = FIT_ELEMENTS["cpu" if on_cpu else "cuda"] // (columns if is_affine else unknowns * columns)
    return max(1, chunk), max(1, FIT_EQUATIONS // unknowns**2)


def fit_panel(columns: int) -> int:
    """Columns of H that `fit_grid` takes at once: products that stop at the diagonal do half of the work and half a panel's."""
    return min(PANEL, max(128, columns // 16))


def _best_step(EH: torch.Tensor, codes: torch.Tensor, grid: Grid, H: Symmetric, chunk: int) -> torch.Tensor:
    """The d [R, K or G] of `fit_grid` for rows whose e H is `EH` [R, I], float32."""
    A, b = (_level_equations if grid.affine is None else _scale_equations)(EH, codes, grid, H, chunk)
    A = A + A.mT
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    ridge = torch.where(ridge > 0, ridge, 1)  # a row of codes that all stand for 0 says nothing about its scale
    A += ridge * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(A, b).float()


def _level_equations(EH: torch.Tensor, codes: torch.Tensor, grid: Grid, H: Symmetric, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K, K] with B H B^T = A + A^T, and B H e^T [R, K], float64; B is made for `chunk` rows at a time, once if that is all."""
    (R, _, K), I = grid.levels.shape, EH.shape[1]
    A, chunks = EH.new_zeros(R, K, K, dtype=torch.float64), panels(R, chunk)
    whole = _one_hot(codes, K) if len(chunks) == 1 else None
    B_of = lambda rows: _one_hot(codes[rows], K) if whole is None else whole  # noqa: E731
    b = torch.cat([(B_of(rows) @ EH[rows].unsqueeze(2)).squeeze(2) for rows in chunks])
    for part in panels(I, fit_panel(I)):
        H_columns = H.half(part).T.to(EH.device)
        for rows in chunks:
            B = B_of(rows)
            BH = times_whole(B.view(-1, I)[:, : part.stop], H_columns).view(*B.shape[:2], -1)
            A[rows] += BH @ B[:, :, part].mT
    return A, b.double()


def _one_hot(codes: torch.Tensor, K: int) -> torch.Tensor:
    """Float32 [R, K, I]."""
    R, I = codes.shape
    return torch.zeros(R, K, I, device=codes.device).scatter_(1, codes.long().unsqueeze(1), 1)


def _scale_equations(EH: torch.Tensor, codes: torch.Tensor, grid: Grid, H: Symmetric, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, G, G] with B H B^T = A + A^T, and B H e^T [R, G], float64. A row of B is 0 outside its group: with all its rows summed in
    `steps` [R, I], the products are those of one matrix, not of G."""
    (R, G, _), I = grid.levels.shape, EH.shape[1]
    size = I // G
    A = EH.new_zeros(R, G, G, dtype=torch.float64)
    steps = (codes.view(R, G, size).float() - grid.affine.zero.unsqueeze(2)).view(R, -1)
    for g, start in enumerate(range(0, I, size)):
        for part in panels(size, fit_panel(I)):
            columns = slice(start + part.start, start + part.stop)
            H_rows = H.half(columns).to(EH.device)
            for rows in panels(R, chunk):
                BH = times_whole(steps[rows, columns], H_rows).mul_(steps[rows, : columns.stop])
                A[rows, g, :g] += BH[:, :start].view(len(BH), g, size).sum(2)
                A[rows, g, g] += BH[:, start:].sum(1)
    return A, (steps * EH).view(R, G, size).sum(2).double()


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


def solve_columns(W: torch.Tensor, U: Triangular, levels: torch.Tensor, group_of: torch.Tensor, block_size: int = 128):
    """GPTQ's loop (paper, algorithm 1): quantize column by column, push each error onto the columns not yet done.

    For i = 0..I-1: c_i = nearest level(w_i), e = (w_i - level[c_i]) / U_ii, w_j -= e U_ij for j > i.
    `W` [O, I] in solver order; `U` [I, I] may lie on another device; `levels` [O, G, K] ascending; `group_of` [I]
    the group of each column. Returns codes uint8 [O, I] in solver order and loss [O] = sum_i e_i^2 = tr(E H E^T).
    """
    columns = W.T.clone(memory_format=torch.contiguous_format)  # [I, O]: a column is a vector
    levels = levels.transpose(0, 1).contiguous()  # [G, O, K]
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=W.device)
    loss = torch.zeros(W.shape[0], device=W.device)
    group_of = group_of.int()
    for block in blocks(len(columns), block_size, W.device):
        U_rows = U.rows(block).to(W.device)
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
