"""The quickstart, all of it, on a tiny model in the demo's place."""

import json
import shutil
import sys

import pytest
from transformers import AutoTokenizer

import demo
from conftest import make_text
from test_main import TEMPLATE


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """Where the demo works, with less to do."""

    def make_model(there) -> None:
        if not there.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(tiny_model(), there))
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(there)

    def make_texts(there) -> tuple:
        for seed, name in enumerate(("calibration.txt", "heldout.txt")):
            (there / name).write_text(make_text(4000, seed=seed))
        return there / "calibration.txt", there / "heldout.txt"

    monkeypatch.setattr(demo, "FULL", demo.Size(tmp_path / "demo", 4, 32, 512, 2, ()))
    monkeypatch.setattr(demo, "FAST", demo.Size(tmp_path / "demo" / "fast", 2, 16, 256, 1, ("--n_layers", "1")))
    monkeypatch.setattr(demo, "make_model", make_model)
    monkeypatch.setattr(demo, "make_texts", make_texts)
    return tmp_path / "demo"


def test_the_quickstart(folder, monkeypatch, capfd):
    """Its table, picture, tasks and sentences; given again it does nothing twice; --fast is apart."""
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    demo.main()
    said = capfd.readouterr().out
    table = (folder / "results.md").read_text()
    rows = json.loads((folder / "results.json").read_text())
    assert table in said and [row["method"] for row in rows] == [method.label for method in demo.METHODS]
    assert [row["bits"] for row in rows] == [16, 4, 4, 4, 4] and all(row["perplexity"] > 1 for row in rows)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {row["name"] for row in json.loads((folder / "tasks.json").read_text())["rows"]} == {"demo_words", "demo_continuations"}
    assert all(f"\n{line}" in said for line in ("original:  ", "quantized: ", "prompt:    ", "table: ")) and "already done" not in said
    files = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    demo.main()
    again = capfd.readouterr().out
    assert again.count("already done") == len(demo.METHODS) and table in again
    assert len(files) == 4 and all(file.stat().st_mtime_ns == time for file, time in files.items())
    monkeypatch.setattr(sys, "argv", ["demo.py", "--fast"])
    monkeypatch.setattr(demo, "METHODS", [demo.METHODS[0], demo.METHODS[-1]])  # enough of them
    demo.main()
    assert "first 1 of 30 layers quantized" in capfd.readouterr().out and (folder / "fast" / "results.md").is_file()


def test_a_method_that_fails_ends_it_with_a_word(folder, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo, "METHODS", [demo.Method("original", "fp16", ("--wbits", "16", "--no_such_flag"))])
    with pytest.raises(SystemExit, match="original did not finish: see above, then run this again"):
        demo.main()
