"""The command line of llama.py: its flags, and the settings they make. Bad combinations are refused here.

What only the model can tell (do groups divide its linears?) is for llama.py to check.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import datautils
import eval_quantized
import plan
import quant
from activations import KINDS
from leanquant import export
from leanquant.errors import InputError
from ranks import Ranks

# An equally spaced grid cannot serve a few very sensitive columns and all others too: 2, the weight that an error has in
# the solver's own loss, serves it better than the 4 of free levels (docs/accuracy.md, How the settings were chosen).
DEFAULT_EXPONENT = {"nonuniform": 4.0, "affine": 2.0}

# The pieces of --recipe (docs/design.md, How it works): how --recipe published sets them, and what --recipe best sets otherwise.
PUBLISHED = {"kmeans": "published", "round_levels": False, "shift": 0.0, "residual": False, "shift_head": False, "refine": 0}
BEST = {"kmeans": "exact", "round_levels": True, "shift": 0.5, "residual": True, "shift_head": True, "refine": 2}


@dataclass(frozen=True)
class Run:
    """Everything the command line decides, besides how a linear is quantized."""

    model: str
    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    batch_size: int
    true_sequential: bool
    n_layers: int | None
    offload_threshold: int
    hessian_device: torch.device | None
    activations: str
    packing: str
    skip: tuple[str, ...]  # regular expressions for linears that stay as they are
    bits_for: tuple[tuple[str, int], ...]  # others, and the bits of what they match
    vocab_bits: int  # of embeddings and head; 16: they are not quantized
    device: torch.device
    save_path: Path | None
    overwrite: bool
    fresh: bool
    force: bool
    report: Path | None
    example_rows: tuple[tuple[str, int], ...]  # linears and their rows that the report shows; none: a choice of its own
    eval: tuple[str, ...]
    export: tuple[tuple[str, Path], ...]  # formats of other software, and the folders they go to
    command: str
    ranks: Ranks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Quantize a causal language model layer by layer and write it as safetensors.",
        formatter_class=eval_quantized.HelpWithDefaults,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", help="hub name or local folder of the model (safetensors)")
    corpora = ", ".join(datautils.CORPORA)
    add("dataset", nargs="?", help=f"calibration text: {corpora}, or a local .txt, .jsonl (text field) or .parquet file")
    add("--wbits", type=int, default=16, help="bits a weight: 2, 3 or 4; 16 evaluates the unquantized model")
    add(
        "--grid",
        choices=quant.GRIDS,
        help="nonuniform (2**bits free levels a row), affine (searched scale and zero) or minmax (GPTQ's) "
        "(unset: nonuniform if --exponent is given, else minmax)",
    )
    add(
        "--exponent",
        type=float,
        help="how strongly the grid favours sensitive weights; 3 or 4 is recommended (unset: 4 for --grid nonuniform, 2 for affine)",
    )
    add(
        "--sensitivity",
        choices=quant.SENSITIVITIES,
        help="what is raised to -exponent: the diagonal of the inverse Hessian's Cholesky factor, as in the published code, or of the "
        "inverse Hessian itself, as in the paper's text (unset: cholesky)",
    )
    add("--groupsize", type=int, default=-1, help="columns that share a scale and zero point (affine and minmax); -1: the whole row")
    add("--sym", action="store_true", help="affine and minmax: zero points fixed in the middle, for software that reads no others")
    add("--nearest", action="store_true", help="baseline: round to the nearest level of a min-max grid")
    add("--nsamples", type=int, default=128, help="calibration windows")
    add("--seqlen", type=int, default=2048, help="tokens a window, for calibration and evaluation")
    add("--seed", type=int, default=0, help="seed of the calibration windows")
    add("--percdamp", type=float, default=0.01, help="damping of the Hessian, as a share of its mean diagonal; 0.1 suits learned grids")
    add("--act-order", action="store_true", help="quantize columns with large inputs first (costs nothing at inference)")
    add("--true-sequential", action="store_true", help="within a layer, let each group of linears see the quantized ones before it")
    add(
        "--static-groups",
        action="store_true",
        help="accepted for compatibility: groups here are always learned up front, from the original weights",
    )
    add(
        "--skip",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="linears that stay as they are: regular expressions for whole names such as model.layers.0.self_attn.q_proj",
    )
    add(
        "--bits_for",
        nargs="+",
        default=[],
        metavar="REGEX=BITS",
        help="other bits than --wbits for the linears whose whole name matches; the first match counts, after --skip's",
    )
    add(
        "--vocab_bits",
        type=int,
        default=16,
        metavar="BITS",
        help="quantize embeddings and head too, to 2, 3, 4 or 8 bits (8: all but lossless); 16: they stay as they are",
    )
    add("--block_size", type=int, default=128, help="columns whose errors are propagated together")
    add("--n_layers", type=int, help="quantize only the first N decoder layers (unset: all)")
    add("--kmeans_bins", type=int, default=128, help="bins of the k-means program: 128, or 256 for the last 0.1 %% of the grid's objective")
    add(
        "--recipe",
        choices=["best", "published"],
        help="best: all pieces below, 2.3 times the time of published (3 bits); published: the paper's algorithm as its code does it "
        "(unset: best for learned grids, published for minmax)",
    )
    switch = argparse.BooleanOptionalAction
    add(
        "--kmeans",
        choices=quant.KMEANS,
        help="how non-uniform levels are found: exact, the optimal ones, at most 7 %% of the time of published more; or one local "
        "optimum, from equally spaced levels (uniform), random ones (plusplus, which takes longer), or as the published code does it: "
        "plusplus at 4 bits, else uniform "
        "(unset: exact for --recipe best, else published)",
    )
    add(
        "--round_levels",
        action=switch,
        help="let the solver see non-uniform levels rounded as they are stored; costs nothing (unset: as --recipe)",
    )
    add(
        "--shift",
        type=float,
        help="0 to 1: how far to aim at the unquantized model's outputs on its own inputs; a second forward pass and a second matrix "
        "a group: +70 %% of the time of published, and a second copy of the activations (unset: 0.5 for --recipe best, else 0)",
    )
    add(
        "--residual",
        action=switch,
        help="with --shift: also make up for what the residual stream lacks; less than 1 %% of the time (unset: as --recipe)",
    )
    add(
        "--shift_head",
        action=switch,
        help="with --shift: move the head too, if it is not the embeddings; it stays in 16 bits; as much time as one more group "
        "(unset: as --recipe)",
    )
    add(
        "--refine",
        type=int,
        help="rounds of coordinate descent on codes and least squares on levels; +30 %% of the time of published each "
        "(unset: 2 for --recipe best, else 0)",
    )
    add(
        "--kmeans_seed",
        type=int,
        default=0,
        help="of the random start that --kmeans plusplus has, and the published recipe at 4 bits; under torchrun it depends on the "
        "number of ranks too",
    )
    add("--grid_partitions", type=int, default=2048, help="T of the affine search: range ends move in steps of range / T")
    add(
        "--grid_search",
        choices=["fast", "exhaustive"],
        default="fast",
        help="affine search coarse to fine, or over every distinct candidate (about 6 times slower)",
    )
    add(
        "--offload_threshold",
        type=int,
        default=53248,
        help="Hessians at least this wide are handled on --hessian_device",
    )
    add(
        "--hessian_device", help="cpu or cuda:N, for Hessians too wide for --device (unset: the second GPU, or the CPU where there is none)"
    )
    add(
        "--activations",
        choices=["auto", *KINDS],
        default="auto",
        help="where the activations of the calibration text wait between passes: on the device, in host memory, or on the disk, in the "
        "folder where the run works; the same bytes come out; auto: the first of these in which they fit",
    )
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N; under torchrun cuda is a GPU for each rank")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float16", "bfloat16", "float32"],
        help="type of weights and activations in forward passes; auto: float32 on a CPU, the model's 16-bit type on a GPU",
    )
    add("--batch_size", type=int, help="sequences per forward pass (unset: as many as make 1024 tokens, on a GPU 8192)")
    add(
        "--save_path",
        type=Path,
        help="where the quantized model goes: a file ending in .safetensors, or a Hugging Face folder (unset: nothing is kept)",
    )
    add(
        "--packing",
        choices=["dense", "nibble"],
        default="dense",
        help="codes of 2 and 3 bits: dense, or one nibble each as the published reader wants",
    )
    add("--overwrite", action="store_true", help="replace what --save_path names")
    add(
        "--fresh",
        action="store_true",
        help="begin anew where an unfinished run with the same --save_path would be taken up (with --overwrite, if its result is complete)",
    )
    add("--force", action="store_true", help="begin although the plan says that memory or disk are too small")
    add(
        "--plan",
        nargs="?",
        const="auto",
        choices=["auto", *plan.HARDWARE],
        help="do not run: print the memory, disk, operations and time that the run would take on this hardware (without a name: here), "
        "and what would make it fit; MODEL may be a config.json, DATASET may be missing",
    )
    add(
        "--export",
        nargs="+",
        metavar="FORMAT[:FOLDER]",
        help=f"also write a folder that other software loads, as scripts/export.py does: {', '.join(export.FORMATS)} "
        "(unset: none; FOLDER unset: --save_path with the format's name behind it)",
    )
    add("--eval", nargs="+", metavar="NAME|PATH", help="texts to measure perplexity on afterwards, or none (unset: wikitext2 ptb c4)")
    add("--new-eval", action="store_true", help="with --eval unset, use wikitext2 ptb-new c4-new")
    add(
        "--report",
        type=Path,
        metavar="FILE.json",
        help="write settings, losses, times, peak memory and perplexities to this file (unset: no report)",
    )
    add(
        "--example_rows",
        nargs="+",
        default=[],
        metavar="LINEAR=ROW",
        help="rows whose weights and levels --report holds for scripts/plot.py, such as model.layers.0.mlp.down_proj=17 "
        "(unset: of each linear in the first, the middle and the last layer the row of median loss)",
    )
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "llama.py", *map(str, sys.argv[1:] if argv is None else argv)])
    return args


def quant_config(args: argparse.Namespace, levels_dtype: torch.dtype) -> quant.QuantConfig:
    """The algorithm's settings. Raises InputError for contradictions."""
    grid = args.grid or ("minmax" if args.exponent is None or args.nearest else "nonuniform")
    if args.nearest and (args.exponent is not None or grid != "minmax"):
        raise InputError("--nearest is the round-to-nearest baseline on a min-max grid: leave out --exponent and --grid")
    if grid == "minmax" and args.exponent is not None:
        raise InputError("--grid minmax has no exponent: leave out --exponent, or choose --grid nonuniform or affine")
    pieces = recipe(args, grid)
    if args.nearest and pieces != PUBLISHED:
        raise InputError("--nearest only rounds: leave out --recipe best and its pieces")
    if grid == "minmax" and args.sensitivity:
        raise InputError("--grid minmax has no sensitivity: leave out --sensitivity, or choose --grid nonuniform or affine")
    if grid != "nonuniform" and args.kmeans:
        raise InputError(f"--kmeans belongs to --grid nonuniform, not to {grid}: leave it out")
    if grid != "nonuniform" and args.round_levels is not None:
        raise InputError(f"--round_levels belongs to --grid nonuniform, not to {grid}: leave it out")
    if pieces["shift"] > 1:
        raise InputError(f"--shift is {pieces['shift']}: give 0 (not at all) to 1 (all the way)")
    if args.sym and grid == "nonuniform":
        raise InputError("--sym belongs to --grid affine or minmax: non-uniform grids have no zero point to fix, so leave it out")
    if grid == "nonuniform" and args.groupsize != -1:
        raise InputError("non-uniform grids are learned for whole rows: leave out --groupsize, or choose --grid affine")
    for name, least in {
        "percdamp": 0,
        "exponent": 0,
        "block_size": 1,
        "kmeans_bins": 2**args.wbits,
        "grid_partitions": 2,
        "refine": 0,
        "shift": 0,
    }.items():
        if (value := getattr(args, name)) is not None and not least <= value < float("inf"):
            raise InputError(f"--{name} is {value}: give at least {least}")
    if args.grid_partitions % 2:
        raise InputError(f"--grid_partitions is {args.grid_partitions}: give an even number")
    return quant.QuantConfig(
        bits=args.wbits,
        grid=grid,
        exponent=DEFAULT_EXPONENT.get(grid, 0.0) if args.exponent is None else args.exponent,
        sensitivity=args.sensitivity or "cholesky",
        groupsize=args.groupsize,
        sym=args.sym,
        nearest=args.nearest,
        percdamp=args.percdamp,
        act_order=args.act_order,
        block_size=args.block_size,
        grid_partitions=args.grid_partitions,
        exhaustive=args.grid_search == "exhaustive",
        kmeans_bins=args.kmeans_bins,
        kmeans_seed=args.kmeans_seed,
        **pieces,
        levels_dtype=levels_dtype,
    )


