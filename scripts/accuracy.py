"""The accuracy study: every method, grid and width on SmolLM2-135M, perplexity and KL on two held-out texts.

    python scripts/accuracy.py [--grids nonuniform row g64] [--methods ...] [--bits 4 3 2] [--seeds 0 1 2] [--choose]

Protocol: 32 x 512 calibration tokens from the first 75 % of the articles' characters, --true-sequential --act-order
--percdamp 0.1, forward passes in bfloat16, perplexity and KL(fp16 || quantized) on windows of 512: 16 384 tokens of the
other articles (wiki) and of another kind of text (news). "best, tuned" measures the best recipe's file, and again after
it was tuned on further windows; "best, bits shared out, tuned" does so with bits that scripts/allocate.py has shared out
(--share), "best, 4-bit vocabulary, tuned" and "8-bit" with embeddings in 4 and 8 bits, which are the head, and one with both of the
former. --choose measures on other parts of both texts, on which the recipe's settings are chosen.
What is done is kept in docs/results/accuracy.json and not run again; docs/accuracy-tables.md and docs/accuracy.png are made
from it.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from demo_data import articles, make_model, news, write_text

ROOT = Path(__file__).resolve().parent.parent
WORK, DOCS = ROOT / "demo" / "accuracy", ROOT / "docs"
MODEL, STORE = ROOT / "demo" / "SmolLM2-135M-Instruct", DOCS / "results" / "accuracy.json"
SEQLEN, REPORT, CHOOSE = 512, 16384, 8192
GRIDS = {
    "nonuniform": ["--grid", "nonuniform"],
    "row": ["--grid", "affine"],
    "g64": ["--grid", "affine", "--groupsize", "64"],
}
SYMMETRIC = "best, no zero points"
METHODS = {
    "fp16": [],
    "rtn": ["--nearest"],
    "gptq": ["--grid", "minmax"],
    "published": ["--recipe", "published"],
    "best": [],
    "best, local grid": ["--kmeans", "published"],
    "best, no shift": ["--shift", "0"],
    "best, no residual": ["--no-residual"],
    "best, no refinement": ["--refine", "0"],
    SYMMETRIC: ["--sym"],
}
OWN_HEAD = "best, a head of its own"  # of the model stored with one: what moving it gives
ROTATED = {f"{method}, rotated": method for method in ("rtn", "gptq", "best")}
TUNED, BOTH, SHARED = "best, tuned", "best, rotated, tuned", "best, bits shared out, tuned"
VOCABULARY = {f"best, {bits}-bit vocabulary, tuned": str(bits) for bits in (4, 8)}
SMALLEST = "best, bits shared out, 4-bit vocabulary, tuned"
TUNED_TIMES = 2  # on so many times the windows it is quantized with, drawn with another seed
BASES = {OWN_HEAD: WORK / "model-with-a-head"} | dict.fromkeys([*ROTATED, BOTH], WORK / "model-rotated")  # with a head of their own
AVERAGES = (3.5, 3, 2.5, 2.25)  # bits a weight, shared out by an estimate on 32 windows with a seed of its own
SIZES, SIZED = (16, 64, 128), ("published", "best", TUNED)  # further numbers of windows, and what is measured with them
BESIDE = "on the pieces' code"  # written by hand: what best gave on older code, with which the rows without a piece were measured
STALE = {"stale": "what is measured again, because the code has changed what it measures since then; tables hold it until then"}


class Cell(NamedTuple):
    """One measurement. `nsamples` calibration windows; `part` is report or choose; `extra` flags only in the latter."""

    method: str
    grid: str
    bits: float  # a whole number where all linears take as many
    seed: int = 0
    nsamples: int = 32
    part: str = "report"
    extra: str = ""

    @property
    def key(self) -> str:
        return " | ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self)


def matrix(args: argparse.Namespace) -> list[Cell]:
    """What is to be measured, the most important first."""
    cells = [Cell("fp16", "row", 16)]
    for grid in args.grids:
        for method, seed, bits in itertools.product(args.methods, args.seeds, args.bits):
            plain = ROTATED.get(method, method)
            if plain in ("rtn", "gptq", SYMMETRIC) and grid == "nonuniform":
                continue  # they have no such grid: the rows of "row" are their counterpart
            if method == "best" and grid == "nonuniform" and OWN_HEAD in args.methods:
                continue  # the runs with a head measure it (`covers`)
            if (method in ("best, local grid", OWN_HEAD) and grid != "nonuniform") or (plain == "rtn" and seed):
                continue
            if method == BOTH and grid != "row":
                continue  # others gain little from a rotation
            cells.append(Cell(method, grid, bits, seed))
        sharing = (SHARED, SMALLEST) if grid == "nonuniform" else (SHARED,)
        cells += [Cell(method, grid, bits, seed) for method, seed, bits in itertools.product(sharing, args.seeds, args.share)]
    for nsamples, method, bits in itertools.product(args.sizes, SIZED, args.bits):
        if "nonuniform" in args.grids and method in args.methods:
            cells.append(Cell(method, "nonuniform", bits, 0, nsamples))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    methods = [*list(METHODS)[1:], *BASES, TUNED, *VOCABULARY]
    add("--methods", nargs="+", choices=methods, default=methods)
    add("--bits", type=int, nargs="+", default=[4, 3, 2])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--share", type=float, nargs="*", default=AVERAGES, help="bits on average, shared out")
    add("--sizes", type=int, nargs="*", default=SIZES, help="further numbers of calibration windows")
    add(
        "--choose",
        metavar="FLAGS",
        nargs="*",
        help="instead: the best recipe with each of these sets of flags, on the choosing texts; end a lone flag in a blank",
    )
    add("--lanes", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    add("--tables", action="store_true", help="only make the tables and the plot of what is there")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        cell = Cell(*json.loads(args.one))
        return print(json.dumps(measure(cell)))
    done, complete = stored(), True
    if not args.tables:
        prepare()
        cells = matrix(args)
        if args.choose is not None:
            trials = itertools.product(args.choose, args.grids, args.seeds, args.bits)
            cells = [Cell("fp16", "row", 16, part="choose")]
            cells += [Cell("best", grid, bits, seed, 32, "choose", extra) for extra, grid, seed, bits in trials]
        wanted = [cell for cell in cells if not is_measured(cell, done) or lacks_reference(cell)]
        for grid in {cell.grid for cell in wanted if cell.method in (SHARED, SMALLEST)}:
            share_out(grid, args.share)
        complete = run_all(wanted, done, args.lanes)
    write_text(DOCS / "accuracy-tables.md", as_markdown(done))
    plot(done, DOCS / "accuracy.png")
    if not complete:
        sys.exit(1)


def lacks_reference(cell: Cell) -> bool:
    """Is `cell` the one whose hidden states all others are compared with, and are they not on this machine?"""
    return cell.method == "fp16" and not all((WORK / f"{text} {cell.part}.pt").is_file() for text in ("wiki", "news"))


def stored() -> dict:
    return json.loads(STORE.read_text()) if STORE.is_file() else {}


def run_all(cells: list[Cell], done: dict, lanes: int) -> bool:
    """Each cell in a process of its own, `lanes` at a time, fp16 first: the others are compared with it. Has all been measured?"""
    STORE.parent.mkdir(parents=True, exist_ok=True)
    complete = True
    for is_reference in (True, False):
        with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
            wanted = [cell for cell in cells if (cell.method == "fp16") == is_reference]
            runs = {pool.submit(run_one, cell): cell for cell in wanted if complete or is_reference}
            for run in concurrent.futures.as_completed(runs):
                complete &= keep(runs[run], run.result(), done)
    return complete


def keep(cell: Cell, result: dict | None, done: dict) -> bool:
    """Store what a run of `cell` has measured of what is missing. False where it has failed."""
    if result is None:
        print(f"failed: {cell.key}", flush=True)
        return False
    done |= stored()  # another of these may be running
    results = [result, result | result["head as it was"]] if cell.method == OWN_HEAD else [result]
    for one, values in zip(covers(cell), results, strict=True):
        if one == cell or not is_measured(one, done):
            done[one.key] = {**one._asdict(), **values}
    write_text(STORE, json.dumps(done, indent=1) + "\n")
    print(f"{cell.key}: wiki {result['wiki']}, news {result['news']}", flush=True)
    return True


def covers(cell: Cell) -> list[Cell]:
    """What a run of `cell` measures: as nothing but the head comes after the layers, also best with the head as it was."""
    return [cell, cell._replace(method="best")] if cell.method == OWN_HEAD else [cell]


def is_measured(cell: Cell, done: dict) -> bool:
    return not any(done.get(one.key, STALE).get("stale") for one in covers(cell))


def run_one(cell: Cell) -> dict | None:
    command = [sys.executable, __file__, "--one", json.dumps(cell)]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    return json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else print(ran.stderr[-2000:], flush=True)


def prepare() -> None:
    """The model, the calibration text and the token windows of each text and part."""
    WORK.mkdir(parents=True, exist_ok=True)
    make_model(MODEL)
    make_model_with_head(BASES[OWN_HEAD])
    make_rotated_model(BASES["best, rotated"])
    if (WORK / "windows.pt").is_file():
        return
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "\n\n".join(articles())
    cut = int(0.75 * len(text))
    write_text(WORK / "calibration.txt", text[:cut])
    windows = {
        f"{name} {part}": ids
        for name, documents, separator, start in (("wiki", articles(), "\n\n", cut), ("news", news(), "\n", 0))
        for part, ids in parts(documents, separator, start, tokenizer).items()
    }
    torch.save(windows, WORK / "windows.pt")


def make_model_with_head(folder: Path) -> None:
    """The model, with a copy of its embeddings as a head of its own, as most larger models have one."""
    from safetensors.torch import load_file, save_file

    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(exist_ok=True)
    for file in MODEL.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((MODEL / "config.json").read_text())
    write_text(folder / "config.json", json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(MODEL / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})


def make_rotated_model(folder: Path) -> None:
    import rotate

    if not folder.is_dir() and rotate.main([str(MODEL), "--out", str(folder)]):
        sys.exit("rotating failed")


def share_out(grid: str, averages: Sequence[float]) -> None:
    """Write to `shares` what is not there yet."""
    import allocate

    if all(shares(grid, average).is_file() for average in averages):
        return
    command = [MODEL, WORK / "calibration.txt", "--bits", 3, "--out", "-", "--nsamples", 32, "--seqlen", SEQLEN, "--dtype", "bfloat16"]
    linears = allocate.estimate(allocate.parse([*map(str, command), *GRIDS[grid]]))
    for average in averages:
        write_text(shares(grid, average), "\n".join(allocate.as_patterns(allocate.allocate(linears, average))))


def shares(grid: str, average: float) -> Path:
    """The file of scripts/allocate.py's lines."""
    return WORK / f"{grid} {average:g} bits shared out.txt"


