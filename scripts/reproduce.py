"""The paper's tables, each made by one command: runs, resumes, and renders ours beside the published values.

    python scripts/reproduce.py --table ppl-4bit --model meta-llama/Meta-Llama-3-8B
    python scripts/reproduce.py --table all --model demo        # SmolLM2-135M on a CPU: docs/reproduction.md

The tables are data, in paper.py. Every quantized model is one run: llama.py, then eval_quantized.py if a table wants tasks,
called as a user would call them. One JSON a run lies in --work, and a run that is there with the same command is not made again.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import NamedTuple

from demo_data import write_text
from paper import BITS, GROUPS, PUBLISHED, PUBLISHED_COSTS, TABLES, Job, Protocol, Table, protocol
from plot import COLORS, add_legend, losses_by_layer, new_figure, save

ROOT = Path(__file__).resolve().parent.parent

# --- runs ------------------------------------------------------------------------------------------------------


class Files(NamedTuple):
    """Of a run: its JSON, which stays, and what its commands write."""

    store: Path
    model: Path
    report: Path
    tasks: Path

    @classmethod
    def of(cls, job: Job, p: Protocol, work: Path) -> "Files":
        return cls(*(work / f"{p.name(job)}.{end}" for end in ("json", "safetensors", "report.json.partial", "tasks.json.partial")))


def quantize_command(job: Job, p: Protocol, files: Files) -> list[str]:
    command = ["llama.py", p.model, *p.calibration, "--wbits", str(job.bits), *p.flags(job)]
    command += ["--eval", *p.texts, "--report", from_root(files.report)]
    return command if job.bits == 16 else [*command, "--save_path", from_root(files.model), "--overwrite"]


def task_command(job: Job, p: Protocol, files: Files) -> list[str]:
    command = ["eval_quantized.py", "--base_model_name_or_path", p.model, "--tasks", *p.tasks, *p.task_flags]
    command += ["--output", from_root(files.tasks)]
    return command if job.bits == 16 else [*command, "--leanquant_path", from_root(files.model)]


def kernel_command(work: Path) -> list[str]:
    """The benchmark of the kernels: on a GPU the kernels' own, else that of their CPU twins on the demo's rows."""
    import torch

    script = "bench_quantize.py" if torch.cuda.is_available() else "bench_grid.py"
    return [f"scripts/{script}", "--out", from_root(work / "bench.json.partial")]


def from_root(path: Path) -> str:
    """As the commands, which run in the project's folder, name it: the same on every machine."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def is_same(one: list[str] | None, other: list[str]) -> bool:
    """Do two commands say the same, wherever their files lie? A folder of runs may be moved, and rendered elsewhere."""
    names = lambda command: [Path(argument).name for argument in command]  # noqa: E731
    return one is not None and names(one) == names(other)


def current(job: Job, p: Protocol, work: Path) -> dict:
    """What is stored of a run, if its commands are still the ones that would be given; without its tasks, if only theirs is another."""
    files = Files.of(job, p, work)
    done = stored(files.store)
    if not is_same(done.get("command"), quantize_command(job, p, files)):
        return {}
    if not is_same(done.get("task_command"), task_command(job, p, files)):
        done.pop("tasks", None)
    return done


def run(job: Job, p: Protocol, work: Path, with_tasks: bool, keep: bool, fresh: bool) -> None:
    """Make the run's JSON, or what it lacks. A model that is made for it is removed afterwards unless `keep`.

    `fresh`: not from the parts that a stopped run has left.
    """
    files, done = Files.of(job, p, work), current(job, p, work)
    kept = keep or files.model.is_file()
    if with_tasks and "tasks" not in done and job.bits != 16 and not files.model.is_file():
        done = {}  # the model is needed again
    if not done:
        command = quantize_command(job, p, files)
        done = {"command": command, "date": date.today().isoformat(), "machine": machine(), "code": code()}
        called = [*command, "--fresh"] if fresh and job.bits != 16 else command
        done |= {"report": without_details(call(called, files.report))}
        write(files.store, done)
    if with_tasks and "tasks" not in done:
        command = task_command(job, p, files)
        done |= {"task_command": command, "task_code": code(), "tasks": call(command, files.tasks)["rows"]}
        write(files.store, done)
    if not kept:
        files.model.unlink(missing_ok=True)


