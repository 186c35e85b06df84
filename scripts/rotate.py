"""Rotate a model: a copy that computes the same, but whose weights suit coarse grids better, to be quantized in its place.

    python scripts/rotate.py MODEL --out FOLDER [--seed 0] [--device cuda]

The residual stream x [D] is held as x Q, with Q orthogonal: random signs, then a Hadamard matrix (QuIP#, arXiv 2402.04396), folded into
the weights (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456). Embeddings E become E Q; a linear W that reads what a norm gives
W diag(g) Q, with g the norm's gain, which becomes 1; one that writes to the stream Q^T W. An RMSNorm without a gain and Q may change
places, so the model stays what it was, while each weight becomes a sum of many: the outliers are gone that one scale for a whole row
suffers from. A head that was the embeddings gets weights of its own. Which linears read and which write is found by watching; each
layer, and at the end the whole, is compared with the original, and a copy that differs is not kept. Not here: rotations that have to be
computed at inference; models with LayerNorms, with norms after linears, with experts, or that are given more than text.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval_quantized import last_hidden, pick_device  # noqa: E402
from leanquant.errors import InputError, exit_code  # noqa: E402
from leanquant.foreign import open_checkpoint  # noqa: E402
from leanquant.packing import TORCH_DTYPES, ModelWriter, check_unfinished, is_finite  # noqa: E402
from modelutils import Stream, StreamedModel, memory_is_input, refuse_quantized, resolve_model  # noqa: E402

TOKENS = 256  # random ones, on which the two models are compared
PIECE = 2**12  # rows that are rotated at a time
MOST_ERROR = 1e-3  # of what a layer gives for a token, before weights are rounded: float32's is some 1e-6
MOST_KL = 0.01  # of the KL of guessing all tokens alike: weights rounded to other 16-bit numbers make less than a tenth of it
WHICH = "only dense text models can be rotated whose linears read RMSNorms with plain gains, and whose outputs are added as they are"


class Rotation(NamedTuple):
    """Q [D, D] = diag(signs) (A kron B): signs [D] of 1 and -1, A [a, a] and B [b, b] orthogonal, a b = D."""

    signs: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name or folder of an unquantized model")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the rotated model goes")
    add("--seed", type=seed, default=0, help="of the rotation")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N: where it is computed")
    add("--overwrite", action="store_true", help="replace what --out names, if it was made here")
    return parser.parse_args(argv)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give a number from 0 to 2**32 - 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run_in_memory(parse(argv)), "nothing was written")


def run_in_memory(args: argparse.Namespace) -> None:
    with memory_is_input("give --device cpu, or more memory"):
        run(args)


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    if args.out.suffix == ".safetensors":
        raise InputError(f"--out is {args.out}: a rotated model is a folder, give its name")
    check_unfinished(args.out, "--out")
    folder, device = resolve_model(args.model), pick_device(args.device)
    model = streamed(folder, device)
    check(model)
    config = model.config.get_text_config()
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    windows = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(args.seed))
    writer = ModelWriter(args.out, args.overwrite, int(1.1 * bytes_of(model)), flag="--out")
    try:
        hidden = model.embed(windows, 1)
        for part in rotated_parts(model, hidden, rotation(hidden.states.shape[-1], args.seed, device)):
            writer.add(part)
        rotated = writer.assemble(folder, {"rotated": args.seed}, {"tie_word_embeddings": False}, metadata={"format": "pt"})
        kl, guessing = divergence(model, hidden, streamed(rotated, device), windows)
        if not kl <= MOST_KL * guessing:
            raise InputError(f"the rotated copy of {args.model} would compute something else (KL {kl:.2g}): {WHICH}")
        writer.publish()
    finally:
        writer.close()
    print(f"{args.out}: computes what {args.model} does, KL {kl:.1e} nats a token on {tokens} random tokens", flush=True)


def streamed(folder: Path, device: torch.device) -> StreamedModel:
    return StreamedModel(folder, open_checkpoint(folder), torch.float32, device)


def check(model: StreamedModel) -> None:
    """Raise InputError for a quantized model, and for tensors of which nobody knows what they do to the residual stream."""
    refuse_quantized(model, str(model.folder))
    known = model.model.state_dict(keep_vars=True)
    for name in model.checkpoint.shapes:
        if name not in known and not name.endswith("inv_freq"):
            raise InputError(f"{type(model.model).__name__} has no use for the tensor {name}, which would stay as it is: {WHICH}")


def bytes_of(model: StreamedModel) -> int:
    """Of the rotated model, whose head is always stored."""
    checkpoint = model.checkpoint
    return checkpoint.file_bytes() + (0 if model.head_name in checkpoint else checkpoint.tensor_bytes(model.embedding_name))


# --- the rotation ----------------------------------------------------------------------------------------------


def rotation(width: int, seed: int, device: torch.device) -> Rotation:
    """A Hadamard matrix of the largest power of two in `width`, by a random orthogonal one of what is left. All entries of the first have
    one size, so that nothing spreads an outlier more evenly."""
    generator = torch.Generator().manual_seed(seed)
    power = (width & -width).bit_length() - 1
    A, B = hadamard(power // 2), torch.kron(hadamard(power - power // 2), orthogonal(width >> power, generator))
    signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1
    return Rotation(*(t.to(device) for t in (signs, A, B)))


def hadamard(power: int) -> torch.Tensor:
    """Sylvester's, orthogonal: [2**power, 2**power]."""
    H = torch.ones(1, 1)
    for _ in range(power):
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H) / math.sqrt(2)
    return H


def orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform among all: float32 [n, n]."""
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (Q * R.diagonal().sign()).float().contiguous()


def rotate(x: torch.Tensor, Q: Rotation, gain: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., D] -> x diag(gain) Q, by pieces of the first axis: the largest matrices of a model barely fit on a device."""
    factors = Q.signs if gain is None else Q.signs * gain
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for piece, out in zip(x.split(PIECE), y.split(PIECE), strict=True):
        out.copy_((Q.A.T @ ((piece * factors).unflatten(-1, (len(Q.A), len(Q.B))) @ Q.B)).flatten(-2))
    return y


# --- the model -------------------------------------------------------------------------------------------------


def rotated_parts(model: StreamedModel, hidden: Stream, Q: Rotation) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of the rotated model as they are to be stored, a layer at a time. `hidden` enters the first and has left the last."""
    written: set[str] = set()
    for index in tqdm(range(len(model.layers)), desc="rotating", unit="layer", ncols=80, leave=False, disable=None):
        with model.layer(index):
            values = rotated_layer(model, index, hidden, Q)
            model.advance(index, hidden)
        written.update(values)
        yield as_stored(model, values)
        del values  # the next layer needs the memory
    written.update(values := rotated_ends(model, hidden, Q))
    yield as_stored(model, values)
    yield {name: model.checkpoint.get(name) for name in model.checkpoint.shapes if name not in written}


def rotated_layer(model: StreamedModel, index: int, hidden: Stream, Q: Rotation) -> dict[str, torch.Tensor]:
    """The parameters of layer `index`, which has its weights, in float32. `hidden` enters it. Raises InputError if the layer with them
    does not give for rotated states what it gave, rotated."""
    layer, batch = model.layers[index], next(hidden.batches())
    gains = norms_read(layer, lambda: model.run_layer(index, batch, {}))
    writers = [name for group in model.groups(index, hidden) if group.residual is not None for name in group.linears]
    values = dict(layer.named_parameters())
    for linear, norm in gains.items():
        if len(gain := layer.get_submodule(norm).weight) != batch.shape[-1]:
            continue  # within attention
        values |= {f"{linear}.weight": rotate(values[f"{linear}.weight"], Q, gain), f"{norm}.weight": torch.ones_like(gain)}
    for linear in writers:
        values[f"{linear}.weight"] = rotate(values[f"{linear}.weight"].T, Q).T
        if (bias := values.get(f"{linear}.bias")) is not None:
            values[f"{linear}.bias"] = rotate(bias[None], Q)[0]
    expected = rotate(model.run_layer(index, batch, {}), Q)
    error = (model.run_layer(index, rotate(batch, Q), values) - expected).norm(dim=-1)
    if not (error <= MOST_ERROR * expected.norm(dim=-1)).all():
        raise InputError(f"layer {index} would compute something else: {WHICH}")
    return {model.layer_prefix(index) + name: value for name, value in values.items()}


def rotated_ends(model: StreamedModel, hidden: Stream, Q: Rotation) -> dict[str, torch.Tensor]:
    """Embeddings, last norm and head, which has weights of its own now, in float32. `hidden` has left the last layer."""
    head, embedding, whole = model.head_name, model.embedding_name, model.model
    with model.head() as logits:
        norm = norms_read(whole, lambda: logits(next(hidden.batches()))).get(head.removesuffix(".weight"))
        if norm is None:
            raise InputError(f"the head of {type(whole).__name__} does not read what a norm with a gain alone gives: {WHICH}")
        if other := set(model.outside_names()) - {embedding, head, head.removesuffix("weight") + "bias", f"{norm}.weight"}:
            raise InputError(f"{type(whole).__name__} has a {min(other)} outside its layers: {WHICH}")
        values = {name: whole.get_parameter(name) for name in model.outside_names() if name != embedding or name == head}
        gain = values[f"{norm}.weight"]
        values |= {head: rotate(values[head], Q, gain), f"{norm}.weight": torch.ones_like(gain)}
    shape = whole.get_input_embeddings().weight.shape
    values[embedding] = rotate(model.checkpoint.weight(embedding, shape, torch.float32, model.device), Q)
    return values


def as_stored(model: StreamedModel, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each in the type that the checkpoint has it in; a tied head in that of the embeddings."""
    stored = {}
    for name, value in values.items():
        dtype = TORCH_DTYPES[model.checkpoint.dtypes[name if name in model.checkpoint else model.embedding_name]]
        stored[name] = value.to("cpu", dtype).contiguous()
        if not is_finite(stored[name]):
            raise InputError(f"{name} has numbers that {dtype} cannot hold once it is rotated: store the model in bfloat16 first")
    return stored


