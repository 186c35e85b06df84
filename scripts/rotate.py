"""Rotate a model: a copy that computes the same, but whose weights suit coarse grids better, to be quantized in its place.

    python scripts/rotate.py MODEL --out FOLDER [--seed 0] [--device cuda]

The residual stream x [D] is stored as x Q for an orthogonal Q, the Kronecker product of two random ones (as in QuIP#, arXiv
2402.04396; folded into the weights as in SliceGPT, arXiv 2401.15024, and QuaRot, arXiv 2404.00456). Embeddings become E Q; a linear
that reads a norm's output becomes W diag(g) Q, with g the gain of the norm, which becomes 1; one that writes to the stream Q^T W. An
RMSNorm without gain commutes with Q, so the model stays what it was, and each weight becomes a sum of many: outliers are gone, which
is what one scale for a whole row suffers from. A head that was the embeddings gets weights of its own. Which linears read and which
write is found by watching; at the end both models' predictions are compared, and a copy that differs is not kept. Not here:
rotations that would have to be computed at inference; models with LayerNorms, with norms after linears, or with experts.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval_quantized import last_hidden  # noqa: E402
from leanquant.errors import InputError, exit_code  # noqa: E402
from leanquant.packing import Checkpoint, ModelWriter  # noqa: E402
from modelutils import Stream, StreamedModel, resolve_model  # noqa: E402

TOKENS = 256  # random ones, on which the two models are compared
MOST_KL = 0.01  # nats a token: rounding rotated weights to bfloat16 gives less than a tenth of it


Rotation = tuple[torch.Tensor, torch.Tensor]  # A [a, a] and B [b, b], of which Q [a b, a b] is the Kronecker product


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name or folder of an unquantized model")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the rotated model goes")
    add("--seed", type=int, default=0, help="of the rotation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it is computed")
    add("--overwrite", action="store_true", help="replace what --out names, if it was made here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)), "nothing was written")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    if args.out.suffix == ".safetensors":
        raise InputError(f"--out is {args.out}: a rotated model is a folder, give its name")
    folder = resolve_model(args.model)
    model = streamed(folder, args.device)
    windows = torch.randint(model.config.get_text_config().vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(args.seed))
    writer = ModelWriter(args.out, args.overwrite, int(1.1 * model.checkpoint.file_bytes()) + embedding_bytes(model), flag="--out")
    try:
        hidden = model.embed(windows, 1)
        Q = rotation(hidden.states.shape[-1], args.seed, model.device)
        for index in tqdm(range(len(model.layers)), desc="rotating", unit="layer", ncols=80, leave=False, disable=None):
            with model.layer(index):
                writer.add(rotated_layer(model, index, hidden, Q))
                model.advance(index, hidden)
        writer.add(rotated_ends(model, hidden, Q))
        rotated = writer.assemble(folder, {"rotated": args.seed}, {"tie_word_embeddings": False}, metadata={"format": "pt"})
        kl = divergence(model, hidden, streamed(rotated, args.device), windows)
        if not kl <= MOST_KL:
            what = f"the rotated copy of {args.model} would compute something else (KL {kl:.2g})"
            raise InputError(f"{what}: only models with RMSNorms before their linears, and none after, can be rotated")
        writer.publish()
    finally:
        writer.close()
    print(f"{args.out}: computes what {args.model} does, KL {kl:.1e} nats a token on {TOKENS} random tokens", flush=True)


def streamed(folder: Path, device: str) -> StreamedModel:
    return StreamedModel(folder, Checkpoint.open(folder), torch.float32, torch.device(device))


def embedding_bytes(model: StreamedModel) -> int:
    return 2 * model.model.get_input_embeddings().weight.numel()


# --- the rotation ----------------------------------------------------------------------------------------------


def rotation(width: int, seed: int, device: torch.device) -> Rotation:
    """Random, of a b = width, as near to each other as can be."""
    generator = torch.Generator().manual_seed(seed)
    a = next(d for d in range(math.isqrt(width), 0, -1) if width % d == 0)
    return tuple(orthogonal(n, generator).to(device) for n in (a, width // a))


def orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform among them: float32 [n, n]."""
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (Q * R.diagonal().sign()).float()


