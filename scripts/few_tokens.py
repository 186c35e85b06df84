"""How many tokens does a Hessian need? What is lost by quantizing with few, against rounding to nearest.

    python scripts/few_tokens.py [--model DIR] [--text FILE] [--layer 5]

For linears of one layer of SmolLM2-135M: the output error tr(E H E^T) on tokens held out, where the weights were quantized
with a Hessian of n tokens, divided by that of rounding to nearest on levels in which all columns count alike. It chose
quant.LEAST_TOKENS; an expert of a mixture may see as few. Prints a table in Markdown.
"""

import argparse
import sys
from pathlib import Path

import torch

from demo_data import make_model, make_texts

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import datautils  # noqa: E402
import hessian  # noqa: E402
import modelutils  # noqa: E402
import quant  # noqa: E402
from leanquant.packing import Checkpoint  # noqa: E402

SHARES = (1 / 16, 1 / 4, 1, 2, 4)  # tokens, of the linear's inputs
ROWS = 64  # of each weight, to save time
HELD_OUT = 8192


@torch.no_grad()
def inputs_of(folder: Path, text: Path, layer: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The first linear of each group of the layer: its weight [ROWS, I] and what it reads, [N, I] in random order."""
    model = modelutils.StreamedModel(folder, Checkpoint.open(folder), torch.float32, torch.device("cpu"))
    ids = datautils.calibration_windows(str(text), modelutils.load_tokenizer(folder), 32, 512, 0)
    states = model.embed(ids, 2)
    for index in range(layer):
        with model.layer(index):
            model.advance(index, states)
    with model.layer(layer) as module:
        groups = model.groups(layer, states)
        batches = [[found.X.flatten(0, 1).clone() for found in batch] for batch in model.inputs(layer, states, groups)]
        order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))
        read = (torch.cat(parts)[order] for parts in zip(*batches, strict=True))
        return {g.linears[0]: (module.get_submodule(g.linears[0]).weight[:ROWS].clone(), X) for g, X in zip(groups, read, strict=True)}


def loss(W: torch.Tensor, X: torch.Tensor, H: torch.Tensor, config: quant.QuantConfig) -> float:
    """tr(E H E^T) of `W` quantized with the tokens `X`; with none, rounded to nearest."""
    factor = hessian.factorize(X.T @ X / len(X), config.percdamp, act_order=True) if len(X) else None
    target = W if factor is None else quant.without_dead(W, factor)
    grid = quant.learn_grid(target, factor, config)
    solved = quant.quantize(target, grid, factor, config)
    if factor is not None:
        grid, solved = quant.refine(target, grid, solved, factor, config)
    return quant.row_losses(W - quant.dequantize(solved.codes, grid.levels), hessian.Symmetric.of(H)).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "demo/SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="calibration text (unset: the demo's)")
    parser.add_argument("--layer", type=int, default=5)
    args = parser.parse_args()
    make_model(args.model)
    text = args.text or make_texts(args.model.parent)[0]
    print("| linear | inputs | bits | percdamp |", *(f"{share:g} |" for share in SHARES))
    print("|" + "---|" * (4 + len(SHARES)))
    for name, (W, X) in inputs_of(args.model, text, args.layer).items():
        I, held_out = W.shape[1], X[-HELD_OUT:]
        H = held_out.T @ held_out / HELD_OUT
        for bits in (4, 3):
            for percdamp in (0.1, 0.01):
                config = quant.QuantConfig(bits=bits, percdamp=percdamp)
                nearest = loss(W, X[:0], H, config)
                losses = (loss(W, X[: int(share * I)], H, config) / nearest for share in SHARES)
                print(f"| {name} | {I} | {bits} | {percdamp} |", *(f"{ratio:.2f} |" for ratio in losses), flush=True)


if __name__ == "__main__":
    main()
