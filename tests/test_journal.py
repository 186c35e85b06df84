"""Killed runs that go on: the same bytes as an uninterrupted one, whatever the moment; and what is refused to go on.

Kills are real: SIGKILL to a process that runs llama.py on a tiny model of many layers, at seeded random moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import llama
from activations import InMemory
from conftest import make_text
from journal import Journal, differences
from leanquant.errors import InputError
from leanquant.packing import Checkpoint, ModelWriter, part_name
from ranks import Ranks
from test_cli import GRIDS, SEQUENTIAL, environment

LAYERS, KILLS = 6, 25
SETTINGS = ["--nsamples", 4, "--seqlen", 32, "--percdamp", 0.1, "--wbits", 3, *GRIDS["nonuniform"], *SEQUENTIAL, "--eval", "none"]


def words(*parts) -> list[str]:
    return [str(part) for part in parts]


@pytest.fixture(scope="module")
def command(tiny_model, text_file):
    """Arguments of llama.py that write to the path they are given."""
    model = tiny_model(num_hidden_layers=LAYERS)
    return lambda save_path, *options: words(model, text_file, *SETTINGS, "--save_path", save_path, *options)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> tuple[bytes, dict]:
    """The file and the report of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert llama.main(command(folder / "q.safetensors", "--report", folder / "r.json")) == 0
    return (folder / "q.safetensors").read_bytes(), json.loads((folder / "r.json").read_text())


class Stopped(Exception):
    pass


@pytest.fixture
def stopped_after(command, monkeypatch):
    """stopped_after(n, save_path): a run that dies when it begins layer n + 1, in this process."""

    def run(layers: int, save_path: Path, error=Stopped, *options) -> None:
        real, begun = llama.quantize_layer, []

        def quantize_layer(*args):
            begun.append(1)
            if len(begun) > layers:
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(llama, "quantize_layer", quantize_layer)
            if error is Stopped:
                with pytest.raises(Stopped):
                    llama.main(command(save_path, *options))
            else:
                assert llama.main(command(save_path, *options)) == 130

    return run


# A child for each kill takes seconds to import torch: one process imports, forks a child for each run and kills it,
# `wait` seconds after its journal has `lines` lines.
SERVER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
import journal, llama, quant, transformers, leanquant.modeling
def count(journal):
    try:
        with open(journal) as file:
            return len(file.readlines())
    except OSError:
        return 0
for line in sys.stdin:
    arguments, journal, lines, wait = json.loads(line)
    child = os.fork()
    if child == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        os._exit(llama.main(arguments))
    kill_at, status = None, None
    while status is None and (kill_at is None or time.monotonic() < kill_at):
        if kill_at is None and count(journal) >= lines:
            kill_at = time.monotonic() + wait
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.001)
    if status is None:
        os.kill(child, 9)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