def rotate(x: torch.Tensor, Q: Rotation) -> torch.Tensor:
    """x [..., D] -> x Q."""
    A, B = Q
    return (A.T @ (x.unflatten(-1, (len(A), len(B))) @ B)).flatten(-2)


# --- the model -------------------------------------------------------------------------------------------------


def rotated_layer(model: StreamedModel, index: int, hidden: Stream, Q: Rotation) -> dict[str, torch.Tensor]:
    """All parameters of layer `index`, which has its weights, under their names, as they are to be stored. `hidden` enters it."""
    if model.experts(index):
        raise InputError(f"layer {index} has experts: such models are not supported")
    layer, batch = model.layers[index], next(hidden.batches())
    gains = norms_read(layer, lambda: model.run_layer(index, batch, {}))
    writers = [name for group in model.groups(index, hidden) if group.residual is not None for name in group.linears]
    values = dict(layer.named_parameters())
    for linear, norm in gains.items():
        values[f"{linear}.weight"] = rotate(values[f"{linear}.weight"] * layer.get_submodule(norm).weight, Q)
        values[f"{norm}.weight"] = torch.ones_like(layer.get_submodule(norm).weight)
    for linear in writers:
        values[f"{linear}.weight"] = rotate(values[f"{linear}.weight"].T, Q).T
        if (bias := values.get(f"{linear}.bias")) is not None:
            values[f"{linear}.bias"] = rotate(bias, Q)
    prefix = model.layer_prefix(index)
    return {prefix + name: as_stored(model, prefix + name, value) for name, value in values.items()}


def rotated_ends(model: StreamedModel, hidden: Stream, Q: Rotation) -> dict[str, torch.Tensor]:
    """What lies outside the layers, of which `hidden` left the last: embeddings, norm and head, which has weights of its own now."""
    head, embedding, whole = model.head_name, model.embedding_name, model.model
    with model.head() as logits:
        norm = norms_read(whole, lambda: logits(next(hidden.batches()))).get(head.removesuffix(".weight"))
        if norm is None:
            raise InputError(f"the head does not read a norm's output: {type(whole).__name__} cannot be rotated")
        values = {name: whole.get_parameter(name) for name in model.outside_names() if name != embedding or name == head}
        gain = values[f"{norm}.weight"]
        values |= {head: rotate(values[head] * gain, Q), f"{norm}.weight": torch.ones_like(gain)}
    shape = whole.get_input_embeddings().weight.shape
    values[embedding] = rotate(model.checkpoint.weight(embedding, shape, torch.float32, model.device), Q)
    return {name: as_stored(model, name, value) for name, value in values.items()}


def as_stored(model: StreamedModel, name: str, value: torch.Tensor) -> torch.Tensor:
    """In the type that the checkpoint has it in; of a tied head, that of the embeddings."""
    stored = model.checkpoint.get(name if name in model.checkpoint else model.embedding_name)
    return value.to(stored.dtype).cpu().contiguous()


def norms_read(root: nn.Module, run: Callable) -> dict[str, str]:
    """For each linear in `root` whose input is the output of a norm, while `run` runs: that norm, a module with nothing but a gain."""
    outputs: list[tuple[str, torch.Tensor]] = []
    found: dict[str, str] = {}

    def note(name: str):
        return lambda _module, _inputs, output: outputs.append((name, output))

    def look(name: str):
        def before(_module, inputs):
            norm = next(
                (norm for norm, output in outputs if output.shape == inputs[0].shape and output.data_ptr() == inputs[0].data_ptr()), None
            )
            if norm is not None:
                found[name] = norm

        return before

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