def parts(documents: list[str], separator: str, start: int, tokenizer) -> dict:
    """The first REPORT tokens from character `start`, and CHOOSE tokens from the next document that begins after them."""
    import torch

    text = separator.join(documents)
    first = tokenizer(text[start:], verbose=False)["input_ids"][:REPORT]
    begins = itertools.accumulate((len(document) + len(separator) for document in documents), initial=0)
    after = next(begin for begin in begins if begin > start + len(tokenizer.decode(first)))
    chosen = tokenizer(text[after:], verbose=False)["input_ids"][:CHOOSE]
    return {part: torch.tensor(ids).view(-1, SEQLEN) for part, ids in {"report": first, "choose": chosen}.items()}


# --- one measurement -------------------------------------------------------------------------------------------


def measure(cell: Cell) -> dict:
    """Quantize as a user would and evaluate. Returns perplexity and KL of each text, seconds of one core, the summed loss, the commit."""
    sys.path.insert(0, str(ROOT))
    import torch

    import llama

    name = cell.key.replace(" | ", "-").replace(" ", "_").replace(",", "")
    file, report = WORK / f"{name}.safetensors", WORK / f"{name}.json"
    code, result, start = commit(), {"cpu_seconds": None, "loss": None}, time.process_time()
    base = BASES.get(cell.method, MODEL)
    if cell.method != "fp16":
        command = [str(base), str(WORK / "calibration.txt"), "--wbits", str(int(cell.bits)), *flags(cell), "--nsamples", str(cell.nsamples)]
        command += ["--seqlen", str(SEQLEN), "--seed", str(cell.seed), "--true-sequential", "--act-order", "--percdamp", "0.1"]
        command += ["--dtype", "bfloat16", "--eval", "none", "--save_path", str(file), "--overwrite", "--fresh", "--report", str(report)]
        if llama.main(command + cell.extra.split()):
            sys.exit("quantization failed")
        contents = json.loads(report.read_text())
        result = {"cpu_seconds": time.process_time() - start, "loss": sum(row["loss"] or 0 for row in contents["linears"])}
        result["phase_seconds"] = contents["phase_seconds"]
        result["megabytes"] = round(file.stat().st_size / 1e6, 2)
    torch.set_float32_matmul_precision("medium")
    if cell.method in (TUNED, BOTH, SHARED, *VOCABULARY, SMALLEST):
        result["untuned"] = {text: evaluate(base, file, f"{text} {cell.part}", False)[0] for text in ("wiki", "news")}
        result["tuning_cpu_seconds"] = tune_file(base, file, cell)
    for text in ("wiki", "news"):
        path = file if file.is_file() else MODEL
        heads = [base] if cell.method in BASES and cell.method != BOTH else []
        result[text], *before = evaluate(base, path, f"{text} {cell.part}", cell.method == "fp16", heads)
        if before:
            result.setdefault("head as it was", {})[text] = before[0]
    file.unlink(missing_ok=True)
    return result | {"commit": code}