def recipe(args: argparse.Namespace, grid: str) -> dict:
    """The pieces that --recipe names, each replaced by its own flag if that is given."""
    best = grid != "minmax" if args.recipe is None else args.recipe == "best"
    pieces = PUBLISHED | (BEST if best else {})
    return {name: value if getattr(args, name) is None else getattr(args, name) for name, value in pieces.items()}


def run_settings(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> Run:
    """Where, how much and onto what. Raises InputError for what can be seen to be wrong at once."""
    if args.wbits not in (2, 3, 4, 16):
        raise InputError(f"--wbits is {args.wbits}: give 2, 3 or 4, or 16 to evaluate the unquantized model")
    for name, least in {"nsamples": 1, "seqlen": 2, "batch_size": 1, "n_layers": 1}.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise InputError(f"--{name} is {value}: give at least {least}")
    sources = tuple(args.eval or (datautils.NEW_TEST_SETS if args.new_eval else datautils.TEST_SETS))
    sources = () if sources == ("none",) else sources
    if args.dataset is None:
        raise InputError("the calibration text is missing: give a DATASET behind the model")
    for source in (args.dataset, *sources):
        datautils.check_source(source)
    if args.wbits != 16 and args.nsamples < ranks.size:
        raise InputError(f"--nsamples is {args.nsamples} and there are {ranks.size} ranks: give each at least one window")
    if args.vocab_bits not in (2, 3, 4, 8, 16):
        raise InputError(f"--vocab_bits is {args.vocab_bits}: give 2, 3, 4 or 8, or 16 to leave embeddings and head as they are")
    if args.wbits == 16 and (args.skip or args.bits_for or args.vocab_bits != 16):
        raise InputError("--skip, --bits_for and --vocab_bits are for quantizing: give --wbits 2, 3 or 4 with them")
    if args.wbits == 16 and (args.save_path or not sources):
        raise InputError("--wbits 16 only evaluates the unquantized model: give --wbits 2, 3 or 4 to quantize it")
    eval_quantized.check_json_path("--report", args.report)
    return Run(
        model=args.model,
        dataset=args.dataset,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        seed=args.seed,
        batch_size=args.batch_size or eval_quantized.default_batch_size(args.seqlen, device),
        true_sequential=args.true_sequential,
        n_layers=args.n_layers,
        offload_threshold=args.offload_threshold,
        hessian_device=ranks.device(eval_quantized.pick_device(args.hessian_device)) if args.hessian_device else None,
        activations=args.activations,
        packing=args.packing,
        skip=tuple(args.skip),
        bits_for=tuple(map(parse_bits, args.bits_for)),
        vocab_bits=args.vocab_bits,
        device=device,
        save_path=args.save_path,
        overwrite=args.overwrite,
        fresh=args.fresh,
        force=args.force,
        report=args.report,
        example_rows=example_rows(args),
        eval=sources,
        export=exports(args),
        command=args.command,
        ranks=ranks,
    )


def exports(args: argparse.Namespace) -> tuple[tuple[str, Path], ...]:
    """Each format that --export names with its folder, which is beside --save_path unless it is given."""
    found = {}
    for text in args.export or ():
        name, _, folder = text.partition(":")
        if name not in export.FORMATS:
            other = "; GGUF files are written by scripts/export.py, afterwards" if name == "gguf" else ""
            raise InputError(f"--export {text}: {name} is none of {', '.join(export.FORMATS)}{other}")
        if not folder and args.save_path is None:
            raise InputError(f"--export {text}: give a folder for it, {name}:FOLDER, or --save_path")
        found[Path(folder) if folder else args.save_path.with_name(f"{args.save_path.name.removesuffix('.safetensors')}-{name}")] = name
    if len(found) < len(args.export or ()) or args.save_path in found:
        raise InputError("--export and --save_path name a folder twice: give each format a folder of its own, FORMAT:FOLDER")
    if found and args.wbits == 16:
        raise InputError("--export is for quantized models: give --wbits 2, 3 or 4 with it")
    return tuple((name, folder) for folder, name in found.items())


def example_rows(args: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    """Each linear that --example_rows names, with its row."""
    found = {}
    for text in args.example_rows:
        name, _, row = text.rpartition("=")
        if not name or not (row.isascii() and row.isdigit()) or name in found:
            raise InputError(f"--example_rows {text}: give LINEAR=ROW, one row a linear, counted from 0")
        found[name] = int(row)
    if found and (args.report is None or args.wbits == 16):
        raise InputError("--example_rows is for the report of a quantization: give --report FILE.json and --wbits 2, 3 or 4 with it")
    return tuple(found.items())


def parse_bits(text: str) -> tuple[str, int]:
    """(pattern, bits) of a `REGEX=BITS`."""
    pattern, _, bits = text.rpartition("=")
    if not pattern or bits not in ("2", "3", "4"):
        raise InputError(f"--bits_for {text}: give REGEX=2, REGEX=3 or REGEX=4; what is to stay as it is goes to --skip")
    return pattern, int(bits)
