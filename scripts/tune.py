"""Tune a quantized model: its levels, or scales, learn through the whole model to give what the unquantized model gives.

    python scripts/tune.py MODEL QUANTIZED TEXT --out OUT [--nsamples 128 --seqlen 2048]

Quantizing looks at one linear at a time, so errors that add up, or could make up for one another, go unseen. Here the mean over tokens of
KL(unquantized || quantized) is minimised by Adam (arXiv 1412.6980) over the levels or scales of all linears together. (The last phase of
EfficientQAT, arXiv 2407.11062, trains a model's few free numbers end to end too, but from text; here the unquantized model teaches.)
Codes and all else stay, so the result has the very size and format of what it was made from, and is read by whatever read that. A result
that is no better on windows kept back is not written. A run that was killed goes on when the same command is given again.

The unquantized model passes a layer at a time and leaves its last hidden states in host memory. The device then holds the packed weights,
embeddings and both heads; some 24 bytes a level or scale (its start and unit, how far it has moved, the gradient, Adam's two means); each
layer's input for a batch, and of one layer at a time the rebuilt weights and all else that its gradients take; logits of a batch and as
large a gradient. Not here: several devices, moving codes.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as computed_again
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datautils  # noqa: E402
from eval_quantized import default_batch_size, last_hidden, pick_device  # noqa: E402
from journal import differences, files_of  # noqa: E402
from leanquant import LeanQuantModelForCausalLM  # noqa: E402
from leanquant.errors import InputError, exit_code  # noqa: E402
from leanquant.foreign import open_checkpoint  # noqa: E402
from leanquant.linear import QuantizedLinear, is_tied, path_in  # noqa: E402
from leanquant.packing import (  # noqa: E402
    GRID,
    PIECE_WEIGHTS,
    SCALE,
    TUNING,
    Checkpoint,
    ModelWriter,
    PackedLinear,
    check_unfinished,
    save_synced,
    sync_folder,
    unpack_codes,
)
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
from rotate import seed  # noqa: E402

KEPT_BACK = 8  # windows on which the result is compared with what it was made from
BETAS, EPSILON = (0.9, 0.95), 1e-12  # Adam's; gradients are as small as the loss's share of one level
WARM_UP, LAST_RATE = 0.05, 0.05  # the share of the steps in which the rate rises, and what of it is left at the end of a half cosine
TOKENS = 16  # whose logits are compared at a time: so few stay in a CPU's cache, which is three times as fast
SAMPLE, LEAST_COSINE = 4096, 0.3  # rows of quantized embeddings that are compared with the original's; another model's are at about 0
PART_BYTES = 2**30  # of the result, written at a time
KEPT_EVERY = 120  # seconds, after which what is learned is kept for the case of a kill


class TunedLinear(nn.Module):
    """A quantized linear with fixed codes whose levels, or scales, are start + unit * moved, `moved` being trained.

    The unit is the mean distance of a row's levels at 2 bits, and for a scale what moves the outermost level about as far; half of that at
    3 and a quarter at 4 and 8 bits, where the loss is so small that what Adam makes of its noise would be too much of it.
    """

    def __init__(self, linear: QuantizedLinear, device: torch.device):
        super().__init__()
        self.packed, self.bits, self.in_features = linear.packed().to(device), linear.bits, linear.in_features
        self.bias, K = linear.bias, 2 ** min(linear.bits, 4)
        self.start = self.packed.stored_levels.float()
        distance = self.start.abs() * 2 / K if self.packed.grid is None else (self.start.amax(1) - self.start.amin(1))[:, None] / (K - 1)
        self.unit = distance * 4 / K
        self.moved = nn.Parameter(torch.zeros_like(self.start))

    def stored(self) -> torch.Tensor:
        """The levels or scales as they are now, in float32."""
        return self.start + self.unit * self.moved

    def with_stored(self, stored: torch.Tensor) -> PackedLinear:
        return self.packed._replace(**{"scale" if self.packed.grid is None else "grid": stored})

    def rebuilt(self, dtype: torch.dtype) -> torch.Tensor:
        packed = self.with_stored(self.stored())
        return Rebuilt.apply(packed.levels(self.bits), packed.codes, self.bits, self.in_features, dtype)

    @property
    def weight(self) -> torch.Tensor:
        """For models that look at a linear's weight."""
        return self.rebuilt(self.packed.stored_levels.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.rebuilt(x.dtype), self.bias)