def machine() -> str:
    """What a run's times are of."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"a CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} of {os.cpu_count()} cores a run"


def code() -> str | None:
    """The commit that makes a run, with a + if files besides the documents differ from it; None outside a checkout."""
    git = lambda *arguments: subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)  # noqa: E731
    with contextlib.suppress(OSError):  # no git
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        return commit and commit + "+" * git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode or None
    return None


def without_details(report: dict) -> dict:
    """What no table needs, and takes most of the space."""
    for row in report.get("linears", []):
        row.pop("example", None)
    return report


def stored(store: Path) -> dict:
    """What a run has left; nothing, so that it is made again, if that cannot be read."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(store.read_text())
    return {}


class Failed(Exception):
    """One of the project's commands ended with an error, which it has printed."""


def call(command: list[str], result: Path) -> dict:
    """Run one of the project's commands. Returns the JSON that it leaves in `result`."""
    print("$ python " + " ".join(command), flush=True)
    if run_program(command):
        raise Failed("the command above failed")
    contents = json.loads(result.read_text())
    result.unlink()
    return contents


def run_program(command: list[str]) -> int:
    # lm-eval's progress bars are for a terminal alone
    bars = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | bars).returncode


def write(store: Path, contents: dict) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    write_text(store, json.dumps(contents) + "\n")


def run_kernels(work: Path) -> None:
    store, command = work / "kernels.json", kernel_command(work)
    if not is_same(stored(store).get("command"), command):
        done = {"command": command, "date": date.today().isoformat(), "machine": machine()}
        write(store, done | {"report": call(command, work / "bench.json.partial")})


# --- tables ----------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A number, its standard error if known, and the published one if known."""

    value: float | None
    error: float | None = None
    published: float | None = None
    digits: int = 2

    def __str__(self) -> str:
        if self.value is None:
            return "" if self.published is None else f"(published {plain(self.published, self.digits)})"
        text = plain(self.value, self.digits) + ("" if self.error is None else f" ± {plain(self.error, self.digits)}")
        return text + ("" if self.published is None else f" (published {plain(self.published, self.digits)})")


def plain(value: float, digits: int) -> str:
    return f"{value:.2e}" if abs(value) >= 1e5 else f"{value:.{digits}f}"


def cells(job: Job, done: dict, columns: tuple[str, ...], model: str, p: Protocol) -> dict[str, Cell]:
    """Column heading -> cell of one run, which may be missing."""
    report, found, short = done.get("report", {}), {}, model.rstrip("/").rpartition("/")[2]
    if "perplexity" in columns:
        rows = {Path(row["source"]).name: row for row in report.get("perplexity", [])}
        for text in map(lambda source: Path(source).name, p.texts):
            row, known = rows.get(text, {}), PUBLISHED.get((short, text), {}).get(job.bits, {}).get(job.method)
            found[f"perplexity, {text}"] = Cell(row.get("perplexity"), row.get("stderr"), known)
    if "tasks" in columns:
        for row in done.get("tasks", []):
            found[f"{row['name']}, {row['metric']}"] = Cell(row["value"], row["stderr"], digits=4)
    if "loss" in columns:
        losses = [row["loss"] for row in report.get("linears", []) if row["loss"] is not None]
        found["sum of losses"] = Cell(sum(losses) if losses else None, digits=1)
    seconds, peak = PUBLISHED_COSTS.get(short, {}).get(job.bits, {}).get(job.method, (None, None))
    if "time" in columns:
        found["seconds"] = Cell(report.get("quantization_seconds"), published=seconds, digits=1)
    if "memory" in columns:
        found["peak host, GB"] = Cell(scaled(report.get("peak_host_bytes_quantizing")), published=peak)
        found["peak device, GB"] = Cell(scaled(report.get("peak_device_bytes_quantizing")))
        found["hours of grid search"] = Cell(scaled(report.get("phase_seconds", {}).get("grid"), 3600), digits=3)
    if "size" in columns:
        found["bits a weight"] = Cell(16.0 if job.bits == 16 else report.get("bits_per_weight"))
    return found


def scaled(value: float | None, unit: float = 1e9) -> float | None:
    return None if value is None else value / unit


