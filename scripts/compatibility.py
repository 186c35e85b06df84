"""docs/compatibility.md: each format of leanquant/export.py, loaded by the software that reads it, on a CPU.

    python scripts/compatibility.py

A cell is a model whose weights are rounded to nearest, exported, and loaded by transformers with gptqmodel or compressed-tensors
(tests/requirements.txt). It passes if the logits in float16 are ours within 1e-2, and if at every position, and of every token that
`generate` goes on with, the likeliest token is ours too, or one that the rounding of float16 puts before it (within 2e-3 of the largest
logit). gptqmodel's kernels are asked twice: the one in torch, and the one that it takes by itself, which on a CPU may compute
in bfloat16. The tests run all cells and make the page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig, LlamaConfig, Qwen2Config  # noqa: E402

import modelutils  # noqa: E402
from demo_data import make_model  # noqa: E402
from leanquant import LeanQuantModelForCausalLM  # noqa: E402
from leanquant.export import export  # noqa: E402
from leanquant.packing import Checkpoint, PackedLinear, pack_codes  # noqa: E402
from leanquant_grid import minmax_affine  # noqa: E402

OUT = ROOT / "docs" / "compatibility.md"
GROUPS = {"whole rows": -1, "groups of 128": 128, "groups of 64": 64}
TINY = {"tiny Llama": LlamaConfig, "tiny Qwen2 with biases": Qwen2Config}
SMOLLM2 = "SmolLM2-135M"
IDS = [list(range(5, 24)), list(range(60, 79))]
SMOLLM2_IDS = [  # "The telescope is an instrument that makes ..." and "The capital of France is Paris, which ..."
    [504, 13776, 314, 354, 5769, 338, 2022, 9931, 3401, 1972, 35678, 284, 3227, 28, 284, 357, 436, 808, 804],
    [504, 3575, 282, 4649, 314, 7042, 28, 527, 5721, 335, 260, 4626, 1268, 462, 284, 553, 719, 260, 8952],
]
NEW_TOKENS, TINY_VOCABULARY = 4, 300
BOUNDS = ((1e-2, 2e-3), (3e-2, 3e-2))  # of a kernel in float16, and of one that may compute in bfloat16: see `verdict`


class Cell(NamedTuple):
    model: str
    format: str
    bits: int
    symmetric: bool
    groupsize: int


FORMATS = [("awq", 4, False), *(("gptq_v2", bits, False) for bits in (4, 3, 2)), ("gptq", 4, True)]
FORMATS += [("compressed-tensors", bits, symmetric) for symmetric in (True, False) for bits in (4, 3, 2)]
TINY_CELLS = [Cell(model, *kind, groupsize) for model, kind, groupsize in product(TINY, FORMATS, GROUPS.values())]
SMOLLM2_CELLS = [Cell(SMOLLM2, *kind, 64) for kind in FORMATS if kind[1] == 4]  # 576 inputs: groups of 128 do not divide them


# --- models ----------------------------------------------------------------------------------------------------


def make_tiny(name: str, folder: Path) -> Path:
    """A random model of two layers whose inputs groups of 128 and 64 divide, in float16."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TINY_VOCABULARY,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY[name](num_hidden_layers=2, **sizes), dtype=torch.float32)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.1 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5
    model.half().save_pretrained(folder)
    return folder


def round_model(base: Path, cell: Cell, out: Path) -> Path:
    """The model in `base` rounded to nearest, as a file of ours.

    Asymmetric tiny ones: the zero points of the first two rows or groups are 0 and the largest. Symmetric: every other scale is negative.
    """
    checkpoint, tensors = Checkpoint.open(base), {}
    model = modelutils.StreamedModel(base, checkpoint, torch.float16, torch.device("cpu"))
    linears = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear) and model.layers_name in name}
    for name in checkpoint.shapes:
        linear = name.removesuffix(".weight")
        tensors |= round_linear(checkpoint.get(name), cell).named(linear) if linear in linears else {name: checkpoint.get(name)}
    settings = {"method": "rtn", "grid": "minmax", "bits": cell.bits, "groupsize": cell.groupsize, "packing": "dense"}
    save_file(tensors, out, metadata={"leanquant": json.dumps(settings)})
    return out