def tune_file(base: Path, file: Path, cell: Cell) -> float:
    """Tune what is in `file`, in its place. Returns seconds of one core."""
    import tune

    start = time.process_time()
    command = [str(base), str(file), str(WORK / "calibration.txt"), "--out", str(file), "--overwrite"]
    with contextlib.suppress(tune.NoBetter):  # the file stays what it was
        windows = ["--nsamples", str(TUNED_TIMES * cell.nsamples), "--seqlen", str(SEQLEN), "--seed", str(100 + cell.seed)]
        tune.run(tune.parse([*command, *windows, "--dtype", "bfloat16"]))
    return time.process_time() - start


def commit() -> str | None:
    """The checked-out commit, of which the code may be an edited copy; None where git does not know."""
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def flags(cell: Cell) -> list[str]:
    group = GRIDS[cell.grid][2:]
    method = ROTATED.get(cell.method, cell.method)
    own = METHODS.get(method, [])
    if method in (SHARED, SMALLEST):
        own = ["--bits_for", *shares(cell.grid, cell.bits).read_text().split()]
    if method in (*VOCABULARY, SMALLEST):
        own = [*own, "--vocab_bits", VOCABULARY.get(method, "4")]
    return [*own, *group] if method in ("rtn", "gptq") else [*GRIDS[cell.grid], *own]


