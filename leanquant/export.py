"""Write a quantized model as a folder that other software loads: weights in its layout, its config, tokenizer, a model card.

Codes are written as they are, never quantized again, a linear at a time. Before the folder gets its name, its files are read back
by the layout's own decoder, and every weight is compared with the source. Layouts are layouts.py's, files packing.py's.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import packing
from .errors import InputError
from .experts import Experts, split_experts
from .foreign import open_checkpoint
from .layouts import LAYOUTS, Layout, Linear, Model, Stored, weight_of
from .linear import path_in
from .modeling import build_model, read_config
from .packing import CARD, OLD_CONFIG, SCALE, SUFFIXES, ZERO, Checkpoint, ModelWriter, PackedLinear, unpack_codes, write_synced

FORMATS = (*LAYOUTS, "dense")
PART_BYTES = 2**26  # written at a time
CHECKED_WEIGHTS = 2**22  # compared at a time


class Dense(Layout):
    """Plain 16-bit weights, dequantized."""

    name = "dense"

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def check(self, model: Model) -> None:
        """Holds anything."""

    def config(self, model: Model, version: str) -> dict:
        return {"dtype": str(self.dtype).removeprefix("torch.")}

    def encode(self, linear: Linear, model: Model) -> dict[str, torch.Tensor]:
        return {".weight": weight_of(linear).to(self.dtype)}

    def weights(self, tensors, bits, rows, columns, step):
        return (piece.float() for piece in tensors[".weight"].split(step))


def export(
    checkpoint: Checkpoint,
    base: Path,
    name: str,
    out: Path,
    overwrite: bool = False,
    perplexity: list[dict] = (),
    command: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    flag: str = "--out",
) -> None:
    """Write the quantized `checkpoint` to the folder `out` in the format `name`, one of FORMATS.

    base: the unquantized model's folder, for config and tokenizer. perplexity: rows of a report, for the model card, as `command`
    is. flag: what the user gave `out` with. Raises InputError, before anything is written, for what the format cannot hold.
    """
    from . import __version__

    layout = layout_of(name, checkpoint.stored_dtype)
    check_output(out, overwrite, flag, base, *(file.parent for file in checkpoint.stamps))
    sizes, model = survey(checkpoint, base)
    check_fits(layout, sizes, model)
    weights = sum(rows * columns for rows, columns in sizes.values())
    settings = {**checkpoint.settings, "exported": name}
    writer = ModelWriter(out, overwrite, int(1.1 * checkpoint.file_bytes()) + (2 * weights if name == "dense" else 0), flag=flag)
    try:
        stored = layout.adapted(model, sizes)
        for part in parts(checkpoint, layout, sizes, stored, min(PART_BYTES, max_shard_bytes)):
            writer.add(part)
        folder = writer.assemble(base, settings, config := layout.config(stored, __version__), max_shard_bytes, {"format": "pt"})
        if name.startswith("gptq"):
            write_synced(folder / OLD_CONFIG, (json.dumps(config["quantization_config"], indent=2) + "\n").encode())
        write_synced(folder / CARD, card(checkpoint, model, name, out.name, perplexity, command).encode())
        verify(checkpoint, Checkpoint.open(folder), layout, sizes)
        verify_config(folder, stored, layout)
        writer.publish()
    finally:
        writer.close()


def layout_of(name: str, dtype: torch.dtype) -> Layout:
    """The layout called `name`; `dtype` is that of plain weights."""
    return LAYOUTS[name] if name in LAYOUTS else Dense(dtype)


def check_output(out: Path, overwrite: bool, flag: str, *homes: Path) -> None:
    """Raise InputError if `out`, which `flag` named, cannot become an exported folder. homes: where the model lies that is exported."""
    if out.suffix == ".safetensors":
        raise InputError(f"{flag} is {out}: an exported model is a folder, give its name")
    if out.resolve() in [home.resolve() for home in homes]:
        raise InputError(f"{flag} is {out}, which holds the model that is to be exported: give another folder")
    packing.check_output(out.absolute(), overwrite, flag)
    packing.check_unfinished(out, flag)


# --- what there is ---------------------------------------------------------------------------------------------


def survey(checkpoint: Checkpoint, base: Path) -> tuple[dict[str, tuple[int, int]], Model]:
    """Rows and columns of each quantized linear, and what they have in common. Reads zero points."""
    network = split_network(base)
    sizes = sizes_of(checkpoint, network, base)
    quantized = list(sizes)
    if mixture := has_experts(network):
        check_expert_names(quantized, base)
    bits = common(checkpoint.bits_of(name) for name in quantized)
    uniform = common(name + SCALE in checkpoint for name in quantized)
    zeros = {zero for name in quantized if name + ZERO in checkpoint for zero in checkpoint.get(name + ZERO).unique().tolist()} or {0}
    symmetric = uniform is True and bits is not None and zeros == {2 ** (bits - 1)}
    skipped = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name not in sizes]
    groupsize = _groupsize(checkpoint, sizes)
    return sizes, Model(bits, groupsize, uniform, symmetric, min(zeros), quantized, skipped, mixture, has_vocabulary(network, quantized))


def split_network(base: Path) -> nn.Module:
    """The model in `base` on the meta device, experts one by one."""
    network = build_model(read_config(base, False), torch.float16, False)
    split_experts(network)
    return network


def sizes_of(checkpoint: Checkpoint, network: nn.Module, base: Path) -> dict[str, tuple[int, int]]:
    """Rows and columns of each quantized linear. Raises InputError if `network`, the model in `base`, has other ones."""
    embeddings = network.get_input_embeddings()
    matrices = {path_in(network, embeddings): embeddings}
    matrices |= {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    checkpoint.check_bits(None, "the model")
    if unknown := [name for name in checkpoint.quantized if name not in matrices]:
        raise InputError(f"the model has a quantized {unknown[0]}, which {base} lacks: is it the right base model?")
    sizes = {name: tuple(matrices[name].weight.shape) for name in checkpoint.quantized}
    for name, (rows, columns) in sizes.items():
        checkpoint.check_linear(name, rows, columns)
    return sizes


def has_vocabulary(network: nn.Module, quantized: Iterable[str]) -> bool:
    """Are embeddings or head among what is `quantized`?"""
    outside = network.get_input_embeddings(), network.get_output_embeddings()
    return any(network.get_submodule(name) in outside for name in quantized)


def has_experts(network: nn.Module) -> bool:
    """Is it a mixture of experts, which have been split?"""
    return any(isinstance(module, Experts) for module in network.modules())


def check_expert_names(quantized: list[str], base: Path) -> None:
    """Raise InputError if the original in `base` names the experts' linears in another way, which other software expects."""
    stored = Checkpoint.open(base)
    if other := [name for name in quantized if name + ".weight" not in stored]:
        raise InputError(f"the original in {base} has no tensor {other[0]}.weight: experts stored in another way cannot be exported")


