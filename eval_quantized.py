"""Perplexity of a quantized model, or of a base model, one decoder layer at a time.

    python eval_quantized.py --base_model_name_or_path MODEL --leanquant_path FILE --perplexity wikitext2 text.txt

The convention of the field: consecutive windows of --seqlen tokens, no context across windows, the mean token loss
of a window averaged over windows. Benchmark tasks (lm-eval) are not here yet.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import datautils
import modelutils
from leanquant.errors import InputError
from leanquant.packing import Checkpoint


class Perplexity(NamedTuple):
    """Perplexity of one text, with what it takes to compare it: windows of `seqlen` tokens, `tokens` in all."""

    source: str
    perplexity: float
    seqlen: int
    windows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.source}: perplexity {self.perplexity:.4f}  ({self.windows} windows of {self.seqlen}, {self.tokens} tokens)"


def perplexity(model: modelutils.StreamedModel, source: str, windows: torch.Tensor, batch_size: int) -> Perplexity:
    """exp(mean over windows of the mean next-token loss) of token `windows` [n, T]."""
    hidden = last_hidden(model, windows, batch_size, f"eval {source}")
    losses = []
    with model.head() as logits:
        for states, ids in zip(hidden, windows, strict=True):
            losses.append(token_losses(logits(states.unsqueeze(0))[0], ids.to(model.device)).mean())
    value = torch.stack(losses).double().mean().exp().item()
    return Perplexity(source, value, windows.shape[1], windows.shape[0], windows.numel())


def last_hidden(model: modelutils.StreamedModel, windows: torch.Tensor, batch_size: int, label: str) -> torch.Tensor:
    """What the last decoder layer gives for token `windows` [n, T]: [n, T, D]; layer by layer, under a progress bar."""
    stream = model.embed(windows, batch_size)
    for index in tqdm(range(len(model.layers)), desc=label, unit="layer", ncols=80, leave=False, disable=None):
        with model.layer(index):
            model.advance(index, stream)
    return stream.hidden


def token_losses(logits: torch.Tensor, ids: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Cross entropy [T - 1] of each next token, from `logits` [T, V] and `ids` [T]; float32, in chunks to save memory."""
    pieces = zip(logits[:-1].split(chunk), ids[1:].split(chunk), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(piece.float(), targets, reduction="none") for piece, targets in pieces])


def default_batch_size(seqlen: int, device: torch.device) -> int:
    """As many sequences as make 1024 tokens, on a GPU 8192: enough to keep matrix products busy, little memory."""
    return max(1, (1024 if device.type == "cpu" else 8192) // seqlen)


def check_json_path(flag: str, path: Path | None) -> None:
    """Raise InputError unless results can be written later to the `path` that `flag` gave."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise InputError(f"{flag}: {path} cannot be written: give a file name in a folder that exists")


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name}: give auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is not supported: give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}, but torch sees {torch.cuda.device_count()} CUDA devices: use --device cpu")
    return device


def pick_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU (it is the fastest there) and the checkpoint's 16-bit type on a GPU."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else checkpoint.stored_dtype


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its sentence; a sentence with "unset:" says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or isinstance(action, argparse._HelpAction) or action.required:
            return action.help
        return action.help + " (off by default)" if action.default is False else super()._get_help_string(action)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpWithDefaults, allow_abbrev=False)
    add = parser.add_argument
    add("--base_model_name_or_path", required=True, help="hub name or folder of the unquantized model (its config and tokenizer are used)")
    add("--leanquant_path", help="quantized .safetensors file or folder (unset: the base model is evaluated)")
    add("--bits", type=int, help="bits of the quantized file, checked if given (unset: read from the file)")
    add(
        "--perplexity",
        nargs="+",
        required=True,
        metavar="NAME|PATH",
        help="test sets: wikitext2, ptb, c4, ptb-new, c4-new or local text files",
    )
    add("--seqlen", type=int, default=2048, help="tokens a window")
    add("--eval_batch_size", type=int, help="sequences per forward pass (unset: as many as make 1024 tokens, on a GPU 8192)")
    add("--use_bf16", action="store_true", help="compute in bfloat16, same as --dtype bfloat16")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float16", "bfloat16", "float32"],
        help="type of weights and activations; auto: float32 on a CPU, the model's 16-bit type on a GPU",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output", type=Path, help="write the results to this JSON file (unset: only print them)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    for source in args.perplexity:
        datautils.check_source(source)
    if args.seqlen < 2 or (args.eval_batch_size or 1) < 1:
        raise InputError("--seqlen must be at least 2 and --eval_batch_size at least 1")
    check_json_path("--output", args.output)
    device = pick_device(args.device)
    folder = modelutils.resolve_model(args.base_model_name_or_path)
    checkpoint = Checkpoint.open(args.leanquant_path or folder)
    if args.leanquant_path:
        checkpoint.check_bits(args.bits, args.leanquant_path)
    dtype = torch.bfloat16 if args.use_bf16 else pick_dtype(args.dtype, checkpoint, device)
    model = modelutils.StreamedModel(folder, checkpoint, dtype, device)
    model.check_seqlen(args.seqlen)
    tokenizer = modelutils.load_tokenizer(folder)
    windows = {source: datautils.evaluation_windows(source, tokenizer, args.seqlen) for source in args.perplexity}
    results = []
    for source, ids in windows.items():
        results.append(perplexity(model, source, ids, args.eval_batch_size or default_batch_size(args.seqlen, device)))
        print(results[-1], flush=True)
    if args.output:
        report = {
            "base_model": args.base_model_name_or_path,
            "leanquant_path": args.leanquant_path,
            "settings": checkpoint.settings,
            "dtype": str(dtype).removeprefix("torch."),
            "perplexity": [result._asdict() for result in results],
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