"""


def test_25_random_kills_change_no_byte(command, tmp_path):
    """After a random number of finished layers, as another machine's time is no measure, and a random time.

    Half have their activations in files.
    """
    rng, resumed = random.Random(0), 0
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def journal_of(path: Path) -> Path:
        return path.with_name(path.name + ".partial") / "journal.jsonl"

    def moment() -> tuple[int, float]:
        finished = rng.randrange(LAYERS + 1)
        return finished and finished + 1, rng.uniform(0, 1.5) * a_layer  # the first line says what run it is

    def run(path: Path, lines: int, wait: float, kind: str = "host") -> int:
        server.stdin.write(json.dumps([command(path, "--activations", kind), str(journal_of(path)), lines, wait]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def check_result(path: Path, number: int) -> None:
        assert path.read_bytes() == expected, f"kill {number}"

    takes = []
    for _ in range(3):  # the first fills caches
        start = time.monotonic()
        assert run(tmp_path / "first.safetensors", 0, 1000) == 0
        takes.append(time.monotonic() - start)
        expected = (tmp_path / "first.safetensors").read_bytes()
        (tmp_path / "first.safetensors").unlink()
    a_layer = min(takes) / LAYERS
    for number in range(KILLS):
        path = tmp_path / f"{number}.safetensors"
        kind = ("host", "disk")[number % 2]
        while (status := run(path, *moment(), kind)) != -signal.SIGKILL:
            assert status == 0  # it was through first
            check_result(path, number)
            path.unlink()
        journal = journal_of(path)
        resumed += journal.is_file() and len(journal.read_text().splitlines()) > 1
        if path.exists():  # killed after the result was complete
            check_result(path, number)
            if not journal.parent.exists():  # and nothing was left to do
                path.unlink()
        assert run(path, 0, 1000, kind) == 0, f"kill {number}"
        check_result(path, number)
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(f"{number}.")] == [path.name]
    server.stdin.close()
    server.wait()
    assert resumed >= 12, resumed  # else the moments were no test


DIES_IN_A_PART = """
import resource, signal, sys
import llama
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
llama.main(sys.argv[2:])
"""


def test_a_kill_within_a_part_is_gone_on_from(command, whole, tmp_path):
    """The system kills the process in the middle of the first part, which safetensors writes under a name of its own."""
    path = tmp_path / "q.safetensors"
    dying = [sys.executable, "-c", DIES_IN_A_PART, str(len(whole[0]) // (6 * LAYERS)), *command(path)]  # less than a part
    assert subprocess.run(dying, env=environment(), capture_output=True).returncode == -signal.SIGXFSZ
    left = {entry.name for entry in Path(f"{path}.partial").iterdir()} - {"journal.jsonl", "lock"}
    assert len(left) == 1 and left != {part_name(0)}, left
    assert llama.main(command(path)) == 0
    assert path.read_bytes() == whole[0]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def killed_in(monkeypatch, capsys):
    """killed_in(where, arguments): a run that dies when it comes to what `where` names. Returns what it said on the way out."""
    places = {"evaluation": (llama.eval_quantized, "streamed_losses"), "export": (llama.export, "export")}
    places["publishing"] = (ModelWriter, "publish")

    def run(where: str, arguments: list[str], error=KeyboardInterrupt) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(*places[where], lambda *_, **__: (_ for _ in ()).throw(error))
            assert llama.main(arguments) == 130
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("where", ["publishing", "evaluation", "export"])
def test_what_comes_after_the_result_is_gone_on_with(command, killed_in, test_text, tmp_path, monkeypatch, capsys, where, options):
    path, report = tmp_path / "q.safetensors", tmp_path / "r.json"
    if options:
        assert llama.main(command(path, "--percdamp", 0.2)) == 0
    older = path.read_bytes() if options else None
    arguments = command(path, "--eval", test_text, "--report", report, "--export", "dense", "--activations", "disk", *options)
    assert "the result is complete: the same command goes on" in killed_in(where, arguments)
    if where == "publishing":
        assert (path.read_bytes() if options else path.exists()) == (older or False)
    else:
        assert {"settings", "run", "dtype", "plan"} <= set(json.loads(report.read_text())), "what is known then"
    with monkeypatch.context() as patch:
        patch.setattr(llama, "quantize_layer", None)
        assert llama.main(arguments) == 0
    said, contents = capsys.readouterr().out, json.loads(report.read_text())
    assert "going on with what comes after it" in said and "exported" in said
    assert len(contents["linears"]) == 7 * LAYERS and contents["perplexity"][0]["perplexity"] > 1
    assert contents["quantization_seconds"] > 0 and contents["bits_per_weight"] > 3
    assert llama.main(command(tmp_path / "again.safetensors")) == 0
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes() != older
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again.safetensors", "q-dense", "q.safetensors", "r.json"]
    assert llama.main(command(path, "--eval", test_text)) == 2, "nothing is left to go on with"


@pytest.mark.parametrize(
    "options, difference", [(["--percdamp", 0.2], "percdamp: 0.1, now 0.2"), (["--dtype", "bfloat16"], "dtype: float32, now bfloat16")]
)
def test_a_result_of_another_run_is_not_gone_on_with(command, killed_in, test_text, tmp_path, capsys, options, difference):
    path = tmp_path / "q.safetensors"
    killed_in("evaluation", command(path, "--eval", test_text))
    assert llama.main(command(path, "--eval", test_text, *options)) == 2
    assert difference in (error := capsys.readouterr().err) and "eval_quantized.py" in error
    assert llama.main(command(path, "--fresh")) == 2, "the result is there"
    assert "--overwrite" in capsys.readouterr().err
    assert llama.main(command(path)) == 0, "no evaluation is left to do"
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors"]


def test_an_output_is_held_until_the_evaluation_is_done(command, test_text, tmp_path, monkeypatch, capsys):
    path, real = tmp_path / "q.safetensors", llama.eval_quantized.streamed_losses

    def streamed_losses(*args):
        with monkeypatch.context() as patch:
            patch.setattr(llama.eval_quantized, "streamed_losses", real)
            assert llama.main(command(path, "--eval", test_text)) == 2
        return real(*args)

    monkeypatch.setattr(llama.eval_quantized, "streamed_losses", streamed_losses)
    assert llama.main(command(path, "--eval", test_text)) == 0
    assert "another run is working" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors"]


def test_how_a_result_was_computed_does_not_matter_to_what_comes_after_it(command, killed_in, test_text, tmp_path, monkeypatch, capsys):
    path, real = tmp_path / "q.safetensors", llama.digest
    killed_in("evaluation", command(path, "--eval", test_text))
    monkeypatch.setattr(llama, "digest", lambda *parts: real(*parts, *[b"#"] * (len(parts) > 1)))  # other code
    assert llama.main(command(path, "--eval", test_text, "--batch_size", 1)) == 0
    assert "going on with what comes after it" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["publishing", "evaluation"])
def test_another_result_in_its_place_is_left_alone(command, killed_in, test_text, tmp_path, capsys, where):
    path = tmp_path / "q.safetensors"
    assert llama.main(command(tmp_path / "other.safetensors", "--percdamp", 0.2)) == 0
    killed_in(where, command(path, "--eval", test_text))
    shutil.copy(tmp_path / "other.safetensors", path)
    assert llama.main(command(path, "--eval", test_text)) == 2
    assert ("exists" if where == "publishing" else "is not what this run has written") in capsys.readouterr().err
    assert path.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


def test_a_result_that_appears_while_texts_are_read_is_left_alone(command, killed_in, test_text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "q.safetensors"
    killed_in("evaluation", command(path, "--eval", test_text))
    written = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(llama, "is_made", lambda _: False)  # as a run saw it that began before
        assert llama.main(command(path, "--eval", test_text, "--overwrite")) == 2
    assert "give the command again" in capsys.readouterr().err and path.read_bytes() == written
    assert llama.main(command(path, "--eval", test_text)) == 0


def test_a_folder_that_was_added_to_is_gone_on_with(command, killed_in, test_text, tmp_path, capsys):
    killed_in("evaluation", command(tmp_path / "m", "--eval", test_text))
    (tmp_path / "m" / "README.md").write_text("mine")
    assert llama.main(command(tmp_path / "m", "--eval", test_text)) == 0
    assert (tmp_path / "m" / "README.md").read_text() == "mine"


def test_an_older_export_is_not_taken_for_this_ones(command, killed_in, test_text, tmp_path, capsys):
    path = tmp_path / "q.safetensors"
    assert llama.main(command(path, "--percdamp", 0.2, "--export", "dense")) == 0
    path.unlink()
    killed_in("evaluation", command(path, "--eval", test_text))
    assert llama.main(command(path, "--eval", test_text, "--export", "dense")) == 2
    assert "q-dense exists" in capsys.readouterr().err
    assert llama.main(command(path, "--eval", test_text, "--export", "dense", "--overwrite")) == 0
    assert Checkpoint.open(tmp_path / "q-dense").settings["percdamp"] == 0.1


def test_a_result_that_is_gone_is_missed(command, killed_in, test_text, tmp_path, capsys):
    path = tmp_path / "q.safetensors"
    killed_in("evaluation", command(path, "--eval", test_text))
    path.unlink()
    assert llama.main(command(path, "--eval", test_text)) == 2
    assert "is gone" in (error := capsys.readouterr().err) and "--fresh" in error
    assert llama.main(command(path, "--fresh")) == 0


def test_exports_that_are_there_are_not_made_again(command, killed_in, tmp_path, monkeypatch, capsys):
    path, real = tmp_path / "q.safetensors", llama.export.export
    calls = []

    def export(*args, **options):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(llama.export, "export", export)
    arguments = command(path, "--export", "dense", f"dense:{tmp_path / 'other'}")
    assert llama.main(arguments) == 130
    assert llama.main(arguments) == 0
    assert "q-dense is there" in capsys.readouterr().out
    assert len(calls) == 3 and (tmp_path / "other").is_dir()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "q-dense", "q.safetensors"]


def test_other_code_does_not_go_on(command, stopped_after, tmp_path, monkeypatch, capsys):
    path, real = tmp_path / "q.safetensors", llama.digest
    stopped_after(2, path)
    monkeypatch.setattr(llama, "digest", lambda *parts: real(*parts, *[b"#"] * (len(parts) > 1)))
    assert llama.main(command(path)) == 2
    assert "code: " in (error := capsys.readouterr().err) and "--fresh" in error


@pytest.mark.parametrize("finished", [1, 3, LAYERS - 1])
def test_a_run_goes_on_after_its_finished_layers(command, whole, stopped_after, tmp_path, monkeypatch, capsys, finished):
    path = tmp_path / "q.safetensors"
    stopped_after(finished, path)
    done, real = [], llama.quantize_layer
    monkeypatch.setattr(llama, "quantize_layer", lambda model, index, *rest: done.append(index) or real(model, index, *rest))
    assert llama.main(command(path, "--report", tmp_path / "r.json")) == 0
    assert done == [*range(finished, LAYERS)]
    assert f"going on after layer {finished}" in capsys.readouterr().out
    assert path.read_bytes() == whole[0]
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["linears"]) == 7 * LAYERS
    assert [(row["layer"], row["linear"], row["loss"]) for row in report["linears"]] == [
        (row["layer"], row["linear"], row["loss"]) for row in whole[1]["linears"]
    ]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["q.safetensors", "r.json"]


def test_a_folder_as_result_goes_on_too(command, stopped_after, tmp_path):
    stopped_after(2, tmp_path / "m")
    assert llama.main(command(tmp_path / "m")) == 0
    assert llama.main(command(tmp_path / "n")) == 0
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "mn"]
    assert files[0] == files[1]


def test_ctrl_c_says_how_to_go_on(command, stopped_after, tmp_path, capsys):
    stopped_after(2, tmp_path / "q.safetensors", KeyboardInterrupt)
    assert "2 finished layers are kept: the same command goes on" in capsys.readouterr().err
    stopped_after(0, tmp_path / "p.safetensors", KeyboardInterrupt)
    assert "nothing was finished" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors.partial"]


def test_sigterm_ends_as_ctrl_c(command, tmp_path, monkeypatch, capsys):
    real, begun = llama.quantize_layer, []

    def quantize_layer(*args):
        begun.append(1)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)
    assert llama.main(command(tmp_path / "q.safetensors")) == 130
    assert "2 finished layers are kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "options, difference",
    [
        (["--nsamples", 5], "nsamples: 4, now 5"),
        (["--percdamp", 0.2], "percdamp: 0.1, now 0.2"),
        (["--dtype", "bfloat16"], "dtype: float32"),
    ],
    ids=["nsamples", "percdamp", "dtype"],
)
def test_other_settings_are_refused_and_named(command, whole, stopped_after, tmp_path, capsys, options, difference):
    path = tmp_path / "q.safetensors"
    stopped_after(2, path)
    assert llama.main(command(path, *options)) == 2
    message = capsys.readouterr().err
    assert difference in message and "--fresh" in message
    assert llama.main(command(path)) == 0 and path.read_bytes() == whole[0]
    assert "going on after layer 2" in capsys.readouterr().out, "the refusal lost nothing"


def test_another_model_or_text_is_refused(command, stopped_after, tiny_model, text_file, tmp_path, capsys):
    model, text, path = tmp_path / "model", tmp_path / "text.txt", tmp_path / "q.safetensors"
    shutil.copytree(tiny_model(num_hidden_layers=LAYERS), model)
    text.write_text(text_file.read_text())
    stopped_after(2, path)
    partial = path.with_name(path.name + ".partial")
    arguments = command(path)
    lines = (partial / "journal.jsonl").read_text().replace(arguments[0], str(model)).replace(arguments[1], str(text))
    (partial / "journal.jsonl").write_text(lines)
    os.utime(model / "model.safetensors")  # a copy that keeps its time is the same model
    assert llama.main([str(model), str(text), *arguments[2:]]) == 2
    assert "files of the model.model.safetensors" in capsys.readouterr().err
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    stat = Path(arguments[0], "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert llama.main([str(model), *arguments[1:]]) == 2
    assert "config of the model" in capsys.readouterr().err
    text.write_text(make_text(8000, seed=5))
    assert llama.main([arguments[0], str(text), *arguments[2:]]) == 2
    assert "calibration_tokens" in capsys.readouterr().err


def test_what_fails_before_the_journal_is_read_loses_nothing(command, stopped_after, tmp_path, monkeypatch, capsys):
    path = tmp_path / "q.safetensors"
    stopped_after(2, path)
    for name in (path, tmp_path / "other.safetensors"):
        with monkeypatch.context() as patch:
            patch.setattr(llama.datautils, "calibration_windows", lambda *_: (_ for _ in ()).throw(InputError("no text")))
            assert llama.main(command(name)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors.partial"]
    assert llama.main(command(path)) == 0
    assert "going on after layer 2" in capsys.readouterr().out


def test_fresh_starts_over(command, whole, stopped_after, tmp_path, capsys):
    path = tmp_path / "q.safetensors"
    stopped_after(2, path)
    assert llama.main(command(path, "--fresh")) == 0
    assert "going on" not in capsys.readouterr().out
    assert path.read_bytes() == whole[0]


def test_two_runs_do_not_share_an_output(command, stopped_after, tmp_path, capsys, monkeypatch):
    real, path = llama.quantize_layer, tmp_path / "q.safetensors"

    def quantize_layer(*args):
        with monkeypatch.context() as patch:
            patch.setattr(llama, "quantize_layer", real)
            assert llama.main(command(path)) == 2
        raise Stopped

    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)
    with pytest.raises(Stopped):
        llama.main(command(path))
    assert "another run is working" in capsys.readouterr().err


def test_a_model_that_changes_under_the_run_ends_it(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    model, real = tmp_path / "model", llama.quantize_layer
    shutil.copytree(tiny_model(num_hidden_layers=LAYERS), model)

    def quantize_layer(model_, index, *rest):
        if index == 2:
            os.utime(model / "model.safetensors")
        return real(model_, index, *rest)

    monkeypatch.setattr(llama, "quantize_layer", quantize_layer)
    assert llama.main(words(model, text_file, *SETTINGS, "--save_path", tmp_path / "q.safetensors")) == 2
    assert "were changed while the run read them" in capsys.readouterr().err


# --- the journal by itself -------------------------------------------------------------------------------------


def waiting(*tensors: torch.Tensor) -> list[InMemory]:
    return [InMemory(tensor, None) for tensor in tensors]


def test_generations_alternate_and_the_newest_whole_one_counts(tmp_path):
    mine = Journal(tmp_path, {"a": 1})
    for layer in (1, 2, 3):
        (tmp_path / f"part-{layer - 1:05d}.safetensors").touch()
        live = waiting(torch.full((2, 3), float(layer)), torch.full((4,), layer, dtype=torch.bfloat16))
        mine.add(layer, layer, [{"layer": layer}], {"grid": float(layer)}, live, False)
    assert sorted(file.name for file in tmp_path.glob("live*")) == ["live-0.bin", "live-1.bin"]

    def taken_up() -> tuple[int, float, list]:
        other, live = Journal(tmp_path, {"a": 1}), [torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)]
        other.restore(waiting(*live))
        assert live[0].unique().numel() == 1 and live[1].unique().item() == live[0][0, 0]
        return other.layers, live[0][0, 0].item(), [row["layer"] for row in other.rows]

    assert taken_up() == (3, 3.0, [1, 2, 3])
    text = (tmp_path / "journal.jsonl").read_text()
    (tmp_path / "journal.jsonl").write_text(text + text.splitlines()[-1][:20])  # killed in the middle of a line
    assert taken_up() == (3, 3.0, [1, 2, 3])
    (tmp_path / "part-00002.safetensors").unlink()
    assert taken_up() == (2, 2.0, [1, 2])
    (tmp_path / "part-00002.safetensors").touch()
    (tmp_path / "journal.jsonl").write_text(text)
    (tmp_path / "live-0.bin").write_bytes(b"")  # killed in the middle of writing over a generation
    assert taken_up() == (2, 2.0, [1, 2])
    with pytest.raises(InputError, match="a: 1, now 2"):
        Journal(tmp_path, {"a": 2})


def test_each_rank_goes_on_with_its_own_batches(tmp_path, monkeypatch):
    """One of two ranks had to halve them. Another number of ranks takes the smallest."""

    class Two(Ranks):
        def each(self, number):
            return [8, 4]

        def from_first(self, compute):
            return compute()

    (tmp_path / "part-00000.safetensors").touch()
    Journal(tmp_path, {}, Two()).add(1, 1, [], {}, waiting(torch.ones(3)), False, 8)
    assert Journal(tmp_path, {}).batch_size == 4
    for rank, size in ((0, 8), (1, 4)):
        assert Journal(tmp_path, {}, Two(rank=rank, size=2)).batch_size == size


def test_a_run_that_finished_no_layer_is_in_nobodys_way(tmp_path):
    Journal(tmp_path, {"a": 1})
    assert Journal(tmp_path, {"a": 2}).layers == 0
    assert json.loads((tmp_path / "journal.jsonl").read_text())["a"] == 2


def test_every_layer_is_saved(tmp_path):
    mine = Journal(tmp_path, {})
    for layer in (1, 2, 3):
        (tmp_path / f"part-{layer - 1:05d}.safetensors").touch()
        mine.add(layer, layer, [{"layer": layer}], {}, waiting(torch.zeros(3)), layer == 3)
        other = Journal(tmp_path, {})
        assert (other.layers, [row["layer"] for row in other.rows]) == (layer, [*range(1, layer + 1)])


def test_differences_name_what_differs():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}, {"a": 1, "b": {"c": 5, "d": 3}, "f": 6}
    assert differences(old, new) == ["b.c: 2, now 5", "e: 4, now None", "f: None, now 6"]