def common(values) -> object | None:
    """The one value that all are, or None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _groupsize(checkpoint: Checkpoint, sizes: dict[str, tuple[int, int]]) -> int | None:
    """Columns of a group, the same everywhere; -1: rows are not divided. A row of one group may be as long as the groups of others."""
    groups = {name: checkpoint.shapes[name + SCALE][1] if name + SCALE in checkpoint else 1 for name in sizes}
    divided = {sizes[name][1] // count for name, count in groups.items() if count > 1}
    whole = {sizes[name][1] for name, count in groups.items() if count == 1}
    return common(divided | whole) if divided else -1


def check_plan(name: str, network: nn.Module, base: Path, bits: dict[str, int], groupsize: int, uniform: bool, symmetric: bool) -> None:
    """Raise InputError if the format `name` cannot hold `network`, the model in `base`, once its linears have these `bits` (16: as now)."""
    sizes = {linear: tuple(network.get_submodule(linear).weight.shape) for linear, its in bits.items() if its < 16}
    width, mixture = common(bits[linear] for linear in sizes), has_experts(network)
    if mixture:
        check_expert_names(list(sizes), base)
    lowest_zero = 2 ** (width - 1) if symmetric and width else 0
    model = Model(width, groupsize, uniform, symmetric, lowest_zero, list(sizes), [], mixture, has_vocabulary(network, sizes))
    check_fits(layout_of(name, torch.float16), sizes, model)


def check_fits(layout: Layout, sizes: dict[str, tuple[int, int]], model: Model) -> None:
    if model.vocabulary and layout.name != "dense":
        raise InputError(f"{layout.name} has embeddings and head in 16 bits: quantize without --vocab_bits, or export as dense")
    layout.check(model)
    for name, (rows, columns) in sizes.items():
        layout.check_size(name, rows, columns, model.bits)


# --- writing ---------------------------------------------------------------------------------------------------


def parts(checkpoint: Checkpoint, layout: Layout, sizes: dict, model: Model, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of the exported model, up to `limit` bytes at a time (a linear's own stay together), in the checkpoint's order."""
    part: dict[str, torch.Tensor] = {}
    for tensors in tqdm(_converted(checkpoint, layout, sizes, model), desc=layout.name, unit="tensor", ncols=80, leave=False, disable=None):
        if part and sum(tensor.nbytes for tensor in (*part.values(), *tensors.values())) > limit:
            yield part
            part = {}
        part |= tensors
    yield part