def round_linear(W: torch.Tensor, cell: Cell) -> PackedLinear:
    O, I = W.shape
    groups = W.float().view(O * I // (I if cell.groupsize == -1 else cell.groupsize), -1)
    scale, zero = minmax_affine(groups, cell.bits, cell.symmetric)
    if cell.symmetric:
        scale[1::2] *= -1
    if not cell.symmetric and cell.model != SMOLLM2:
        zero[:2] = torch.tensor([0, 2**cell.bits - 1])
    codes = (groups / scale.unsqueeze(1) + zero.unsqueeze(1)).round().clamp(0, 2**cell.bits - 1).to(torch.uint8)
    return PackedLinear(pack_codes(codes.view(O, I), cell.bits), scale=scale.view(O, -1).half(), zero=zero.view(O, -1))


# --- loading ---------------------------------------------------------------------------------------------------


def ids_of(folder: Path) -> torch.Tensor:
    """What the model in `folder` is asked to go on with: [2, 19]."""
    return torch.tensor(IDS if json.loads((folder / "config.json").read_text())["vocab_size"] == TINY_VOCABULARY else SMOLLM2_IDS)


def load(folders: list[str], out: str) -> None:
    """What the real loaders make of `folders`: logits and generated tokens, or the error, in the file `out`. In a process of its own."""
    results = {}
    torch.compiler.set_stance("force_eager")  # gptqmodel compiles kernels that are run twice here
    for folder, kernel in ((name, kernel) for name in folders for kernel in kernels(name)):
        ids = ids_of(Path(folder))
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu", **kernel).eval()
            with torch.no_grad():
                logits = model(ids).logits.float()
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
            results.setdefault(folder, []).append({"logits": logits, "tokens": tokens[:, ids.shape[1] :]})
        except Exception as error:  # each loader fails in its own way
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            results.setdefault(folder, []).append({"error": text})
    torch.save(results, out)


def kernels(folder: str | Path) -> list[dict]:
    """What `from_pretrained` is told, for each kernel of the folder's reader that is to run."""
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    choices = {
        "gptq": [{"quantization_config": GPTQConfig(bits=config.get("bits", 4), backend="gptq_torch")}, {}],
        "awq": [{"quantization_config": AwqConfig(backend="torch_awq")}, {}],
    }
    return choices.get(config["quant_method"], [{}])


def verdict(model: nn.Module, ids: torch.Tensor, theirs: dict, bound: float, tie: float) -> str:
    """`yes`, or what is wrong with what a loader made of `ids` [n, T].

    model: ours. bound: of the logits' relative error. tie: how far from its largest logit one may be that rounding makes the largest.
    """
    if "error" in theirs:
        return theirs["error"]
    if theirs["tokens"].shape != (len(ids), NEW_TOKENS):
        return f"generate makes {theirs['tokens'].shape[1]} tokens"
    with torch.no_grad():
        logits = model(torch.cat([ids, theirs["tokens"][:, :-1]], 1)).logits
    ours = logits[:, : ids.shape[1]]
    error = ((theirs["logits"] - ours).norm() / ours.norm()).item()
    if not error < bound:
        return f"logits differ by {error:.2g}"
    asked = torch.cat([ours, logits[:, ids.shape[1] - 1 :]], 1)
    chosen = torch.cat([theirs["logits"].argmax(-1), theirs["tokens"]], 1)
    if (behind(asked, chosen) > tie).any():
        return "other tokens are the likeliest"
    return "yes"


def behind(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far `tokens` [n, T] are from being the likeliest, relative to the largest of `logits` [n, T, V]. 0: they are."""
    return (logits.amax(-1) - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)) / logits.abs().amax(-1)


def check(cells: list[Cell], bases: dict[str, Path], work: Path) -> dict[Cell, str]:
    """Whether each cell passes. `bases`: the folder of each model; `work`: an empty folder, which needs room for all of them."""
    files, folders = {}, {}
    for number, cell in enumerate(cells):
        files[cell], folders[cell] = work / f"{number}.safetensors", work / str(number)
        export(Checkpoint.open(round_model(bases[cell.model], cell, files[cell])), bases[cell.model], cell.format, folders[cell])
    command = [sys.executable, __file__, "--load", str(work / "results.pt"), *map(str, folders.values())]
    quiet = {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the loaders' process failed: {done.stderr[-2000:]}")
    results = torch.load(work / "results.pt", weights_only=True)
    verdicts = {}
    for cell in cells:
        model, ids = LeanQuantModelForCausalLM.from_pretrained(bases[cell.model], files[cell], device="cpu"), ids_of(bases[cell.model])
        kernel_results = zip(results[str(folders[cell])], BOUNDS[: len(kernels(folders[cell]))], strict=True)
        found = [verdict(model, ids, theirs, *bounds) for theirs, bounds in kernel_results]
        verdicts[cell] = next((text for text in found if text != "yes"), "yes")
    return verdicts


def check_all(work: Path) -> dict[Cell, str]:
    """Every cell of the page. `work`: an empty folder, for 3 GB."""
    smollm2 = ROOT / "demo" / "SmolLM2-135M-Instruct"
    smollm2.parent.mkdir(exist_ok=True)
    make_model(smollm2)
    bases = {name: make_tiny(name, work / name.replace(" ", "-")) for name in TINY} | {SMOLLM2: smollm2}
    found = {}
    for number, cells in enumerate((TINY_CELLS, SMOLLM2_CELLS)):
        (folder := work / f"cells-{number}").mkdir()
        found |= check(cells, bases, folder)
        shutil.rmtree(folder)
    return found


# --- the page --------------------------------------------------------------------------------------------------

HEAD = """# What loads what

Made by the tests (`tests/test_export.py`) and by `python scripts/compatibility.py`. Readers: transformers {transformers} on a CPU, with
gptqmodel {gptqmodel} and optimum {optimum} for awq and gptq, and compressed-tensors {compressed_tensors} for its own format.

yes: it loads; float16 logits are those of `LeanQuantModelForCausalLM` within 1e-2; at each of 38 positions, and of the four tokens that
`generate` goes on with, the likeliest token is ours (or one within 0.2 % of the largest logit of it, the rounding of float16). gptqmodel's
torch kernel is meant; the kernel that it takes by itself on a CPU may compute in bfloat16: within 3e-2 and 3 %.
Asymmetric tiny models hold zero points of 0 and of 2^bits - 1. SmolLM2 has 576 inputs, which groups of 128 do not divide.

"""


def page(found: dict[Cell, str]) -> str:
    header = ["format", "bits", "zero points", *(f"{model}, {name}" for model in TINY for name in GROUPS), f"{SMOLLM2}, groups of 64"]
    lines = [header, ["---"] * len(header)]
    for name, bits, symmetric in FORMATS:
        cells = [Cell(model, name, bits, symmetric, groupsize) for model in TINY for groupsize in GROUPS.values()]
        cells.append(Cell(SMOLLM2, name, bits, symmetric, 64))
        lines.append([name, str(bits), "symmetric" if symmetric else "asymmetric", *(found.get(cell, "") for cell in cells)])
    versions = {name.replace("-", "_"): version(name) for name in ("transformers", "gptqmodel", "optimum", "compressed-tensors")}
    return HEAD.format(**versions) + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load[1:], args.load[0])
        return
    with tempfile.TemporaryDirectory(prefix="compatibility-") as folder:
        found = check_all(Path(folder))
    print(*(f"{cell}: {text}" for cell, text in found.items()), sep="\n", flush=True)
    OUT.write_text(page(found))


if __name__ == "__main__":
    main()
