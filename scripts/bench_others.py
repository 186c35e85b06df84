"""Other quantizers beside ours: the accuracy study's model, calibration windows and measure (accuracy.py), in groups of 64 columns.

    python scripts/bench_others.py [--tools auto-round hqq nf4] [--bits 4 3 2] [--seeds 0] [--out docs/results/others-cpu.json]

AutoRound learns roundings and ranges, block by block, by gradients: it gets the windows that ours is quantized with and those that it is
tuned on, 96 x 512 tokens, and else its defaults. HQQ and bitsandbytes' NF4 (4 bits alone) need none. What each makes is measured
dequantized, in 16 bits, with scales as it keeps them. What is done is kept in --out and not run again; ours is accuracy.py's, and
GPTQModel's bench_gptqmodel.py's.
Needs what it measures: pip install --no-deps auto-round==0.16.1 py-cpuinfo hqq==0.2.8.post1 termcolor bitsandbytes==0.50.2
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import accuracy  # noqa: E402
import datautils  # noqa: E402

GROUPSIZE, SAMPLES = 64, 32
OURS = {"round to nearest": ("rtn", "g64"), "GPTQ, as run here": ("gptq", "g64")}
OURS |= {"LeanQuant affine": ("best", "g64"), "LeanQuant affine, tuned": ("best, tuned", "g64")}
OURS |= {"LeanQuant, free levels": ("best", "nonuniform"), "LeanQuant, free levels, tuned": ("best, tuned", "nonuniform")}


def auto_round(model: nn.Module, bits: int, seed: int) -> None:
    from auto_round import AutoRound

    tokenizer, text = AutoTokenizer.from_pretrained(accuracy.MODEL), str(accuracy.WORK / "calibration.txt")
    draws = (SAMPLES, seed), (accuracy.TUNED_TIMES * SAMPLES, 100 + seed)  # to quantize, to tune
    windows = torch.cat([datautils.calibration_windows(text, tokenizer, samples, accuracy.SEQLEN, its) for samples, its in draws])
    scheme = {"bits": bits, "group_size": GROUPSIZE, "sym": False, "data_type": "int"}
    AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=list(windows.split(8)),
        nsamples=len(windows),
        seqlen=accuracy.SEQLEN,
        seed=seed,
        device_map="cpu",
    ).quantize()


def hqq(model: nn.Module, bits: int, seed: int) -> None:
    from hqq.core.quantize import Quantizer

    for linear in linears(model):
        codes, meta = Quantizer.quantize(
            linear.weight.data.float(), bits, group_size=GROUPSIZE, axis=1, device="cpu", compute_dtype=torch.float32
        )
        linear.weight.data = Quantizer.dequantize(codes, meta).to(linear.weight.dtype)


def nf4(model: nn.Module, bits: int, seed: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for linear in linears(model):
        codes, state = quantize_4bit(linear.weight.data.float(), blocksize=GROUPSIZE, quant_type="nf4")
        linear.weight.data = dequantize_4bit(codes, state).to(linear.weight.dtype)


TOOLS = {"auto-round": auto_round, "hqq": hqq, "nf4": nf4}
PACKAGES = {"auto-round": "auto-round", "hqq": "hqq", "nf4": "bitsandbytes"}


def linears(model: nn.Module) -> list[nn.Linear]:
    """All but the head."""
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()]


def measure(tool: str, bits: int, seed: int) -> dict:
    """Perplexity and KL of both texts, seconds of one core, and the release."""
    model = AutoModelForCausalLM.from_pretrained(accuracy.MODEL, dtype=torch.bfloat16)
    torch.set_float32_matmul_precision("highest")
    before, start = [linear.weight.data.clone() for linear in linears(model)], time.process_time()
    TOOLS[tool](model, bits, seed)
    seconds = time.process_time() - start
    if any(torch.equal(old, linear.weight.data) for old, linear in zip(before, linears(model), strict=True)):
        sys.exit(f"error: {tool} has left a linear as it was")
    torch.set_float32_matmul_precision("medium")  # as accuracy.py
    with tempfile.TemporaryDirectory(dir=accuracy.WORK) as folder:
        model.save_pretrained(folder)
        texts = {text: accuracy.evaluate(accuracy.MODEL, Path(folder), f"{text} report", False)[0] for text in ("wiki", "news")}
    return {"tool": tool, "bits": bits, "seed": seed, **texts, "cpu_seconds": seconds, "release": version(PACKAGES[tool])}


def as_markdown(found: dict, bits: list[int], seeds: list[int]) -> str:
    ours, lines = accuracy.stored(), []
    for width in bits:
        lines += [f"| {width} bits | wiki ppl | wiki KL | news ppl | news KL | core s |", "|---|---|---|---|---|---|"]
        rows = {tool: [found.get(key(tool, width, seed)) for seed in seeds] for tool in TOOLS}
        rows |= {name: [ours.get(accuracy.Cell(method, grid, width, seed).key) for seed in seeds] for name, (method, grid) in OURS.items()}
        for name, measured in rows.items():
            if measured := [row for row in measured if row]:
                numbers = [
                    accuracy.over_seeds([row[text][what] for row in measured], digits)
                    for text in ("wiki", "news")
                    for what, digits in (("perplexity", ".5g"), ("kl", ".4f"))
                ]
                lines.append(f"| {name} | {' | '.join(numbers)} | {accuracy.cpu_seconds(measured)} |")
        lines.append("")
    return "\n".join(lines)


def key(tool: str, bits: int, seed: int) -> str:
    return f"{tool} | {bits} | {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 3, 2), default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "others-cpu.json")
    args = parser.parse_args()
    accuracy.prepare()
    reference = accuracy.Cell("fp16", "row", 16)
    if accuracy.lacks_reference(reference):
        accuracy.measure(reference)
    for tool, bits, seed in itertools.product(args.tools, args.bits, args.seeds):
        found = json.loads(args.out.read_text()) if args.out.is_file() else {}
        if key(tool, bits, seed) not in found and not (tool == "nf4" and bits != 4):
            row = measure(tool, bits, seed)
            found = json.loads(args.out.read_text()) if args.out.is_file() else {}  # another of these may be running
            accuracy.write_text(args.out, json.dumps(found | {key(tool, bits, seed): row}, indent=1) + "\n")
    print(as_markdown(json.loads(args.out.read_text()), args.bits, args.seeds))


if __name__ == "__main__":
    main()
