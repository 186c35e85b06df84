"""llama.cpp runs GGUF files: exported ones, and what its own quantizer makes of the same model. Quality, size and speed, all in llama.cpp.

    python scripts/bench_gguf.py --converter llama.cpp/convert_hf_to_gguf.py [--base demo/accuracy/model-rotated] [--out FILE.json]

The accuracy study's calibration windows and held-out texts (accuracy.py), every fourth window; KL is that from the 16-bit GGUF file. The
model is a rotated copy by default: SmolLM2 itself was dequantized from 4 bits in blocks of 32, which a quantizer with such blocks finds
again. llama.cpp's types with a K need 256 columns, where it takes larger ones for this model's 576, so files are larger than usual.
Its quantizer uses no calibration text here. Needs what it measures, which tests/requirements.txt has, and llama.cpp's converter.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import accuracy  # noqa: E402
from llama_cpp import LlamaCpp, quantize  # noqa: E402

THEIRS = {"Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q3_K_M": 12}  # llama.cpp's numbers of mixtures
OURS = {"LeanQuant, Q4_0": ["--sym", "--groupsize", "32"], "LeanQuant, Q4_1": ["--groupsize", "32"]}
WINDOWS = slice(None, None, 4)
WRITTEN, ROUNDS = 64, 5  # tokens, to see how fast, and how often


def made_by_us(base: Path, name: str, seed: int) -> Path:
    """A quantized file, made now if it has not been."""
    file = accuracy.WORK / f"{base.name} {name} {seed}.safetensors"
    if not file.exists():
        options = ["--wbits", "4", "--grid", "affine", "--exponent", "2", "--true-sequential", "--act-order", "--percdamp", "0.1"]
        windows = ["--nsamples", "32", "--seqlen", str(accuracy.SEQLEN), "--seed", str(seed), "--dtype", "bfloat16", "--eval", "none"]
        call("llama.py", str(base), str(accuracy.WORK / "calibration.txt"), *options, *OURS[name], *windows, "--save_path", str(file))
    return file


def call(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def files(base: Path, template: Path, seeds: list[int], work: Path) -> Iterator[tuple[str, int, Path]]:
    """What is measured: a name, a calibration seed, a file."""
    for name, mixture in THEIRS.items():
        quantize(template, file := work / f"{name}.gguf", mixture)
        yield f"llama.cpp, {name}", 0, file
    for seed in seeds:
        for name in OURS:
            file, quantized = work / f"{name} {seed}.gguf", made_by_us(base, name, seed)
            flags = ["--to", "gguf", "--template", str(template), "--out", str(file), "--overwrite"]
            call("scripts/export.py", str(quantized), "--base", str(base), *flags)
            yield name, seed, file


def measure(file: Path, reference: dict[str, list[torch.Tensor]], windows: dict[str, torch.Tensor]) -> dict:
    """Size, perplexity and KL of each text. A reference that is empty is filled."""
    model, row = LlamaCpp(file, accuracy.SEQLEN), {"megabytes": file.stat().st_size / 1e6}
    for text, its in windows.items():
        losses, divergences, known = [], [], reference.setdefault(text, [])
        for number, window in enumerate(its):
            model.forget()
            log_q = model.logits(window.tolist()).log_softmax(-1)
            if number == len(known):
                known.append(log_q)
            log_p = known[number]
            losses.append(-log_q[:-1].gather(1, window[1:, None]).mean().item())
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
        row[text] = {"perplexity": math.exp(statistics.mean(losses)), "kl": statistics.mean(divergences)}
    return row


def speed(file: Path) -> float:
    """Tokens written a second, one after the other, on one thread."""
    model = LlamaCpp(file, accuracy.SEQLEN)
    model.read([0])
    start = time.perf_counter()
    for token in range(WRITTEN):
        model.read([token])
    return WRITTEN / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--converter", required=True, type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--base", type=Path, default=accuracy.WORK / "model-rotated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gguf-cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    accuracy.prepare()
    texts = torch.load(accuracy.WORK / "windows.pt")
    windows = {text: texts[f"{text} report"][WINDOWS] for text in ("wiki", "news")}
    work = accuracy.WORK / "gguf"
    work.mkdir(exist_ok=True)
    template = work / f"{args.base.name}.gguf"
    if not template.exists():
        subprocess.run([sys.executable, args.converter, args.base, "--outtype", "f16", "--outfile", template], check=True)
    reference: dict[str, list[torch.Tensor]] = {}
    rows, measured = [], []
    for name, seed, file in chain([("float16", 0, template)], files(args.base, template, args.seeds, work)):
        measured.append(file)
        rows.append({"name": name, "seed": seed, **measure(file, reference, windows)})
        print(json.dumps(rows[-1]), flush=True)
    speeds = [[speed(file) for file in measured] for _ in range(ROUNDS)]  # side by side: a machine may change its pace
    for row, *tries in zip(rows, *speeds, strict=True):
        row["tokens_per_second"] = statistics.median(tries)
    accuracy.write_text(args.out, json.dumps({"model": args.base.name, "rows": rows}, indent=1) + "\n")
    print(as_markdown(rows))


def as_markdown(rows: list[dict]) -> str:
    lines = ["| | MB | wiki ppl | wiki KL | news ppl | news KL | tokens/s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        texts = [f"{row[text]['perplexity']:.2f} | {row[text]['kl']:.4f}" for text in ("wiki", "news")]
        lines.append(f"| {row['name']} | {row['megabytes']:.1f} | {' | '.join(texts)} | {row['tokens_per_second']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