def as_markdown(table: Table, model: str, p: Protocol, work: Path) -> str:
    """The table, empty if nothing of it was measured yet."""
    done = {job: current(job, p, work) for job in table.jobs}
    rows = {job: cells(job, contents, table.columns, model, p) for job, contents in done.items()}
    headings = [
        heading
        for heading in dict.fromkeys(h for row in rows.values() for h in row)
        if any(heading in row and row[heading].value is not None for row in rows.values())
    ]
    if not headings or not any(done.values()):
        return ""
    lines = [f"| bits | method | {' | '.join(headings)} |", f"|---|---|{'---|' * len(headings)}"]
    best = {(job.bits, heading): best_of(table, rows, job.bits, heading) for job in table.jobs for heading in headings}
    for job, row in rows.items():
        texts = [emphasised(row.get(heading), best[job.bits, heading]) for heading in headings]
        lines.append(f"| {job.bits} | {shown(job, p)} | {' | '.join(texts)} |")
    for bits, method, text, value in literature(table, model, p):
        texts = [str(Cell(None, published=value)) if heading == f"perplexity, {text}" else "" for heading in headings]
        lines.append(f"| {bits} | {method} | {' | '.join(texts)} |")
    return "\n".join(lines)


def layers_markdown(table: Table, p: Protocol, work: Path) -> str:
    """Loss of each layer, a column a run."""
    found = {job: losses_by_layer(done["report"]) for job in table.jobs if (done := current(job, p, work))}
    headings = [f"{job.bits} bits, {job.method}" for job in found]
    lines = [f"| decoder layer | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
    for layer in sorted({layer for losses in found.values() for layer in losses}):
        lines.append(f"| {layer} | {' | '.join(plain(losses[layer], 2) if layer in losses else '' for losses in found.values())} |")
    return "\n".join(lines)


def shown(job: Job, p: Protocol) -> str:
    for wanted, used in zip(GROUPS, p.groups, strict=True):
        if job.method.endswith(f"groups of {wanted}"):
            return job.method.replace(str(wanted), str(used))
    return job.method


def best_of(table: Table, rows: dict, bits: int, heading: str) -> float | None:
    """The best value of a width, for columns of quality."""
    values = [row[heading].value for job, row in rows.items() if job.bits == bits and heading in row and row[heading].value is not None]
    values = [value for value in values if math.isfinite(value)]
    is_quality = is_share(heading) or heading.startswith(("perplexity", "sum")) or heading.endswith(", perplexity")
    if len(values) < 2 or not is_quality:
        return None
    return max(values) if is_share(heading) else min(values)


def is_share(heading: str) -> bool:
    """Is the column one of right answers, from 0 to 1 and the more the better?"""
    return heading.endswith((", acc", ", acc_norm"))


def emphasised(cell: Cell | None, best: float | None) -> str:
    text = "" if cell is None else str(cell)
    return f"**{text}**" if cell is not None and best is not None and cell.value == best else text


def literature(table: Table, model: str, p: Protocol) -> list[tuple[int, str, str, float]]:
    """Published values of methods that are not run here."""
    if "perplexity" not in table.columns or not table.title.startswith("Perplexity"):
        return []
    here, widths = {(job.bits, job.method) for job in table.jobs}, {job.bits for job in table.jobs}
    return [
        (bits, method, text, value)
        for (name, text), values in PUBLISHED.items()
        for bits, methods in values.items()
        for method, value in methods.items()
        if name == model.rstrip("/").rpartition("/")[2] and bits in widths and (bits, method) not in here
    ]


def kernel_rows(work: Path) -> list[tuple[str, str, float]]:
    """(what, how, milliseconds) from the benchmark that was run: a row of the demo's on a CPU, whole matrices on a GPU."""
    report = stored(work / "kernels.json").get("report", {})
    if "results" in report:
        names = ("affine, brute force", "affine, exhaustive", "affine, coarse to fine")
        return [
            (f"{r['bits']} bits, a row", name.removeprefix("affine, "), r[name]["ms_per_row"]) for r in report["results"] for name in names
        ]
    rows = []
    for matrix in report.get("matrices", []):
        what, ours = f"{report['bits']} bits, {matrix['rows']} x {matrix['columns']}", matrix["kernel_ms"]
        rows.append((what, "brute force", matrix["brute_force_ms"]))
        rows += [(what, how, ours[name]) for name, how in (("affine, exhaustive", "exhaustive"), ("affine", "coarse to fine"))]
    return rows


def kernel_markdown(work: Path) -> str:
    """The table, empty if the benchmark was not run yet."""
    rows, done = kernel_rows(work), stored(work / "kernels.json")
    if not rows:
        return ""
    brute = {what: cost for what, how, cost in rows if how.startswith("brute")}
    lines = ["| what | how | ms | times faster than brute force |", "|---|---|---|---|"]
    lines += [f"| {what} | {how} | {cost:.2f} | {brute[what] / cost:.0f} |" for what, how, cost in rows]
    where = f"On {done['machine']}. " if "machine" in done else ""
    what = "Rows are of SmolLM2-135M." if "results" in done.get("report", {}) else "Weights are random."
    return "\n".join([*lines, "", where + what])


# --- pictures --------------------------------------------------------------------------------------------------


def plot(name: str, table: Table, model: str, p: Protocol, work: Path, out: Path) -> None:
    """Write the table's picture."""
    if not table.jobs:
        figure = plot_kernels(work)
    else:
        draw = plot_layers if name == "loss" else plot_exponents if "exponent" in name else plot_bars
        done = {job: contents for job in table.jobs if (contents := current(job, p, work))}
        figure = draw(table, done, model, p)
    save(figure, out)


def plot_kernels(work: Path):
    """Milliseconds, a bar each."""
    rows = kernel_rows(work)
    figure, axes = new_figure(1, 1, figsize=(7, 1.2 + 0.27 * len(rows)))
    axes[0][0].barh([f"{what}, {how}" for what, how, _ in rows], [cost for *_, cost in rows], color=COLORS[0])
    axes[0][0].set(xscale="log", xlabel="milliseconds")
    axes[0][0].invert_yaxis()
    axes[0][0].tick_params(labelsize=7)
    return figure


def plot_layers(table: Table, done: dict, model: str, p: Protocol):
    """Loss of each layer, summed over its linears, by grid; a panel a width."""
    widths = [bits for bits in BITS if any(job.bits == bits for job in done)]
    methods = list(dict.fromkeys(job.method for job in done))
    figure, axes = new_figure(1, len(widths), figsize=(4.5 * len(widths), 3.6))
    for axis, bits in zip(axes[0], widths, strict=True):
        for job, contents in ((j, c) for j, c in done.items() if j.bits == bits):
            losses = losses_by_layer(contents["report"])
            axis.plot(list(losses), list(losses.values()), ".-", color=COLORS[methods.index(job.method)], label=job.method)
        axis.set(yscale="log", xlabel="decoder layer", title=f"{bits} bits")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("sum of losses")
    add_legend(figure)
    return figure


def reading_of(job: Job) -> str:
    return job.method.rpartition(", ")[2] if "affine" not in job.method else "affine"


def plot_exponents(table: Table, done: dict, model: str, p: Protocol):
    """Perplexity against the exponent, a line a reading, a panel a width."""
    widths = [bits for bits in BITS if any(job.bits == bits for job in done)]
    readings = list(dict.fromkeys(reading_of(job) for job in done))
    figure, axes = new_figure(1, len(widths), figsize=(4.2 * len(widths), 3.4))
    for axis, bits in zip(axes[0], widths, strict=True):
        lines: dict[str, list] = {}
        for job, contents in done.items():
            if job.bits == bits:
                exponent = float(re.search(r"exponent (\d+)", job.method)[1])
                lines.setdefault(reading_of(job), []).append((exponent, contents["report"]["perplexity"][0]["perplexity"]))
        for reading, points in lines.items():
            axis.plot(*zip(*points, strict=True), "o-", color=COLORS[readings.index(reading)], label=reading)
        axis.set(yscale="log", xlabel="exponent", title=f"{bits} bits")
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel(f"perplexity, {Path(p.texts[0]).name}")
    add_legend(figure)
    return figure


def is_number(value: float | None) -> bool:
    """Neither missing nor nan or infinite, as what a model broken by its quantization gives."""
    return value is not None and math.isfinite(value)


def plot_bars(table: Table, done: dict, model: str, p: Protocol):
    """The table's columns side by side, a bar a run with its standard error, published values as crosses."""
    rows = {job: cells(job, contents, table.columns, model, p) for job, contents in done.items()}
    headings = [
        h
        for h in dict.fromkeys(h for row in rows.values() for h in row)
        if any(row.get(h, Cell(None)).value is not None for row in rows.values())
    ]
    figure, axes = new_figure(1, len(headings), figsize=(2.4 + 2.9 * len(headings), 1.2 + 0.27 * len(rows)))
    for axis, heading in zip(axes[0], headings, strict=True):
        for place, (job, row) in enumerate(rows.items()):
            cell = row.get(heading, Cell(None))
            if is_number(cell.value):
                color, error = "#555555" if job.bits == 16 else COLORS[BITS.index(job.bits)], cell.error if is_number(cell.error) else None
                axis.barh(place, cell.value, xerr=error, color=color, error_kw={"elinewidth": 1})
            if cell.published is not None:
                axis.plot(cell.published, place, "kx", label="published")
        values = [row[heading].value for row in rows.values() if heading in row and is_number(row[heading].value)]
        positive = [value for value in values if value > 0]
        far = 5 if "perplexity" in heading else 30
        if not is_share(heading) and positive and min(values) >= 0 and max(values) > far * min(positive):
            axis.set_xscale("log", subs=(2, 5))
            if max(values) < 100 * min(positive):  # of a decade or two there is room for 20 and 50 besides
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter("{x:g}")
        elif positive and heading.startswith("perplexity"):
            axis.set_xlim(0.9 * min(positive))
        axis.set_title(heading, fontsize=8)
        axis.set_yticks([])
        axis.set_ylim(len(rows) - 0.5, -0.5)  # the same rows in all panels, whichever of them have a value
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3, axis="x")
    axes[0][0].set_yticks(range(len(rows)), [f"{job.bits} bits, {shown(job, p)}" for job in rows], fontsize=7)
    add_legend(figure)
    return figure


