"""Inference speed: products with packed weights beside fp16, for the linears of Llama-3-8B and 70B, and a whole 8B-shaped model.

    python scripts/bench_inference.py [--bits 4 3 2] [--out docs/results/inference-gpu.json]

Each product in turn reads one of several copies of the weight, so that no cache holds it; medians of CUDA events over graphs of
those calls. "gather" is what the published package does: rebuild the weight by indexing, then multiply. Shares are of
the bandwidth of a device-to-device copy in the same run, counting the bytes of codes and levels once. One token is timed also with an
element far above the others, which its kernel takes longer for (`outlier_ms` in the JSON). The whole model generates one token at
batch 1, in a CUDA graph and without, and a text by transformers' `generate`, likewise; what the host does for a product, which counts
without one, is timed by itself. Random weights. Meant to take less than 8 minutes on an H200; `--smoke` runs it all on tiny sizes.
`--plans` times, instead, ways to share a product among blocks and warps beside those that lut_gemm.py plans: where a plan is far from
the best it is to be mended there.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_quantize import LLAMA_3_8B, machine, milliseconds_by_events, ready, save  # noqa: E402
from leanquant import kernels, lut_gemm  # noqa: E402
from leanquant.decoding import with_cuda_graphs  # noqa: E402
from leanquant.linear import QuantizedEmbedding, QuantizedLinear  # noqa: E402
from leanquant.packing import PackedLinear, packed_width, unpack_codes  # noqa: E402

SHAPES = {  # out x in features
    "Llama-3-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "Llama-3-70B": [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)],
}
IN_A_LAYER = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}  # of the 8B model
TOKENS = (1, 2, 4, 8, 64, 512)
PLANNED_TOKENS = (1, 8, 16, 32, 64, 512)
# At least so many times fp16's speed at one token on the 8B shapes, and at least that share of the copy bandwidth on large layers.
PROMISED = {4: (2.4, 0.6), 3: (3.5, 0.8), 2: (4.0, 0.6)}
LARGE = 30e6  # bytes of fp16


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bits", type=int, nargs="+", default=[4, 3, 2])
    add("--smoke", action="store_true", help="tiny sizes: does it all run?")
    add("--plans", action="store_true", help="instead: other plans beside those of lut_gemm.py")
    add("--out", type=Path, help="write the results to this JSON file")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(None)
    device = ready(args.device)
    if args.plans and device.type != "cuda":
        sys.exit("--plans needs a GPU: there is nothing to plan without one")
    results = {"machine": machine(device), "copy_tb_s": copy_bandwidth(device), "products": [], "plans": [], "host": [], "model": []}
    print(f"device-to-device copy: {results['copy_tb_s']:.2f} TB/s")
    for model, shapes in SHAPES.items():
        for O, I in [(48, 128)] if args.smoke else shapes:
            for bits in args.bits:
                if args.plans:
                    results["plans"] += bench_plans(O, I, bits, device)
                else:
                    results["products"] += bench_products(model, O, I, bits, results["copy_tb_s"], device)
                save(results, args.out)
    if args.plans:
        return
    results["host"] = bench_host(args.bits, device, *(48, 128, 2) if args.smoke else (1024, 4096, 200))
    results["model"] = bench_model(args, device)
    results["promises"] = {} if args.smoke or device.type == "cpu" else promises(results["products"])
    save(results, args.out)


def milliseconds(operations: list[Callable], device: torch.device, repeats: int = 20) -> float:
    """Median time of one of `operations`, which are run one after the other: captured in a graph, timed by events."""
    if device.type == "cpu":
        return 1e3 * median(seconds(operation) for operation in operations)
    for operation in operations:
        operation()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept = [operation() for operation in operations]  # noqa: F841 - keeps outputs apart
    for _ in range(repeats + 3):
        times.append(milliseconds_by_events(graph.replay) / len(operations))
    return median(times[3:])


def seconds(operation: Callable) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device) -> float:
    """TB/s of a large copy, bytes read and written: the best of several, each by itself (in a graph copies ran at two thirds of it)."""
    size = 2**32 if device.type == "cuda" else 2**24
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    if device.type == "cpu":
        return 2 * size / milliseconds([lambda: target.copy_(source)], device) / 1e9
    return 2 * size / min(milliseconds_by_events(lambda: target.copy_(source)) for _ in range(10)) / 1e9


# --- products --------------------------------------------------------------------------------------------------


def random_packed(O: int, I: int, bits: int, device: torch.device) -> PackedLinear:
    codes = torch.randint(256, (O, packed_width(I, bits)), dtype=torch.uint8, device=device)
    if bits == 8:
        scale, zero = (torch.full((O, 1), value, device=device) for value in (3e-3, 8.0))
        return PackedLinear(codes, None, scale.half(), zero.byte())
    return PackedLinear(codes, torch.randn(O, 2**bits, device=device).half() * 0.02)


def random_weights(O: int, I: int, bits: int, device: torch.device) -> list[PackedLinear]:
    """So many that no cache holds them."""
    return [random_packed(O, I, bits, device) for _ in range(max(4, int(300e6 / (O * I * bits / 8)) if O * I > 1e6 else 4))]


def tile(packed: PackedLinear, bits: int, I: int) -> lut_gemm.Tiles:
    codes = lut_gemm.tile_codes(unpack_codes(packed.codes, bits, I), bits)
    return lut_gemm.Tiles(codes, packed.grid, None, None, bits, len(packed.codes), I)


def gather(x: torch.Tensor, packed: PackedLinear, bits: int) -> torch.Tensor:
    """As the published package multiplies: index the levels with all codes, then a plain product."""
    codes = unpack_codes(packed.codes, bits, x.shape[1])
    return x @ packed.grid.gather(1, codes.long()).T


def bench_products(model: str, O: int, I: int, bits: int, copy_tb_s: float, device: torch.device) -> list[dict]:
    """One row for each number of tokens: milliseconds of ours, of fp16 and of gather-then-multiply."""
    weights = random_weights(O, I, bits, device)
    tiles, copies = [tile(packed, bits, I) for packed in weights], len(weights)
    plain = [torch.randn(O, I, dtype=torch.float16, device=device) for _ in range(max(4, min(copies, int(600e6 / (2 * O * I)))))]
    moved = tiles[0].codes.numel() * 4 + 2 * tiles[0].levels.numel()
    rows = []
    for N in TOKENS:
        x = torch.randn(N, I, dtype=torch.float16, device=device)
        ours = milliseconds([partial(lut_gemm.lut_linear, x, *t[:4], None, bits, O) for t in tiles], device)
        fp16 = milliseconds([partial(nn.functional.linear, x, w) for w in plain], device)
        by_gather = milliseconds([partial(gather, x, w, bits) for w in weights[:4]], device, repeats=5)
        share = moved / ours / 1e9 / copy_tb_s
        row = {"model": model, "rows": O, "columns": I, "bits": bits, "tokens": N, "ms": ours, "fp16_ms": fp16, "gather_ms": by_gather}
        if N == 1:
            x[0, 5] = 1000  # far above the others
            row["outlier_ms"] = milliseconds([partial(lut_gemm.lut_linear, x, *t[:4], None, bits, O) for t in tiles], device)
        rows.append(row | {"copy_share": share, "copies": copies})
        speeds = f"{fp16 / ours:6.2f} x fp16 {by_gather / ours:7.1f} x gather {100 * share:5.0f} % of the copy"
        print(f"{O:>6} x {I:<6} {bits} bits {N:>4} tokens {1e3 * ours:9.1f} us {speeds}", flush=True)
    return rows


def bench_plans(O: int, I: int, bits: int, device: torch.device) -> list[dict]:
    """Times of the plan that lut_gemm.py makes and of others, for each number of tokens."""
    tiles, rows = [tile(packed, bits, I) for packed in random_weights(O, I, bits, device)], []
    for N in PLANNED_TOKENS:
        if N > lut_gemm.FUSED_TOKENS and not lut_gemm._is_wide(N, tiles[0]):
            continue  # there is nothing to plan
        columns = I if lut_gemm._is_wide(N, tiles[0]) else tiles[0].codes.shape[1] * lut_gemm.TILE_COLUMNS
        x = torch.randn(N, columns, device=device).half()
        multiply, ours, others = plans(N, tiles[0])
        times = {plan: _plan_milliseconds(multiply, x, tiles, plan, device) for plan in dict.fromkeys((ours, *others))}
        best = min(times, key=lambda plan: (times[plan] != times[plan], times[plan]))
        ours_us, best_us = 1e3 * times[ours], 1e3 * times[best]
        print(f"{O:>6} x {I:<6} {bits} bits {N:>4} tokens {ours} {ours_us:8.1f} us, best {best} {best_us:8.1f} us", flush=True)
        sizes = {"rows": O, "columns": I, "bits": bits, "tokens": N}
        rows += [sizes | {"plan": plan, "planned": plan == ours, "ms": ms} for plan, ms in times.items() if ms == ms]
    return rows


def plans(N: int, tiles: lut_gemm.Tiles) -> tuple[Callable, tuple, list[tuple]]:
    """Who multiplies N tokens, by what plan, and what other plans there are: their numbers are those of lut_gemm.py's functions."""
    rows, columns = tiles.codes.shape[:2]
    device, gpu = tiles.codes.device, kernels.properties(tiles.codes.device)
    if lut_gemm._is_wide(N, tiles):
        sizes = [size for size in lut_gemm.WIDE_SIZES if size >= min(N, 128)][:2]
        others = itertools.product(sizes, range(1, min(columns, 16) + 1))
        return lut_gemm._multiply_wide, lut_gemm._wide_plan(N, tiles.O, columns, tiles.bits, gpu), list(others)
    if N == 1:
        others = [(teams, warps, 1) for warps in (4, 6, 8) for teams in range(1, warps + 1) if warps % teams == 0]
        others += [(warps, warps, each) for warps in (4, 5, 6, 7, 8) for each in (2, 3)]
        if ours := lut_gemm._gemv_plan(rows, columns, tiles.bits, gpu):
            return lut_gemm._multiply_one, ours, others
    if N <= 8:
        others = [(teams, warps, parts) for warps in (4, 8, 16) for teams in (1, 2) for parts in (1, 2) if parts <= columns]
    else:
        others = [(warps, warps, parts) for warps in (2, 4) for parts in range(1, min(columns, 16) + 1)]
    return lut_gemm._multiply_fused, lut_gemm._shares(N, tiles, device), others