class Text(NamedTuple):
    """Token windows [n, T], and of each what the unquantized model's last layer gives, [n, T, D] in host memory, and what its head makes of
    such states. The last windows are kept back."""

    windows: torch.Tensor
    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]

    def logits(self, number: int) -> torch.Tensor:
        """Of the unquantized model, for one window: [T, vocabulary]."""
        return self.head(self.hidden[number : number + 1])[0]


class Progress:
    """How far the levels of a run have moved, kept in its working folder, so that the same command goes on there after a kill."""

    def __init__(self, folder: Path, settings: dict, moved: dict[str, nn.Parameter]):
        """moved: by the paths of their linears. settings: all that decides what they learn. Raises InputError if what is kept in `folder`
        is another run's."""
        self.file, self.settings, self.moved, self.steps = folder / TUNING, json.loads(json.dumps(settings)), moved, 0
        self.optimizer = torch.optim.Adam(moved.values(), betas=BETAS, eps=EPSILON)
        self._kept = Checkpoint([self.file] if self.file.exists() else [])
        self._kept_at = time.monotonic()
        if self._kept.settings and (changed := differences(self._kept.settings["settings"], self.settings)):
            what = "; ".join(changed[:4])
            raise InputError(f"{folder} holds an unfinished run that differs ({what}): finish that one, or remove it")

    def restore(self) -> None:
        """Go on with what is kept, if there is anything."""
        self.steps = self._kept.settings.get("steps", 0)
        for name in self._kept.shapes:
            path, what = name.split(" ")
            values, parameter = self._kept.get(name), self.moved[path]
            if what == "moved":
                parameter.data.copy_(values)
            else:  # Adam's; it counts steps on the host
                self.optimizer.state[parameter][what] = values.to(parameter.device if values.dim() else "cpu")

    def keep(self) -> None:
        """Write what there is after `steps` steps, if that has not been done for long enough."""
        if time.monotonic() - self._kept_at < KEPT_EVERY:
            return
        kept = {f"{path} moved": parameter.data for path, parameter in self.moved.items()}
        for path, parameter in self.moved.items():  # of an expert that no token has used yet Adam knows nothing
            kept |= {f"{path} {what}": values for what, values in self.optimizer.state[parameter].items()}
        new = self.file.with_name("journal.new")
        save_synced(kept, new, {"leanquant": json.dumps({"steps": self.steps, "settings": self.settings})})
        os.replace(new, self.file)
        sync_folder(self.file.parent)
        self._kept_at = time.monotonic()

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


