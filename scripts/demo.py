"""The quickstart: quantize SmolLM2-135M-Instruct with four methods, compare them with fp16, let the result write.

    python scripts/demo.py [--fast]

Everything lands under demo/ (demo/fast/ with --fast, which quantizes 6 of the 30 layers and uses fewer tokens).
What is already there is reused. The work is done by llama.py, called as a user would call it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from transformers.utils.logging import disable_progress_bar

from demo_data import make_model, make_texts, write_text
from plot import losses_by_layer

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "What is a telescope? Answer in one sentence."


class Method(NamedTuple):
    label: str
    name: str
    flags: tuple[str, ...]


METHODS = [
    Method("original", "fp16", ("--wbits", "16")),
    Method("round to nearest", "rtn", ("--wbits", "4", "--nearest")),
    Method("GPTQ", "gptq", ("--wbits", "4", "--grid", "minmax")),
    Method("LeanQuant affine", "affine", ("--wbits", "4", "--grid", "affine")),
    Method("LeanQuant non-uniform", "nonuniform", ("--wbits", "4", "--grid", "nonuniform")),
]


class Size(NamedTuple):
    """How much work the demo does: windows and tokens for calibration, tokens and items to evaluate, layers to quantize."""

    folder: Path
    nsamples: int
    seqlen: int
    test_tokens: int
    items: int
    layers: tuple[str, ...]


FULL = Size(ROOT / "demo", 32, 512, 16384, 100, ())
FAST = Size(ROOT / "demo" / "fast", 16, 256, 4096, 20, ("--n_layers", "6"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fast", action="store_true", help="6 layers and fewer tokens: three to six minutes on 2 cores")
    size = FAST if parser.parse_args().fast else FULL
    size.folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    print("preparing the model and the text (a minute the first time)", flush=True)
    make_model(FULL.folder / "SmolLM2-135M-Instruct")
    calibration, heldout = make_texts(FULL.folder)
    test = cut_text(heldout, size)
    reports = {method.name: run(method, size, calibration, test) for method in METHODS}
    rows = [row(method, reports, size) for method in METHODS]
    table = as_markdown(rows)
    (size.folder / "results.md").write_text(table + "\n")
    (size.folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(reports, size.folder / "loss.png")
    note = f"first {size.layers[1]} of 30 layers quantized; " if size.layers else ""
    windows = reports["fp16"]["perplexity"][0]
    print(f"\nSmolLM2-135M-Instruct; {note}perplexity on {windows['tokens']} held-out tokens in windows of {size.seqlen}\n\n{table}\n")
    run_tasks(size)
    write_sentences(size)
    print(f"\ntable: {shown(size.folder)}/results.md   plot: {shown(size.folder)}/loss.png   models: {shown(size.folder)}/*.safetensors")


def cut_text(heldout: Path, size: Size) -> Path:
    """The first `test_tokens` tokens of the held-out articles, as a text file of their own."""
    out = size.folder / f"heldout-{size.test_tokens}.txt"
    if not out.is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(FULL.folder / "SmolLM2-135M-Instruct")
        ids = tokenizer(heldout.read_text()[: 8 * size.test_tokens], verbose=False)["input_ids"]
        write_text(out, tokenizer.decode(ids[: size.test_tokens]))
    return out


def run(method: Method, size: Size, calibration: Path, test: Path) -> dict:
    """Call llama.py for one method, unless its report is there for the same command. Returns the report."""
    report = size.folder / f"{method.name}.json"
    stamp = size.folder / f"{method.name}.command"
    command = ["llama.py", shown(FULL.folder / "SmolLM2-135M-Instruct"), shown(calibration), *method.flags]
    command += ["--nsamples", str(size.nsamples), "--seqlen", str(size.seqlen), "--eval", shown(test), "--report", shown(report)]
    if method.name != "fp16":
        command += ["--true-sequential", "--act-order", "--percdamp", "0.1", *size.layers]
        command += ["--save_path", shown(model_file(method, size)), "--overwrite"]
    line = "python " + " ".join(command)
    print(f"\n{method.label}\n$ {line}", flush=True)
    if stamp.is_file() and stamp.read_text() == line and report.is_file() and model_file(method, size).is_file():
        print("already done", flush=True)
    else:
        stamp.unlink(missing_ok=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            sys.exit(f"error: {method.label} did not finish: see above, then run this again (what is done is kept)")
        stamp.write_text(line)
    return json.loads(report.read_text())


def run_tasks(size: Size) -> None:
    """lm-eval on the last method's model and on the original, on tasks made of the held-out articles."""
    command = ["eval_quantized.py", "--base_model_name_or_path", shown(FULL.folder / "SmolLM2-135M-Instruct")]
    command += ["--leanquant_path", shown(model_file(METHODS[-1], size)), "--include_path", "scripts/tasks"]
    command += ["--tasks", "demo_words", "demo_continuations", "--limit", str(size.items), "--compare"]
    command += ["--output", shown(size.folder / "tasks.json")]
    print("lm-eval, on two tasks made of the held-out articles\n$ python " + " ".join(command), flush=True)
    # lm-eval's progress bars are for a terminal alone
    bars = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    if subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | bars).returncode:
        sys.exit("error: the evaluation did not finish: see above, then run this again (what is done is kept)")
    print()


def model_file(method: Method, size: Size) -> Path:
    if method.name == "fp16":
        return FULL.folder / "SmolLM2-135M-Instruct" / "model.safetensors"
    return size.folder / f"{method.name}-4bit.safetensors"


def shown(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def row(method: Method, reports: dict, size: Size) -> dict:
    report = reports[method.name]
    return {
        "method": method.label,
        "bits": report["settings"].get("bits", 16),
        "file_megabytes": round(model_file(method, size).stat().st_size / 1e6, 1),
        "perplexity": round(report["perplexity"][0]["perplexity"], 3),
        "quantization_seconds": round(report["quantization_seconds"], 1) if "quantization_seconds" in report else None,
    }


def as_markdown(rows: list[dict]) -> str:
    lines = ["| method | bits | file, MB | perplexity | quantization, s |", "|---|---|---|---|---|"]
    for r in rows:
        seconds = "" if r["quantization_seconds"] is None else r["quantization_seconds"]
        lines.append(f"| {r['method']} | {r['bits']} | {r['file_megabytes']} | {r['perplexity']:.2f} | {seconds} |")
    return "\n".join(lines)


def plot(reports: dict, out: Path) -> None:
    """Loss per layer, the squared output error summed over its linears, for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for method in METHODS[1:]:
        losses = losses_by_layer(reports[method.name])
        perplexity = reports[method.name]["perplexity"][0]["perplexity"]
        axes.plot(list(losses), list(losses.values()), marker=".", label=f"{method.label} (perplexity {perplexity:.2f})")
    original = reports["fp16"]["perplexity"][0]["perplexity"]
    axes.set(xlabel="decoder layer", ylabel="loss: squared output error per token", yscale="log")
    axes.set_title(f"SmolLM2-135M-Instruct at 4 bits (fp16 perplexity {original:.2f})")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def write_sentences(size: Size) -> None:
    """One greedy answer of the original and one of the quantized model."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from leanquant import LeanQuantModelForCausalLM

    base = FULL.folder / "SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(base)
    original = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    quantized = LeanQuantModelForCausalLM.from_pretrained(base, model_file(METHODS[-1], size))
    print(f"prompt:    {PROMPT}")
    print(f"original:  {answer(original, tokenizer)}")
    print(f"quantized: {answer(quantized, tokenizer)}")


def answer(model, tokenizer) -> str:
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
    out = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