def evaluate(base: Path, path: Path, text: str, is_reference: bool, other_heads: Sequence[Path] = ()) -> list[dict[str, float]]:
    """Perplexity of the model in `path`, and the mean over tokens of KL(fp16 || it), from both models' last hidden states; with its own
    head, and with those of other models.

    float32 logits; products round their factors to bfloat16, which moves the KL by 0.0002 (measured on fp16).
    """
    import torch

    import eval_quantized

    windows = torch.load(WORK / "windows.pt")[text]
    hidden = eval_quantized.last_hidden(streamed(base, path), windows, 4, text).hidden
    reference = WORK / f"{text}.pt"
    if is_reference:
        torch.save(hidden, reference)
    return compare(hidden, torch.load(reference), windows, [streamed(base, head) for head in (path, *other_heads)])


def streamed(base: Path, path: Path):
    """The model of `base` with the weights in `path`."""
    import torch

    import modelutils
    from leanquant.packing import Checkpoint

    return modelutils.StreamedModel(base, Checkpoint.open(path), torch.bfloat16, torch.device("cpu"))


def compare(hidden, their_hidden, windows, models) -> list[dict[str, float]]:
    """`evaluate` from last hidden states, with the head of each of `models`."""
    import torch

    losses, divergences = [[] for _ in models], [[] for _ in models]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        their_logits, *heads = (stack.enter_context(model.head()) for model in (streamed(MODEL, MODEL), *models))
        for ours, theirs, ids in zip(hidden, their_hidden, windows, strict=True):
            log_p = log_probabilities(their_logits, theirs)
            for number, logits in enumerate(heads):
                log_q = log_probabilities(logits, ours)
                losses[number].append(-log_q.gather(1, ids[1:].unsqueeze(1)).mean())
                divergences[number].append(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1).mean())
    means = [[torch.stack(values).double().mean() for values in pair] for pair in zip(losses, divergences, strict=True)]
    return [{"perplexity": round(loss.exp().item(), 4), "kl": round(kl.item(), 5)} for loss, kl in means]


