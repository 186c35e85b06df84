"""Quantization speed: each kernel beside its torch twin and the paper's brute force, and layers of Llama-3-8B's shapes.

    python scripts/bench_quantize.py [--device cuda] [--bits 4] [--out docs/results/quantize-gpu.json]

Per matrix, random weights, medians of CUDA events. The brute force runs on a few rows and is scaled to all; the twins are
what a machine without kernels runs. End to end: random weights of the 8B model's decoder layers, random tokens (the time
does not depend on what they say), the whole pipeline from reading the layer to the packed file, a few layers timed and
scaled to 32. Prints tables and what the project promises beside what was measured. Meant to take less than 8 minutes on an H200.
`--smoke` runs everything on tiny sizes, also without a GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import flags  # noqa: E402
import hessian  # noqa: E402
import journal  # noqa: E402
import llama  # noqa: E402
import modelutils  # noqa: E402
import plan  # noqa: E402
import quant  # noqa: E402
import report  # noqa: E402
from leanquant import kernels, packing  # noqa: E402
from leanquant_grid import affine_search, kmeans_levels, sensitivity  # noqa: E402
from ranks import Ranks  # noqa: E402

T = 2048
BRUTE_FORCE = kernels.Kernel(ROOT / "scripts" / "brute_force.cu", "brute_force", (*3 * [torch.float32], torch.uint8, int, int, int))
# Most milliseconds for a 4096 x 4096 matrix at 4 bits on an H200; end to end: seconds for 32 layers, and GB on the device.
PROMISED = {"affine": 20, "affine, exhaustive": 150, "column solver": 5, "k-means": 40, "end to end": 120, "device": 8}
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bits", type=int, default=4)
    add("--shapes", nargs="*", default=["4096x4096", "14336x4096", "4096x14336"], help="matrices, rows x columns")
    add("--layers", type=int, default=3, help="decoder layers to quantize end to end, at least 2")
    add("--windows", type=int, default=128, help="calibration windows")
    add("--seqlen", type=int, default=2048)
    add("--recipes", nargs="*", default=["best", "published"], help="for the end-to-end runs")
    add("--smoke", action="store_true", help="tiny sizes: does it all run?")
    add("--out", type=Path, help="write the results to this JSON file")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(None)
    device = ready(args.device)
    shapes = ["32x64"] if args.smoke else args.shapes
    results = {"machine": machine(device), "bits": args.bits, "matrices": [], "end_to_end": []}
    for O, I in (map(int, shape.split("x")) for shape in shapes):
        results["matrices"].append(bench_matrix(O, I, args.bits, device))
        save(results, args.out)
    for recipe in args.recipes:
        results["end_to_end"].append(bench_layers(args, recipe, device))
        save(results, args.out)
    results["promises"] = promises(results, args)
    save(results, args.out)


def ready(device: str) -> torch.device:
    """Nothing of the environment changes what is timed, and a twin's time does not pass for a kernel's: falling back is an error."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    os.environ.pop("LEANQUANT_KERNELS", None)
    warnings.filterwarnings("error", message=".*runs in torch, which is slower")
    return torch.device(device)