class Rebuilt(torch.autograd.Function):
    """levels [O, G, K], packed codes -> the weight levels[codes] [O, I] in `dtype`. Between the passes it keeps nothing but the codes."""

    @staticmethod
    def forward(ctx, levels: torch.Tensor, packed: torch.Tensor, bits: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.sizes = levels.shape, bits, columns
        weight = levels.new_empty(len(levels), columns, dtype=dtype)
        for rows in pieces(weight):
            codes = unpack_codes(packed[rows], bits, columns).view(-1, levels.shape[1], columns // levels.shape[1])
            weight[rows] = levels[rows].to(dtype).gather(2, codes.long()).view(-1, columns)
        return weight

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (O, G, K), bits, columns = ctx.sizes
        found = []
        for rows in pieces(gradient):
            codes = unpack_codes(ctx.saved_tensors[0][rows], bits, columns).view(-1, G, columns // G)
            found.append(sum_by_code(gradient[rows].view(codes.shape), codes, K))
        return torch.cat(found), None, None, None, None


def pieces(matrix: torch.Tensor) -> list[slice]:
    """Rows that are taken at once, as indices take eight bytes a weight."""
    step = max(1, PIECE_WEIGHTS // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def sum_by_code(values: torch.Tensor, codes: torch.Tensor, K: int) -> torch.Tensor:
    """For each code the sum of what stands where it does: [O, G, n] -> float32 [O, G, K].

    On a GPU a pass for each code: where thousands of values are added to the same few addresses, each would wait for the others.
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
    add("--seed", type=seed, default=1, help="of the windows and their order (default: %(default)s, where llama.py takes 0)")
    add("--passes", type=positive, default=1, help="over the windows (default: %(default)s)")
    add("--lr", type=rate, default=0.004, help="highest learning rate, in distances of levels at 2 bits (default: %(default)s)")
    add("--batch_size", type=positive, default=1, help="windows a step (default: %(default)s)")
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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate: give one between 0 and 1")
    return value


class Useless(InputError):
    """What was learned is of no use: the same command would end so again."""


class NoBetter(Useless):
    """What was tuned is no better than it was."""


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run_in_memory(parse(argv)), "the same command goes on with what was kept, if anything was")


def run_in_memory(args: argparse.Namespace) -> None:
    smaller = "--batch_size or --seqlen" if args.batch_size > 1 else "--seqlen"
    with memory_is_input(f"give a smaller {smaller}, --dtype bfloat16, --device cpu, or more memory"):
        run(args)


def run(args: argparse.Namespace) -> None:
    steady_memory()
    device = pick_device(args.device)
    dtype, checkpoint = pick_dtype(args.dtype, device), open_checkpoint(args.quantized)
    checkpoint.check_bits(None, args.quantized)
    if checkpoint.format != "leanquant":
        raise InputError(f"{args.quantized} is {checkpoint.format}'s: tune what llama.py wrote, then export that")
    datautils.check_source(args.text)
    check_unfinished(args.out, "--out", TUNING)
    kept = 12 * sum(math.prod(checkpoint.shapes[name]) for name in checkpoint.shapes if name.endswith((GRID, SCALE)))  # twice, at times
    writer = ModelWriter(args.out, args.overwrite, int(1.1 * checkpoint.file_bytes()) + kept, resume=True, flag="--out")
    is_over = False
    try:
        writer.keep(0)
        before, after = write_tuned(writer, checkpoint, resolve_model(args.model), device, dtype, args)
        is_over = True
    except Useless:
        is_over = True
        raise
    finally:
        if not is_over:
            writer.keep(0)
        writer.close(keep=not is_over)
    print(f"{args.out}: KL {before:.4f} -> {after:.4f} nats a token on {KEPT_BACK} windows kept back", flush=True)


def write_tuned(
    writer: ModelWriter, checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype, args
) -> tuple[float, float]:
    """Returns the divergence on the windows kept back, before and after. Raises InputError if that has not become less."""
    check_seqlen(folder, args.seqlen)
    original = StreamedModel(folder, open_checkpoint(folder), dtype, device)
    refuse_quantized(original, args.model)
    check_base(checkpoint, original)
    windows = datautils.windows_apart(args.text, load_tokenizer(folder), args.nsamples, KEPT_BACK, args.seqlen, args.seed)
    model, linears = trainable(folder, args.quantized, device, dtype)
    told = history(args, windows, dtype)
    progress = Progress(writer.folder, told | others(original, checkpoint), {path: linear.moved for path, linear in linears.items()})
    hidden = last_hidden(original, windows, default_batch_size(args.seqlen, device), "reference").hidden
    with original.head() as head:
        text = Text(windows, hidden, head)
        before = divergence(model, text)
        tune(model, text, args, progress)
        changed = {name: tensor for path, linear in linears.items() for name, tensor in rounded(linear, path).items()}
        after = divergence(model, text)
    if not after < before:
        raise NoBetter(
            f"tuning made it no better (KL {before:.4f}, then {after:.4f} nats a token, on {KEPT_BACK} windows kept back): "
            "give a smaller --lr, or more text"
        )
    for part in parts(checkpoint, changed):
        writer.add(part)
    checkpoint.check_unchanged()
    beside = Path(args.quantized)  # a folder has its own config and tokenizer
    writer.finish(settings_of(checkpoint, told), beside if beside.is_dir() else folder, before_publishing=progress.forget)
    return before, after


def check_base(checkpoint: Checkpoint, original: StreamedModel) -> None:
    """Raise InputError unless the quantized model has the original's embeddings, as llama.py leaves them or nearly so: another model of
    the same shape would teach it something else."""
    name, path = original.embedding_name, original.embedding_name.removesuffix(".weight")
    theirs = original.checkpoint.get(name)
    if checkpoint.is_quantized(path):
        packed, step = checkpoint.packed(path, *theirs.shape), -(-len(theirs) // SAMPLE)
        ours = PackedLinear(*(None if tensor is None else tensor[::step] for tensor in packed))
        ours = ours.dequantize(checkpoint.bits_of(path), theirs.shape[1], torch.float32).flatten()
        alike = torch.cosine_similarity(ours, theirs[::step].float().flatten(), 0) > LEAST_COSINE
    else:
        ours = checkpoint.get(name) if name in checkpoint else theirs[:0]
        alike = ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours.dtype))
    if not alike:
        raise InputError(f"{name} is not that of {original.folder}: give the model that was quantized")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has units for it, else float32. (Gradients are too small for float16.)"""
    if name != "auto":
        return getattr(torch, name)
    has_units = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_units(torch.bfloat16)
    return torch.bfloat16 if has_units else torch.float32


# --- training --------------------------------------------------------------------------------------------------


def trainable(folder: Path, quantized: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, dict[str, TunedLinear]]:
    """The quantized model with linears that learn, and these by the paths that the file has them under; embeddings learn with a head that
    they are. Each layer keeps nothing but its input for the way back. Loaded on the host, where codes stay as they are stored."""
    model = LeanQuantModelForCausalLM.from_pretrained(folder, quantized, torch_dtype=dtype, device="cpu", dequantize="never")
    linears = {}
    embeddings = model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, tuned := TunedLinear(module, device))
            if is_tied(module):
                embeddings.packed = lambda tuned=tuned: tuned.with_stored(tuned.stored())
                name = path_in(model, embeddings)
            linears[name] = tuned
    for layer in find_layers(model)[1]:
        layer.forward = forgetful(layer.forward)
    return model.to(device), linears


def forgetful(forward):
    return lambda *args, **kwargs: computed_again(forward, *args, use_reentrant=False, **kwargs)


def tune(model: nn.Module, text: Text, args: argparse.Namespace, progress: Progress) -> None:
    """Minimise the divergence on all windows but those kept back over all that `progress` has. Says up to ten times how far it is."""
    progress.restore()
    optimizer, losses = progress.optimizer, []  # since it was last said
    batches = list(batches_of(args.nsamples, args))
    between = math.ceil(len(batches) / 10)
    if progress.steps:
        print(f"going on after step {progress.steps}, which an earlier run finished", flush=True)
    with tqdm(total=len(batches), initial=progress.steps, desc="tuning", unit="step", ncols=80, leave=False, disable=None) as bar:
        for numbers in batches[progress.steps :]:
            optimizer.param_groups[0]["lr"] = args.lr * share_of_rate(progress.steps, len(batches))
            losses.append(learn(model, text, numbers))
            optimizer.step()
            optimizer.zero_grad()
            progress.steps += 1
            bar.update()
            if progress.steps % between == 0 or progress.steps == len(batches):
                bar.write(f"step {progress.steps}/{len(batches)}  KL {mean(losses):.4f}")
                losses.clear()
            progress.keep()


def batches_of(count: int, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """The numbers of the windows of each step: all, in another order in each pass."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.passes):
        yield from torch.randperm(count, generator=generator).split(args.batch_size)


def share_of_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)


def learn(model: nn.Module, text: Text, numbers: torch.Tensor) -> float:
    """Find the gradients of the divergence on the windows of these numbers, which is returned."""
    logits = logits_of(model, text.windows[numbers])
    gradient = torch.empty_like(logits)
    windows = zip(logits.detach(), gradient, map(text.logits, numbers.tolist()), strict=True)
    terms = [compare(*window) for window in windows]
    if not math.isfinite(kl := mean(terms)):
        raise Useless(f"the divergence became {kl} while tuning: give a smaller --lr, or --dtype float32")
    logits.backward(gradient.div_(len(terms)))
    return kl


@torch.no_grad()
def divergence(model: nn.Module, text: Text) -> float:
    """Mean KL(unquantized || quantized) over the tokens of the windows that were kept back, nats."""
    numbers = range(len(text.windows) - KEPT_BACK, len(text.windows))
    return mean(compare(logits_of(model, text.windows[n : n + 1])[0], None, text.logits(n)) for n in numbers)


def logits_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=windows.to(model.device), use_cache=False).logits


def compare(logits: torch.Tensor, gradient: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Mean KL(wanted || logits) over tokens, both [T, V], in float32, some tokens at a time. `gradient` takes its gradient in `logits`."""
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
    suffix, dtype = SCALE if linear.packed.grid is None else GRID, linear.packed.stored_levels.dtype
    new = linear.stored().to(dtype)
    try:
        linear.with_stored(new).check_values(path, linear.bits, linear.in_features)
    except InputError:
        raise Useless(f"{path}{suffix} has left what {dtype} can hold: give a smaller --lr") from None
    linear.start = new.float()
    linear.moved.zero_()
    return {path + suffix: new.cpu()}


def parts(checkpoint: Checkpoint, changed: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of the file, those in `changed` as they are there."""
    part, size = {}, 0
    for name in checkpoint.shapes:
        part[name] = changed[name] if name in changed else checkpoint.get(name)
        size += part[name].nbytes
        if size > PART_BYTES:
            yield part
            part, size = {}, 0
    if part:
        yield part


def settings_of(checkpoint: Checkpoint, tuning: dict) -> dict:
    """What the file says of itself, and of how it was tuned, each time; of a published file, which says nothing, what is known."""
    bits = checkpoint.bits_of(checkpoint.quantized[0])
    settings = checkpoint.settings or {"method": "leanquant", "bits": bits, "packing": "nibble"}
    earlier = settings.get("tuned")
    return settings | {"tuned": [*earlier, tuning] if isinstance(earlier, list) else [tuning]}


def history(args: argparse.Namespace, windows: torch.Tensor, dtype: torch.dtype) -> dict:
    """What the tuned file says of its tuning."""
    flags = {name: getattr(args, name) for name in ("nsamples", "seqlen", "seed", "passes", "lr", "batch_size")}
    text = {"calibration": args.text, "calibration_tokens": datautils.digest(windows.numpy().tobytes())}
    return flags | text | {"dtype": str(dtype).removeprefix("torch.")}


def others(original: StreamedModel, checkpoint: Checkpoint) -> dict:
    """What decides what is learned, besides what the tuned file tells."""
    return {
        "config of the model": datautils.digest(original.config.to_json_string().encode()),
        "files of the model": files_of(original.checkpoint),
        "files of the quantized one": files_of(checkpoint),
        "code": datautils.digest(Path(__file__).read_bytes()),
    }


if __name__ == "__main__":
    sys.exit(main())
