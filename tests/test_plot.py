"""scripts/plot.py on reports that llama.py wrote: which pictures there are, and what is in them."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors import safe_open

import flags
import hessian
import llama
import plot
from test_cli import GRIDS, SEQUENTIAL, quantize


@pytest.fixture(scope="module")
def reports(tiny_model, text_file, tmp_path_factory):
    """Reports of two methods at two widths each, and of the original."""
    folder, text = tmp_path_factory.mktemp("reports"), text_file
    for bits in (2, 3):
        for name, grid in {"n": GRIDS["nonuniform"], "a": [*GRIDS["affine"], "--groupsize", 16]}.items():
            options = ["--wbits", bits, *grid, *SEQUENTIAL, "--report", folder / f"{name}{bits}.json"]
            quantize(tiny_model(), text, *options, "--save_path", folder / f"{name}{bits}.safetensors", evaluate=text)
    quantize(tiny_model(), text, "--wbits", 16, "--report", folder / "original.json", evaluate=text)
    return folder


def test_all_pictures_are_drawn(reports, tmp_path, capsys):
    assert plot.main([*map(str, sorted(reports.glob("*.json"))), "--out", str(tmp_path / "new")]) == 0
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == ["grid.png", "loss.png", "pareto.png", "time.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"{name}.png") for name in ("loss", "time", "grid", "pareto")]
    for name in found:
        pixels = matplotlib.image.imread(tmp_path / "new" / name)
        assert pixels.std() > 0.02, f"{name} is blank"


def test_one_report_gives_what_it_has(reports, tmp_path, capsys):
    assert plot.main([str(reports / "original.json"), "--out", str(tmp_path)]) == 2
    assert "nothing to draw" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert plot.main([str(reports / "n3.json"), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "loss.png", "time.png"]
    (tmp_path / "run.json").write_text(json.dumps({"report": json.loads((reports / "n3.json").read_text())}))  # as reproduce.py stores it
    assert plot.main([str(tmp_path / "run.json")]) == 0
    assert (tmp_path / "run-loss.png").read_bytes() == (tmp_path / "loss.png").read_bytes()


def test_settings_that_differ_tell_curves_apart(reports):
    read = [plot.read_report(reports / name) for name in ("n2.json", "n3.json", "n3.json", "a3.json")]
    read[2]["settings"] = read[2]["settings"] | {"exponent": 1.0, "seed": 5}
    labels = [report["label"] for report in plot.label_all(read)]
    assert labels[:2] == ["LeanQuant non-uniform, exponent 4.0, seed 0"] * 2
    assert labels[2:] == ["LeanQuant non-uniform, exponent 1.0, seed 5", "LeanQuant affine, groups of 16"]


def test_models_and_texts_tell_curves_apart(reports):
    read = [plot.read_report(reports / name) for name in ("n2.json", "n3.json")]
    read[1]["settings"] = read[1]["settings"] | {"base_model": "/models/another", "calibration": "texts/other.txt", "n_layers": 1}
    labels = [report["label"] for report in plot.label_all(read)]
    assert labels[1] == "LeanQuant non-uniform, n_layers 1, calibration other.txt, base_model another" and labels[0] != labels[1]


def labels_of(report: dict, *changes: dict) -> list[str]:
    """Labels of reports that differ from `report` in some settings; those that are None are missing."""
    settings = [{k: v for k, v in (report["settings"] | change).items() if v is not None} for change in changes]
    return [its["label"] for its in plot.label_all([report | {"settings": its} for its in settings])]


def test_recipes_are_called_by_their_names(reports):
    assert plot.RECIPES == {"best": flags.BEST, "published": flags.PUBLISHED}
    report, name = plot.read_report(reports / "n3.json"), "LeanQuant non-uniform"
    assert report["settings"].items() >= flags.BEST.items()
    assert labels_of(report, {}, flags.PUBLISHED) == [f"{name}, recipe best", f"{name}, recipe published"]
    assert labels_of(report, {}, {"shift_head": None}) == [name] * 2, "a report older than that piece"
    named, other = labels_of(report, flags.PUBLISHED, {"refine": 5, "seed": 1})
    assert named == f"{name}, recipe published, seed 0"
    assert other == f"{name}, kmeans exact, round_levels, shift 0.5, residual, shift_head, refine 5, seed 1"
    assert labels_of(report, {}, {"refine": 5}) == [f"{name}, recipe best", f"{name}, refine 5"]


def test_a_missing_setting_is_one_that_is_off(reports):
    report = plot.read_report(reports / "n3.json") | {"label": "GPTQ"}
    for pieces in (flags.PUBLISHED, flags.PUBLISHED | {"shift": 0.5}):  # the latter are no recipe
        older, newer = pieces | {"shift_head": None, "act_order": None}, pieces | {"act_order": False}
        assert labels_of(report, older, newer) == ["GPTQ", "GPTQ"]
        assert labels_of(report, older, newer | {"act_order": True}) == ["GPTQ", "GPTQ, act_order"]


def test_curves_hold_the_reports_numbers(reports):
    read = [plot.read_report(reports / name) for name in ("n2.json", "n3.json", "a2.json", "a3.json", "original.json")]
    (axis,) = plot.plot_pareto(read).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    expected = [[report["bits_per_weight"], report["perplexity"][0]["perplexity"]] for report in read[:4]]
    assert lines["LeanQuant non-uniform"] == expected[:2]
    assert lines["LeanQuant affine, groups of 16"] == expected[2:4]
    first = plot.plot_losses(read).axes[0].lines[0]
    rows = [row for row in read[0]["linears"] if row["linear"] == first.get_label()]
    assert first.get_xydata().tolist() == [[row["layer"] + 1, row["loss"]] for row in rows]
    bars = plot.plot_times(read).axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(sum(sum(r.get("phase_seconds", {}).values()) for r in read))


def assert_texts_fit(figure) -> None:
    """Titles, labels and the legend lie within the figure, and none covers another."""
    figure.draw_without_rendering()
    texts = [*figure.legends, *figure.texts]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        texts += axis.get_yticklabels() if axis.get_yscale() == "linear" else []  # a logarithmic axis has some outside, not drawn
    boxes = [text.get_window_extent() for text in texts if text in figure.legends or text.get_text()]
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


LONG = "LeanQuant non-uniform, recipe published, groups of 128, mixed, percdamp 0.01, calibration another-text.jsonl, seed {}"


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("draw", [plot.plot_losses, plot.plot_times, plot.plot_grids, plot.plot_pareto])
def test_long_labels_stay_within_the_picture(reports, draw, count):
    read = [plot.read_report(reports / f"n{2 + number % 2}.json") | {"label": LONG.format(number)} for number in range(count)]
    if draw == plot.plot_pareto and count == 1:
        assert draw(read) is None
        return
    assert_texts_fit(figure := draw(read))
    first = figure.axes[0].get_window_extent()
    assert len(figure.axes) > 1 or first.width > figure.bbox.width / 2 and first.height > 50, "texts leave the axes little room"


def test_no_two_lines_look_alike(reports):
    """Of a mixture with attention of low rank there are more lines than colors."""
    read = [plot.read_report(reports / "n3.json") | {"label": str(number)} for number in range(20)]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in plot.plot_pareto(read).axes[0].lines}
    many = read[0] | {"linears": [row | {"linear": f"{row['linear']}{n}"} for row in read[0]["linears"] for n in range(2)]}
    lines = plot.plot_losses([many]).axes[0].lines
    assert len(looks) == 20 and len(lines) == len({(line.get_color(), line.get_marker()) for line in lines}) == 14


def test_experts_are_one_line_and_one_of_them_is_shown(reports):
    """Else a mixture of 128 has 388 lines in its legend, and as many rows of grids."""
    report, experts = plot.read_report(reports / "n3.json"), 128
    linears = [
        row | {"linear": row["linear"].replace("mlp.", f"mlp.experts.{number}.")}
        for row in report["linears"]
        for number in range(experts if row["linear"].startswith("mlp.") else 1)
    ]
    mixture = report | {"linears": linears}
    assert_texts_fit(figure := plot.plot_losses([mixture]))
    before, after = ({line.get_label(): line.get_ydata() for line in f.axes[0].lines} for f in (plot.plot_losses([report]), figure))
    assert list(after) == [name.replace("mlp.", "mlp.experts.*.") for name in before]
    for name, losses in before.items():
        assert after[name.replace("mlp.", "mlp.experts.*.")] == pytest.approx(np.array(losses) * (experts if "mlp" in name else 1))
    assert_texts_fit(grids := plot.plot_grids([mixture]))
    titles = [axis.get_title() for axis in grids.axes]
    assert [axis.get_xlabel() for axis in grids.axes] == [""] * 12 + ["weight"] * 2
    assert len(titles) == 14 and all("experts.0." in title for title in titles if "experts" in title)


def test_losses_that_are_no_numbers_are_left_out(reports):
    report = plot.read_report(reports / "n3.json")
    damaged = [row | {"loss": value} for row, value in zip(report["linears"], (math.nan, math.inf, None, 0.0), strict=False)]
    (axis,) = plot.plot_losses([report | {"linears": damaged + report["linears"][4:]}]).axes
    assert sum(len(line.get_ydata()) for line in axis.lines) == len(report["linears"]) - 4 and math.isfinite(axis.get_ylim()[1])


@pytest.mark.parametrize("name", ["n", "a"])
def test_example_rows_are_those_of_the_file(reports, tiny_model, name):
    report = json.loads((reports / f"{name}3.json").read_text())
    examples = [row for row in report["linears"] if "example" in row]
    assert {row["layer"] for row in examples} == {0, 1} and len(examples) == 14
    with safe_open(reports / f"{name}3.safetensors", "pt") as file, safe_open(tiny_model() / "model.safetensors", "pt") as base:
        for row in examples:
            example, linear = row["example"], f"model.layers.{row['layer']}.{row['linear']}"
            w = base.get_tensor(f"{linear}.weight")[example["row"]]
            if name == "n":
                levels = file.get_tensor(f"{linear}.quant_grid")[example["row"]]
            else:
                w = w[:16]
                scale, zero = (file.get_tensor(f"{linear}.{part}")[example["row"], 0].float() for part in ("scale", "zero"))
                levels = scale * (torch.arange(8) - zero)
            torch.testing.assert_close(torch.tensor(example["levels"]), levels.float())
            assert (example["low"], example["high"]) == pytest.approx((w.min().item(), w.max().item()))
            assert sum(example["counts"]) == len(w)
            assert all(min(abs(w - outlier)) < 1e-6 for outlier in example["outlier_weights"])


def test_chosen_rows_are_drawn(tiny_model, text_file, tmp_path):
    chosen = {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.mlp.down_proj": 0}
    options = ["--wbits", 2, *GRIDS["nonuniform"], "--report", tmp_path / "r.json", "--save_path", tmp_path / "q.safetensors"]
    quantize(tiny_model(), text_file, *options, "--example_rows", *(f"{name}={row}" for name, row in chosen.items()))
    rows = json.loads((tmp_path / "r.json").read_text())["linears"]
    assert {f"model.layers.{r['layer']}.{r['linear']}": r["example"]["row"] for r in rows if "example" in r} == chosen
    axes = plot.plot_grids([plot.read_report(tmp_path / "r.json")]).axes
    assert [axis.get_title() for axis in axes] == ["layer 1, self_attn.q_proj, row 3", "layer 2, mlp.down_proj, row 0"]
    assert [axis.get_xlabel() for axis in axes] == ["weight", "weight"], "each is the lowest of its column"


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ([f"{Q}=100000"], f"{Q}=100000: it has"),
        ([f"{Q}=1", f"{Q}=2"], f"{Q}=2: give LINEAR=ROW, one row a linear"),
        ([Q], f"{Q}: give LINEAR=ROW"),
        ([f"{Q}=-1"], f"{Q}=-1: give LINEAR=ROW"),
        ([f"{Q[:-5]}=1"], f"{Q[:-5]} matches no linear to be quantized by its whole name: they are called"),
        ([f"{Q}=1", "--skip", ".*q_proj"], f"{Q} matches no linear to be quantized"),
        ([f"{DOWN}=1", "--n_layers", "1"], f"{DOWN} matches no linear to be quantized"),
        ([f"{DOWN}=1", "--n_layers", "1", "--plan"], f"{DOWN} matches no linear to be quantized"),
        ([f"{Q}=1", "--wbits", "16"], "is for the report of a quantization"),
    ],
    ids=str,
)
def test_rows_that_are_not_there_are_refused(tiny_model, text_file, tmp_path, capsys, options, what):
    base = [str(tiny_model()), str(text_file), "--wbits", "2", "--seqlen", "32", "--eval", str(text_file)]
    base += ["--report", str(tmp_path / "r.json")]
    capsys.readouterr()  # making the model draws a bar, the first time
    assert llama.main([*base, "--example_rows", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: --example_rows {what}")
    assert not list(tmp_path.iterdir())


def test_rows_are_for_a_report(tiny_model, text_file, capsys):
    assert llama.main([str(tiny_model()), str(text_file), "--wbits", "2", "--eval", str(text_file), "--example_rows", f"{Q}=1"]) == 2
    assert "give --report FILE.json" in capsys.readouterr().err


def test_a_row_that_could_not_be_shown_is_named(tiny_model, text_file, tmp_path, monkeypatch):
    def fail(*_):
        raise hessian.NotPositiveDefinite

    monkeypatch.setattr(hessian, "factorize", fail)
    options = ["--wbits", 2, *GRIDS["nonuniform"], "--report", tmp_path / "r.json", "--save_path", tmp_path / "q.safetensors"]
    with pytest.warns(UserWarning, match=f"the report does not show {Q}=1: finished before, or rounded to nearest"):
        quantize(tiny_model(), text_file, *options, "--example_rows", f"{Q}=1")


def test_a_file_is_no_folder_for_pictures(reports, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert plot.main([str(reports / "n2.json"), "--out", str(tmp_path / "out")]) == 2
    assert "is a file: give a folder" in capsys.readouterr().err


def test_what_is_no_report_is_refused(tmp_path, capsys):
    for text in ("[1]", '{"settings": {"method": "none"}, "rows": []}'):
        (tmp_path / "other.json").write_text(text)
        assert plot.main([str(tmp_path / "other.json")]) == 2
        assert "is not a report" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "missing.json")]) == 2
    assert "missing.json cannot be read (No such file or directory): check its path" in capsys.readouterr().err