def _converted(checkpoint: Checkpoint, layout: Layout, sizes: dict, model: Model) -> Iterator[dict[str, torch.Tensor]]:
    for name, (rows, columns) in sizes.items():
        packed = checkpoint.packed(name, rows, columns)
        bits = checkpoint.bits_of(name)
        scale, zero = packed.affine(bits)
        linear = Linear(unpack_codes(packed.codes, bits, columns), packed.grid, scale, zero)
        yield {name + suffix: tensor for suffix, tensor in layout.encode(linear, model).items()}
    for name in others(checkpoint):
        yield {name: checkpoint.get(name)}


def others(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that are not a quantized linear's."""
    quantized = {name + suffix for name in checkpoint.quantized for suffix in SUFFIXES}
    return [name for name in checkpoint.shapes if name not in quantized]


def verify(source: Checkpoint, written: Checkpoint, layout: Layout, sizes: dict[str, tuple[int, int]]) -> None:
    """Raise RuntimeError unless what was `written` is what the `source` holds: every weight, as a reader rebuilds it, and all else."""
    left = set(written.shapes)
    for name in others(source):
        if name not in left or not torch.equal(written.get(name), source.get(name)):
            raise RuntimeError(f"{name} was not written as it is: nothing was kept, please report this")
        left.remove(name)
    for name, (rows, columns) in tqdm(sizes.items(), desc="verifying", unit="linear", ncols=80, leave=False, disable=None):
        mine = [full for full in left if full.rpartition(".")[0] == name]
        tensors = {full.removeprefix(name): written.get(full) for full in mine}
        left -= set(mine)
        bits, step = source.bits_of(name), max(1, CHECKED_WEIGHTS // columns)
        found = layout.weights(tensors, bits, rows, columns, step)
        for wanted, piece in zip(_rebuilt(source.packed(name, rows, columns), bits, columns, step), found, strict=True):
            if not torch.equal(wanted.to(layout.dtype), piece.to(layout.dtype)):
                raise RuntimeError(f"{name} does not read back as it was: nothing was kept, please report this")
    if left:
        raise RuntimeError(f"{min(left)} was written, which the model lacks: nothing was kept, please report this")


def verify_config(folder: Path, model: Model, layout: Layout) -> None:
    """Raise RuntimeError unless the config.json in `folder` says what `model` is, to our reader of others' folders."""
    if not isinstance(layout, Stored):
        return
    try:
        read = open_checkpoint(folder)
        said = (read.format, read.settings["bits"], read.settings["groupsize"], sorted(read.quantized))
    except InputError:
        said = None
    if said != (layout.name, model.bits, model.groupsize, sorted(model.linears)):
        raise RuntimeError("config.json does not say what was written: nothing was kept, please report this")


def _rebuilt(packed: PackedLinear, bits: int, columns: int, step: int) -> Iterator[torch.Tensor]:
    return (piece.dequantize(bits, columns, torch.float32) for piece in packed.split(step))


# --- the model card --------------------------------------------------------------------------------------------

VLLM, SGLANG = "vllm serve {}", "python -m sglang.launch_server --model-path {}"
IN_FLOAT16 = " --dtype float16"  # as scales are
NEEDS = {
    "awq": "gptqmodel",
    "gptq": "gptqmodel optimum",
    "gptq_v2": "gptqmodel optimum",
    "compressed-tensors": "compressed-tensors",
}


def card(checkpoint: Checkpoint, model: Model, name: str, folder: str, perplexity: list[dict], command: str | None) -> str:
    """README.md: what the model is, how it was made and measured, how to load it."""
    settings = checkpoint.settings
    base = str(settings.get("base_model", "")) or "unknown"
    method = {"leanquant": "LeanQuant", "gptq": "GPTQ", "rtn": "round to nearest"}.get(settings.get("method"), "LeanQuant")
    grid = (
        "several grids"
        if model.uniform is None
        else "non-uniform levels"
        if not model.uniform
        else "symmetric"
        if model.symmetric
        else "asymmetric"
    )
    groups = {-1: "whole rows", None: "several sizes of groups"}.get(model.groupsize, f"groups of {model.groupsize}")
    rows = {"method": f"{method}, {settings.get('grid', 'nonuniform' if not model.uniform else 'affine')} grid"}
    rows |= {"bits": f"{model.bits or 'several widths'}, {grid}, {groups}", "format": name, "base model": base}
    named = ("exponent", "sensitivity", "percdamp", "act_order", "true_sequential", "shift", "residual", "refine")
    rows |= {key.replace("_", "-"): settings[key] for key in named if settings.get(key) is not None}
    if "calibration" in settings:
        windows = f"{settings.get('nsamples')} windows of {settings.get('seqlen')} tokens, seed {settings.get('seed')}"
        rows["calibration"] = f"{settings['calibration']}, {windows}"
    for text in perplexity:
        rows[f"perplexity, {text['source']}"] = f"{text['perplexity']:.4f} ({text['tokens']} tokens in windows of {text['seqlen']})"
    if isinstance(settings.get("versions"), dict):
        rows["versions"] = ", ".join(f"{package} {number}" for package, number in settings["versions"].items())
    if model.skipped:
        rows["not quantized"] = f"{len(model.skipped)} linears: {', '.join(model.skipped[:4])}{' ...' if len(model.skipped) > 4 else ''}"
    table = "\n".join(f"| {key} | {' '.join(str(value).split()).replace('|', '/')} |" for key, value in rows.items())
    made = f"\nMade with\n\n```bash\n{command}\n```\n" if command else ""
    return f"# {folder}\n\n| | |\n|---|---|\n{table}\n{_usage(name, model, folder)}{made}"


def servers(name: str, model: Model) -> list[str]:
    """Commands that serve such a model."""
    if name == "dense":
        return [VLLM, SGLANG]
    if name == "awq" or name == "gptq" and model.bits == 4 and model.symmetric:
        return [VLLM + IN_FLOAT16, SGLANG + IN_FLOAT16]
    return [VLLM + IN_FLOAT16] if name == "compressed-tensors" and model.bits == 4 else []


def _usage(name: str, model: Model, folder: str) -> str:
    if name == "any-precision":
        return "\nFor kernels that read any-precision-llm's layout (`qweight` bit planes, `lut`).\n"
    if model.mixture and name in ("awq", "gptq"):
        transformers = "\ntransformers does not read the experts of this format; "
        return transformers + "vLLM does:\n\n```bash\n" + (VLLM + IN_FLOAT16).format("./" + folder) + "\n```\n"
    needs = f" (`pip install {NEEDS[name]}`)" if name in NEEDS else ""
    dtype = '"auto"' if name == "dense" else "torch.float16"  # scales are float16
    python = f'AutoModelForCausalLM.from_pretrained("{folder}", dtype={dtype})'
    imports = "" if name == "dense" else "import torch\n"
    usage = f"\nWith transformers{needs}:\n\n```python\n{imports}from transformers import AutoModelForCausalLM\n\nmodel = {python}\n```\n"
    if commands := servers(name, model):
        usage += "\nOr one of\n\n```bash\n" + "\n".join(command.format("./" + folder) for command in commands) + "\n```\n"
    return usage