# --- the command line ------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--table", nargs="+", choices=[*TABLES, "all"], default=["all"], metavar="NAME", help=f"{', '.join(TABLES)}, or all")
    add("--model", required=True, help="hub name or folder, or demo: SmolLM2-135M and the demo's articles, on any machine")
    add(
        "--work",
        type=Path,
        help="folder for the runs' JSON and models (unset: docs/results/reproduction for the demo, else reproduction/MODEL)",
    )
    add("--out", type=Path, help="folder for reproduction.md and its pictures (unset: docs for the demo, else --work)")
    add("--keep", action="store_true", help="keep the quantized models")
    add(
        "--fresh",
        action="store_true",
        help="begin anew the runs that were stopped, by a Ctrl-C or with other code, instead of going on with them",
    )
    add(
        "--lanes",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=1,
        help="runs at a time, each with its share of the CPU's threads (times are of runs beside others)",
    )
    add("--render", action="store_true", help="run nothing: only render what is there, as every call does at its end")
    add("--dry-run", action="store_true", help="only print the commands")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    names = list(TABLES) if "all" in args.table else args.table
    is_folder = args.model != "demo" and Path(args.model).is_dir()
    p = protocol(str(Path(args.model).resolve()) if is_folder else args.model)
    default = (
        ROOT / "docs" / "results" / "reproduction"
        if args.model == "demo"
        else ROOT / "reproduction" / args.model.strip("./").replace("/", "--")
    )
    work = (args.work or default).absolute()
    out = args.out or (ROOT / "docs" if args.model == "demo" else work)
    if args.dry_run:
        for command in commands(names, p, work):
            print(command)
        return 0
    if trouble := refusal(args, is_folder, work, out):
        print(f"error: {trouble}", file=sys.stderr)
        return 2
    failed = []
    try:
        if not args.render:
            failed = run_all(args, names, p, work)
        print(render(args.model, p, work, out))
    except KeyboardInterrupt:
        print("interrupted: what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    if failed:
        print(f"error: {', '.join(failed)} failed: mend what is said above, then run this again (what is done is kept)", file=sys.stderr)
    return 1 if failed else 0


def commands(names: list[str], p: Protocol, work: Path) -> list[str]:
    """What would be run."""
    found = []
    for job, with_tasks in wanted(names, p):
        files = Files.of(job, p, work)
        found += [quantize_command(job, p, files)] + [task_command(job, p, files)] * with_tasks
    found += [kernel_command(work)] * ("kernels" in names)
    return ["python " + shlex.join(command) for command in found]


def refusal(args: argparse.Namespace, is_folder: bool, work: Path, out: Path) -> str | None:
    """What is wrong with the command line."""
    if args.model != "demo" and not is_folder and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", args.model):
        return f"{args.model} is no folder, and no name of the hub: give one of them, or demo"
    for flag, folder in (("--work", work), ("--out", out)):
        if folder.exists() and not folder.is_dir():
            return f"{flag}: {folder} is a file: give a folder"
    if args.render and not any(work.glob("*.json")):
        return f"{work} holds no runs to render: leave out --render, or give their folder with --work"
    return None


def run_all(args: argparse.Namespace, names: list[str], p: Protocol, work: Path) -> list[str]:
    """Make every run of the named tables that is not there. Returns the names of those that failed."""
    work.mkdir(parents=True, exist_ok=True)
    jobs = wanted(names, p)
    if args.lanes > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.lanes))
    if args.model == "demo":
        prepare_demo()

    def attempt(numbered) -> str | None:
        number, (job, with_tasks) = numbered
        print(f"\n{number}/{len(jobs)}: {job.method}, {job.bits} bits", flush=True)
        try:
            run(job, p, work, with_tasks, args.keep, args.fresh)
        except Failed:
            return p.name(job)

    with ThreadPoolExecutor(args.lanes) as lanes:  # one alone stays in this thread, where Ctrl-C ends it
        ended = (lanes.map if args.lanes > 1 else map)(attempt, enumerate(jobs, 1))
        failed = [name for name in ended if name]
    if "kernels" in names:
        try:
            run_kernels(work)
        except Failed:
            failed.append("kernels")
    return failed