def _plan_milliseconds(multiply: Callable, x: torch.Tensor, tiles: list, plan: tuple, device: torch.device) -> float:
    """NaN where a block cannot have what the plan asks for."""
    try:
        return milliseconds([partial(multiply, x, t, None, *plan) for t in tiles], device, repeats=5)
    except kernels.KernelError:
        return float("nan")


def promises(rows: list[dict]) -> dict:
    """What the project promises for an H200 beside what was measured: the worst case of each."""
    found = {}
    for bits, (speed, share) in PROMISED.items():
        one = [r for r in rows if r["bits"] == bits and r["tokens"] == 1]
        if not one:
            continue
        eight = [r for r in one if r["model"] == "Llama-3-8B"]
        found[f"{bits} bits, one token, times fp16 on 8B's shapes"] = (min(r["fp16_ms"] / r["ms"] for r in eight), speed)
        theirs, ours = (sum(IN_A_LAYER[r["rows"], r["columns"]] * r[key] for r in eight) for key in ("fp16_ms", "ms"))
        found[f"{bits} bits, one token, times fp16 on all of an 8B layer"] = (theirs / ours, speed)
        found[f"{bits} bits, share of the copy on layers of 30 MB"] = (
            min(r["copy_share"] for r in one if 2 * r["rows"] * r["columns"] >= LARGE),
            share,
        )
        few = [r["fp16_ms"] / r["ms"] for r in rows if r["bits"] == bits and r["tokens"] <= 64]
        many = [r["fp16_ms"] / r["ms"] for r in rows if r["bits"] == bits and r["tokens"] == 512]
        found[f"{bits} bits, up to 64 tokens, times fp16"] = (min(few), 1.0)
        found[f"{bits} bits, 512 tokens, times fp16"] = (min(many), 1 / 1.3)
    for name, (measured, least) in found.items():
        print(f"{'kept  ' if measured >= least else 'BROKEN'} {name}: {measured:.3g}, promised {least:.3g}")
    return {name: {"measured": measured, "promised": least} for name, (measured, least) in found.items()}


