"""Tune a quantized model: its levels, or scales, learn through the whole model to give what the unquantized model gives.

    python scripts/tune.py MODEL QUANTIZED TEXT --out OUT [--nsamples 128 --seqlen 2048]

Quantizing looks at one linear at a time, so errors that add up, or could make up for one another, go unseen. Here the mean over tokens of
KL(unquantized || quantized) is minimised by Adam (arXiv 1412.6980) over the levels or scales of all linears together; distilling into a
model's few free numbers ends the training of EfficientQAT (arXiv 2407.11062) too. Codes and all else stay, so the result has the very
size and format of what it was made from, and is read by whatever read that. A result that is no better on windows kept back is not written.

The unquantized model passes a layer at a time and leaves its last hidden states; the quantized one stays packed, its weights rebuilt where
they are used, and each layer computed again on the way back, so that a device that quantized a model can tune it as a rule. Not here:
several devices, moving codes.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as computed_again
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datautils  # noqa: E402
from eval_quantized import default_batch_size, last_hidden, pick_device  # noqa: E402
from leanquant import LeanQuantModelForCausalLM  # noqa: E402
from leanquant.errors import InputError, exit_code  # noqa: E402
from leanquant.foreign import open_checkpoint  # noqa: E402
from leanquant.linear import QuantizedLinear  # noqa: E402
from leanquant.packing import GRID, SCALE, Checkpoint, ModelWriter, check_unfinished, is_finite, unpack_codes  # noqa: E402
from modelutils import (  # noqa: E402
    StreamedModel,
    check_seqlen,
    cpu_units,
    find_layers,
    load_tokenizer,
    memory_is_input,
    refuse_quantized,
    resolve_model,
    steady_memory,
)

KEPT_BACK = 8  # windows on which the result is compared with what it was made from
BETAS, EPSILON = (0.9, 0.95), 1e-12  # Adam's; gradients are as small as the loss's share of one level
WARM_UP, LAST_RATE = 0.05, 0.05  # the share of the steps in which the rate rises, and what of it is left at the end of a half cosine
TOKENS = 16  # whose logits are compared at a time: so few stay in a CPU's cache, which is three times as fast
PART_BYTES = 2**30  # of the result, written at a time


class TunedLinear(nn.Module):
    """A quantized linear with fixed codes whose levels, or scales, are start + unit * moved, `moved` being trained.

    The unit of a row's levels is their mean distance, that of a scale what moves the row's outermost level about as far.
    """

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.packed, self.bits, self.in_features, self.bias = linear.packed(), linear.bits, linear.in_features, linear.bias
        self.start, K = self.packed.stored_levels.float(), 2**linear.bits
        self.unit = self.start.abs() * 2 / K if self.packed.grid is None else (self.start.amax(1) - self.start.amin(1))[:, None] / (K - 1)
        self.moved = nn.Parameter(torch.zeros_like(self.start))

    def stored(self) -> torch.Tensor:
        """The levels or scales as they are now, in float32."""
        return self.start + self.unit * self.moved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed._replace(**{"scale" if self.packed.grid is None else "grid": self.stored()})
        W = Rebuilt.apply(packed.levels(self.bits), packed.codes, self.bits, self.in_features, x.dtype)
        return nn.functional.linear(x, W, self.bias)


class Text(NamedTuple):
    """Token windows [n, T], and of each what the unquantized model's last layer gives, [n, T, D] in host memory, and what its head makes of
    such states. The last windows are kept back."""

    windows: torch.Tensor
    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]

    def logits(self, numbers: torch.Tensor) -> torch.Tensor:
        """Of the unquantized model, for the tokens of some windows: [N, vocabulary]."""
        return self.head(self.hidden[numbers]).flatten(0, 1)

    def logits_by(self, model: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        """The same of another model."""
        return model(input_ids=self.windows[numbers].to(model.device), use_cache=False).logits.flatten(0, 1)


class Rebuilt(torch.autograd.Function):
    """levels [O, G, K], packed codes -> the weight levels[codes] [O, I] in `dtype`. Between the passes it keeps nothing but the codes."""

    @staticmethod
    def forward(ctx, levels: torch.Tensor, packed: torch.Tensor, bits: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.sizes = levels.shape, bits, columns
        codes = unpack_codes(packed, bits, columns).view(*levels.shape[:2], -1)
        return levels.to(dtype).gather(2, codes.long()).view(-1, columns)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        shape, bits, columns = ctx.sizes
        codes = unpack_codes(ctx.saved_tensors[0], bits, columns).view(*shape[:2], -1)
        return sum_by_code(gradient.view(codes.shape), codes, shape[2]), None, None, None, None


def sum_by_code(values: torch.Tensor, codes: torch.Tensor, K: int) -> torch.Tensor:
    """For each code the sum of what stands where it does: [O, G, n] -> float32 [O, G, K].

    On a GPU a pass for each code: adding thousands of values to the same few addresses would wait, and add in a new order each time.
    """
    if values.is_cuda:
        return torch.stack([(values * (codes == k)).sum(2, dtype=torch.float32) for k in range(K)], 2)
    return values.new_zeros(*values.shape[:2], K, dtype=torch.float32).scatter_add_(2, codes.long(), values.float())


# --- the command -----------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name or folder of the unquantized model")
    add("quantized", metavar="QUANTIZED", help="what llama.py made of it: a .safetensors file or a folder")
    add("text", metavar="TEXT", help=f"{', '.join(datautils.CORPORA)}, or a {', '.join(datautils.LOCAL_SUFFIXES)} file: what it learns on")
    add("--out", required=True, type=Path, help="OUT.safetensors is one file, anything else a folder")
    add("--nsamples", type=positive, default=128, help=f"windows, besides {KEPT_BACK} that are kept back (default: %(default)s)")
    add("--seqlen", type=positive, default=2048, help="tokens a window (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the windows and their order (default: %(default)s, where llama.py takes 0)")
    add("--passes", type=positive, default=1, help="over the windows (default: %(default)s)")
    add("--lr", type=rate, default=0.004, help="highest learning rate, in distances of levels (default: %(default)s)")
    add("--batch_size", type=positive, default=2, help="windows a step (default: %(default)s)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of both models while they run (auto: bfloat16 where the device has units for it, else float32)",
    )
    add("--overwrite", action="store_true", help="replace what --out names, if it was made here")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is no number of this kind: give 1 or more")
    return int(text)


def rate(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate: give one between 0 and 1")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run_in_memory(parse(argv)), "nothing was written")


def run_in_memory(args: argparse.Namespace) -> None:
    with memory_is_input("give a smaller --seqlen, --dtype bfloat16, --device cpu, or more memory"):
        run(args)


def run(args: argparse.Namespace) -> None:
    steady_memory()
    check_unfinished(args.out, "--out")
    folder, device, checkpoint = resolve_model(args.model), pick_device(args.device), open_checkpoint(args.quantized)
    dtype = pick_dtype(args.dtype, device)
    checkpoint.check_bits(None, args.quantized)
    if checkpoint.format != "leanquant":
        raise InputError(f"{args.quantized} is {checkpoint.format}'s: tune what llama.py wrote, then export that")
    check_seqlen(folder, args.seqlen)
    original = StreamedModel(folder, Checkpoint.open(folder), dtype, device)
    refuse_quantized(original, args.model)
    windows = datautils.calibration_windows(args.text, load_tokenizer(folder), args.nsamples + KEPT_BACK, args.seqlen, args.seed)
    writer = ModelWriter(args.out, args.overwrite, int(1.1 * checkpoint.file_bytes()), flag="--out")
    try:
        hidden = last_hidden(original, windows, default_batch_size(args.seqlen, device), "reference").hidden
        options = {"torch_dtype": dtype, "device": device, "dequantize": "never"}
        model, linears = trainable(LeanQuantModelForCausalLM.from_pretrained(folder, args.quantized, **options))
        with original.head() as head:
            text = Text(windows, hidden, head)
            before = divergence(model, text, args.batch_size)
            tune(model, [linear.moved for linear in linears.values()], text, args)
            changed = {name: tensor for path, linear in linears.items() for name, tensor in rounded(linear, path).items()}
            after = divergence(model, text, args.batch_size)
        if not after < before:
            raise InputError(
                f"tuning made it no better (KL {before:.4f}, then {after:.4f} nats a token, on {KEPT_BACK} windows kept back): "
                "give a smaller --lr, or more text"
            )
        for part in parts(checkpoint, changed):
            writer.add(part)
        writer.finish(settings_of(checkpoint) | {"tuned": history(args, windows, dtype)}, folder)
    finally:
        writer.close()
    print(f"{args.out}: KL {before:.4f} -> {after:.4f} nats a token on {KEPT_BACK} windows kept back", flush=True)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Raises InputError for one that is left over."""
    if name != "auto":
        return getattr(torch, name)
    has_units = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_units(torch.bfloat16)
    return torch.bfloat16 if has_units else torch.float32


