"""A CPU: tokens a second of the demo's quantized model, generated and read, beside the original in float32; and single products.

    python scripts/bench_generate.py [--tokens 32] [--repeats 7] [--out docs/results/generate-cpu.json]

The model as it is loaded by itself (codes looked up), the same in 16 bits, rebuilt, and packed as torch alone does it; looked up with
embeddings and head of 8 and 4 bits too, random ones, which take as long as any. All are in one process and take turns, so that what else
the machine does meets them alike; greedy, batch 1, medians. Products of 1, 8 and 128 tokens in float32, and of 128 in bfloat16, with a
4096 x 4096 weight of free levels, of which there are several in turn, 100 MB and more of each kind. Needs
demo/nonuniform-4bit.safetensors, which scripts/quickstart.sh makes.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import median

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from bench_inference import quantize_vocabulary, random_packed, seconds  # noqa: E402
from leanquant import LeanQuantModelForCausalLM  # noqa: E402
from leanquant.linear import QuantizedLinear  # noqa: E402
from leanquant.lut_cpu import can_multiply, packed_linear  # noqa: E402
from leanquant.packing import Checkpoint  # noqa: E402

BASE, QUANTIZED = ROOT / "demo" / "SmolLM2-135M-Instruct", ROOT / "demo" / "nonuniform-4bit.safetensors"
READ = 400  # tokens of a text that is read at once
PROMPT = "The telescope is an instrument that"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "generate-cpu.json")
    args = parser.parse_args()
    if not QUANTIZED.is_file():
        sys.exit(f"error: {QUANTIZED} is not there: run scripts/quickstart.sh first")
    if not can_multiply(random_packed(256, 256, 4, torch.device("cpu")), 256):
        sys.exit("error: this CPU has no kernel, or this machine no C++ compiler")
    results = {"tokens": args.tokens, "repeats": args.repeats, "threads": torch.get_num_threads()}
    results |= {"cpu": torch.backends.cpu.get_cpu_capability()} | bench_models(args) | {"products": bench_products(args.repeats)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


def bench_models(args: argparse.Namespace) -> dict:
    bits = Checkpoint.open(QUANTIZED).bits_of("model.layers.0.mlp.down_proj")
    ours = {
        f"{bits} bits, looked up": {},
        f"{bits} bits, looked up, bfloat16": {"torch_dtype": torch.bfloat16},
        f"{bits} bits, looked up, float16": {"torch_dtype": torch.float16},
        f"{bits} bits, rebuilt at load": {"dequantize": "always"},
        f"{bits} bits, packed, by torch": {"dequantize": "never"},
    }
    models = {"original, float32": AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)}
    models |= {name: LeanQuantModelForCausalLM.from_pretrained(BASE, QUANTIZED, device="cpu", **how) for name, how in ours.items()}
    for linear in models[f"{bits} bits, packed, by torch"].modules():
        if isinstance(linear, QuantizedLinear):
            linear.release()
    for name, width in itertools.product((f"{bits} bits, looked up", f"{bits} bits, looked up, float16"), (8, 4)):
        model = models[f"{name}, {width}-bit vocabulary"] = LeanQuantModelForCausalLM.from_pretrained(BASE, QUANTIZED, **ours[name])
        quantize_vocabulary(model, width, "looked_up")
    ids, text = AutoTokenizer.from_pretrained(BASE)(PROMPT, return_tensors="pt"), torch.randint(1000, (1, READ))
    generating, reading = ({name: [] for name in models} for _ in range(2))
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            one = seconds(lambda: model.generate(**ids, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False))  # noqa: B023
            two = seconds(lambda: model(text, logits_to_keep=1))  # noqa: B023
            if repeat:  # the first warms up
                generating[name].append(one)
                reading[name].append(two)
    found = {}
    for key, tokens, times in (("tokens_per_second", args.tokens, generating), ("read_tokens_per_second", READ, reading)):
        found[key] = {name: tokens / median(values) for name, values in times.items()}
        for name, speed in found[key].items():
            print(f"{key}: {name}: {speed:.1f}, {speed / found[key]['original, float32']:.2f} times the original")
    return found


def bench_products(repeats: int, size: int = 4096, copies: int = 24) -> list[dict]:
    """Milliseconds of a product, looked up at each width and with the plain weight."""
    device = torch.device("cpu")
    plain = [torch.randn(size, size) for _ in range(copies // 6)]
    packed = {bits: [random_packed(size, size, bits, device) for _ in range(copies)] for bits in (4, 3, 2)}
    rows = []
    for tokens, dtype in ((1, torch.float32), (8, torch.float32), (128, torch.float32), (128, torch.bfloat16)):
        x, weights = torch.randn(tokens, size, dtype=dtype), [weight.to(dtype) for weight in plain]
        times = {name: [] for name in ("plain", *packed)}
        for repeat in range(copies * repeats):
            weight = weights[repeat % len(weights)]
            times["plain"].append(seconds(lambda: nn.functional.linear(x, weight)))  # noqa: B023
            for bits, copies_of_it in packed.items():
                codes = copies_of_it[repeat % copies]
                times[bits].append(seconds(lambda: packed_linear(x, *codes, None, bits)))  # noqa: B023
        ms = {name: 1e3 * median(values[copies:]) for name, values in times.items()}
        of = {"rows": size, "columns": size, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
        for bits in packed:
            rows.append({**of, "bits": bits, "ms": ms[bits], "plain_ms": ms["plain"]})
            speed = ms["plain"] / ms[bits]
            print(f"{size} x {size}, {bits} bits, {tokens} tokens: {ms[bits]:.2f} ms, {speed:.1f} times as fast as plain in {of['dtype']}")
    return rows


if __name__ == "__main__":
    main()