def bench_host(all_bits: list[int], device: torch.device, O: int, I: int, calls: int) -> list[dict]:
    """Microseconds of the host for one product of one token, of calls that do not wait for the GPU: they bound generation without a
    graph."""
    x, rows = torch.randn(1, 1, I, dtype=torch.float16, device=device), []
    plain = nn.Linear(I, O, bias=False, dtype=torch.float16, device=device)
    for bits in (16, *all_bits):
        linear, times = plain if bits == 16 else quantized_like(plain, bits, device), []
        for _ in range(20):
            with torch.inference_mode():
                times.append(seconds(lambda linear=linear: [linear(x) for _ in range(calls)]))
            if device.type == "cuda":
                torch.cuda.synchronize()
        rows.append({"bits": bits, "microseconds": 1e6 * median(times[3:]) / calls})
        print(f"{name_of(bits)}: {rows[-1]['microseconds']:.1f} us of the host a product", flush=True)
    return rows


# --- a whole model ---------------------------------------------------------------------------------------------


def bench_model(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Tokens a second of an 8B-shaped model at batch 1, fp16 and each width, with embeddings and head of 16, 8 and 4 bits; one decoding
    step in a CUDA graph."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = LLAMA_3_8B | {"num_hidden_layers": 32, "vocab_size": 128256}
    if args.smoke:
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        sizes["vocab_size"] = 100
    rows = []
    for bits, vocab_bits in ((16, 16), *itertools.product(args.bits, (16, 8, 4))):
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float16).eval()
        if bits < 16:
            for name, linear in list(model.model.named_modules()):
                if isinstance(linear, nn.Linear):
                    model.model.set_submodule(name, quantized_like(linear, bits, device))
        if vocab_bits < 16:
            quantize_vocabulary(model, vocab_bits, "tiles")
        graph, eager = (1e3 / step_milliseconds(model, device, captured) for captured in (True, False))
        found = {"tokens_per_second": graph, "eager_tokens_per_second": eager} | generated(model)
        rows.append({"bits": bits, "vocab_bits": vocab_bits, **found})
        outside = "" if vocab_bits == 16 else f", embeddings and head too in {vocab_bits}"
        print(f"{name_of(bits)}{outside}: {', '.join(f'{name} {value:.1f}' for name, value in found.items())}", flush=True)
        del model
    return rows


