"""Our affine search beside GPTQModel's own GPTQ: same model, bits, groups and calibration windows, both measured by transformers' loader.

    python scripts/bench_gptqmodel.py [--groupsizes 64 128] [--out docs/results/gptqmodel-cpu.json]

SmolLM2-135M-Instruct at 4 bits, 32 x 512 calibration tokens, on a CPU. Held-out perplexity: of our own file through llama.py, of the
exported folder (awq) and of GPTQModel's through transformers with gptqmodel's torch kernel, and of GPTQModel's as read here
(eval_quantized.py). And the time and memory of the export.
Groups of 128 do not divide SmolLM2's 576 inputs: there the model is the same function with zeros appended (demo_data.widen).
Steps that are done are kept in --folder. Needs tests/requirements.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from demo import FULL, cut_text  # noqa: E402
from demo_data import make_model, make_texts, widen  # noqa: E402
from eval_quantized import versions  # noqa: E402

BITS, SAMPLES, SEQLEN = 4, 32, 512
VARIANTS = {"gptqmodel, its defaults": {}, "gptqmodel, asymmetric": {"sym": False, "format": "gptq_v2"}}


class Bench(NamedTuple):
    """Where the runs of one size of group keep what is done."""

    model: Path
    groupsize: int
    folder: Path
    calibration: Path
    test: Path

    def file(self, name: str) -> Path:
        return self.folder / name.format(self.groupsize)


def quantize_ours(bench: Bench) -> dict:
    """llama.py's report."""
    report, partial = bench.file("ours-{}.json"), bench.file("report-{}.json")
    if not report.is_file():
        command = ["llama.py", str(bench.model), str(bench.calibration), "--wbits", str(BITS), "--grid", "affine"]
        command += ["--groupsize", str(bench.groupsize), "--nsamples", str(SAMPLES), "--seqlen", str(SEQLEN)]
        command += ["--true-sequential", "--act-order", "--percdamp", "0.1", "--eval", str(bench.test)]
        command += ["--save_path", str(bench.file("ours-{}.safetensors")), "--overwrite", "--report", str(partial)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        partial.rename(report)
    return json.loads(report.read_text())


def export_ours(bench: Bench) -> tuple[Path, dict]:
    """The exported folder, and what it took: seconds and the peak resident memory of the process."""
    out, measured = bench.file("ours-{}-awq"), bench.file("export-{}.json")
    if not measured.is_file():
        command = [sys.executable, "scripts/export.py", str(bench.file("ours-{}.safetensors")), "--base", str(bench.model)]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--to", "awq", "--out", str(out), "--overwrite"], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit("error: the export failed, see above")
        seconds = time.perf_counter() - start
        measured.write_text(json.dumps({"seconds": round(seconds, 1), "peak_host_bytes": usage.ru_maxrss * 1024}))
    return out, json.loads(measured.read_text())


def run_alone(*args: str) -> None:
    """This script's step `args` in a process of its own: importing gptqmodel changes the one it is in."""
    workers = {"GPTQMODEL_CPU_WORKERS": "2"}  # on two cores it takes one, and then wants two
    subprocess.run([sys.executable, __file__, "--step", *args], cwd=ROOT, check=True, env=workers | os.environ)


def quantize_theirs(variant: str, model: str, groupsize: str, calibration: str, out: str) -> None:
    """GPTQModel's public API, on the calibration windows of llama.py."""
    from gptqmodel import GPTQModel, QuantizeConfig

    import datautils
    import modelutils

    ids = datautils.calibration_windows(calibration, modelutils.load_tokenizer(model), SAMPLES, SEQLEN, 0)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * SEQLEN} for row in ids]
    config = QuantizeConfig(bits=BITS, group_size=int(groupsize), device="cpu", offload_to_disk=False, **VARIANTS[variant])
    network = GPTQModel.load(model, config, dtype=torch.float32)
    network.quantize(windows, batch_size=2)
    network.save(out + ".partial")
    Path(out + ".partial").rename(out)


