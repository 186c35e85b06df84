"""Draw what llama.py's reports hold: losses, times, grids and, over several reports, perplexity against size.

    python scripts/plot.py report.json [more.json ...] [--out FOLDER]

FOLDER/loss.png   loss of each linear by layer, of a mixture's experts their sum, a panel a report
FOLDER/time.png   seconds of each phase, a bar a report
FOLDER/grid.png   weights of one row of each linear (first, middle, last layer of the first report that has them, or the rows that
                  llama.py --example_rows chose), its levels, and the weights at outliers of the inverse Hessian's diagonal, where
                  an error costs most; of a mixture's experts the first that has rows
FOLDER/pareto.png perplexity against bits a weight, over reports that have both
Without --out they lie beside the first report, under its name: report-loss.png.
"""

import argparse
import json
import math
import re
import sys
import textwrap
from pathlib import Path

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"]
METHODS = {"leanquant": "LeanQuant", "gptq": "GPTQ", "rtn": "round to nearest", "none": "original"}
RECIPES = {  # flags.py's, which would bring torch
    "best": {"kmeans": "exact", "round_levels": True, "shift": 0.5, "residual": True, "shift_head": True, "refine": 2},
    "published": {"kmeans": "published", "round_levels": False, "shift": 0.0, "residual": False, "shift_head": False, "refine": 0},
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files that llama.py --report wrote, or runs of reproduce.py")
    parser.add_argument("--out", type=Path, help="folder for the pictures (unset: beside the first report, under its name)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        reports = label_all([read_report(path) for path in args.reports])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out and args.out.exists() and not args.out.is_dir():
        print(f"error: --out: {args.out} is a file: give a folder", file=sys.stderr)
        return 2
    drawn = {"loss": plot_losses(reports), "time": plot_times(reports), "grid": plot_grids(reports), "pareto": plot_pareto(reports)}
    if not any(drawn.values()):
        print("error: nothing to draw: give reports of quantizations, or several with perplexities", file=sys.stderr)
        return 2
    first = args.reports[0]
    for name, figure in drawn.items():
        if figure is not None:
            path = args.out / f"{name}.png" if args.out else first.with_name(f"{first.stem}-{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            save(figure, path)
            print(path)
    return 0


def read_report(path: Path) -> dict:
    """A report of llama.py, by itself or in a run that reproduce.py stored."""
    try:
        report = json.loads(path.read_text())
        report = report.get("report", report)
        report["run"]  # results of eval_quantized.py have settings too
        return report | {"label": label(report), "linears": report.get("linears", [])}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check its path") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is not a report of llama.py: make one with --report FILE.json") from None


def label(report: dict) -> str:
    """Method, bits and grid in a few words, from the report's settings."""
    settings = report["settings"]
    method = METHODS.get(settings["method"], settings["method"])
    if settings["method"] == "none":
        return method
    groups = f", groups of {settings['groupsize']}" if settings["groupsize"] != -1 else ""
    grid = {"nonuniform": " non-uniform", "affine": " affine"}.get(settings["grid"], "")
    mixed = ", mixed" if settings.get("bits_for") or settings.get("skip") else ""
    return f"{method}{grid}{groups}{mixed}"


def label_all(reports: list[dict]) -> list[dict]:
    """Labels that tell the reports apart: where methods and widths agree, by the settings that do not."""
    pieces = tuple(RECIPES["best"])
    names = ("exponent", "sensitivity", "recipe", *pieces, "percdamp", "act_order", "true_sequential", "n_layers")
    names += ("calibration", "nsamples", "seqlen", "seed", "base_model")
    for report in reports:
        alike = [with_recipe(other["settings"]) for other in reports if other["label"] == report["label"]]
        settings = with_recipe(report["settings"])
        differing = [name for name in names if len({in_words(its, name) for its in alike}) > 1]
        values = [in_words(settings, name) for name in differing if name not in pieces or not settings["recipe"]]
        report["full_label"] = ", ".join([report["label"], *filter(None, values)])
    return [report | {"label": report["full_label"]} for report in reports]


def with_recipe(settings: dict) -> dict:
    """Settings and the name of the recipe that they are, if they are one. A piece that a report lacks is younger than its recipe."""
    pieces = {name: settings[name] for name in RECIPES["best"] if name in settings}
    named = (name for name, recipe in RECIPES.items() if pieces and pieces.items() <= recipe.items())
    return settings | {"recipe": next(named, None)}


def in_words(settings: dict, name: str) -> str:
    """A setting with its value, of paths the last part. Empty where it is off or, in an older report, missing."""
    value = settings.get(name)
    if value is None or value is False:
        return ""
    return name if value is True else f"{name} {Path(str(value)).name}"


def new_figure(*args, **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots(*args, squeeze=False)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


def style(number: int) -> dict:
    """How a line looks: there are more lines than colors that can be told apart."""
    turn = number // len(COLORS)
    return {"color": COLORS[number % len(COLORS)], "marker": "os^Dv"[turn % 5], "ls": ("-", "--", ":", "-.")[turn % 4]}


LETTER = 0.6 / 72  # inches that a letter takes, rather more than on average, for each point of the font's size


def wrapped(text: str, inches: float, size: float) -> str:
    """In lines that are no wider than that."""
    return textwrap.fill(text, int(inches / (LETTER * size)))


def add_legend(figure, size: float = 9) -> None:
    """Each label of the axes once, beneath them, in as many columns as fit; the figure grows by it, so that the axes do not shrink."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if not handles:
        return
    width, height = figure.get_size_inches()
    labels = [wrapped(label, width - 1, size) for label in handles]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, int((width - 0.2) / (LETTER * size * longest + 0.6)))  # 0.6: the handle and the space between columns
    lines = -(-len(labels) // columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(height + 0.19 * lines)
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns, fontsize=size)


def linears_of_layers(report: dict) -> list[dict]:
    """All but a head, whose loss is of another kind."""
    return [row for row in report["linears"] if row["layer"] is not None]


def losses_by_layer(report: dict) -> dict[int, float]:
    """Number of each layer, from 1 -> the sum of its linears' losses."""
    losses: dict[int, float] = {}
    for row in linears_of_layers(report):
        losses[row["layer"] + 1] = losses.get(row["layer"] + 1, 0.0) + (row["loss"] or 0)
    return losses


def linear_name(row: dict) -> str:
    """One name for a linear of all experts: there may be hundreds."""
    return re.sub(r"\bexperts\.\d+\.", "experts.*.", row["linear"])


def losses_by_linear(report: dict) -> dict[str, dict[int, float]]:
    """Name of each linear -> number of each layer, from 1 -> its loss, of experts the sum; without losses that no logarithm has."""
    losses: dict[str, dict[int, float]] = {}
    for row in linears_of_layers(report):
        if row["loss"] and math.isfinite(row["loss"]):
            layers = losses.setdefault(linear_name(row), {})
            layers[row["layer"] + 1] = layers.get(row["layer"] + 1, 0.0) + row["loss"]
    return losses


def plot_losses(reports: list[dict]):
    """A panel a report, a line a linear."""
    reports = [report for report in reports if report["linears"]]
    if not reports:
        return None
    columns = min(3, len(reports))
    rows = -(-len(reports) // columns)
    figure, axes = new_figure(rows, columns, figsize=(5 * columns + 1, 3.4 * rows))
    losses = [losses_by_linear(report) for report in reports]
    names = list(dict.fromkeys(name for linears in losses for name in linears))
    values = [value for linears in losses for layers in linears.values() for value in layers.values()]
    limits = min(values, default=1) / 1.5, max(values, default=1) * 1.5
    for axis, report, linears in zip(axes.flat, reports, losses, strict=False):
        for name, layers in linears.items():
            axis.plot(list(layers), list(layers.values()), **style(names.index(name)), ms=3, lw=1, label=name)
        axis.set(yscale="log", ylim=limits, xlabel="decoder layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(wrapped(title(report), 4.2, 10), fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss: squared output error a token")
    for axis in axes.flat[len(reports) :]:
        axis.remove()
    add_legend(figure)
    return figure


def title(report: dict) -> str:
    return f"{report['label']}, {report['settings']['bits']} bits"


def plot_times(reports: list[dict]):
    """A stacked bar a report; the smallest phases are taken together."""
    reports = [report for report in reports if report.get("phase_seconds")]
    if not reports:
        return None
    titles = [wrapped(title(report), 3.6, 9) for report in reports]
    lines = max(text.count("\n") + 1 for text in titles)
    figure, axes = new_figure(1, 1, figsize=(9, 1 + (0.3 + 0.15 * lines) * len(titles)))
    axis = axes[0, 0]
    total = max(sum(report["phase_seconds"].values()) for report in reports)
    phases = list(dict.fromkeys(name for report in reports for name in report["phase_seconds"]))
    large = [name for name in phases if max(report["phase_seconds"].get(name, 0) for report in reports) > 0.02 * total]
    lefts = [0.0] * len(reports)
    for number, name in enumerate([*large, "other"]):
        members = [name] if name != "other" else [phase for phase in phases if phase not in large]
        widths = [sum(report["phase_seconds"].get(phase, 0) for phase in members) for report in reports]
        axis.barh(range(len(reports)), widths, left=lefts, color=COLORS[number % len(COLORS)], label=name, alpha=1 if number < 7 else 0.5)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.set_yticks(range(len(reports)), titles, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("seconds to quantize")
    add_legend(figure)
    return figure


def plot_grids(reports: list[dict]):
    """The example rows of the first report that has some."""
    report = next((report for report in reports if any("example" in row for row in report["linears"])), None)
    if report is None:
        return None
    examples: dict[tuple[str, int], dict] = {}
    for row in report["linears"]:
        if "example" in row:
            examples.setdefault((linear_name(row), row["layer"]), row)
    names, layers = (list(dict.fromkeys(values)) for values in zip(*examples, strict=True))
    figure, axes = new_figure(len(names), len(layers), figsize=(4.6 * len(layers), 1.9 * len(names) + 1))
    for (name, layer), row in examples.items():
        axis = axes[names.index(name), layers.index(layer)]
        draw_row(axis, row["example"])
        axis.set_title(wrapped(f"layer {row['layer'] + 1}, {row['linear']}, row {row['example']['row']}", 4.4, 9), fontsize=9)
    figure.suptitle(wrapped(f"{title(report)}: rows of its linears", 4.4 * len(layers), 11), fontsize=11)
    add_legend(figure)
    for column in axes.T:
        [axis for axis in column if axis.has_data()][-1].set_xlabel("weight")
    for empty in (axis for axis in axes.flat if not axis.has_data()):
        empty.remove()
    return figure


def draw_row(axis, example: dict) -> None:
    step = (example["high"] - example["low"]) / len(example["counts"])
    axis.bar(
        [example["low"] + (i + 0.5) * step for i in range(len(example["counts"]))],
        example["counts"],
        step,
        color="#bbbbbb",
        label="weights",
    )
    top = max(example["counts"])
    axis.vlines(example["levels"], -0.14 * top, -0.02 * top, color=COLORS[0], lw=1.2, label="levels")
    axis.plot(
        example["outlier_weights"],
        [0.05 * top] * len(example["outlier_weights"]),
        "v",
        color=COLORS[1],
        ms=4,
        label="outliers of 1 / diag(inv(H))",
    )
    axis.set_yticks([])
    axis.tick_params(labelsize=8)


def plot_pareto(reports: list[dict]):
    """A line a method, over its widths, for the first text of each report."""
    measured = [report for report in reports if report.get("perplexity") and (report.get("bits_per_weight") or is_original(report))]
    if len(measured) < 2:
        return None
    figure, axes = new_figure(1, 1, figsize=(7.5, 4.5))
    axis, text = axes[0, 0], measured[0]["perplexity"][0]["source"]
    curves: dict[str, list] = {}
    for report in measured:
        value = next((row["perplexity"] for row in report["perplexity"] if row["source"] == text), None)
        if value and is_original(report):
            axis.axhline(value, color="#555555", lw=1, ls="--", label=f"{report['label']} ({value:.2f})")
        elif value:
            curves.setdefault(report["label"], []).append((report["bits_per_weight"], value))
    for number, (name, points) in enumerate(curves.items()):
        axis.plot(*zip(*sorted(points), strict=True), **style(number), label=name)
    axis.set(yscale="log", xlabel="bits a weight, with levels or scales", ylabel=f"perplexity on {Path(text).name}")
    axis.grid(alpha=0.3, which="both")
    for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatter("{x:g}")
    add_legend(figure)
    return figure


def is_original(report: dict) -> bool:
    return report["settings"]["method"] == "none"


if __name__ == "__main__":
    sys.exit(main())