def norms_read(root: nn.Module, run: Callable) -> dict[str, str]:
    """For each linear in `root` whose input is the output of a norm, while `run` runs: that norm, a module with nothing but a gain."""
    outputs: dict[str, torch.Tensor] = {}
    found: dict[str, str] = {}

    def note(name: str):
        return lambda _module, _inputs, output: outputs.update({name: output})

    def look(name: str):
        return lambda _module, inputs: found.update((name, norm) for norm in outputs if _is_same(outputs[norm], inputs[0]))

    handles = []
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(look(name)))
        elif [(leaf, p.ndim) for leaf, p in module.named_parameters()] == [("weight", 1)]:
            handles.append(module.register_forward_hook(note(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Or the same under another name: models cut what the head reads."""
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape


# --- the proof -------------------------------------------------------------------------------------------------


def divergence(model: StreamedModel, hidden: Stream, rotated: StreamedModel, windows: torch.Tensor) -> tuple[float, float]:
    """Mean KL(model || rotated) over tokens, nats, and KL(model || all tokens alike). `hidden`: what the model's last layer gives."""
    log_p, log_q = log_probabilities(model, hidden), log_probabilities(rotated, last_hidden(rotated, windows, 1, "comparing"))
    terms = (log_p.exp() * (log_p - log_q), log_p.exp() * (log_p + math.log(log_p.shape[-1])))
    return tuple(term.sum().item() / windows.numel() for term in terms)


def log_probabilities(model: StreamedModel, hidden: Stream) -> torch.Tensor:
    with model.head() as logits:
        return torch.cat([logits(batch).float().log_softmax(-1) for batch in hidden.batches()])


if __name__ == "__main__":
    sys.exit(main())
