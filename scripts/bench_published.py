"""Time, peak memory and perplexity on SmolLM2-135M beside the published tool's, as the README states them.

    python scripts/bench_published.py [--bits 4 3 2] [--methods nonuniform "published recipe" gptq rtn affine]

Protocol of the published numbers: 32 x 512 calibration tokens, --true-sequential --act-order --percdamp 0.1
--exponent 4; the articles joined and cut at 75 % of the characters; perplexity on the first 16 384 held-out tokens in
windows of 512. Results are added to docs/results/quantize-cpu.json, the table to docs/results/quantize-cpu.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from demo_data import articles, make_model, write_text

ROOT = Path(__file__).resolve().parent.parent
WORK, RESULTS = ROOT / "demo" / "bench", ROOT / "docs" / "results"
TOKENS, SEQLEN = 16384, 512
FLAGS = {
    "fp16": ["--wbits", "16"],
    "nonuniform": ["--exponent", "4"],
    "published recipe": ["--exponent", "4", "--recipe", "published"],
    "affine": ["--grid", "affine"],
    "affine, exponent 4": ["--grid", "affine", "--exponent", "4"],
    "gptq": ["--grid", "minmax"],
    "rtn": ["--nearest"],
}
# The published code on 2 CPU cores: (perplexity, seconds); its peak host memory was 1.33 GB (GPTQ: 1.6 GB).
PUBLISHED = {
    ("fp16", 16): (19.65, None),
    ("published recipe", 4): (21.67, 449),
    ("published recipe", 3): (35.24, 313),
    ("published recipe", 2): (150.95, None),
    ("gptq", 4): (29.84, 215),
    ("gptq", 3): (80.36, 197),
    ("gptq", 2): (1.5e6, 364),
    ("rtn", 4): (34.01, None),
    ("rtn", 3): (433.7, None),
    ("rtn", 2): (5.0e6, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument(
        "--methods", nargs="+", choices=list(FLAGS)[1:], default=["nonuniform", "published recipe", "affine", "gptq", "rtn"]
    )
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    make_model(ROOT / "demo" / "SmolLM2-135M-Instruct")
    make_texts()
    store = RESULTS / "quantize-cpu.json"
    rows = json.loads(store.read_text()) if store.is_file() else {}
    for method, bits in [("fp16", 16), *((m, b) for b in args.bits for m in args.methods)]:
        rows[f"{method} {bits}"] = measure(method, bits)
        store.write_text(json.dumps(rows, indent=2) + "\n")
        (RESULTS / "quantize-cpu.md").write_text(as_markdown(rows))
    print("\n" + as_markdown(rows))


def make_texts() -> None:
    if (WORK / "heldout.txt").is_file():
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "SmolLM2-135M-Instruct")
    text = "\n\n".join(articles())
    cut = int(0.75 * len(text))
    write_text(WORK / "calibration.txt", text[:cut])
    held = tokenizer(text[cut:], verbose=False)["input_ids"][:TOKENS]
    write_text(WORK / "heldout.txt", tokenizer.decode(held))


def measure(method: str, bits: int) -> dict:
    """One run of llama.py. Returns what the table needs of its report."""
    report = WORK / "report.json"
    command = ["llama.py", "demo/SmolLM2-135M-Instruct", "demo/bench/calibration.txt", "--nsamples", "32", "--seqlen", str(SEQLEN)]
    command += ["--eval", "demo/bench/heldout.txt", "--report", str(report.relative_to(ROOT)), *FLAGS[method]]
    if method != "fp16":
        command += ["--wbits", str(bits), "--true-sequential", "--act-order", "--percdamp", "0.1"]
        command += ["--save_path", "demo/bench/model.safetensors", "--overwrite", "--fresh"]
    print("$ python " + " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    contents = json.loads(report.read_text())
    return {
        "method": method,
        "bits": bits,
        "perplexity": contents["perplexity"][0]["perplexity"],
        "tokens": contents["perplexity"][0]["tokens"],
        "seconds": contents.get("quantization_seconds"),
        "phase_seconds": contents.get("phase_seconds"),
        "peak_host_gb": contents["machine"]["peak_host_bytes"] / 1e9,
        "peak_host_gb_quantizing": contents.get("peak_host_bytes_quantizing", 0) / 1e9,
        "threads": contents["machine"]["threads"],
        "settings": contents["settings"],
    }


def as_markdown(rows: dict) -> str:
    lines = [
        "| method | bits | perplexity | published | seconds | published | peak host memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows.values():
        perplexity, seconds = PUBLISHED.get((r["method"], r["bits"]), (None, None))
        cells = [r["method"], r["bits"], f"{r['perplexity']:.5g}", f"{perplexity:.5g}" if perplexity else ""]
        cells += [
            f"{r['seconds']:.0f}" if r["seconds"] else "",
            seconds or "",
            f"{r['peak_host_gb_quantizing']:.2f}" if r["seconds"] else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