def save(results: dict, out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n")


def machine(device: torch.device) -> dict:
    """What the numbers were measured on."""
    found = {"device": str(device), "torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    for package in ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
        found["gpu"] = torch.cuda.get_device_name(device)
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            found["driver"] = "unknown: no nvidia-smi"
    print(" ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


# --- one matrix ------------------------------------------------------------------------------------------------


def milliseconds(operation: Callable, device: torch.device, budget: float = 3.0) -> float:
    """Median time of `operation`, by events on a GPU: one warm-up, then up to 20 runs or `budget` seconds, at least 3."""
    times, began = [], None
    while began is None or len(times) < 3 or (len(times) < 20 and time.perf_counter() - began < budget):
        if device.type == "cuda":
            taken = milliseconds_by_events(operation)
        else:
            start = time.perf_counter()
            operation()
            taken = 1e3 * (time.perf_counter() - start)
        if began is None:
            began = time.perf_counter()
        else:
            times.append(taken)
    return median(times)


def milliseconds_by_events(operation: Callable) -> float:
    """Of one run on the current GPU."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    operation()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def bench_matrix(O: int, I: int, bits: int, device: torch.device) -> dict:
    """Milliseconds of each step on a random [O, I] matrix, by kernel and by torch twin where it has both."""
    generator = torch.Generator(device).manual_seed(0)
    W = torch.randn(O, I, generator=generator, device=device) * 0.02
    H = random_hessian(I, generator, device)
    config = quant.QuantConfig(bits=bits, act_order=True, percdamp=0.1)
    group = 128 if I % 128 == 0 else 32
    grouped = quant.QuantConfig(bits=bits, grid="affine", groupsize=group, act_order=True, percdamp=0.1)
    factor = hessian.factorize(H.clone(), 0.1, True)
    a = torch.empty(I, dtype=torch.float64, device=device)
    a[factor.order] = sensitivity(factor.U.diagonal(), 4.0)
    grid, grids = quant.learn_grid(W, factor, config), quant.learn_grid(W, factor, grouped)
    solved, damped = quant.quantize(W, grid, factor, config), factor.H
    in_groups = quant.quantize(W, grids, factor, grouped).codes
    twice = {  # what has a kernel and a twin
        "affine": lambda: affine_search(W, a, bits, T),
        "affine, exhaustive": lambda: affine_search(W, a, bits, T, exhaustive=True),
        f"affine, groups of {group}": lambda: quant.learn_grid(W, factor, grouped),
        "column solver": lambda: quant.quantize(W, grid, factor, config),
        "column solver, groups": lambda: quant.quantize(W, grids, factor, grouped),
        "coordinate descent": lambda: quant.descend(W, solved.codes, grid.levels, damped),
    }
    once = {
        "k-means": lambda: kmeans_levels(W, a, bits),
        "fit of levels": lambda: quant.fit_grid(W, solved.codes, grid, damped, config),
        "the same, its equations from all of H": lambda: equations_from_all_of_H(solved.codes, 2**bits, damped),
        f"fit of scales, groups of {group}": lambda: quant.fit_grid(W, in_groups, grids, damped, grouped),
        "the same, its equations from all of B": lambda: equations_from_all_of_B(in_groups, grids, damped),
        "factorization": lambda: hessian.factorize(H.clone(), 0.1, True),
    }
    result = {"rows": O, "columns": I, "kernel_ms": {}, "torch_ms": {}}
    print(f"\n{O} x {I}, {bits} bits{'':<22}kernel ms   torch ms", flush=True)
    for name, operation in twice.items():
        if device.type == "cuda":
            result["kernel_ms"][name] = milliseconds(operation, device)
        os.environ["LEANQUANT_KERNELS"] = "torch"
        result["torch_ms"][name] = milliseconds(operation, device, budget=1.0)
        del os.environ["LEANQUANT_KERNELS"]
        print_row(name, result["kernel_ms"].get(name), result["torch_ms"][name])
    for name, operation in once.items():
        result["torch_ms"][name] = milliseconds(operation, device)
        print_row(name, None, result["torch_ms"][name])
    if device.type == "cuda":
        result["brute_force_ms"] = brute_force_milliseconds(W, a, bits)
        ratio = result["brute_force_ms"] / result["kernel_ms"]["affine, exhaustive"]
        print_row("the paper's brute force, scaled", result["brute_force_ms"], None)
        print(f"  the exhaustive search is {ratio:.0f} times faster than the brute force", flush=True)
    return result


def equations_from_all_of_H(codes: torch.Tensor, K: int, H: hessian.Symmetric) -> None:
    """B H B^T of `quant.fit_grid`, as it is written: not from the half of H below its diagonal."""
    I = codes.shape[1]
    H = H.rows(slice(0, I))
    for part in codes.split(quant.fit_rows(K, I, False, codes.device.type == "cpu")[0]):
        B = quant._one_hot(part, K)
        hessian.times_whole(B.view(-1, I), H).view(B.shape) @ B.mT


def equations_from_all_of_B(codes: torch.Tensor, grid: quant.Grid, H: hessian.Symmetric) -> None:
    """B H B^T of `quant.fit_grid`, as it is written: with a product for each group of each row."""
    (R, I), G = codes.shape, grid.levels.shape[1]
    steps = (codes.view(R, G, -1).float() - grid.affine.zero.unsqueeze(2)).transpose(1, 2)
    columns = H.rows(slice(0, I))
    for part in steps.split(max(1, quant.FIT_ELEMENTS["cpu" if codes.device.type == "cpu" else "cuda"] // (G * I))):
        B = torch.zeros(len(part), G, G, I // G, device=codes.device)
        B.diagonal(dim1=1, dim2=2).copy_(part)
        B = B.view(len(part), G, I)
        hessian.times_whole(B.view(-1, I), columns).view(B.shape) @ B.transpose(1, 2)


def print_row(name: str, kernel: float | None, twin: float | None) -> None:
    cells = (f"{value:11.2f}" if value is not None else f"{'':11}" for value in (kernel, twin))
    print(f"  {name:<38}" + "".join(cells), flush=True)


def random_hessian(I: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Of correlated inputs whose columns' sizes are heavy-tailed, as those of a model are."""
    size = torch.randn(I, generator=generator, device=device).mul(0.7).exp()
    X = torch.randn(2 * I, I, generator=generator, device=device) + torch.randn(2 * I, 1, generator=generator, device=device)
    return (X * size).T @ (X * size) / len(X)


def brute_force_milliseconds(W: torch.Tensor, a: torch.Tensor, bits: int, rows: int = 264) -> float:
    """All rows' time from that of `rows` of them: two thread blocks for each multiprocessor of an H200, so that it is busy."""
    rows = min(rows, len(W))
    w = W[:rows].contiguous()
    sensitivities = a.float().expand_as(w).contiguous()
    scale, zero = torch.empty(rows, device=W.device), torch.empty(rows, dtype=torch.uint8, device=W.device)
    shared = 8 * 2048 + 8 * 256
    args = (w, sensitivities, scale, zero, w.shape[1], T, 2**bits)
    taken = milliseconds(lambda: kernels.launch(BRUTE_FORCE, (rows, 1), 256, shared, *args), W.device, budget=1.0)
    return taken * len(W) / rows


# --- layers ----------------------------------------------------------------------------------------------------


def bench_layers(args: argparse.Namespace, recipe: str, device: torch.device) -> dict:
    """Quantize layers as llama.py does. What 32 take: the fixed costs, and 32 times what each layer after the first adds."""
    sizes = LLAMA_3_8B | {"num_hidden_layers": args.layers, "vocab_size": 1024}
    windows, seqlen = args.windows, args.seqlen
    if args.smoke:
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        windows, seqlen = 4, 32
    folder = Path(tempfile.mkdtemp(prefix="leanquant-bench-"))
    try:
        make_random_model(folder, sizes, device)
        (folder / "unused.txt").touch()
        command = [str(folder), str(folder / "unused.txt"), "--wbits", str(args.bits), "--grid", "nonuniform", "--recipe", recipe]
        command += ["--true-sequential", "--act-order", "--percdamp", "0.1", "--nsamples", str(windows), "--seqlen", str(seqlen)]
        command += ["--eval", "none", "--device", str(device), "--save_path", str(folder / "out.safetensors"), "--n_layers"]
        quantize_layers([*command, "1"], seqlen, device)  # memory is pinned and libraries are loaded once
        one, result = (quantize_layers([*command, str(layers)], seqlen, device) for layers in (1, args.layers))
    finally:
        shutil.rmtree(folder)
    a_layer = (result["seconds"] - one["seconds"]) / (args.layers - 1)
    result |= {"recipe": recipe, "seconds_a_layer": a_layer, "seconds_for_32_layers": one["seconds"] + 31 * a_layer}
    print_layers(result, "a tiny model" if args.smoke else "Llama-3-8B")
    return result


def quantize_layers(command: list[str], seqlen: int, device: torch.device) -> dict:
    """One run of the loop of llama.py, to the finished file: seconds, by phase too, and peak memory."""
    parsed = flags.parse(command)
    checkpoint = packing.Checkpoint.open(parsed.model)
    config, run = flags.quant_config(parsed, checkpoint.stored_dtype), flags.run_settings(parsed, device, Ranks())
    model = modelutils.StreamedModel(Path(parsed.model), checkpoint, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    ids = torch.randint(1024, (run.nsamples, seqlen), generator=torch.Generator().manual_seed(0))
    run.save_path.unlink(missing_ok=True)
    run = replace(run, activations="host")
    bits = llama.assigned_bits(model, run, config)
    writer = packing.ModelWriter(run.save_path, True, plan.result_bytes(model, run, config, bits))
    phases = llama.Phases(device)
    reset_peaks(device)
    start = time.perf_counter()
    try:
        llama.quantize_model(model, ids, run, config, writer, journal.Journal(None, {}), phases)
        with phases("pack"):
            writer.finish(report.settings_of(run, config, bits, ids), Path(parsed.model))
    finally:
        writer.close()
    return {
        "layers": run.n_layers,
        "tokens": ids.numel(),
        "seconds": time.perf_counter() - start,
        "phase_seconds": phases.seconds,
        "peak_host_gb": report.peak_host_bytes() / 1e9,
        "peak_device_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


def reset_peaks(device: torch.device) -> None:
    """From here on peaks are counted anew, on the host too where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def print_layers(result: dict, model: str) -> None:
    memory = f"host {result['peak_host_gb']:.1f} GB" + (f", device {result['peak_device_gb']:.1f} GB" if result["peak_device_gb"] else "")
    print(
        f"\n--recipe {result['recipe']}, {result['layers']} layers of {model}, {result['tokens']} tokens: {result['seconds']:.1f} s;",
        end=" ",
    )
    print(f"{result['seconds_a_layer']:.2f} s a layer, {result['seconds_for_32_layers']:.0f} s for 32; peak {memory}")
    for name, value in sorted(result["phase_seconds"].items(), key=lambda item: -item[1]):
        print(f"  {name:<20}{value:8.2f} s {100 * value / result['seconds']:5.0f} %", flush=True)


def make_random_model(folder: Path, sizes: dict, device: torch.device) -> None:
    """A Llama of these sizes with random weights, made on the device and written as bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- promises --------------------------------------------------------------------------------------------------


def promises(results: dict, args: argparse.Namespace) -> dict:
    """What the project promises for an H200 beside what was measured; only where it was measured at those sizes."""
    square = next((m for m in results["matrices"] if (m["rows"], m["columns"]) == (4096, 4096)), None)
    best = next((run for run in results["end_to_end"] if run["recipe"] == "best"), None)
    rows = {}
    if square and square["kernel_ms"] and args.bits == 4:
        times = square["torch_ms"] | square["kernel_ms"]
        rows |= {name: (times[name], PROMISED[name]) for name in ("affine", "affine, exhaustive", "column solver", "k-means")}
        rows["exhaustive, as a share of the brute force"] = (times["affine, exhaustive"] / square["brute_force_ms"], 1 / 20)
    if best and best["peak_device_gb"] and not args.smoke and (args.windows, args.seqlen, args.bits) == (128, 2048, 4):
        rows["end to end, s for 32 layers"] = (best["seconds_for_32_layers"], PROMISED["end to end"])
        rows["end to end, GB on the device"] = (best["peak_device_gb"], PROMISED["device"])
    for name, (measured, most) in rows.items():
        print(f"{'kept  ' if measured <= most else 'BROKEN'} {name}: {measured:.3g}, promised {most:.3g}")
    return {name: {"measured": measured, "promised": most} for name, (measured, most) in rows.items()}


if __name__ == "__main__":
    main()