class WideProducts(TorchFunctionMode):
    """For the block: 16-bit products are made in float32, which holds theirs exactly, and rounded. Its torch kernels compute in 16
    bits, for which CPUs without such units take a hundred times as long."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype.itemsize == 2:
            return function(args[0].float(), args[1].float(), **(kwargs or {})).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


def measure(folder: str, model: str, test: str, out: str) -> None:
    """Held-out perplexity of an exported folder by transformers' loader, with gptqmodel's torch kernel in a float32 model."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    import eval_quantized
    import modelutils

    method = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["quant_method"]
    kernel = AwqConfig(backend="torch_awq") if method == "awq" else GPTQConfig(bits=BITS, backend="gptq_torch")
    torch.compiler.set_stance("force_eager")
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", quantization_config=kernel).eval()
    windows = eval_quantized.Windows.of(test, modelutils.load_tokenizer(model), SEQLEN)
    with WideProducts():
        found = eval_quantized.perplexity(windows, eval_quantized.whole_losses(network, windows.ids, 4, "held-out"))
    Path(out).write_text(json.dumps(found._asdict()))


def measured(bench: Bench, folder: Path, out: Path) -> float:
    if not out.is_file():
        run_alone("measure", str(folder), str(bench.model), str(bench.test), str(out))
    return json.loads(out.read_text())["perplexity"]


def read_here(bench: Bench, folder: Path, out: Path) -> float:
    """Held-out perplexity by eval_quantized.py."""
    if not out.is_file():
        command = ["eval_quantized.py", "--base_model_name_or_path", str(folder), "--perplexity", str(bench.test), "--seqlen", str(SEQLEN)]
        subprocess.run([sys.executable, *command, "--output", str(out)], cwd=ROOT, check=True)
    return json.loads(out.read_text())["perplexity"][0]["perplexity"]


def compare(bench: Bench) -> dict:
    """Everything about one size of group."""
    original = read_here(bench, bench.model, bench.file("original-{}.json"))
    ours = quantize_ours(bench)["perplexity"][0]["perplexity"]
    exported, cost = export_ours(bench)
    through = measured(bench, exported, bench.file("awq-{}.json"))
    perplexity = {"original": original, "leanquant affine, its own file": ours}
    perplexity["leanquant affine, exported to awq, through transformers"] = through
    for number, variant in enumerate(VARIANTS):
        folder = bench.file(f"theirs-{{}}-{number}")
        if not (folder / "config.json").is_file():
            run_alone("quantize", variant, str(bench.model), str(bench.groupsize), str(bench.calibration), str(folder))
        perplexity[variant] = measured(bench, folder, bench.file(f"theirs-{{}}-{number}.json"))
        perplexity[f"{variant}, read here"] = read_here(bench, folder, bench.file(f"theirs-{{}}-{number}-here.json"))
    return {
        "model": bench.model.name,
        "perplexity": perplexity,
        "exported_through_transformers_relative_difference": through / ours - 1,
        "export": cost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--groupsizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--folder", type=Path, default=FULL.folder / "gptqmodel", help="where models go (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gptqmodel-cpu.json")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"quantize": quantize_theirs, "measure": measure}[args.step[0]](*args.step[1:])
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    model = FULL.folder / "SmolLM2-135M-Instruct"
    make_model(model)
    calibration, heldout = make_texts(FULL.folder)
    test, found = cut_text(heldout, FULL), {}
    for groupsize in args.groupsizes:
        base = model if divides(groupsize, model) else widen(model, FULL.folder / "SmolLM2-135M-Instruct-widened")
        found[f"groups of {groupsize}"] = compare(Bench(base, groupsize, args.folder, calibration, test))
        write(args.out, found)
    for groups, row in found.items():
        print(groups, *(f"{name}: {perplexity:.4f}" for name, perplexity in row["perplexity"].items()), sep="\n  ")


def divides(groupsize: int, model: Path) -> bool:
    """Can the inputs of each linear be cut into such groups?"""
    config = json.loads((model / "config.json").read_text())
    return config["hidden_size"] % groupsize == config["intermediate_size"] % groupsize == 0


def write(out: Path, found: dict) -> None:
    contents = {
        "model": "SmolLM2-135M-Instruct; widened: zeros appended until 128 divides the inputs of every linear, the same function",
        "bits": BITS,
        "calibration": f"{SAMPLES} x {SEQLEN} tokens of Wikipedia, the same windows for both",
        "test": f"{FULL.test_tokens} held-out tokens in windows of {SEQLEN}, float32",
        **found,
        "versions": versions("gptqmodel", "optimum"),
        "threads": torch.get_num_threads(),
    }
    out.write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
