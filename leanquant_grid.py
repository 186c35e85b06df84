"""Grids: weights and their sensitivity in, quantization levels out.

Three grids, all learned for every row (or every group of a row) at once, on any device:

* `kmeans_levels`   non-uniform, 2**bits free levels a row: weighted 1-D k-means (paper, section 3.2.1);
* `affine_search`   a scale and an integer zero point that minimise the weighted error over the paper's
                    (T/2)^2 shrunken ranges (section 3.2.2); `symmetric_search`: a scale, which may be negative, the zero point fixed;
* `minmax_affine`   the scale and zero point of GPTQ and of round-to-nearest; `digits_affine`: for 8 bits.

This file knows tensors and numbers only: no model, no settings object, no file format.
Legend: O rows, I columns, n points of a row or group, K = 2**bits levels, m bins, T partitions.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from leanquant import kernels

CUDA_SOURCE = Path(__file__).with_name("fused_kernel.cu")

# Smallest positive number that fp16, the stored dtype of scales, can hold.
MIN_SCALE = 2.0**-24
# Differences of float64 prefix sums below this share of their total are rounding noise.
NOISE = 1e-14
# Elements of a chunk of rows: in k-means, at about 60 bytes each; of its tables, at 24; in the published k-means, at about 200.
KMEANS_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
TABLE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}
LOCAL_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}
STRIDE, PEAKS = 16, 2  # of the search for scales, as in CUDA_SOURCE: every STRIDE-th, then those around the PEAKS best of them
BLOCK = 32  # of those every STRIDE-th, how many are judged before the next question whether any more can be better
SEARCH_BYTES = {"cpu": 2**22, "cuda": 2**30}  # of a chunk of rows, or of tables, in the search for scales: what a CPU's caches hold


def sensitivity(diagonal: torch.Tensor, exponent: float) -> torch.Tensor:
    """How much the loss minds an error in each column: a_i = d_i^-exponent, geometric mean 1.

    `diagonal` [I] > 0: of U, the upper Cholesky factor of the inverse damped Hessian in the solver's order, as in the published
    code; or of the inverse itself, the squared lengths of U's columns, as in the paper's text (section 3.2). Returns float64 [I].
    Computed through logarithms, because 1e-10 ** -4 overflows float32, and limited to e^+-60.
    """
    log_diagonal = diagonal.double().log()
    return ((log_diagonal.mean() - log_diagonal) * exponent).clamp(-60, 60).exp()


# --- non-uniform -----------------------------------------------------------------------------------------------


def kmeans_levels(W: torch.Tensor, a: torch.Tensor, bits: int, bins: int = 128) -> torch.Tensor:
    """Levels that minimise sum_i a_i (w_i - nearest level)^2, for each row of `W` [O, I]; `a` [I] or [O, I] > 0.

    Returns ascending float32 [O, K]. Exact dynamic program on `bins` adaptive bins, then Lloyd's iteration on
    the points themselves: within 0.1 % of the global optimum on average at 128 bins, exact where I <= bins.
    Constant rows and rows with fewer than K distinct values get repeated levels.
    """
    K, bins = 2**bits, min(bins, W.shape[1])
    chunk = max(1, KMEANS_ELEMENTS[_kind(W)] // W.shape[1])
    return torch.cat([_kmeans_rows(rows, a_rows, K, bins) for rows, a_rows in _row_chunks(W, a, chunk)])


def _kind(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def _row_chunks(W: torch.Tensor, a: torch.Tensor, chunk: int):
    """`chunk` rows of `W` [O, n] at a time, with what `a`, [n] or [P, n], holds for each: row r has number r % P."""
    a = a.view(-1, a.shape[-1])
    for start in range(0, len(W), chunk):
        rows = W[start : start + chunk].float()
        yield rows, a.expand_as(rows) if len(a) == 1 else a[torch.arange(start, start + len(rows), device=a.device) % len(a)]


class _Sorted(NamedTuple):
    """Rows sorted ascending, with float64 prefix sums from which any run [i, j) of points is judged.

    w [R, n]; A [R, n+1] sums of a; B [R, n+1] sums of a (w - center); center [R, 1], the weighted mean:
    centering keeps the differences of B exact enough.
    """

    w: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    a: torch.Tensor
    center: torch.Tensor


def _sort_rows(W: torch.Tensor, a: torch.Tensor, centered: bool) -> _Sorted:
    w, order = W.sort(dim=1)
    a = a.gather(1, order).double()
    A = torch.nn.functional.pad(a.cumsum(1), (1, 0))
    center = (a * w).sum(1, keepdim=True) / A[:, -1:] if centered else torch.zeros_like(A[:, :1])
    B = torch.nn.functional.pad((a * (w - center)).cumsum(1), (1, 0))
    return _Sorted(w, A, B, a, center)


def local_kmeans_levels(W: torch.Tensor, a: torch.Tensor, bits: int, seed: int = 0, start: str = "published") -> torch.Tensor:
    """The published code's grid: Lloyd's iteration from one start, a local optimum of the objective of `kmeans_levels`.

    start: "uniform", equally spaced levels from the smallest to the largest weight; "plusplus", drawn at random, depending on
    `seed` and on a row's place among the rows; "published", uniform for 4 and 8 levels and plusplus for 16.
    """
    K = 2**bits
    is_uniform = start == "uniform" or (start == "published" and K <= 8)
    chunk = max(1, LOCAL_ELEMENTS[_kind(W)] // W.shape[1])
    generator = torch.Generator(W.device).manual_seed(seed)
    levels = []
    for rows, a_rows in _row_chunks(W, a, chunk):
        s = _sort_rows(rows, a_rows, centered=True)
        first = _uniform_start(s, K) if is_uniform else _plusplus_start(s, K, generator)
        levels.append(_lloyd(s, _borders_between(s, first)).float())
    return torch.cat(levels)


def _uniform_start(s: _Sorted, K: int) -> torch.Tensor:
    """K equally spaced levels [R, K] from the smallest to the largest weight."""
    return s.w[:, :1] + (s.w[:, -1:] - s.w[:, :1]) * torch.linspace(0, 1, K, device=s.w.device)


def _plusplus_start(s: _Sorted, K: int, generator: torch.Generator) -> torch.Tensor:
    """K of the weights [R, K], ascending, by greedy k-means++ (Arthur and Vassilvitskii, 2007).

    The first is drawn by its sensitivity; each next one is the best of 2 + ln K, rounded down, drawn by sensitivity times
    squared distance to the nearest one so far.
    """
    w = s.w.double()
    first = torch.multinomial(s.a, 1, generator=generator)
    chosen = w.gather(1, first)
    distance = (w - chosen).square()
    for _ in range(K - 1):
        chance = (s.a * distance).clamp(min=0) + 1e-300
        drawn = w.gather(1, torch.multinomial(chance, 2 + int(math.log(K)), replacement=True, generator=generator))
        closer = torch.minimum((w.unsqueeze(1) - drawn.unsqueeze(2)).square(), distance.unsqueeze(1))
        pick = (closer * s.a.unsqueeze(1)).sum(2).argmin(1, keepdim=True)
        chosen = torch.cat([chosen, drawn.gather(1, pick)], 1)
        distance = closer.gather(1, pick.unsqueeze(2).expand(-1, -1, w.shape[1])).squeeze(1)
    return chosen.sort(1).values.float()


def _borders_between(s: _Sorted, levels: torch.Tensor) -> torch.Tensor:
    """Where the nearest of `levels` [R, K] changes, as positions [R, K+1] in the sorted rows, with both ends."""
    inner = torch.searchsorted(s.w, ((levels[:, 1:] + levels[:, :-1]) / 2).float(), right=True)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0), value=0), (0, 1), value=s.w.shape[1])


def _kmeans_rows(W: torch.Tensor, a: torch.Tensor, K: int, bins: int) -> torch.Tensor:
    s = _sort_rows(W, a, centered=True)
    borders = _best_borders(s, _candidate_borders(s, bins), K)
    return _lloyd(s, borders).float()


def _candidate_borders(s: _Sorted, m: int) -> torch.Tensor:
    """Where clusters may begin: positions [R, m+1] in the sorted row, first 0, last n.

    Equal quantiles of a measure that is large where neighbouring points are heavy and far apart:
    (sqrt(h) gap)^(2/3), h = a_i a_{i+1} / (a_i + a_{i+1}), plus a floor of 1 % of its mean.
    """
    n = s.w.shape[1]
    if n <= m:
        return torch.arange(n + 1, device=s.w.device).expand(len(s.w), -1)
    left, right = s.a[:, :-1], s.a[:, 1:]
    gap = s.w.diff(dim=1).double() / (s.w[:, -1:] - s.w[:, :1]).double().clamp(min=1e-300)
    measure = (left * right / (left + right) * gap.square()).float().pow(1 / 3)
    measure = measure.cumsum(1, dtype=torch.float64)
    measure += 0.01 * measure[:, -1:] * torch.linspace(1 / (n - 1), 1, n - 1, device=s.w.device, dtype=torch.float64)
    quantiles = measure[:, -1:] * torch.linspace(0, 1, m + 1, device=s.w.device, dtype=torch.float64)[1:-1]
    inner = torch.searchsorted(measure, quantiles).clamp_(max=n - 2) + 1  # a border lies after its gap
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0), value=0), (0, 1), value=n)


def _best_borders(s: _Sorted, candidates: torch.Tensor, K: int) -> torch.Tensor:
    """The K - 1 candidates that minimise the k-means cost exactly: positions [R, K+1] with both ends.

    F_t[j] = max_i F_{t-1}[i] + (B_j - B_i)^2 / (A_j - A_i). The argmax is recomputed on the way back for
    one j a row, which is cheaper than an argmax over everything on the way there.
    """
    A, B = s.A.gather(1, candidates), s.B.gather(1, candidates)
    # In units of the row's own totals, so that their squares fit float32 whatever the units of the weights.
    A, B = A / A[:, -1:], B / B.abs().amax(1, keepdim=True).clamp(min=1e-300)
    m1 = A.shape[1]
    # The table [rows, m+1, m+1] of gains is read K times: it should stay in the cache of a core. Its memory is
    # allocated once, because fresh pages cost more than the arithmetic.
    rows = max(1, TABLE_ELEMENTS[_kind(A)] // m1**2)
    wide = torch.empty(2, min(rows, len(A)), m1, m1, dtype=torch.float64, device=A.device)
    narrow = torch.empty_like(wide, dtype=torch.float32)
    backward = torch.ones(m1, m1, dtype=torch.bool, device=A.device).tril(-1)
    paths = []
    for A_rows, B_rows in zip(A.split(rows), B.split(rows), strict=True):
        gains, table = _run_gains(A_rows, B_rows, wide[:, : len(A_rows)], narrow[:, : len(A_rows)])
        paths.append(_best_path(gains.masked_fill_(backward, -math.inf), table, K))
    return candidates.gather(1, torch.cat(paths))


def _run_gains(A: torch.Tensor, B: torch.Tensor, wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """What the run i..j saves when one level at its mean replaces the overall mean: dB^2 / dA, float32 [R, m+1, m+1].

    The differences are taken in float64. A floor of rounding size on dA makes runs without weight save nothing.
    Returns `narrow`, overwritten: the gains and a scratch table.
    """
    torch.sub((A + NOISE)[:, None, :], A[:, :, None], out=wide[0])
    torch.sub(B[:, None, :], B[:, :, None], out=wide[1])
    narrow.copy_(wide)
    narrow[1].square_()
    torch.div(narrow[1], narrow[0], out=narrow[0])
    return narrow


def _best_path(gains: torch.Tensor, table: torch.Tensor, K: int) -> torch.Tensor:
    """Indices [R, K+1] of the K - 1 inner borders that `gains` [R, m+1, m+1] make best, with 0 and m at the ends."""
    F = [gains[:, 0]]
    for _ in range(K - 2):
        F.append(torch.add(F[-1].unsqueeze(2), gains, out=table).amax(1))
    j = torch.full((len(gains), 1), gains.shape[1] - 1, device=gains.device)
    path = [j]
    for best_to in reversed(F):
        to_j = gains.gather(2, j.unsqueeze(1).expand(-1, gains.shape[1], -1)).squeeze(2)
        j = (best_to + to_j).argmax(1, keepdim=True)
        path.append(j)
    path.append(torch.zeros_like(j))
    return torch.cat(path[::-1], 1)


def _cluster_means(s: _Sorted, borders: torch.Tensor) -> torch.Tensor:
    """Weighted mean of each run [R, K], kept inside its run so that levels ascend; an empty run takes its border."""
    n = s.w.shape[1]
    A, B = s.A.gather(1, borders), s.B.gather(1, borders)
    means = B.diff(dim=1) / A.diff(dim=1).clamp(min=1e-300) + s.center
    low = s.w.gather(1, borders[:, :-1].clamp(max=n - 1)).double()
    high = s.w.gather(1, (borders[:, 1:] - 1).clamp(min=0)).double()
    return torch.minimum(torch.maximum(means, low), torch.maximum(low, high))


def _lloyd(s: _Sorted, borders: torch.Tensor, max_steps: int = 100) -> torch.Tensor:
    """Lloyd's iteration from `borders` until no point changes its level. Returns levels [R, K] in float64."""
    levels = _cluster_means(s, borders)
    active = torch.arange(len(s.w), device=s.w.device)
    for _ in range(max_steps):
        live = _Sorted(*(t[active] for t in s)) if len(active) < len(s.w) else s
        moved_borders = _borders_between(live, levels[active])
        moved = (moved_borders != borders[active]).any(1)
        active = active[moved]
        if not len(active):
            break
        borders = borders.index_copy(0, active, moved_borders[moved])
        levels[active] = _cluster_means(_Sorted(*(t[moved] for t in live)), moved_borders[moved])
    return levels


