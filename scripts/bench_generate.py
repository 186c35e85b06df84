"""Generation on a CPU: tokens a second of the demo's quantized model, rebuilt and packed, beside the original in float32.

    python scripts/bench_generate.py [--tokens 32] [--repeats 7] [--out docs/results/generate-cpu.json]

All three models are in one process and take turns, so that what else the machine does meets them alike; greedy, batch 1, medians.
Needs demo/nonuniform-4bit.safetensors, which scripts/quickstart.sh makes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from leanquant import LeanQuantModelForCausalLM  # noqa: E402
from leanquant.packing import Checkpoint  # noqa: E402

BASE, QUANTIZED = ROOT / "demo" / "SmolLM2-135M-Instruct", ROOT / "demo" / "nonuniform-4bit.safetensors"
PROMPT = "The telescope is an instrument that"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "generate-cpu.json")
    args = parser.parse_args()
    if not QUANTIZED.is_file():
        sys.exit(f"error: {QUANTIZED} is not there: run scripts/quickstart.sh first")
    bits = Checkpoint.open(QUANTIZED).bits_of("model.layers.0.mlp.down_proj")
    packed = {"torch_dtype": torch.float32, "device": "cpu", "dequantize": "never"}
    models = {
        "original, float32": AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        f"{bits} bits, rebuilt at load": LeanQuantModelForCausalLM.from_pretrained(BASE, QUANTIZED, device="cpu"),
        f"{bits} bits, packed": LeanQuantModelForCausalLM.from_pretrained(BASE, QUANTIZED, **packed),
    }
    ids = AutoTokenizer.from_pretrained(BASE)(PROMPT, return_tensors="pt")
    seconds = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(**ids, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    speeds = {name: args.tokens / median(times) for name, times in seconds.items()}
    original = next(iter(speeds.values()))
    for name, speed in speeds.items():
        print(f"{name}: {speed:.1f} tokens/s, {speed / original:.2f} times the original")
    results = {"tokens": args.tokens, "repeats": args.repeats, "threads": torch.get_num_threads(), "tokens_per_second": speeds}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
