"""Rotate a model: a copy that computes the same, but whose weights suit coarse grids better, to be quantized in its place.

    python scripts/rotate.py MODEL --out FOLDER [--seed 0] [--device cuda]

The residual stream x [D] is held as x Q, with Q orthogonal: random signs, then a Hadamard matrix (QuIP#, arXiv 2402.04396), folded into
the weights (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456). Embeddings E become E Q; a linear W that reads what a norm gives
W diag(g) Q, with g the norm's gain, which becomes 1; one that writes to the stream Q^T W. An RMSNorm without a gain and Q may change
places, so the model stays what it was, while each weight becomes a sum of many: the outliers are gone that one scale for a whole row
suffers from. A head that was the embeddings gets weights of its own. Which linears read and which write is found by watching; each
layer, and at the end the whole, is compared with the original, and a copy that differs is not kept. Not here: rotations that have to be
computed at inference; models with LayerNorms, with norms after linears, or with experts.
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
from leanquant.packing import Checkpoint, ModelWriter  # noqa: E402
from modelutils import Stream, StreamedModel, resolve_model  # noqa: E402

TOKENS = 256  # random ones, on which the two models are compared
MOST_ERROR = 1e-3  # of what a layer gives for a token, before weights are rounded: float32's is some 1e-6
MOST_KL = 0.01  # nats a token, by weights rounded to the type they are stored in
WHICH = "only models with RMSNorms before their linears, and none after, can be rotated"


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
    add("--seed", type=int, default=0, help="of the rotation")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N: where it is computed")
    add("--overwrite", action="store_true", help="replace what --out names, if it was made here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)), "nothing was written")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    if args.out.suffix == ".safetensors":
        raise InputError(f"--out is {args.out}: a rotated model is a folder, give its name")
    folder, device = resolve_model(args.model), pick_device(args.device)
    model = streamed(folder, device)
    if model.checkpoint.quantized:
        raise InputError(f"{args.model} is quantized already: give the model it was made of")
    windows = torch.randint(model.config.get_text_config().vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(args.seed))
    writer = ModelWriter(args.out, args.overwrite, int(1.1 * model.checkpoint.file_bytes()) + embedding_bytes(model), flag="--out")
    try:
        hidden = model.embed(windows, 1)
        for part in rotated_parts(model, hidden, rotation(hidden.states.shape[-1], args.seed, device)):
            writer.add(part)
        rotated = writer.assemble(folder, {"rotated": args.seed}, {"tie_word_embeddings": False}, metadata={"format": "pt"})
        kl = divergence(model, hidden, streamed(rotated, device), windows)
        if not kl <= MOST_KL:
            raise InputError(f"the rotated copy of {args.model} would compute something else (KL {kl:.2g}): {WHICH}")
        writer.publish()
    finally:
        writer.close()
    print(f"{args.out}: computes what {args.model} does, KL {kl:.1e} nats a token on {TOKENS} random tokens", flush=True)


def streamed(folder: Path, device: torch.device) -> StreamedModel:
    return StreamedModel(folder, Checkpoint.open(folder), torch.float32, device)


def embedding_bytes(model: StreamedModel) -> int:
    return 2 * model.model.get_input_embeddings().weight.numel()


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


def rotate(x: torch.Tensor, Q: Rotation) -> torch.Tensor:
    """x [..., D] -> x Q."""
    return (Q.A.T @ ((x * Q.signs).unflatten(-1, (len(Q.A), len(Q.B))) @ Q.B)).flatten(-2)


# --- the model -------------------------------------------------------------------------------------------------


def rotated_parts(model: StreamedModel, hidden: Stream, Q: Rotation) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of the rotated model as they are to be stored, a layer at a time. `hidden` enters the first and has left the last."""
    written: set[str] = set()
    for index in tqdm(range(len(model.layers)), desc="rotating", unit="layer", ncols=80, leave=False, disable=None):
        with model.layer(index):
            values = rotated_layer(model, index, hidden, Q)
            model.advance(index, hidden)
        yield as_stored(model, values)
        written.update(values)
    yield as_stored(model, values := rotated_ends(model, hidden, Q))
    written.update(values)
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
        values |= {f"{linear}.weight": rotate(values[f"{linear}.weight"] * gain, Q), f"{norm}.weight": torch.ones_like(gain)}
    for linear in writers:
        values[f"{linear}.weight"] = rotate(values[f"{linear}.weight"].T, Q).T
        if (bias := values.get(f"{linear}.bias")) is not None:
            values[f"{linear}.bias"] = rotate(bias, Q)
    expected = rotate(model.run_layer(index, batch, {}), Q)
    error = (model.run_layer(index, rotate(batch, Q), values) - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not error.max() <= MOST_ERROR:
        raise InputError(f"layer {index} would compute something else (by {error.max():.1g} of what it gives): {WHICH}")
    return {model.layer_prefix(index) + name: value for name, value in values.items()}


def rotated_ends(model: StreamedModel, hidden: Stream, Q: Rotation) -> dict[str, torch.Tensor]:
    """Embeddings, last norm and head, which has weights of its own now, in float32. `hidden` has left the last layer."""
    head, embedding, whole = model.head_name, model.embedding_name, model.model
    with model.head() as logits:
        norm = norms_read(whole, lambda: logits(next(hidden.batches()))).get(head.removesuffix(".weight"))
        if norm is None:
            raise InputError(f"the head of {type(whole).__name__} does not read what a norm with a gain alone gives: {WHICH}")
        values = {name: whole.get_parameter(name) for name in model.outside_names() if name != embedding or name == head}
        gain = values[f"{norm}.weight"]
        values |= {head: rotate(values[head] * gain, Q), f"{norm}.weight": torch.ones_like(gain)}
    shape = whole.get_input_embeddings().weight.shape
    values[embedding] = rotate(model.checkpoint.weight(embedding, shape, torch.float32, model.device), Q)
    return values


def as_stored(model: StreamedModel, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each in the type that the checkpoint has it in; a tied head in that of the embeddings."""
    dtype = lambda name: model.checkpoint.get(name if name in model.checkpoint else model.embedding_name).dtype  # noqa: E731
    return {name: value.to("cpu", dtype(name)).contiguous() for name, value in values.items()}


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
        elif [p.ndim for p in module.parameters()] == [1] and not list(module.children()):
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


def divergence(model: StreamedModel, hidden: Stream, rotated: StreamedModel, windows: torch.Tensor) -> float:
    """Mean KL(model || rotated) over tokens, nats. `hidden`: what the model's last layer gives for `windows`."""
    log_p, log_q = (log_probabilities(*pair) for pair in ((model, hidden), (rotated, last_hidden(rotated, windows, 1, "comparing"))))
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / windows.numel()


def log_probabilities(model: StreamedModel, hidden: Stream) -> torch.Tensor:
    with model.head() as logits:
        return torch.cat([logits(batch).float().log_softmax(-1) for batch in hidden.batches()])


if __name__ == "__main__":
    sys.exit(main())
