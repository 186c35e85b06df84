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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("quantized", metavar="QUANTIZED", help="quantized .safetensors file or folder")
    add(
        "--base", metavar="MODEL", help="hub name or folder of the unquantized model, for config and tokenizer (unset: QUANTIZED, a folder)"
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
    add("--max_shard_size", type=gigabytes, default=5.0, metavar="GB", help="largest weights file (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace what --out names, if it was made here")
    return parser.parse_args(argv)


def gigabytes(text: str) -> float:
    size = float(text)
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no size: give some GB")
    return size


def run(args: argparse.Namespace, command: str) -> None:
    if args.base is None and not Path(args.quantized).is_dir():
        raise InputError(f"{args.quantized} is a single file, without config and tokenizer: name the unquantized model with --base")
    if (args.to == "gguf") != (args.template is not None):
        raise InputError(
            "--to gguf, and nothing else, needs --template: the 16-bit file that llama.cpp's convert_hf_to_gguf.py makes of the model"
        )
    checkpoint = open_checkpoint(args.quantized)
    base = modelutils.resolve_model(args.base or args.quantized, modelutils.FILES_BESIDE_WEIGHTS)
    if args.to == "gguf":
        types = export_gguf(checkpoint, base, args.template, args.out, args.overwrite)
        print(f"{args.out}: {types}, every weight read back and compared", flush=True)
        return
    perplexity = read_perplexity(args.report)
    export(checkpoint, base, args.to, args.out, args.overwrite, perplexity, command, int(args.max_shard_size * 1e9))
    print(f"{args.out}: {args.to}, every weight read back and compared", flush=True)


def export_gguf(checkpoint: Checkpoint, base: Path, template: Path | None, out: Path, overwrite: bool) -> str:
    """Returns how many tensors were written in which type."""
    try:
        from leanquant import ggml
    except ImportError as error:
        raise InputError(f"--to gguf needs a package that is not installed ({error}): pip install gguf") from None
    types = ggml.export(checkpoint, base, template, out, overwrite)
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