def log_probabilities(logits, hidden):
    """Of each next token, float32 [T - 1, vocabulary], from last hidden states [T, D]."""
    return logits(hidden.unsqueeze(0))[0, :-1].float().log_softmax(1)


# --- tables ----------------------------------------------------------------------------------------------------


def as_markdown(done: dict) -> str:
    of_pieces = main_tables, piece_table, head_table
    of_models = tuning_table, shared_table, vocabulary_table, rotation_table
    tables = (table(done) for table in (*of_pieces, *of_models, size_table, choice_table))
    return "\n\n".join(filter(None, tables)) + "\n"


def rows_of(done: dict, **wanted) -> list[dict]:
    return [row for row in done.values() if all(row[name] == value for name, value in wanted.items())]


def over_seeds(values: list[float], digits: str) -> str:
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):{digits}}{spread}"


def cpu_seconds(rows: list[dict]) -> str:
    """Seconds of one core for quantizing and tuning, on whatever machine and beside whatever else it ran; empty if not measured."""
    values = [row["cpu_seconds"] + row.get("tuning_cpu_seconds", 0) for row in rows if row.get("cpu_seconds")]
    return f"{mean(values):.0f}" if values else ""


def closed(done: dict, rows: list[dict], text: str, against: str) -> str:
    """Share of the log-perplexity gap of `against` to fp16 that is closed, in %: from the means of ln ppl over seeds, ± the standard
    deviation of the shares of single seeds, each against `against` with that seed."""
    base = rows_of(done, method=against, grid=rows[0]["grid"], bits=rows[0]["bits"], nsamples=32, part="report")
    original = rows_of(done, method="fp16", part="report")
    if not base or not original or rows[0]["method"] in ("rtn", "gptq", against):
        return ""
    log = lambda some: mean(math.log(row[text]["perplexity"]) for row in some)  # noqa: E731
    share = lambda theirs, ours: 100 * (log(theirs) - log(ours)) / (log(theirs) - log(original))  # noqa: E731
    pairs = [([other], [row]) for row in rows for other in base if other["seed"] == row["seed"]]
    spread = f" ± {stdev(share(*pair) for pair in pairs):.1f}" if len(pairs) > 1 else ""
    return f"{share(base, rows):.0f}{spread}"


