"""Export a quantized model as what other software loads: a folder for transformers, vLLM or SGLang, a file for llama.cpp.

    python scripts/export.py QUANTIZED --base MODEL --to awq --out FOLDER
    python scripts/export.py QUANTIZED --base MODEL --to gguf --template MODEL-F16.gguf --out FILE.gguf

Which format holds what, and who reads it: docs/export.md. The work is leanquant/export.py's, which llama.py --export calls too, and that of
leanquant/ggml.py.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import modelutils  # noqa: E402
from leanquant.errors import InputError, exit_code  # noqa: E402
from leanquant.export import FORMATS, export  # noqa: E402
from leanquant.foreign import open_checkpoint  # noqa: E402
from leanquant.packing import Checkpoint  # noqa: E402

SHARD = 5.0  # GB


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("quantized", metavar="QUANTIZED", help="quantized .safetensors file or folder")
    add(
        "--base",
        metavar="MODEL",
        help="hub name or folder of the unquantized model (unset: QUANTIZED, if it is a folder, but for gguf)",
    )
    add("--to", required=True, choices=(*FORMATS, "gguf"), metavar="FORMAT", help=f"{', '.join(FORMATS)}, gguf")
    add("--out", required=True, type=Path, metavar="OUT", help="where the exported model goes: a folder, or FILE.gguf")
    add(
        "--template", type=Path, metavar="FILE.gguf", help="for gguf: the unquantized model, as llama.cpp's convert_hf_to_gguf.py writes it"
    )
    add(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="llama.py's --report or eval_quantized.py's --output: perplexities for the model card",
    )
    add("--max_shard_size", type=gigabytes, metavar="GB", help=f"largest weights file (default: {SHARD})")
    add("--overwrite", action="store_true", help="replace what --out names: a folder that was made here, or FILE.gguf")
    return parser.parse_args(argv)


def gigabytes(text: str) -> float:
    size = float(text)
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size: give some GB")
    return size


def run(args: argparse.Namespace, command: str) -> None:
    if args.template is not None and args.to != "gguf":
        raise InputError("--template is for --to gguf: leave it out")
    checkpoint = open_checkpoint(args.quantized)
    what = export_file(checkpoint, args) if args.to == "gguf" else export_folder(checkpoint, args, command)
    print(f"{args.out}: {what}, every weight read back and compared", flush=True)


def export_folder(checkpoint: Checkpoint, args: argparse.Namespace, command: str) -> str:
    if args.base is None and not Path(args.quantized).is_dir():
        raise InputError(f"{args.quantized} is a single file, without config and tokenizer: name the unquantized model with --base")
    base = modelutils.resolve_model(args.base or args.quantized, modelutils.FILES_BESIDE_WEIGHTS)
    perplexity, shard_bytes = read_perplexity(args.report), int((args.max_shard_size or SHARD) * 1e9)
    export(checkpoint, base, args.to, args.out, args.overwrite, perplexity, command, shard_bytes)
    return args.to


def export_file(checkpoint: Checkpoint, args: argparse.Namespace) -> str:
    """Returns how many tensors have which of ggml's types."""
    if args.base is None or args.template is None:
        raise InputError(
            "--to gguf needs the unquantized model, --base, and --template, the 16-bit file that llama.cpp's converter makes of it"
        )
    if args.report or args.max_shard_size:
        raise InputError("--report and --max_shard_size are for exported folders, and a GGUF file is written: leave them out")
    try:
        from leanquant import ggml
    except ImportError as error:
        raise InputError(f"--to gguf needs a package that is not installed ({error}): pip install gguf") from None
    types = ggml.export(checkpoint, modelutils.resolve_model(args.base), args.template, args.out, args.overwrite)
    return ", ".join(f"{count} tensors in {name}" for name, count in types.most_common())


def read_perplexity(report: Path | None) -> list[dict]:
    """The rows of a report that the model card shows."""
    if report is None:
        return []
    try:
        rows = json.loads(report.read_text())["perplexity"]
        return [{name: row[name] for name in ("source", "perplexity", "tokens", "seqlen")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--report: {report} holds no perplexities ({type(error).__name__}: {error})") from None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: run(parse(argv), "python scripts/export.py " + shlex.join(map(str, argv))), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