# --- training --------------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> tuple[nn.Module, dict[str, TunedLinear]]:
    """The model with its quantized linears replaced by those that learn, and these by their paths. Each of its layers keeps nothing but
    its input for the way back."""
    linears = {name: TunedLinear(module) for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    for layer in find_layers(model)[1]:
        layer.forward = forgetful(layer.forward)
    return model, linears


def forgetful(forward):
    return lambda *args, **kwargs: computed_again(forward, *args, use_reentrant=False, **kwargs)


def tune(model: nn.Module, moved: list[nn.Parameter], text: Text, args: argparse.Namespace) -> None:
    """Minimise the divergence on all windows but those kept back over all of `moved`, under a progress bar."""
    optimizer = torch.optim.Adam(moved, betas=BETAS, eps=EPSILON)
    batches = list(batches_of(args.nsamples, args))
    with tqdm(batches, desc="tuning", unit="step", ncols=80, leave=False, disable=None) as bar:
        for step, numbers in enumerate(bar):
            optimizer.param_groups[0]["lr"] = args.lr * share_of_rate(step, len(batches))
            bar.set_postfix_str(f"KL {learn(model, text, numbers):.3f}")
            optimizer.step()
            optimizer.zero_grad()


def batches_of(count: int, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The numbers of the windows of each step: all, in another order in each pass."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.passes):
        yield from torch.randperm(count, generator=generator).split(args.batch_size)


def share_of_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)


def learn(model: nn.Module, text: Text, numbers: torch.Tensor) -> float:
    """Find the gradients of some windows' divergence, which is returned."""
    logits = text.logits_by(model, numbers)
    gradient = torch.empty_like(logits)
    kl = compare(logits.detach(), text.logits(numbers), gradient)
    if not math.isfinite(kl):
        raise InputError(f"the divergence became {kl} while tuning: give a smaller --lr, or --dtype float32")
    logits.backward(gradient)
    return kl


@torch.no_grad()
def divergence(model: nn.Module, text: Text, batch_size: int) -> float:
    """Mean KL(unquantized || quantized) over the tokens of the windows that were kept back, nats."""
    batches = torch.arange(len(text.windows) - KEPT_BACK, len(text.windows)).split(batch_size)
    total = sum(len(batch) * compare(text.logits_by(model, batch), text.logits(batch)) for batch in batches)
    return total / KEPT_BACK


def compare(logits: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor | None = None) -> float:
    """Mean KL(wanted || logits) over tokens, both [N, V], in float32, some tokens at a time. `gradient` takes its gradient in `logits`."""
    total = torch.zeros((), device=logits.device)
    for start in range(0, len(logits), TOKENS):
        rows = slice(start, start + TOKENS)
        log_p, log_q = wanted[rows].float().log_softmax(-1), logits[rows].float().log_softmax(-1)
        total += nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
        if gradient is not None:
            gradient[rows] = (log_q.exp_() - log_p.exp_()) / len(logits)
    return (total / len(logits)).item()


# --- the result ------------------------------------------------------------------------------------------------


@torch.no_grad()
def rounded(linear: TunedLinear, path: str) -> dict[str, torch.Tensor]:
    """The levels or scales of the linear at `path` as the file will have them, by their name there. The linear computes with them, too."""
    name, dtype = path + (SCALE if linear.packed.grid is None else GRID), linear.packed.stored_levels.dtype
    new = linear.stored().to(dtype)
    if not is_finite(new):
        raise InputError(f"{name} has left what {dtype} can hold: give a smaller --lr")
    linear.start = new.float()
    linear.moved.zero_()
    return {name: new.cpu()}


def parts(checkpoint: Checkpoint, changed: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of the file, those in `changed` as they are there."""
    part, size = {}, 0
    for name in checkpoint.shapes:
        part[name] = changed[name] if name in changed else checkpoint.get(name)
        size += part[name].nbytes
        if size > PART_BYTES:
            yield part
            part, size = {}, 0
    yield part


def settings_of(checkpoint: Checkpoint) -> dict:
    """What the file says of itself; of a published file, which says nothing, what is known."""
    bits = checkpoint.bits_of(checkpoint.quantized[0])
    return checkpoint.settings or {"method": "leanquant", "bits": bits, "packing": "nibble"}


def history(args: argparse.Namespace, windows: torch.Tensor, dtype: torch.dtype) -> dict:
    """What the tuned file says of its tuning."""
    flags = {name: getattr(args, name) for name in ("text", "nsamples", "seqlen", "seed", "passes", "lr", "batch_size")}
    return flags | {"tokens": datautils.digest(windows.numpy().tobytes()), "dtype": str(dtype).removeprefix("torch.")}


if __name__ == "__main__":
    sys.exit(main())
