"""The Hessian of a group of linears: what is summed over the tokens they read, its factor, and products with both.

A wide Hessian is held once. Above the diagonal of one square lies the factor, in the solver's order; below it lies the damped Hessian,
in the order of the columns. Both are made, and multiplied with, by panels. No grids, no codes, no model.
Legend: I columns (in_features), O rows (out_features, of a group's linears stacked), N tokens. "Solver order": columns permuted by
act-order. U: upper, U^T U = inv(H + damping).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from leanquant import kernels

PANEL = 1024  # columns, or rows, of a square that are taken at once: what is held beside it is a few of those


class NotPositiveDefinite(ArithmeticError):
    """The Hessian could not be factorized, however much it was damped."""


def panels(columns: int, size: int = PANEL) -> list[slice]:
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


# --- two triangles in one square -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Triangular:
    """The upper triangle of `square` [I, I] with its diagonal; what lies below is not its own."""

    square: torch.Tensor

    def diagonal(self) -> torch.Tensor:
        return self.square.diagonal()

    def rows(self, part: slice) -> torch.Tensor:
        """Rows `part` from column part.start on, [P, I - part.start]: before it they are 0."""
        return self.square[part, part.start :].triu()

    def columns(self, part: slice) -> torch.Tensor:
        """Columns `part` down to row part.stop, [part.stop, P]: below it they are 0."""
        return self.square[: part.stop, part].triu(-part.start)

    def column_norms(self) -> torch.Tensor:
        """Float64 [I]."""
        parts = panels(len(self.square))
        return torch.cat([torch.linalg.vector_norm(self.columns(part), dim=0, dtype=torch.float64) for part in parts])


@dataclass(frozen=True)
class Symmetric:
    """A symmetric matrix [I, I]: its `diagonal` [I], and what lies below the diagonal of `square`."""

    square: torch.Tensor
    diagonal: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Symmetric":
        return cls(matrix, matrix.diagonal())

    def rows(self, part: slice) -> torch.Tensor:
        """Rows `part`, [P, I]."""
        return torch.cat([self.square[part, : part.start], self._corner(part), self.square[part.stop :, part].T], 1)

    def half(self, part: slice) -> torch.Tensor:
        """Rows `part` of what lies below the diagonal, and half of that, up to column part.stop: [P, part.stop]. With its transpose this
        makes up the matrix."""
        corner = self.square[part, part].tril(-1) + torch.diag(self.diagonal[part] / 2)
        return torch.cat([self.square[part, : part.start], corner], 1)

    def _corner(self, part: slice) -> torch.Tensor:
        corner = self.square[part, part].tril(-1)
        return corner + corner.T + torch.diag(self.diagonal[part])

    def after(self, A: torch.Tensor, part: slice) -> torch.Tensor:
        """Columns `part` of A times this matrix, [J, P]: without a copy of them, which would cost as much as 20 rows of A do."""
        found = A[:, part] @ self._corner(part)
        found.addmm_(A[:, : part.start], self.square[part, : part.start].T)
        return found.addmm_(A[:, part.stop :], self.square[part.stop :, part])


class Factor(NamedTuple):
    """What solver and refinement need of a Hessian: the two triangles of `square` [I, I], and the lower one's `diagonal` [I].

    order [I]: the original column at each solver position. dead [I]: original columns whose input is always 0.
    """

    square: torch.Tensor
    diagonal: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    percdamp: float

    @property
    def U(self) -> Triangular:
        """In solver order."""
        return Triangular(self.square)

    @property
    def H(self) -> Symmetric:
        """Damped, in the order of the columns."""
        return Symmetric(self.square, self.diagonal)


# --- sums over tokens ------------------------------------------------------------------------------------------


class Statistics:
    """Sums, then means, over tokens of products of a group's input x [I]; x' is the unquantized model's.

    H [I, I]: x x^T, upper triangle. With a shift, what the quantized model's streams lack, in one of two forms: S [O, I],
    (W (x' - x) + h' - h) x^T, W the original weights of all linears stacked, h' and h the residual streams that the group's one
    linear writes to (`residual`); or, where nothing is written there and it is smaller, C [I, I], (x' - x) x^T. The other is None.
    tokens: how many.
    """

    def __init__(self, weights: Sequence[torch.Tensor], shift: bool, residual: bool, device: torch.device):
        O, I = sum(map(len, weights)), weights[0].shape[1]
        zeros = lambda rows: torch.zeros(rows, I, device=device)  # noqa: E731
        self.H, self.C, self.S = zeros(I), None, None
        self._weights, self._residual = weights, residual
        if shift and sums_outputs(O, I, residual):
            self.S = zeros(O)
        elif shift:
            self.C = zeros(I)
        self.tokens = 0

    def add(self, ours, theirs) -> None:
        """Count one batch: what the group reads in the quantized model and in the unquantized one, or None."""
        self.tokens += ours.X[..., 0].numel()
        X = ours.X.flatten(0, -2)
        with _products_of(X):
            X = X if _on_tensor_cores(X) else X.float()
            accumulate_hessian(self.H, X)
            if self.C is not None:
                accumulate_product(self.C, _difference(theirs.X, X).to(X), X)
            if self.S is not None:
                accumulate_product(self.S, self._lacking(ours, theirs, X).to(X), X)

    def _lacking(self, ours, theirs, X: torch.Tensor) -> torch.Tensor:
        """W (x' - x) + h' - h, float32 [N, O]."""
        difference = _difference(theirs.X, X).to(X)
        products = [_product(difference, weight.T) for weight in self._weights]
        found = products[0] if len(products) == 1 else torch.cat(products, 1)
        return found.add_(_difference(theirs.residual, ours.residual).to(found)) if self._residual else found

    def sums(self) -> list[torch.Tensor]:
        return [total for total in (self.H, self.C, self.S) if total is not None]

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(total[part]).all()) for total in self.sums() for part in panels(len(total)))

    def divide(self) -> None:
        """Make the sums means."""
        for total in self.sums():
            total /= max(self.tokens, 1)
        self._weights = ()


def sums_outputs(O: int, I: int, residual: bool) -> bool:
    """Which of its two forms a shift is summed in: S [O, I], or C [I, I]."""
    return residual or O <= I


def statistics_size(O: int, I: int, shift: bool, residual: bool) -> int:
    """How many numbers `Statistics` hold."""
    return I * (I + shift * (O if sums_outputs(O, I, residual) else I))


def at_a_time(groups: Sequence, size: Callable[[object], int], most: int = 2**30) -> list[list]:
    """`groups` in lists whose statistics, of size(group) numbers each, are summed in one pass: up to `most` numbers."""
    found, room = [], 0
    for group in groups:
        if size(group) > room:
            found.append([])
            room = max(most, size(group))
        found[-1].append(group)
        room -= size(group)
    return found


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
    """theirs - ours, float32 [N, J], on the device of `ours`."""
    ours = ours.reshape(-1, ours.shape[-1])
    return theirs.to(ours.device, torch.float32, copy=True).view_as(ours).sub_(ours)


def accumulate_hessian(H: torch.Tensor, X: torch.Tensor) -> None:
    """Add X^T X to `H` [I, I] in place, its upper triangle only; `X` [N, I].

    By column panels: four products that stop at the diagonal do 5/8 of the work of one full product.
    """
    I = H.shape[0]
    for part in panels(I, I if I < 1024 else -(-I // 4)):
        accumulate_product(H[: part.stop, part], X[:, : part.stop], X[:, part])


def accumulate_product(S: torch.Tensor, A: torch.Tensor, X: torch.Tensor) -> None:
    """Add A^T X to `S` [J, I] float32 in place; `A` [N, J] and `X` [N, I] of one dtype.

    Where the product is made beside `S`, on tensor cores or because `S` lies on another device than the tokens, it comes by panels.
    """
    if S.device == X.device and not _on_tensor_cores(X):
        S.addmm_(A.to(S).T, X.to(S))
        return
    for part in panels(S.shape[1]):
        S[:, part] += _product(A.T, X[:, part]).to(S.device)


def _product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A B in float32."""
    if _on_tensor_cores(A):
        return torch.mm(A, B.to(A), out_dtype=torch.float32)
    return A.float() @ B.float()


# --- the factor ------------------------------------------------------------------------------------------------


def factorize(H: torch.Tensor, percdamp: float, act_order: bool) -> Factor:
    """Damp, order and factorize a Hessian given by its upper triangle, [I, I] float32, mean over tokens; in its own memory.

    Damping adds percdamp * mean(diag H). A Hessian that is still not positive definite gets ten times more, up to
    three times; then NotPositiveDefinite is raised. Columns that saw no input get a unit diagonal.
    """
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    mean = diagonal.mean().clamp(min=torch.finfo(H.dtype).tiny)
    diagonal[dead] = 1
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    _mirror(H)
    for _ in range(4):
        damped = diagonal + percdamp * mean
        _fill_above(H, damped, order)
        if inverse_cholesky_(H):
            return Factor(H, damped, order, dead, percdamp)
        percdamp = 10 * max(percdamp, 1e-3)
    raise NotPositiveDefinite


def _mirror(square: torch.Tensor) -> None:
    """Copy what lies above the diagonal below it."""
    for part in panels(len(square)):
        _set(square[part, part], lower=square[part, part].T)
        square[part.stop :, part] = square[part, part.stop :].T


def _set(corner: torch.Tensor, upper: torch.Tensor | None = None, lower: torch.Tensor | None = None) -> None:
    """Give `corner` [P, P] the upper triangle of `upper`, diagonal included, or what lies below the diagonal of `lower`."""
    corner.copy_((corner if upper is None else upper).triu() + (corner if lower is None else lower).tril(-1))


def _fill_above(square: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> None:
    """Write the symmetric matrix that `diagonal` and the lower triangle of `square` say, permuted by `order`, into the upper one."""
    for part in panels(len(square), 256):  # whose indices take 8 bytes each
        first, second = order[: part.stop, None], order[part]
        found = square.take(torch.maximum(first, second).mul_(len(square)).add_(torch.minimum(first, second)))
        square[: part.start, part] = found[: part.start]
        corner = found[part.start :]
        corner.diagonal().copy_(diagonal[order[part]])
        _set(square[part, part], upper=corner)


def inverse_cholesky_(square: torch.Tensor, size: int = PANEL) -> bool:
    """Replace the upper triangle of `square` [I, I], that of a positive definite H, by U with U^T U = inv(H). What lies below the
    diagonal stays. False if H is not positive definite: then the upper triangle is lost.

    H = T T^T with T upper, panel by panel from the last (Cholesky's algorithm backwards); then U = inv(T), panel by panel from the
    first, [[A, B], [0, D]] having the inverse [[inv(A), -inv(A) B inv(D)], [0, inv(D)]]. One factorization and one triangular
    inverse, where cholesky, cholesky_inverse, cholesky do twice the work and take three squares.
    """
    parts = panels(len(square), size)
    for part in reversed(parts):
        T = _cholesky_backwards(square[part, part])
        if T is None:
            return False
        _set(square[part, part], upper=T)
        above = square[: part.start, part]
        above.copy_(torch.linalg.solve_triangular(T.T, above, upper=False, left=False))
        for left in panels(part.start, size):
            square[: left.start, left].addmm_(above[: left.start], above[left].T, alpha=-1)
            _set(square[left, left], upper=torch.addmm(square[left, left], above[left], above[left].T, alpha=-1))
    for part in parts:
        T = square[part, part].triu()
        inverse = torch.linalg.solve_triangular(T, torch.eye(len(T), dtype=T.dtype, device=T.device), upper=True)
        _set(square[part, part], upper=inverse)
        above = square[: part.start, part]
        for rows in panels(part.start, size):  # each reads the ones after it, as they were
            product = square[rows, rows].triu() @ above[rows] + square[rows, rows.stop : part.start] @ above[rows.stop :]
            above[rows] = product.neg_() @ inverse
    return True


def _cholesky_backwards(corner: torch.Tensor) -> torch.Tensor | None:
    """T, upper, with T T^T the symmetric matrix whose upper triangle `corner` [P, P] holds; None if it is not positive definite."""
    symmetric = corner.triu() + corner.triu(1).T
    L, failed = torch.linalg.cholesky_ex(symmetric.flip(0, 1))
    return None if failed or not torch.isfinite(L.diagonal()).all() else L.flip(0, 1)


# --- products --------------------------------------------------------------------------------------------------


def times(A: torch.Tensor, M: "Symmetric | torch.Tensor") -> torch.Tensor:
    """A M, for `A` [J, I] and a symmetric or plain M [I, I], which may lie on another device: it comes by panels."""
    found, symmetric = torch.empty_like(A), isinstance(M, Symmetric)
    for part in panels(A.shape[1]):
        if symmetric and M.square.device == A.device:
            found[:, part] = M.after(A, part)
        else:
            found[:, part] = A @ (M.rows(part).T if symmetric else M[:, part]).to(A)
    return found


def times_whole(A: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """A M in float32, for an `A` [J, I] of small whole numbers in float32.

    They, and the three parts of 8 bits that make up a float32, are exact in bfloat16, and on a GPU three products on tensor cores
    take a fifth of the time of one in float32.
    """
    if not kernels.on_gpu(A):
        return A @ M
    A, total = A.bfloat16(), 0
    for _ in range(3):
        part = M.bfloat16()
        total, M = _product(A, part).add_(total), M - part
    return total


def times_inverse_(A: torch.Tensor, U: Triangular) -> torch.Tensor:
    """Replace `A` [J, I], columns in solver order, by A inv(H) = (A U^T) U; U may lie on another device.

    Each panel is written over what no later one reads, and skips the half of U that is 0.
    """
    parts = panels(A.shape[1])
    for part in parts:
        A[:, part] = A[:, part.start :] @ U.rows(part).to(A).T
    for part in reversed(parts):
        A[:, part] = A[:, : part.stop] @ U.columns(part).to(A)
    return A
