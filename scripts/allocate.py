"""Share out bits among the linears of a model: which need 4, and for which 2 are enough, so that all take as many as wanted on average.

    python scripts/allocate.py MODEL TEXT --bits 2.5 --out bits.txt
    python llama.py MODEL TEXT --wbits 2 --bits_for $(cat bits.txt) [...]

What a linear costs at a width is estimated to second order, in nats a token of KL(unquantized || quantized): the mean over tokens of
sum_o g_o^2 (E x)_o^2 / 2. E [O, I] are the errors that the column solver leaves at that width, x is the linear's input, and g the gradient
of -log q(y) in its output, y drawn from the model's own predictions q: the mean of g g^T is the Hessian of the divergence, of which what
links outputs, and tokens, is left out. With the mean over rows in the place of each g_o^2 it is tr(E F E^T) / 2, with
F = mean (|g|^2 / O) x x^T. The bits are those of the least sum of costs within the budget, by Lagrange's method. Errors are those of
act-order and a damping of 0.1, without shift and refinement.

Later layers make up for part of what earlier ones lose, since their targets are shifted (docs/design.md): the costs of the first third
of the layers count half, as was measured (docs/accuracy.md, Bits shared out). Errors of several linears are taken to be independent: the
sum says which share is better, not what the KL will be.

The unquantized model passes forwards and back a layer at a time; what enters each layer waits in host memory, and the device holds a matrix
[I, I] for each linear of a layer and one for all that read the same, of a mixture for all its experts. Not here: quantizing.
"""

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datautils  # noqa: E402
import quant  # noqa: E402
from eval_quantized import check_json_path, pick_device  # noqa: E402
from flags import DEFAULT_EXPONENT  # noqa: E402
from hessian import NotPositiveDefinite, Symmetric, accumulate_hessian, factorize  # noqa: E402
from leanquant.errors import InputError, exit_code  # noqa: E402
from leanquant.foreign import open_checkpoint  # noqa: E402
from llama import check_groups  # noqa: E402
from modelutils import StreamedModel, check_seqlen, load_tokenizer, memory_is_input, refuse_quantized, resolve_model  # noqa: E402
from rotate import seed  # noqa: E402
from tune import pick_dtype, positive  # noqa: E402

WIDTHS = (2, 3, 4)
EARLY, THEIR_SHARE = 1 / 3, 0.5  # of the layers, and what of their costs counts: layers after them make up for the rest


class Linear(NamedTuple):
    """How many weights a linear has, and what it costs at each width."""

    weights: int
    costs: dict[int, float]


