"""How close the grids come to the optimum, and what they cost, on real rows of SmolLM2-135M with real sensitivities.

    python scripts/bench_grid.py [--rows 500] [--out docs/results/grid-cpu.json]

Rows are drawn from all linears of four layers; sensitivities come from Hessians of the unquantized model on 8 x 512
calibration tokens. Non-uniform: excess of 128 and 256 bins over the exact program. Affine: excess of the coarse-to-fine
search over the exhaustive one, and the time of both beside the paper's brute force over all its candidates, on three rows.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datautils  # noqa: E402
import hessian  # noqa: E402
import modelutils  # noqa: E402
import quant  # noqa: E402
from demo_data import make_model, make_texts  # noqa: E402
from leanquant.packing import Checkpoint, affine_levels  # noqa: E402
from leanquant_grid import affine_search, kmeans_levels, sensitivity, stored_scale  # noqa: E402

LAYERS = (0, 9, 19, 29)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "grid-cpu.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    (ROOT / "demo").mkdir(exist_ok=True)
    folder = ROOT / "demo" / "SmolLM2-135M-Instruct"
    make_model(folder)
    calibration, _ = make_texts(ROOT / "demo")
    samples = real_rows(folder, calibration, args.rows)
    results = [compare(samples, bits) for bits in (4, 3, 2)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"rows": sum(len(W) for W, _ in samples), "threads": torch.get_num_threads(), "results": results}, indent=2) + "\n"
    )


def real_rows(folder: Path, calibration: Path, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(W [r, I], a [I]) for each linear of `LAYERS`; rows drawn at random, `count` in all."""
    model = modelutils.StreamedModel(folder, Checkpoint.open(folder), torch.float32, torch.device("cpu"))
    ids = datautils.calibration_windows(str(calibration), modelutils.load_tokenizer(folder), 8, 512, 0)
    stream = model.embed(ids, 4)
    generator, samples = torch.Generator().manual_seed(0), []
    linears = len(LAYERS) * 7
    for index in range(len(model.layers)):
        with model.layer(index) as layer:
            groups = model.groups(index, stream) if index in LAYERS else []
            widths = [layer.get_submodule(group.linears[0]).in_features for group in groups]
            hessians = [torch.zeros(width, width) for width in widths]
            for seen in model.inputs(index, stream, groups) if groups else ():
                for H, (X, _) in zip(hessians, seen, strict=True):
                    hessian.accumulate_hessian(H, X.flatten(0, -2))
            for group, H in zip(groups, hessians, strict=True):
                factor = hessian.factorize(H / ids.numel(), 0.1, True)
                a = torch.empty(len(H), dtype=torch.float64)
                a[factor.order] = sensitivity(factor.U.diagonal(), 4.0)
                for name in group.linears:
                    W = layer.get_submodule(name).weight
                    want = (count - sum(len(w) for w, _ in samples)) // (linears - len(samples))
                    samples.append((W[torch.randperm(len(W), generator=generator)[:want]].clone(), a))
            model.advance(index, stream)
    return samples


def objective(W: torch.Tensor, a: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    nearest = levels.gather(1, quant.nearest_codes(W, levels)).double()
    return (a * (W.double() - nearest).square()).sum(1)


def compare(samples, bits: int) -> dict:
    grids = {
        "k-means, exact program": lambda W, a: kmeans_levels(W, a, bits, bins=W.shape[1]),
        "k-means, 128 bins": lambda W, a: kmeans_levels(W, a, bits),
        "k-means, 256 bins": lambda W, a: kmeans_levels(W, a, bits, bins=256),
        "affine, exhaustive": lambda W, a: affine_levels(*affine_search(W, a, bits, exhaustive=True), bits),
        "affine, coarse to fine": lambda W, a: affine_levels(*affine_search(W, a, bits), bits),
    }
    result, best = {"bits": bits}, {}
    for name, learn in grids.items():
        kind, start = name.split(",")[0], time.perf_counter()
        levels = [learn(W, a) for W, a in samples]
        milliseconds = 1e3 * (time.perf_counter() - start) / sum(len(W) for W, _ in samples)
        cost = torch.cat([objective(W, a, found) for (W, a), found in zip(samples, levels, strict=True)])
        excess = cost / best.setdefault(kind, cost) - 1
        result[name] = {"mean_excess": excess.mean().item(), "worst_excess": excess.max().item(), "ms_per_row": milliseconds}
        print(
            f"{bits} bit  {name:<24} mean excess {excess.mean():8.4%}  worst {excess.max():8.3%}  {milliseconds:.2f} ms a row", flush=True
        )
    result["affine, brute force"] = {"ms_per_row": time_brute_force(samples, bits)}
    print(f"{bits} bit  affine, brute force over all candidates {result['affine, brute force']['ms_per_row']:.0f} ms a row", flush=True)
    return result


def time_brute_force(samples, bits: int, rows: int = 3, T: int = 2048) -> float:
    """Milliseconds a row for judging each of the paper's (T/2)^2 candidates by a pass over the row's points, in float32."""
    step = len(samples) // rows
    start = time.perf_counter()
    for W, a in samples[: step * rows : step]:
        brute_force(W[0], a.float(), 2**bits, T)
    return 1e3 * (time.perf_counter() - start) / rows


def brute_force(w: torch.Tensor, a: torch.Tensor, K: int, T: int) -> tuple[float, float]:
    """The (scale, zero) of least sum a (w - q(w))^2 over all t_min, t_max (paper, section 3.2.2)."""
    low, high = w.min().clamp(max=0), w.max().clamp(min=0)
    shrink, best = (high - low) / T * torch.arange(T // 2).float(), (torch.inf, 0.0, 0.0)
    for rise in shrink:
        scale = stored_scale((high - shrink - low - rise) / (K - 1)).unsqueeze(1)
        zero = (-(low + rise) / scale).round().clamp(0, K - 1)
        q = ((w / scale).round() + zero).clamp(0, K - 1) - zero
        cost = (a * (w - scale * q).square()).sum(1)
        least = int(cost.argmin())
        best = min(best, (cost[least].item(), scale[least].item(), zero[least].item()))
    return best[1:]


if __name__ == "__main__":
    main()
