"""Our affine search beside GPTQModel's own GPTQ: same model, bits, groups and calibration windows, both measured by transformers' loader.

    python scripts/bench_gptqmodel.py [--groupsize 64] [--out docs/results/gptqmodel-cpu.json]

SmolLM2-135M-Instruct at 4 bits, 32 x 512 calibration tokens, on a CPU. Held-out perplexity: of our own file through llama.py, of the
exported folder (awq) and of GPTQModel's through transformers with gptqmodel's torch kernel. And the time and memory of the export.
Steps that are done are kept in --folder. Groups of 128 do not divide 576 inputs. Needs tests/requirements.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from demo import FULL, cut_text  # noqa: E402
from demo_data import make_model, make_texts  # noqa: E402

MODEL, BITS, SAMPLES, SEQLEN = FULL.folder / "SmolLM2-135M-Instruct", 4, 32, 512
VARIANTS = {"gptqmodel, its defaults": {}, "gptqmodel, asymmetric": {"sym": False, "format": "gptq_v2"}}


def quantize_ours(folder: Path, groupsize: int, calibration: Path, test: Path) -> dict:
    """llama.py's report."""
    report = folder / f"ours-{groupsize}.json"
    if not report.is_file():
        command = ["llama.py", str(MODEL), str(calibration), "--wbits", str(BITS), "--grid", "affine", "--groupsize", str(groupsize)]
        command += ["--nsamples", str(SAMPLES), "--seqlen", str(SEQLEN), "--true-sequential", "--act-order", "--percdamp", "0.1"]
        command += [
            "--save_path",
            str(our_file(folder, groupsize)),
            "--eval",
            str(test),
            "--report",
            str(folder / "report.json"),
            "--overwrite",
        ]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        (folder / "report.json").rename(report)
    return json.loads(report.read_text())


def our_file(folder: Path, groupsize: int) -> Path:
    return folder / f"ours-{groupsize}.safetensors"


def export_ours(folder: Path, groupsize: int) -> tuple[Path, dict]:
    """The exported folder, and what it took: seconds and the peak resident memory of the process."""
    out, measured = folder / f"ours-{groupsize}-awq", folder / f"export-{groupsize}.json"
    if not measured.is_file():
        command = [sys.executable, "scripts/export.py", str(our_file(folder, groupsize)), "--base", str(MODEL), "--to", "awq"]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--out", str(out), "--overwrite"], cwd=ROOT)
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


def quantize_theirs(variant: str, groupsize: str, calibration: str, out: str) -> None:
    """GPTQModel's public API, on the calibration windows of llama.py."""
    from gptqmodel import GPTQModel, QuantizeConfig

    import datautils
    import modelutils

    ids = datautils.calibration_windows(calibration, modelutils.load_tokenizer(MODEL), SAMPLES, SEQLEN, 0)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * SEQLEN} for row in ids]
    config = QuantizeConfig(bits=BITS, group_size=int(groupsize), device="cpu", offload_to_disk=False, **VARIANTS[variant])
    model = GPTQModel.load(str(MODEL), config, dtype=torch.float32)
    model.quantize(windows, batch_size=2)
    model.save(out + ".partial")
    Path(out + ".partial").rename(out)


class WideProducts(TorchFunctionMode):
    """For the block: 16-bit products are made in float32, which holds theirs exactly, and rounded. Its torch kernels compute in 16
    bits, for which CPUs without such units take a hundred times as long."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype.itemsize == 2:
            return function(args[0].float(), args[1].float(), **(kwargs or {})).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


def measure(folder: str, test: str, out: str) -> None:
    """Held-out perplexity of an exported folder by transformers' loader, with gptqmodel's torch kernel in a float32 model."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    import eval_quantized
    import modelutils

    method = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["quant_method"]
    kernel = AwqConfig(backend="torch_awq") if method == "awq" else GPTQConfig(bits=BITS, backend="gptq_torch")
    torch.compiler.set_stance("force_eager")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", quantization_config=kernel).eval()
    windows = eval_quantized.Windows.of(test, modelutils.load_tokenizer(MODEL), SEQLEN)
    with WideProducts():
        found = eval_quantized.perplexity(windows, eval_quantized.whole_losses(model, windows.ids, 4, "held-out"))
    Path(out).write_text(json.dumps(found._asdict()))


def measured(folder: Path, test: Path, out: Path) -> dict:
    if not out.is_file():
        run_alone("measure", str(folder), str(test), str(out))
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--groupsize", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo" / "gptqmodel", help="where models go (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gptqmodel-cpu.json")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        {"quantize": quantize_theirs, "measure": measure}[args.step[0]](*args.step[1:])
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    make_model(MODEL)
    calibration, heldout = make_texts(FULL.folder)
    test = cut_text(heldout, FULL)
    ours = quantize_ours(args.folder, args.groupsize, calibration, test)
    exported, cost = export_ours(args.folder, args.groupsize)
    own = ours["perplexity"][0]["perplexity"]
    through = measured(exported, test, args.folder / f"awq-{args.groupsize}.json")["perplexity"]
    rows = {
        "leanquant affine, its own file": {"perplexity": own},
        "leanquant affine, exported to awq, through transformers": {"perplexity": through},
    }
    for number, variant in enumerate(VARIANTS):
        folder = args.folder / f"theirs-{args.groupsize}-{number}"
        if not (folder / "config.json").is_file():
            run_alone("quantize", variant, str(args.groupsize), str(calibration), str(folder))
        row = measured(folder, test, args.folder / f"theirs-{args.groupsize}-{number}.json")
        rows[variant] = {"perplexity": row["perplexity"]}
        write(args, rows, cost, through / own - 1)
    for name, row in rows.items():
        print(f"{name}: {row['perplexity']:.4f}")


def write(args: argparse.Namespace, rows: dict, cost: dict, difference: float) -> None:
    packages = {name: version(name) for name in ("torch", "transformers", "gptqmodel", "optimum")}
    contents = {
        "model": "SmolLM2-135M-Instruct",
        "bits": BITS,
        "groupsize": args.groupsize,
        "groupsize_128": "not possible: 576 inputs are four and a half groups of 128, which llama.py refuses",
        "calibration": f"{SAMPLES} x {SEQLEN} tokens of Wikipedia, the same windows for both",
        "test": f"{FULL.test_tokens} held-out tokens in windows of {SEQLEN}, float32",
        "rows": rows,
        "exported_through_transformers_relative_difference": difference,
        "export": cost,
        "versions": packages,
        "threads": torch.get_num_threads(),
    }
    args.out.write_text(json.dumps(contents, indent=2) + "\n")


if __name__ == "__main__":
    main()