# --- affine ----------------------------------------------------------------------------------------------------


class Affine(NamedTuple):
    """w ~ scale * (code - zero): scale float32 [...] that fp16 holds exactly, integer zero uint8 [...] in 0..K-1."""

    scale: torch.Tensor
    zero: torch.Tensor


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """`scale` as the file will hold it (fp16, positive, finite), in its own dtype."""
    return scale.clamp(MIN_SCALE, 65504).half().to(scale.dtype)


def minmax_affine(W: torch.Tensor, bits: int, sym: bool = False) -> Affine:
    """Scale and zero from each row's range, as in GPTQ: `W` [O, n] -> [O]. The range is widened to include 0."""
    maxq = 2**bits - 1
    low, high = W.amin(1).clamp(max=0).float(), W.amax(1).clamp(min=0).float()
    if sym:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    scale = stored_scale((high - low) / maxq)
    zero = torch.full_like(scale, (maxq + 1) // 2) if sym else (-low / scale).round().clamp(0, maxq)
    return Affine(scale, zero.to(torch.uint8))


def digits_affine(W: torch.Tensor) -> Affine:
    """`minmax_affine` for 8 bits: a scale that is a sixteenth of one that fp16 holds, a zero that is a multiple of 17.

    Such a code is two digits to base 16, each with the same scale, but for the 16, and the same zero.
    """
    low, high = W.amin(1).clamp(max=0).float(), W.amax(1).clamp(min=0).float()
    share = torch.where(low < high, -low / (high - low), 0)
    zero = 17 * (15 * share).round().clamp(1, 14)
    scale = torch.maximum(-low / zero, high / (255 - zero))
    scale = stored_scale(16 * torch.where(scale > 0, scale, 1)) / 16
    return Affine(scale, zero.to(torch.uint8))


def affine_search(W: torch.Tensor, a: torch.Tensor, bits: int, partitions: int = 2048, exhaustive: bool = False) -> Affine:
    """The (scale, zero) of least sum_i a_i (w_i - q(w_i))^2 for each row of `W` [O, n]; `a` [n] or [P, n] > 0, of which row r has
    number r % P.

    Candidates (paper, section 3.2.2): the row's range, widened to include 0, loses t_min R/T at its low end and
    t_max R/T at its high end, 0 <= t_min, t_max < T/2 with T = `partitions`; scale S = fp16(rest / (K-1)), zero
    Z = round(-low/S) clamped to 0..K-1. S depends on t = t_min + t_max alone, and all Z of an S are judged
    together from prefix sums. `exhaustive` judges every distinct candidate: the exact minimum of the whole set.
    Otherwise coarse to fine: every 16th t, then all within 15 of the 2 best. Ties go to the smallest t, then Z.
    """
    if partitions < 2 or partitions % 2:
        raise ValueError(f"partitions must be even and at least 2, not {partitions}")
    chunk = max(1, SEARCH_BYTES[_kind(W)] // (60 * W.shape[1]))
    return _joined([_affine_rows(rows, a_rows, 2**bits, partitions, exhaustive) for rows, a_rows in _row_chunks(W, a, chunk)])


def _joined(pieces: list[Affine]) -> Affine:
    return Affine(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _affine_rows(W: torch.Tensor, a: torch.Tensor, K: int, T: int, exhaustive: bool) -> Affine:
    s = _sort_rows(W, a, centered=False)
    return kernels.run(_search_affine_cuda, _search_affine, s.w, s.A, s.B, K, T, exhaustive or T <= 64)


def _search_affine_cuda(w, A, B, K: int, T: int, exhaustive: bool) -> Affine:
    """`_search_affine` in one launch, a thread block a row."""
    R, n = w.shape
    if A.shape != (R, n + 1) or B.shape != (R, n + 1):
        raise ValueError(f"prefix sums {tuple(A.shape)}, {tuple(B.shape)} do not fit points {tuple(w.shape)}")
    kernel = kernels.Kernel(
        CUDA_SOURCE, f"search_affine_{K}", (torch.float32, *2 * [torch.float64], torch.float32, torch.uint8, int, int, int)
    )
    scale, zero = torch.empty(R, device=w.device), torch.empty(R, dtype=torch.uint8, device=w.device)
    threads, coarse = 128, (T - 2) // STRIDE + 1
    kernels.launch(kernel, (R, 1), threads, 16 * threads + 8 * coarse + 4 * PEAKS, w, A, B, scale, zero, n, T, int(exhaustive))
    return Affine(scale, zero)


def _search_affine(w, A, B, K: int, T: int, exhaustive: bool) -> Affine:
    """The best (scale, zero) [R] for rows of ascending points `w` [R, n] with prefix sums `A`, `B` [R, n+1]; see `affine_search`."""
    candidates = T if exhaustive else max(BLOCK, PEAKS * (2 * STRIDE - 1))
    rows = max(1, SEARCH_BYTES[_kind(w)] // (100 * K * candidates + 70 * w.shape[1]))  # of tables, and of what is judged on the way
    pieces = zip(w.split(rows), A.split(rows), B.split(rows), strict=True)
    return _joined([_search_affine_rows(*piece, K, T, exhaustive) for piece in pieces])


def _search_affine_rows(w, A, B, K: int, T: int, exhaustive: bool) -> Affine:
    low, high = w[:, :1].double().clamp(max=0), w[:, -1:].double().clamp(min=0)
    t = torch.arange(T - 1, device=w.device).expand(len(w), -1)
    if not exhaustive:
        coarse = t[:, ::STRIDE]
        best = coarse.gather(1, _first_peaks(_coarse_gains(w, A, B, low, high, coarse, K, T)))
        t = _around(best, T - 2)
    gain = _gains(w, A, B, low, high, t, K, T)
    place = _first_largest(gain.amax(2)).unsqueeze(2)
    zero = _first_largest(gain.gather(1, place.expand(-1, 1, K)).squeeze(1))
    return Affine(_scales(low, high, t.gather(1, place.squeeze(2)), K, T).squeeze(1).float(), zero.squeeze(1).to(torch.uint8))


def _first_peaks(gain: torch.Tensor) -> torch.Tensor:
    """Indices [R, PEAKS] of the largest of `gain` [R, N], the first of equals first."""
    return gain.sort(dim=1, descending=True, stable=True).indices[:, :PEAKS]


def _around(t: torch.Tensor, last: int) -> torch.Tensor:
    """Ascending, what lies within a stride of any `t` [R, PEAKS] and in 0..last."""
    return (t.unsqueeze(2) + torch.arange(1 - STRIDE, STRIDE, device=t.device)).flatten(1).clamp(0, last).sort(1).values


def _coarse_gains(w, A, B, low, high, t: torch.Tensor, K: int, T: int) -> torch.Tensor:
    """The gain of the best zero for each t [R, N], ascending; -inf where it cannot be among the PEAKS best of its row.

    A smaller scale spans less: once what the points beyond the span cost at least, whatever the zero, leaves less gain than PEAKS
    larger scales have, no further t is judged. That is most of them at 4 bits.
    """
    gain = torch.full(t.shape, -math.inf, dtype=torch.float64, device=t.device)
    live, rows = torch.arange(len(t), device=t.device), [w, A, B, low, high]
    for start in range(0, t.shape[1], BLOCK):
        if start:
            least = gain[live].topk(PEAKS, dim=1).values
            kept = _gain_ceiling(*rows, t[live, start, None], K, T)[:, 0] > least[:, -1]
            live, rows = live[kept], [tensor[kept] for tensor in rows]
        if not len(live):
            break
        gain[live, start : start + BLOCK] = _gains(*rows, t[live, start : start + BLOCK], K, T).amax(2)
    return gain


def _gain_ceiling(w, A, B, low, high, t: torch.Tensor, K: int, T: int) -> torch.Tensor:
    """More than this [R, 1] no scale of `t` [R, 1] or a later one gains: as if only points beyond its span, -S Z .. S (K-1-Z), cost."""
    a = A.diff(dim=1)
    C = torch.nn.functional.pad((a * w.double().square()).cumsum(1), (1, 0))
    S = _scales(low, high, t, K, T)
    Z = torch.arange(K, device=t.device, dtype=torch.float64)
    first, last = -S * Z, S * (K - 1 - Z)
    i, j = torch.searchsorted(w, first.float()), torch.searchsorted(w, last.float())
    Ai, Bi, Ci, Aj, Bj, Cj = (prefix.gather(1, place) for place in (i, j) for prefix in (A, B, C))
    below = Ci - 2 * first * Bi + first.square() * Ai
    above = C[:, -1:] - Cj - 2 * last * (B[:, -1:] - Bj) + last.square() * (A[:, -1:] - Aj)
    noise = NOISE * (C[:, -1:] + A[:, -1:] * (high - low).square())
    return C[:, -1:] + noise - (below + above).amin(1, keepdim=True)


def _first_largest(values: torch.Tensor) -> torch.Tensor:
    """Index [R, 1] of the first of the largest of `values` [R, N]; argmax promises nothing about ties."""
    places = torch.arange(values.shape[1], device=values.device)
    return torch.where(values == values.amax(1, keepdim=True), places, len(places)).amin(1, keepdim=True)


def _scales(low, high, t, K: int, T: int) -> torch.Tensor:
    return stored_scale((high - low) * (1 - t.double() / T) / (K - 1))


def _gains(w, A, B, low, high, t: torch.Tensor, K: int, T: int) -> torch.Tensor:
    """For each t [R, N] and zero: sum a w^2 minus the cost; -inf for zeros that t cannot reach; [R, N, K].

    With r = code - Z and borders b_r = S (r + 1/2), the run of points below border r has prefix sums PA_r, PB_r. Summing
    by parts, gain(Z) = S r_t (2 B - S r_t A) - 2 S sum (PB_r - b_r PA_r), r_t = K-1-Z, r from -Z to r_t - 1:
    windows of one cumulative sum over r = -(K-1) .. K-2, so each Z costs O(1).
    """
    S = _scales(low, high, t, K, T).unsqueeze(2)
    r = torch.arange(1 - K, K - 1, device=t.device, dtype=torch.float64)
    borders = S * (r + 0.5)
    position = torch.searchsorted(w, borders.float().flatten(1))
    PA = A.gather(1, position).view(borders.shape)
    PB = B.gather(1, position).view(borders.shape)
    sums = torch.nn.functional.pad(PB.addcmul_(borders, PA, value=-1).cumsum(2), (1, 0))
    windows = sums[..., K - 1 :] - sums[..., :K]  # [R, N, K], window k begins at r = k - (K-1), that is Z = K-1-k
    top = S * torch.arange(K, device=t.device, dtype=torch.float64)  # r_t = k
    gain = torch.addcmul(2 * B[:, -1].view(-1, 1, 1), top, A[:, -1].view(-1, 1, 1), value=-1).mul_(top).addcmul_(S, windows, value=-2)
    return gain.flip(2).masked_fill_(~_reachable_zeros(S, low, high, t, K, T), -math.inf)


def _reachable_zeros(S, low, high, t: torch.Tensor, K: int, T: int) -> torch.Tensor:
    """Which zeros Z some split t = t_min + t_max leads to: bool [R, N, K].

    Z falls as t_min grows. Where it moves by less than 1 each time (all but the most extreme shrinks), all between its ends are
    reached. Else an inner Z is reached if it is by the t_min that brings -low/S nearest to it; 0 and K-1, onto which the rest
    is clamped, also by either end of the range of t_min.
    """
    S, step = S.squeeze(2), (high - low) / T
    inverse, inverse_step = 1 / S, 1 / step.clamp(min=1e-300)
    zero_of = lambda t_min, low, step, inverse: (-(low + t_min * step) * inverse).round().clamp(0, K - 1)  # noqa: E731
    first, last = (t - T // 2 + 1).clamp(min=0), t.clamp(max=T // 2 - 1)
    most, least = zero_of(first, low, step, inverse), zero_of(last, low, step, inverse)
    Z = torch.arange(K, device=t.device, dtype=torch.float64)
    reached = (Z <= most.unsqueeze(2)) & (Z >= least.unsqueeze(2))
    some = (step * inverse >= 1).nonzero(as_tuple=True)
    if len(some[0]):
        pick = lambda values: values.expand_as(t)[some].unsqueeze(1)  # noqa: E731
        S, low, step, inverse, inverse_step, first, last, most, least = map(
            pick, (S, low, step, inverse, inverse_step, first, last, most, least)
        )
        nearest = torch.minimum(torch.maximum(((-Z * S - low) * inverse_step).round(), first), last)
        reached[some] = (zero_of(nearest, low, step, inverse) == Z) | (most == Z) | (least == Z)
    return reached


def symmetric_search(W: torch.Tensor, a: torch.Tensor, bits: int, partitions: int = 2048, exhaustive: bool = False) -> Affine:
    """`affine_search` with the zero K/2 or K/2 - 1, for readers that know K/2 alone (`with_middle_zero`): `W` [O, n], `a` as there.

    Candidates: scale S = fp16(max |w| / (K/2 - 1) (1 - t/T)), 0 <= t < T = `partitions`, levels -S K/2 .. S (K/2 - 1) or
    -S (K/2 - 1) .. S K/2: of an even number of levels one side has one more, which not all rows need on the same one.
    `exhaustive` judges them all; otherwise coarse to fine as there. Ties go to the smallest t, then K/2.
    """
    K, T = 2**bits, partitions
    candidates = T if exhaustive else max(-(-T // STRIDE), PEAKS * (2 * STRIDE - 1))
    chunk = max(1, SEARCH_BYTES[_kind(W)] // (60 * W.shape[1] + 60 * K * candidates))
    return _joined([_symmetric_rows(rows, a_rows, K, T, exhaustive) for rows, a_rows in _row_chunks(W, a, chunk)])


def _symmetric_rows(W: torch.Tensor, a: torch.Tensor, K: int, T: int, exhaustive: bool) -> Affine:
    s = _sort_rows(W, a, centered=False)
    largest = torch.maximum(-s.w[:, :1], s.w[:, -1:]).double() / (K // 2 - 1)
    scales = lambda t: stored_scale(largest * (1 - t.double() / T))  # noqa: E731
    t = torch.arange(T, device=W.device).expand(len(W), -1)
    if not exhaustive:
        coarse = t[:, ::STRIDE]
        t = _around(coarse.gather(1, _first_peaks(torch.maximum(*_symmetric_gains(s, scales(coarse), K)))), T - 1)
    gain, mirrored = _symmetric_gains(s, scales(t), K)
    best = _first_largest(torch.maximum(gain, mirrored))
    zero = K // 2 - (mirrored.gather(1, best) > gain.gather(1, best)).to(torch.uint8)
    return Affine(scales(t.gather(1, best)).squeeze(1).float(), zero.squeeze(1))


def _symmetric_gains(s: _Sorted, S: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each scale `S` [R, N] and the zeros K/2 and K/2 - 1: sum a w^2 minus the cost; [R, N] each.

    With K + 1 levels S r, -K/2 <= r <= K/2, it is the sum over r of 2 S r dB - S^2 r^2 dA. Either zero lacks the level at one end: its
    points go to the next, whose term for them is by 2 S dB - S^2 (K - 1) dA less, at the other end with the sign of dB changed.
    """
    r = torch.arange(K + 1, device=S.device, dtype=torch.float64) - K // 2
    position = torch.searchsorted(s.w, (S.unsqueeze(2) * (r[1:] - 0.5)).float().flatten(1))
    ends = torch.nn.functional.pad(torch.nn.functional.pad(position.view(*S.shape, -1), (1, 0)), (0, 1), value=s.w.shape[1]).flatten(1)
    dA, dB = (prefix.gather(1, ends).view(*S.shape, -1).diff(dim=2) for prefix in (s.A, s.B))
    gain = S * (2 * (dB * r).sum(2) - S * (dA * r.square()).sum(2))
    return tuple(gain - S * (2 * sign * dB[..., end] - S * (K - 1) * dA[..., end]) for sign, end in ((1, -1), (-1, 0)))


def with_middle_zero(codes: torch.Tensor, affine: Affine, bits: int) -> tuple[torch.Tensor, Affine]:
    """The same weights with the zero K/2 everywhere: where it is K/2 - 1, the scale becomes negative and codes are counted from the other
    end. Codes uint8 [O, I], scale and zero [O, G]."""
    mirrored = affine.zero == 2 ** (bits - 1) - 1
    scale = torch.where(mirrored, -affine.scale, affine.scale)
    wide = mirrored.repeat_interleave(codes.shape[1] // mirrored.shape[1], 1)
    return torch.where(wide, 2**bits - 1 - codes, codes), Affine(scale, affine.zero + mirrored)