def main_tables(done: dict) -> str:
    tables = []
    for grid, bits in itertools.product(GRIDS, (4, 3, 2)):
        against = "published" if grid == "nonuniform" else "gptq"
        lines = [
            f"| {grid}, {bits} bits | wiki ppl | wiki KL | closed, % | news ppl | news KL | closed, % | loss | core s | seeds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            found = rows_of(done, method=method, part="report", nsamples=32, **({} if method == "fp16" else {"grid": grid, "bits": bits}))
            if found:
                cells = [method]
                for text in ("wiki", "news"):
                    cells += [over_seeds([row[text]["perplexity"] for row in found], ".5g")]
                    cells += [over_seeds([row[text]["kl"] for row in found], ".4f"), closed(done, found, text, against)]
                cells += [f"{mean(row['loss'] or 0 for row in found):.5g}", cpu_seconds(found), len(found)]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        if len(lines) > 3:
            tables.append(f"Closed: of the gap of {against}.\n\n" + "\n".join(lines))
    return "\n\n".join(tables)


def piece_table(done: dict) -> str:
    """How much higher the KL is without each piece, in %: each seed against best with that seed."""
    cells = [(grid, bits) for grid in GRIDS for bits in (4, 3, 2)]
    lines = [
        "KL without a piece, % above best's of the same seed (wiki / news; ± over seeds, whose number is in brackets).\n",
        "| | " + " | ".join(f"{grid}, {bits} bits" for grid, bits in cells) + " |",
        "|" + (len(cells) + 1) * "---|",
    ]
    for method in (method for method in METHODS if method.startswith("best, ")):
        texts = []
        for grid, bits in cells:
            wanted = {"grid": grid, "bits": bits, "nsamples": 32, "part": "report"}
            best = {row["seed"]: row.get(BESIDE, row) for row in rows_of(done, method="best", **wanted)}
            pairs = [(row, best[row["seed"]]) for row in rows_of(done, method=method, **wanted) if row["seed"] in best]
            rises = [[100 * (row[text]["kl"] / whole[text]["kl"] - 1) for row, whole in pairs] for text in ("wiki", "news")]
            texts.append(" / ".join(over_seeds(rise, ".0f") for rise in rises) + f" ({len(pairs)})" if pairs else "")
        lines.append(f"| {method.removeprefix('best, ')} | {' | '.join(texts)} |")
    return "\n".join(lines)


def head_table(done: dict) -> str:
    """What moving a head gives, in the very same runs."""
    said = "A head of its own (the model stored with one), non-uniform: as it was, and moved (--shift_head)."
    return before_and_after(done, said, OWN_HEAD, "head as it was", "moved")


def tuning_table(done: dict) -> str:
    """What tuning gives, in the very same runs."""
    same = f"the same file tuned on {32 * TUNED_TIMES} windows of {SEQLEN} tokens (scripts/tune.py)."
    models = {TUNED: "", BOTH: " on a rotated model, its head moved"}
    tables = [before_and_after(done, f"The best recipe{said}, and {same}", method, "untuned", "tuned") for method, said in models.items()]
    return "\n\n".join(filter(None, tables))


def before_and_after(done: dict, said: str, method: str, before: str, after: str) -> str:
    """Rows of `method` as they are, beside what they hold under the name `before`; `said` says of what, `after` heads the columns."""
    texts = "".join(f"| {text} ppl | {after} | {text} KL | {after} | change, % " for text in ("wiki", "news"))
    lines = [f"{said}\n", f"| grid | bits {texts}| seeds |", "|" + 13 * "---|"]
    for grid, bits in itertools.product(GRIDS, sorted({row["bits"] for row in done.values()}, reverse=True)):
        if found := rows_of(done, method=method, grid=grid, bits=bits, nsamples=32):
            cells = []
            for text in ("wiki", "news"):
                pairs = [(row[before][text], row[text]) for row in found]
                for name, digits in (("perplexity", ".5g"), ("kl", ".4f")):
                    cells += [over_seeds([pair[side][name] for pair in pairs], digits) for side in (0, 1)]
                cells.append(over_seeds([100 * (new["kl"] / old["kl"] - 1) for old, new in pairs], ".1f"))
            lines.append(f"| {grid} | {bits:g} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def shared_table(done: dict) -> str:
    """What sharing bits out gives."""
    said = "The best recipe with bits shared out (scripts/allocate.py), and the same file tuned as above."
    return beside_tuned(done, said, SHARED, "as many bits everywhere")


def vocabulary_table(done: dict) -> str:
    """What embeddings in 4 and 8 bits, which are the head, cost and save; in 4 with bits shared out, too."""
    said = "The best recipe with embeddings and head in {} bits (--vocab_bits){}, and the same file tuned as above."
    tables = [beside_tuned(done, said.format(its, ""), name, "embeddings and head in 16 bits") for name, its in VOCABULARY.items()]
    otherwise = "as many bits everywhere, but embeddings and head in 16"
    tables.append(beside_tuned(done, said.format(4, " and bits shared out"), SMALLEST, otherwise))
    return "\n\n".join(filter(None, tables))


def beside_tuned(done: dict, said: str, method: str, otherwise: str) -> str:
    """`before_and_after` tuning of `method`, and how that compares with the best recipe, of which `otherwise` is true."""
    lines = [
        f"How large those files are, and how much higher their KL is than with {otherwise}, %, with the same seed.\n",
        "| grid | bits | MB | wiki | tuned | news | tuned | seeds |",
        "|" + 8 * "---|",
    ]
    for grid, bits in itertools.product(GRIDS, sorted({row["bits"] for row in done.values()}, reverse=True)):
        found = rows_of(done, method=method, grid=grid, bits=bits)
        alike = {row["seed"]: row for row in rows_of(done, method=TUNED, grid=grid, bits=bits, nsamples=32)}
        pairs = [(alike[row["seed"]], row) for row in found if row["seed"] in alike]
        changes = [
            over_seeds([100 * (kind(new)[text]["kl"] / kind(old)[text]["kl"] - 1) for old, new in pairs], ".1f") if pairs else ""
            for text in ("wiki", "news")
            for kind in (lambda row: row["untuned"], lambda row: row)
        ]
        if found:
            size = mean(row["megabytes"] for row in found)
            lines.append(f"| {grid} | {bits:g} | {size:.1f} | {' | '.join(changes)} | {len(pairs) or ''} |")
    table = before_and_after(done, said, method, "untuned", "tuned")
    return "\n\n".join([table, "\n".join(lines)]) if table else ""


def rotation_table(done: dict) -> str:
    """What a rotated model loses, beside the model as it was with the same seeds."""
    lines = [
        "A rotated model (scripts/rotate.py), its head as it was; in brackets with the head moved, which the model itself cannot have.\n",
        "| grid | bits | method "
        + "".join(f"| {text} ppl | rotated | {text} KL | rotated | change, % " for text in ("wiki", "news"))
        + "| seeds |",
        "|" + 14 * "---|",
    ]
    for grid, bits, (rotated, plain) in itertools.product(GRIDS, (4, 3, 2), ROTATED.items()):
        wanted = {"grid": grid, "bits": bits, "nsamples": 32, "part": "report"}
        before = {row["seed"]: row for row in rows_of(done, method=plain, **wanted)}
        pairs = [(before[row["seed"]], row) for row in rows_of(done, method=rotated, **wanted) if row["seed"] in before]
        if not pairs:
            continue
        cells = []
        for text in ("wiki", "news"):
            for name, digits in (("perplexity", ".5g"), ("kl", ".4f")):
                moved = f" ({mean(row[text][name] for _, row in pairs):{digits}})" if plain == "best" else ""
                cells.append(over_seeds([row[text][name] for row, _ in pairs], digits))
                cells.append(over_seeds([row["head as it was"][text][name] for _, row in pairs], digits) + moved)
            changes = [100 * (row["head as it was"][text]["kl"] / as_it_was[text]["kl"] - 1) for as_it_was, row in pairs]
            cells.append(over_seeds(changes, ".1f"))
        lines.append(f"| {grid} | {bits} | {plain} | {' | '.join(cells)} | {len(pairs)} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def size_table(done: dict) -> str:
    lines = ["| windows of 512 | method | bits | wiki ppl | wiki KL | news ppl | news KL | core s |", "|---|---|---|---|---|---|---|---|"]
    for bits, nsamples, method in itertools.product((4, 3, 2), sorted({32, *SIZES}), SIZED):
        for row in rows_of(done, method=method, grid="nonuniform", bits=bits, seed=0, nsamples=nsamples, part="report"):
            values = [f"{row[text]['perplexity']:.5g} | {row[text]['kl']:.4f}" for text in ("wiki", "news")]
            lines.append(f"| {nsamples} | {method} | {bits} | {' | '.join(values)} | {cpu_seconds([row])} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def choice_table(done: dict) -> str:
    lines = ["| grid | bits | best with | wiki ppl | wiki KL | news ppl | news KL | core s | seeds |", "|" + 9 * "---|"]
    chosen = rows_of(done, part="choose")
    for grid, bits, extra in sorted(
        {(row["grid"], row["bits"], row["extra"]) for row in chosen}, key=lambda row: (row[0], -row[1], row[2])
    ):
        found = rows_of(done, part="choose", grid=grid, bits=bits, extra=extra)
        values = [
            f"{over_seeds([r[text]['perplexity'] for r in found], '.5g')} | {over_seeds([r[text]['kl'] for r in found], '.4f')}"
            for text in ("wiki", "news")
        ]
        lines.append(f"| {grid} | {bits} | `{extra or found[0]['method']}` | {' | '.join(values)} | {cpu_seconds(found)} | {len(found)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def plot(done: dict, out: Path) -> None:
    """KL to fp16 of each method, a panel a grid and text, bars from the least to the largest of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grids = [grid for grid in GRIDS if rows_of(done, grid=grid, method="best", part="report")]
    if not grids:
        return
    figure, axes = plt.subplots(2, len(grids), figsize=(5 * len(grids) + 2, 8), layout="constrained", squeeze=False, sharey=True)
    methods, handles = list(METHODS)[1:], {}
    methods.insert(methods.index("best") + 1, TUNED)
    for (row, text), (column, grid) in itertools.product(enumerate(("wiki", "news")), enumerate(grids)):
        panel = axes[row][column]
        for (shift, method), bits in itertools.product(enumerate(methods), (4, 3, 2)):
            found = [r[text]["kl"] for r in rows_of(done, method=method, grid=grid, bits=bits, nsamples=32, part="report")]
            if found:
                error = [[mean(found) - min(found)], [max(found) - mean(found)]]
                place = 4 - bits + 0.09 * (shift - len(methods) // 2)
                handles[method] = panel.errorbar(place, mean(found), error, fmt="o", ms=2.5, color=f"C{shift}", capsize=3)
        panel.set(yscale="log", xticks=[0, 1, 2], xticklabels=["4 bits", "3 bits", "2 bits"], title=f"{grid}, {text}")
        panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel("KL(fp16 || quantized), nats a token")
    shown = [method for method in methods if method in handles]
    figure.legend([handles[method] for method in shown], shown, loc="outside right center")
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
