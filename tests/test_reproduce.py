"""scripts/reproduce.py and mt_bench.py on tiny models: commands, resuming, tables, pictures, answers."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import eval_quantized
import flags
import llama
import mt_bench
import paper
import reproduce
from test_cli import GRIDS, quantize
from test_evaluation import own_tasks_are_parsed_once, task_folder  # noqa: F401
from test_plot import assert_texts_fit

COSTS = {"brute force": 60.0, "exhaustive": 2.0, "coarse to fine": 0.5}
MODELS = ("demo", "meta-llama/Meta-Llama-3-8B")


# --- the tables as data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("table", [*paper.TABLES])
def test_every_command_is_one_that_the_tools_take(capsys, model, table):
    assert reproduce.main(["--table", table, "--model", model, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) > 0
    written = [argument for line in lines for argument in shlex.split(line) if argument.endswith(".partial")]
    assert len(written) == len(set(written)) == len(lines)  # whoever gives them by hand keeps what each writes
    for line in lines:
        _, script, *arguments = shlex.split(line)
        if script == "llama.py":
            args = flags.parse(arguments)
            if args.wbits != 16:
                config = flags.quant_config(args, None)
                assert model != "demo" or config.groupsize == -1 or 576 % config.groupsize == 1536 % config.groupsize == 0
        elif script == "eval_quantized.py":
            assert eval_quantized.parse(arguments).tasks
        else:
            assert table == "kernels" and (reproduce.ROOT / script).is_file()


def test_tables_share_runs_and_a_runs_name_is_its_flags():
    p, jobs = paper.protocol("any"), [job for table in paper.TABLES.values() for job in table.jobs]
    assert len({p.name(job) for job in jobs}) == len({(job.bits, job.flags) for job in jobs}) < len(jobs)
    for bits in paper.BITS:
        by_flags = {job.flags for job in jobs if job.bits == bits}
        configs = {}
        for given in by_flags:
            config = flags.quant_config(flags.parse(["m", "t", "--wbits", str(bits), *given]), None)
            # The local grid's start, spelled out: two runs must not compute the same.
            if config.kmeans == "published":
                config = dataclasses.replace(config, kmeans="plusplus" if bits == 4 else "uniform")
            if config.exponent == 0:
                config = dataclasses.replace(config, sensitivity="cholesky")
            assert configs.setdefault(config, given) == given
    assert {method for tables in paper.PUBLISHED.values() for rows in tables.values() for method in rows} >= {"GPTQ", "original"}


# --- runs and rendering ----------------------------------------------------------------------------------------


@pytest.fixture
def project(tiny_model, text_file, test_text, tmp_path, task_folder, monkeypatch):  # noqa: F811
    """A protocol for the tiny model and two small tables; llama.py and eval_quantized.py run in this process. Returns their calls."""
    p = paper.Protocol(
        model=str(tiny_model()),
        calibration=(str(text_file), "--nsamples", "4", "--seqlen", "32", "--percdamp", "0.1"),
        texts=(str(test_text),),
        seqlen=32,
        tasks=("mine_a",),
        task_flags=("--include_path", str(task_folder)),
        groups=(32, 16),
    )
    jobs = [job for job in paper.MAIN if job.bits in (3, 16)]
    tables = {
        "matrix": paper.Table("All", jobs, ("perplexity", "tasks", "size")),
        "cost": paper.Table("Cost", jobs[1:], ("time", "memory", "loss"), "A note."),
        "loss": paper.Table("Losses", [job for job in paper.LOSS_AWARE if job.bits == 3], ("loss",)),
        "exponent": paper.Table("Exponent", [job for job in paper.SWEEP if job.bits == 3][3:6], ("perplexity",)),
    }
    calls = []

    def run(command):
        calls.append(command)
        return {"llama.py": llama, "eval_quantized.py": eval_quantized}[command[0]].main(command[1:])

    monkeypatch.setattr(reproduce, "protocol", lambda _: p)
    monkeypatch.setattr(reproduce, "TABLES", tables)
    monkeypatch.setattr(reproduce, "run_program", run)
    return calls


def reproduce_in(folder: Path, *options) -> str:
    assert reproduce.main(["--model", "tiny", "--work", str(folder / "work"), "--out", str(folder / "out"), *options]) == 0
    return (folder / "out" / "reproduction.md").read_text()


def test_tables_are_made_and_what_is_done_is_not_done_again(project, tmp_path):
    text = reproduce_in(tmp_path, "--table", "matrix")
    assert f"8 of {len(reproduce.wanted(list(reproduce.TABLES), reproduce.protocol('tiny')))} runs are made so far." in text
    assert [call[0] for call in project] == ["llama.py", "eval_quantized.py"] * 8
    assert "LeanQuant affine, groups of 16" in text and "groups of 64" not in text
    rows = [line.split(" | ") for line in text.split("\n## ")[1].splitlines() if line.startswith("| 3 |") or line.startswith("| 16 |")]
    assert len(rows) == 8
    store = json.loads((tmp_path / "work" / "3bit-grid-minmax.json").read_text())
    (gptq,) = [row for row in rows if row[1] == "GPTQ"]
    assert gptq[2].strip("*").startswith(f"{store['report']['perplexity'][0]['perplexity']:.2f} ± ")
    assert gptq[3].strip("*").startswith(f"{store['tasks'][0]['value']:.4f} ± ")
    assert sum("**" in row[2] for row in rows) == 1, "one best perplexity at 3 bits"
    assert (tmp_path / "out" / "reproduction" / "matrix.png").stat().st_size > 5000
    assert not list((tmp_path / "work").glob("*.safetensors")), "models are removed"

    again = reproduce_in(tmp_path, "--table", "matrix", "cost", "loss", "exponent")
    new = project[16:]
    assert len(new) == 3 and all(call[0] == "llama.py" for call in new), "exponents 3 and 6, and the grid without sensitivity"
    assert again.startswith("# tiny") and all(f"reproduction/{name}.png" in again for name in ("matrix", "cost", "loss", "exponent"))
    assert reproduce_in(tmp_path, "--render").count("## ") == 4 and len(project) == 19
    assert "A note." in again


def test_runs_in_lanes_are_the_same(project, tmp_path, monkeypatch):
    """Two at a time; llama.py runs in this process, so one after the other behind a lock."""
    alone = reproduce_in(tmp_path, "--table", "loss")
    calls, lock, real = list(project), threading.Lock(), reproduce.run_program

    def run(command):
        assert os.environ["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))
        with lock:
            return real(command)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(reproduce, "run_program", run)
    shutil.rmtree(tmp_path / "work")
    again = reproduce_in(tmp_path, "--table", "loss", "--lanes", "2")
    assert again.split("## Losses")[1] == alone.split("## Losses")[1]  # of costs there may be other ones
    assert "Times are of a CPU with" in alone and sorted(project[len(calls) :]) == sorted(calls)


def test_a_run_is_made_again_for_what_it_lacks_or_if_its_command_changed(project, tmp_path):
    reproduce_in(tmp_path, "--table", "cost", "--keep")
    assert [call[0] for call in project] == ["llama.py"] * 7
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 7
    file = tmp_path / "work" / "3bit-grid-minmax.json"
    store = json.loads(file.read_text())
    file.write_text(json.dumps(store | {"command": [*store["command"], "--seed", "1"]}))
    reproduce_in(tmp_path, "--table", "cost", "--keep")
    assert len(project) == 8
    reproduce_in(tmp_path, "--table", "matrix")
    assert [call[0] for call in project[8:]] == ["llama.py", *["eval_quantized.py"] * 8], "the kept models serve"
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 7, "and are kept: this call has not made them"


def test_what_other_commands_made_is_not_shown(project, tmp_path):
    text = reproduce_in(tmp_path, "--table", "matrix")
    shutil.copytree(tmp_path / "work", tmp_path / "elsewhere" / "work")
    assert reproduce_in(tmp_path / "elsewhere", "--render") == text, "a folder of runs may be moved"
    file = tmp_path / "work" / "3bit-grid-minmax.json"
    store = json.loads(file.read_text())
    file.write_text(json.dumps(store | {"task_command": [*store["task_command"], "--limit", "1"]}))
    half = reproduce_in(tmp_path, "--render")
    gptq = lambda text: next(line for line in text.splitlines() if line.startswith("| 3 | GPTQ |")).split(" | ")  # noqa: E731
    assert (gptq(half)[2], gptq(half)[3]) == (gptq(text)[2], "") != (gptq(text)[2], gptq(text)[3]) and "7 of " in half
    file.write_text(json.dumps(store | {"command": [*store["command"], "--seed", "9"]}))
    assert gptq(reproduce_in(tmp_path, "--render"))[2] == "" and len(project) == 16


def test_the_page_says_whose_code_made_the_runs(project, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "code", lambda: "abc1234")
    text = reproduce_in(tmp_path, "--table", "cost")
    assert "The code is that of abc1234." in text and "not recorded" not in text
    file = tmp_path / "work" / "3bit-grid-minmax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": None}))
    assert "The code is that of abc1234. Of 1 runs it was not recorded." in reproduce_in(tmp_path, "--render")


def test_a_failed_command_loses_nothing(project, tmp_path, monkeypatch, capsys):
    reproduce_in(tmp_path, "--table", "cost")
    monkeypatch.setattr(reproduce, "run_program", lambda _: 2)
    before = sorted(path.read_bytes() for path in (tmp_path / "work").glob("*.json"))
    options = ["--model", "tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert reproduce.main([*options, "--table", "exponent"]) == 1
    names = ", ".join(f"3bit-grid-nonuniform-exponent-{exponent}" for exponent in (3, 6))
    assert f"error: {names} failed" in (error := capsys.readouterr().err) and "what is done is kept" in error
    assert "## Cost" in (tmp_path / "out" / "reproduction.md").read_text()
    assert sorted(path.read_bytes() for path in (tmp_path / "work").glob("*.json")) == before


def test_published_values_stand_beside_ours(project, tmp_path, test_text, monkeypatch):
    known = {("tiny", test_text.name): {3: {"GPTQ": 12.34, "OmniQuant": 5.6}}}
    for module in (paper, reproduce):
        monkeypatch.setattr(module, "PUBLISHED", known)
    monkeypatch.setitem(reproduce.TABLES, "matrix", reproduce.TABLES["matrix"]._replace(title="Perplexity"))
    text = reproduce_in(tmp_path, "--table", "matrix")
    assert text.count("(published 12.34)") == 1 and "| OmniQuant | (published 5.60) |" in text


def test_a_table_of_which_nothing_is_measured_is_left_out(project, tmp_path):
    """It shares its runs with one that is."""
    reproduce.TABLES["zero-shot"] = paper.Table("Zero-shot", reproduce.TABLES["matrix"].jobs, ("tasks",))
    text = reproduce_in(tmp_path, "--table", "cost")
    assert "## Cost" in text and "Zero-shot" not in text
    assert "## Zero-shot" in reproduce_in(tmp_path, "--table", "zero-shot")


def test_losses_of_each_layer_are_written_out(project, tmp_path):
    text = reproduce_in(tmp_path, "--table", "loss").split("## Losses")[1]
    assert "| decoder layer | 3 bits, min-max grid | 3 bits, k-means, all weights alike | 3 bits, loss-aware grid |" in text
    report = json.loads((tmp_path / "work" / "3bit-grid-minmax.json").read_text())["report"]
    second = sum(row["loss"] for row in report["linears"] if row["layer"] == 1)
    assert f"| 2 | {second:.2f} | " in text


def test_all_panels_of_a_picture_have_the_same_rows(project, tmp_path):
    reproduce_in(tmp_path, "--table", "cost")
    p, table = reproduce.protocol("tiny"), reproduce.TABLES["matrix"]
    done = {job: reproduce.stored(tmp_path / "work" / f"{p.name(job)}.json") for job in table.jobs}
    figure = reproduce.plot_bars(table, done, "tiny", p)
    assert {axis.get_ylim() for axis in figure.axes} == {(len(table.jobs) - 0.5, -0.5)} and len(figure.axes) > 1


@pytest.mark.parametrize(("table", "draw"), [("loss", reproduce.plot_layers), ("exponent", reproduce.plot_exponents)])
def test_a_curve_has_one_color_in_all_panels_and_the_legend_fits(table, draw):
    """Whichever runs are there: of some widths the first ones may be missing."""
    report = {"linears": [{"layer": layer, "loss": 1.0 + layer} for layer in range(3)], "perplexity": [{"perplexity": 20.0}]}
    jobs, p = paper.TABLES[table].jobs, paper.protocol("tiny")
    for some in ([job for job in jobs if job.bits == 4], [job for job in jobs if job.bits == 4 or job is jobs[-1]]):
        assert_texts_fit(figure := draw(paper.TABLES[table], {job: {"report": report} for job in some}, "tiny", p))
        lines = {(line.get_label(), line.get_color()) for axis in figure.axes for line in axis.lines}
        assert len(lines) == len(figure.legends[0].texts) == len(dict(lines))


BARS = {
    "all zero": ([0.0, 0.0, 0.0], "linear"),
    "one that is not a number": ([math.nan], "linear"),
    "an infinite one": ([math.inf, 20.0, 21.0], "linear"),
    "far apart, and zero": ([0.0, 1.0, 100.0], "log"),
    "far apart, and negative": ([-0.1, 1.0, 100.0], "linear"),
}


@pytest.mark.parametrize("heading", ["perplexity", "value"])
@pytest.mark.parametrize(("values", "scale"), BARS.values(), ids=BARS)
def test_bars_are_drawn_of_whatever_was_measured(tmp_path, monkeypatch, heading, values, scale):
    rows = {job: {heading: reproduce.Cell(value, abs(value))} for job, value in zip(paper.MAIN, values, strict=False)}
    monkeypatch.setattr(reproduce, "cells", lambda job, *_: rows[job])
    figure = reproduce.plot_bars(paper.TABLES["matrix"], rows, "tiny", paper.protocol("tiny"))
    reproduce.save(figure, tmp_path / "bars.png")
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [value for value in values if math.isfinite(value)]
    assert axis.get_xscale() == scale and all(map(math.isfinite, axis.get_xlim()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "../nope"], "../nope is no folder, and no name of the hub"),
        (["--model", "tiny", "--work", __file__], "is a file: give a folder"),
        (["--model", "tiny", "--out", __file__], "is a file: give a folder"),
        (["--model", "tiny", "--work", "nothing", "--render"], "holds no runs to render"),
    ],
)
def test_what_reproduce_cannot_use_is_refused(project, capsys, options, says):
    assert reproduce.main(options) == 2
    assert says in capsys.readouterr().err and not project


def test_a_damaged_store_is_made_again_and_an_interruption_keeps_the_rest(project, tmp_path, monkeypatch, capsys):
    reproduce_in(tmp_path, "--table", "exponent")
    count, run = len(project), reproduce.run_program
    (tmp_path / "work" / "3bit-grid-nonuniform-exponent-3.json").write_text('{"command": [')

    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_program", interrupted)
    assert reproduce.main(["--model", "tiny", "--work", str(tmp_path / "work"), "--table", "exponent"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(reproduce, "run_program", run)
    reproduce_in(tmp_path, "--table", "exponent")
    assert len(project) == count + 1


def test_runs_that_other_code_left_are_begun_anew_if_told_so(project, tmp_path, monkeypatch, capsys):
    quantize_layer, layers = llama.quantize_layer, []

    def stopped(*args):
        layers.append(1)
        if len(layers) > 1:
            raise KeyboardInterrupt
        return quantize_layer(*args)

    monkeypatch.setattr(llama, "quantize_layer", stopped)
    command = ["--model", "tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--table", "loss"]
    assert reproduce.main(command) == 1
    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)
    real = llama.digest
    monkeypatch.setattr(llama, "digest", lambda *parts: real(*parts, *[b"#"] * (len(parts) > 1)))
    assert reproduce.main(command) == 1 and "--fresh" in capsys.readouterr().err
    reproduce_in(tmp_path, "--table", "loss", "--fresh")
    reproduce_in(tmp_path, "--table", "loss")  # all current, though the commands stored do not say --fresh


@pytest.mark.parametrize(
    "report",
    [
        {"results": [{"bits": 4, **{f"affine, {how}": {"ms_per_row": ms} for how, ms in COSTS.items()}}]},
        {
            "bits": 4,
            "matrices": [
                {"rows": 8, "columns": 9, "brute_force_ms": 60.0, "kernel_ms": {"affine, exhaustive": 2.0, "affine": 0.5, "k-means": 1.0}}
            ],
        },
    ],
    ids=["CPU", "GPU"],
)
def test_kernel_table_of_either_benchmark(project, tmp_path, report):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "kernels.json").write_text(json.dumps({"report": report}))
    reproduce.TABLES["kernels"] = paper.TABLES["kernels"]
    text = reproduce_in(tmp_path, "--render")
    assert "| brute force | 60.00 | 1 |" in text and "| coarse to fine | 0.50 | 120 |" in text
    assert (tmp_path / "out" / "reproduction" / "kernels.png").is_file() and "15.1 h" in text


# --- MT-Bench --------------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["the old ", "a river "]},
    {"question_id": 111, "category": "math", "turns": ["one ", "two "], "reference": ["1", "2"]},
]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


@pytest.fixture
def chat_model(tiny_model, text_file, tmp_path) -> Path:
    quantize(tiny_model(), text_file, "--wbits", 4, *GRIDS["nonuniform"], "--save_path", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def answers(folder: Path, model: Path, *options) -> list[dict]:
    file = folder / "a.jsonl"
    arguments = ["--path", model, "--model-id", "tiny-4bit", "--answers", file, "--max-new-tokens", 5, *options]
    assert mt_bench.main([*map(str, arguments)]) == 0
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def test_answers_are_in_fastchats_format_and_are_taken_up_again(chat_model, tmp_path, monkeypatch):
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "question.jsonl"))
    whole = answers(tmp_path, chat_model)
    assert [row["question_id"] for row in whole] == [81, 111]
    for row in whole:
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and row["model_id"] == "tiny-4bit"
        assert [choice["index"] for choice in row["choices"]] == [0] and len(row["choices"][0]["turns"]) == 2
    file = tmp_path / "a.jsonl"
    first, second = file.read_text().splitlines()
    first = first.replace('"turns": ["', '"turns": ["\u2028 \u0085 ')  # ends of lines to Python, not to JSON
    file.write_bytes(f"{first}\n{second[: len(second) // 2]}".encode() + "ö".encode()[:1])  # killed within a character
    again = answers(tmp_path, chat_model, "--questions", tmp_path / "question.jsonl")
    assert again[0] == json.loads(first) and again[1]["choices"] == whole[1]["choices"]


def test_mt_bench_refuses_what_it_cannot_use(chat_model, tiny_model, tmp_path, monkeypatch, capsys):
    def refused(*options) -> str:
        assert mt_bench.main([*map(str, ["--path", chat_model, "--model-id", "m", "--answers", tmp_path / "a.jsonl", *options])]) == 2
        return capsys.readouterr().err

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    assert "--questions" in refused()
    (tmp_path / "q.jsonl").write_text('{"question_id": 1}\n')
    assert "question.jsonl" in refused("--questions", tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text("\n")
    assert "it is empty" in refused("--questions", tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0] | {"turns": "Say hi."}))
    assert "no list of texts" in refused("--questions", tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0] | {"question_id": "81"}))
    assert "no whole number" in refused("--questions", tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0]))
    assert "--max-new-tokens is 0" in refused("--questions", tmp_path / "q.jsonl", "--max-new-tokens", 0)
    assert "--base" in refused("--questions", tmp_path / "q.jsonl", "--path", tmp_path / "q.safetensors")
    assert "--answers" in refused("--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "none" / "a.jsonl")
    assert "chat template" in refused("--questions", tmp_path / "q.jsonl", "--base", tiny_model())
    (tmp_path / "a.jsonl").write_text('{"text": "something else"}\n')
    assert "--answers" in refused("--questions", tmp_path / "q.jsonl")
    assert (tmp_path / "a.jsonl").read_text() == '{"text": "something else"}\n'
    (tmp_path / "a.jsonl").write_text('{"question_id": 81, "model_id": "another"}\n')
    assert "answers of another" in refused("--questions", tmp_path / "q.jsonl")