def wanted(names: list[str], p: Protocol) -> list[tuple[Job, bool]]:
    """The runs of the named tables, each once, and whether tasks are wanted of it."""
    jobs: dict[str, tuple[Job, bool]] = {}
    for name in names:
        for job in TABLES[name].jobs:
            first, with_tasks = jobs.get(p.name(job), (job, False))
            jobs[p.name(job)] = (first, with_tasks or "tasks" in TABLES[name].columns)
    return list(jobs.values())


def prepare_demo() -> None:
    from demo import FULL, cut_text
    from demo_data import make_model, make_texts

    FULL.folder.mkdir(exist_ok=True)
    make_model(FULL.folder / "SmolLM2-135M-Instruct")
    cut_text(make_texts(FULL.folder)[1], FULL)


def conditions(p: Protocol, runs: list[dict]) -> str:
    """What is true of all tables, of whose `runs` these are the ones that are there."""
    machines = list(dict.fromkeys(run["machine"] for run in runs))
    commits = list(dict.fromkeys(run[kind] for run in runs for kind in ("code", "task_code") if run.get(kind)))
    unknown = sum(not run.get("code") for run in runs)
    unknown_tasks = sum("tasks" in run and not run.get("task_code") for run in runs)
    flags = f" (`{' '.join(p.task_flags)}`)" if p.task_flags else ""
    return (
        f"Calibration: `{' '.join(p.calibration)}`. Perplexity in windows of {p.seqlen} tokens. Tasks: {', '.join(p.tasks)}{flags}. "
        "± is the standard error over windows or items, which are the same for all rows: it says little about their differences. "
        "Bold: the best of its width."
        + "".join(
            f" Groups of {used} stand for {wanted}, which does not divide all of this model's inputs."
            for wanted, used in zip(GROUPS, p.groups, strict=True)
            if wanted != used
        )
        + (f" Times are of {' or '.join(machines)}; others may have run beside it (`--lanes`)." if machines else "")
        + (f" The code is that of {' or '.join(commits)}." if commits else "")
        + (f" Of {unknown} runs it was not recorded." if commits and unknown else "")
        + (f" Of the tasks of {unknown_tasks} runs it was not." if commits and unknown_tasks else "")
        + (f" {p.note}" if p.note else "")
    )