def quantized_like(linear: nn.Linear, bits: int, device: torch.device) -> QuantizedLinear:
    packed = random_packed(linear.out_features, linear.in_features, bits, device)
    quantized = QuantizedLinear(packed, bits, linear.in_features, None)
    quantized.prepare("tiles", torch.float16)
    return quantized


def quantize_vocabulary(model: nn.Module, bits: int, form: str) -> None:
    """Give `model` random embeddings that are the head too."""
    packed = random_packed(*model.lm_head.weight.shape, bits, model.device)
    QuantizedEmbedding.take_place_of(model.get_input_embeddings(), packed, bits)
    model.lm_head = QuantizedLinear(packed, bits, model.lm_head.in_features, None)
    model.lm_head.prepare(form, model.dtype)


def name_of(bits: int) -> str:
    return "fp16" if bits == 16 else f"{bits} bits"


def step_milliseconds(model: nn.Module, device: torch.device, captured: bool, context: int = 128) -> float:
    """One token after `context` others, with a static cache; from a CUDA graph or launch by launch."""
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=2 * context)
    model(torch.randint(100, (1, context), device=device), past_key_values=cache)
    token, position = torch.tensor([[7]], device=device), torch.tensor([[context]], device=device)
    step = lambda: model(token, past_key_values=cache, position_ids=position).logits  # noqa: E731
    if captured:
        return milliseconds([step], device)
    step().sum().item()
    return 1e3 * median(seconds(lambda: step().sum().item()) for _ in range(10))


def generated(model: nn.Module, tokens: int = 64) -> dict:
    """Tokens a second of `generate`: as it is by itself, and with CUDA graphs where it can have them."""
    ids, found = torch.arange(16, device=model.device)[None], {}
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    ways = {"eager_generate_tokens_per_second": model.generate, "generate_tokens_per_second": with_cuda_graphs(model)}
    for name, generate in ways.items():
        if not found or generate != model.generate:
            run = partial(generate, ids, attention_mask=torch.ones_like(ids), **how)
            found[name] = tokens / median(seconds(lambda run=run: run().sum().item()) for _ in range(3))
    return found


if __name__ == "__main__":
    main()