class Sums:
    """Over the tokens that some linears read: H of x x^T, and of each linear F of (|g|^2 / O) x x^T; upper triangles [I, I]."""

    def __init__(self, linears: dict[str, nn.Linear], device: torch.device):
        I = next(iter(linears.values())).in_features
        zeros = lambda: torch.zeros(I, I, device=device)  # noqa: E731
        self.linears, self.H, self.F, self.tokens = linears, zeros(), {name: zeros() for name in linears}, 0

    def add(self, x: torch.Tensor) -> None:
        """What they read, [..., I]."""
        x = x.flatten(0, -2).float()
        accumulate_hessian(self.H, x)
        self.tokens += len(x)

    def add_gradient(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        """That of what linear `name` gives for x, [..., O]."""
        x, g = x.flatten(0, -2).float(), g.flatten(0, -2).float()
        accumulate_hessian(self.F[name], x * g.square().mean(1, keepdim=True).sqrt())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name or folder of the unquantized model")
    add("text", metavar="TEXT", help=f"{', '.join(datautils.CORPORA)}, or a {', '.join(datautils.LOCAL_SUFFIXES)} file")
    add("--bits", required=True, type=average, help="that a weight is to take on average, levels or scales not counted: from 2 to 4")
    add("--out", required=True, type=Path, metavar="FILE.txt", help="where the values of llama.py's --bits_for go")
    add("--grid", choices=("nonuniform", "affine"), default="nonuniform", help="as for llama.py (default: %(default)s)")
    add("--groupsize", type=int, default=-1, help="as for llama.py (default: %(default)s, whole rows)")
    add("--nsamples", type=positive, default=16, help="windows (default: %(default)s)")
    add("--seqlen", type=positive, default=2048, help="tokens a window (default: %(default)s)")
    add("--seed", type=seed, default=2, help="of the windows (default: %(default)s, where llama.py takes 0 and tune.py 1)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="as for tune.py")
    return parser.parse_args(argv)


def average(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not min(WIDTHS) <= value <= max(WIDTHS):
        raise argparse.ArgumentTypeError(f"{text} bits a weight cannot be had: give a number from {min(WIDTHS)} to {max(WIDTHS)}")
    return value


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: run_in_memory(args), "nothing was written")


def run_in_memory(args: argparse.Namespace) -> None:
    with memory_is_input("give a smaller --seqlen, --device cpu, or more memory"):
        run(args)


def run(args: argparse.Namespace) -> None:
    check_json_path("--out", args.out)
    if args.out.exists():
        raise InputError(f"{args.out} exists: give another --out, or remove it")
    linears = estimate(args)
    bits = allocate(linears, args.bits)
    tell(linears, bits, args.out)
    args.out.write_text("".join(f"{line}\n" for line in as_patterns(bits)))


def estimate(args: argparse.Namespace) -> dict[str, Linear]:
    """What each linear of the model costs, by its full name. Raises InputError."""
    if args.grid == "nonuniform" and args.groupsize != -1:
        raise InputError("--groupsize is for affine grids, free levels are a row's: give --grid affine with it")
    datautils.check_source(args.text)
    device, folder = pick_device(args.device), resolve_model(args.model)
    check_seqlen(folder, args.seqlen)
    model = StreamedModel(folder, open_checkpoint(folder), pick_dtype(args.dtype, device), device)
    refuse_quantized(model, args.model)
    names = [model.layer_prefix(index) + name for index in range(len(model.layers)) for name in model.linears(index)]
    check_groups(model, config_of(args, min(WIDTHS)), dict.fromkeys(names, min(WIDTHS)))
    windows = datautils.calibration_windows(args.text, load_tokenizer(folder), args.nsamples, args.seqlen, args.seed)
    linears = {}
    for found in costs_by_layer(model, windows, args):
        if broken := [name for name, linear in found.items() if not all(map(math.isfinite, linear.costs.values()))]:
            raise InputError(f"the cost of {broken[0]} is not finite in {model.dtype}: --dtype float32 may do better")
        linears |= found
    return linears


def config_of(args: argparse.Namespace, bits: int) -> quant.QuantConfig:
    return quant.QuantConfig(bits, args.grid, DEFAULT_EXPONENT[args.grid], groupsize=args.groupsize, act_order=True)


# --- forwards and back -----------------------------------------------------------------------------------------


def costs_by_layer(model: StreamedModel, windows: torch.Tensor, args: argparse.Namespace) -> Iterator[dict[str, Linear]]:
    """The linears of a layer by their full names, from the last layer to the first."""
    stream, entering, groups = model.embed(windows, 1), [], []
    for index in tqdm(range(len(model.layers)), desc="forwards", unit="layer", ncols=80, leave=False, disable=None):
        entering.append(stream.hidden.clone())
        with model.layer(index, index + 1 if index + 1 < len(model.layers) else None):
            groups.append([group.linears for group in model.groups(index, stream)])
            model.advance(index, stream)
    gradients = gradients_of_the_last(model, stream.hidden, args.seed)
    del stream
    for index in tqdm(range(len(model.layers))[::-1], desc="back", unit="layer", ncols=80, leave=False, disable=None):
        with model.layer(index, index - 1 if index else None):
            linears = model.linears(index)
            sums = [Sums({name: linears[name] for name in names}, model.device) for names in groups[index]]
            for hidden, gradient in zip(entering.pop(), gradients, strict=True):
                gradient.copy_(passed_back(model, index, sums, hidden[None], gradient[None].to(model.device))[0])
            prefix, experts, found = model.layer_prefix(index), model.experts(index), {}
            share = (THEIR_SHARE if index < EARLY * len(model.layers) else 1) / windows.numel()
            while sums:
                found |= costs(sums.pop(), share, set(experts), args)
            yield {prefix + name: found[name] for name in linears}


def gradients_of_the_last(model: StreamedModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """[n, T, D], of the sum over a window's tokens of -log q(y), y drawn from q, in what the last layer gives."""
    generator, gradients = torch.Generator(model.device).manual_seed(seed), torch.empty_like(hidden)
    with model.head(with_gradients=True) as logits_of:
        for window, gradient in zip(hidden, gradients, strict=True):
            last = window[None].to(model.device).requires_grad_()
            log_q = logits_of(last)[0].float().log_softmax(-1)
            drawn = torch.multinomial(log_q.detach().exp(), 1, generator=generator)
            gradient.copy_(torch.autograd.grad(-log_q.gather(1, drawn).sum(), last)[0][0])
    return gradients


def passed_back(model: StreamedModel, index: int, sums: list[Sums], hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in what enters layer `index`, [1, T, D], from that in what leaves it; on the way the sums of its linears grow."""

    def see(its: Sums, name: str):
        def after(_module, inputs, output):
            x = inputs[0].detach()
            if name == next(iter(its.linears)):
                its.add(x)
            output.register_hook(lambda g: its.add_gradient(name, x, g))

        return after

    handles = [linear.register_forward_hook(see(its, name)) for its in sums for name, linear in its.linears.items()]
    try:
        with torch.enable_grad():
            entering = hidden.to(model.device).requires_grad_()
            return torch.autograd.grad(model.run_layer(index, entering, {}), entering, gradient)[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def costs(sums: Sums, share: float, experts: set[str], args: argparse.Namespace) -> dict[str, Linear]:
    """Of each linear at each width, a `share` of the sum over tokens; an expert without a token costs nothing."""
    factor = None
    if experts.isdisjoint(sums.linears) or sums.tokens >= quant.LEAST_TOKENS * len(sums.H):  # else rounded to nearest, as by llama.py
        with contextlib.suppress(NotPositiveDefinite):
            factor = factorize(sums.H / sums.tokens, percdamp=0.1, act_order=True)
    found = {name: Linear(linear.weight.numel(), {}) for name, linear in sums.linears.items()}
    for (name, linear), bits in itertools.product(sums.linears.items(), WIDTHS):
        W, config = linear.weight.float(), config_of(args, bits)
        grid = quant.learn_grid(W, factor, config)
        E = quant.dequantize(quant.quantize(W, grid, factor, config).codes, grid.levels) - W
        found[name].costs[bits] = share * quant.row_losses(E, Symmetric.of(sums.F[name].T)).sum().item() / 2
    return found


# --- bits ------------------------------------------------------------------------------------------------------


def allocate(linears: dict[str, Linear], average: float) -> dict[str, int]:
    """Bits by linear, `average` a weight at most: from 2 for all, the steps that save most for their bits, as long as there are
    any left and they save anything.

    A step goes from a linear's width to the one beyond which no step saves more a bit, so that steps save less and less.
    """
    bits = dict.fromkeys(linears, min(WIDTHS))
    left = round((average - min(WIDTHS)) * sum(linear.weights for linear in linears.values()))
    steps = sorted((step for name, linear in linears.items() for step in steps_of(name, linear)), reverse=True)
    for saved, name, width in steps:
        price = (width - bits[name]) * linears[name].weights
        if saved > 0 and price <= left and width > bits[name]:
            bits[name] = width
            left -= price
    return bits


def steps_of(name: str, linear: Linear) -> Iterator[tuple[float, str, int]]:
    """(saved a bit, name, width that is reached), along the lower convex hull of costs over bits."""
    width = min(WIDTHS)
    saved = lambda other: (linear.costs[width] - linear.costs[other]) / (linear.weights * (other - width))  # noqa: E731
    while wider := [other for other in WIDTHS if other > width]:
        best = max(wider, key=saved)
        yield saved(best), name, best
        width = best


def as_patterns(bits: dict[str, int]) -> list[str]:
    """REGEX=BITS for all linears, those of the same name in several layers together. A dot stands for itself, or for another character,
    which no name has there: so none needs a quote in a shell."""
    layers: dict[tuple, list[str]] = {}
    for name, width in bits.items():
        before, number, after = split_name(name)
        layers.setdefault((before, after, width), []).append(number)
    return [f"{before}({'|'.join(sorted(numbers, key=int))}){after}={width}" for (before, after, width), numbers in sorted(layers.items())]


def split_name(name: str) -> tuple[str, str, str]:
    """What stands before the number of its layer, that, and what follows: "model.layers.", "3", ".mlp.down_proj"."""
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place]) + ".", parts[place], "." + ".".join(parts[place + 1 :])


def tell(linears: dict[str, Linear], bits: dict[str, int], out: Path) -> None:
    total = sum(linear.weights for linear in linears.values())
    mean = sum(linears[name].weights * width for name, width in bits.items()) / total
    kinds: dict[str, list[str]] = {}
    for name in sorted(bits, key=lambda name: int(split_name(name)[1])):
        kinds.setdefault(split_name(name)[2][1:], []).append(str(bits[name]))
    for kind, widths in kinds.items():
        print(f"{kind:<24}{''.join(widths)}")
    cost = lambda chosen: sum(linear.costs[chosen[name]] for name, linear in linears.items())  # noqa: E731
    whole = ", ".join(f"{width} bits {cost(dict.fromkeys(bits, width)):.3f}" for width in WIDTHS)
    print(f"{out}: {mean:.3f} bits a weight; estimated cost {cost(bits):.3f} ({whole})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