def render(model: str, p: Protocol, work: Path, out: Path) -> Path:
    """Write reproduction.md, a section for each table that has results, and the pictures beside it. Returns its path."""
    (out / "reproduction").mkdir(parents=True, exist_ok=True)
    title = "SmolLM2-135M-Instruct" if model == "demo" else model
    command = f"python scripts/reproduce.py --table all --model {model}"
    jobs = wanted(list(TABLES), p)
    runs = [current(job, p, work) for job, _ in jobs]
    made = sum(bool(done) and ("tasks" in done or not with_tasks) for done, (_, with_tasks) in zip(runs, jobs, strict=True))
    so_far = "" if made == len(jobs) else f" {made} of {len(jobs)} runs are made so far."
    if "kernels" in TABLES and not kernel_rows(work):
        so_far += " The benchmark of the kernels is not made yet."
    said = conditions(p, list(filter(None, runs)))
    sections = [f"# {title}: the paper's tables\n\n`{command}`, rendered {date.today()}.{so_far}\n\n{said}"]
    for name, table in TABLES.items():
        body = as_markdown(table, model, p, work) if table.jobs else kernel_markdown(work)
        if not body:
            continue
        plot(name, table, model, p, work, out / "reproduction" / f"{name}.png")
        body += f"\n\n![{table.title}](reproduction/{name}.png)"
        if name == "loss":
            body += f"\n\n{layers_markdown(table, p, work)}"
        sections.append(f"## {table.title}\n\n{body}" + (f"\n\n{table.note}" if table.note else ""))
    path = out / "reproduction.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
