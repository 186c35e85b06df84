"""python -m leanquant: info without loading, generation and chat in the terminal."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import llama
from leanquant import __main__ as cli
from leanquant import packing

FIXTURES = Path(__file__).with_name("fixtures")
SHORT = ["--nsamples", "2", "--seqlen", "32", "--eval", "none"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def folder(tiny_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "folder"
    flags = ["--wbits", "3", "--exponent", "4", *SHORT, "--save_path", str(out)]
    assert llama.main([str(tiny_model()), str(text_file), *flags]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    return out


def test_info_describes_a_folder_without_reading_weights(folder, capsys, monkeypatch):
    monkeypatch.setattr(packing.Checkpoint, "get", lambda *_: pytest.fail("a tensor was read"))
    assert cli.main(["info", str(folder)]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["bits"].strip().startswith("3 (")
    assert lines["grid"].strip() == "non-uniform levels"
    assert lines["linears"].strip().startswith("14,")
    assert "2 x 32 tokens, seed 0" in lines["calibration"]
    assert "times less than 16 bits" in lines["size"]


@pytest.mark.parametrize(
    "flags, grid", [(["--grid", "minmax"], "affine, row-wise"), (["--grid", "minmax", "--groupsize", "32"], "affine, in groups")]
)
def test_info_tells_grids_apart(tiny_model, text_file, tmp_path, flags, grid, capsys):
    out = tmp_path / "q.safetensors"
    assert llama.main([str(tiny_model()), str(text_file), "--wbits", "4", "--nearest", *SHORT, "--save_path", str(out), *flags]) == 0
    size = cli.describe(packing.Checkpoint.open(out))
    assert size["grid"] == grid and size["method"] == "rtn"


def test_info_of_a_published_file(capsys):
    assert cli.main(["info", str(FIXTURES / "llama_2bit.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "published tool" in out and "bits:         2 (" in out


def test_sizes_are_those_of_the_model(tiny_model, text_file, tmp_path):
    """The 16-bit size that info names is the size of the 16-bit model, for every packing."""
    base = tiny_model(dtype="float16")
    for name, flags in (("a", []), ("b", ["--packing", "nibble"])):
        out = tmp_path / f"{name}.safetensors"
        command = [str(base), str(text_file), "--wbits", "2", "--nearest", *SHORT, "--save_path", str(out), *flags]
        assert llama.main(command) == 0
        checkpoint, original = packing.Checkpoint.open(out), packing.Checkpoint.open(base)
        weights = sum(checkpoint.weights_of(linear) for linear in checkpoint.quantized)
        assert weights == sum(torch.Size(original.shapes[f"{linear}.weight"]).numel() for linear in checkpoint.quantized)


def test_generate_streams_the_continuation(folder, capsys):
    assert cli.main(["generate", str(folder), "the river", "--max_new_tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the river")


def test_generate_from_a_file_needs_its_base(tiny_model, text_file, tmp_path, capsys):
    out = tmp_path / "q.safetensors"
    assert llama.main([str(tiny_model()), str(text_file), "--wbits", "4", "--nearest", *SHORT, "--save_path", str(out)]) == 0
    assert cli.main(["generate", str(out), "the"]) == 2
    assert "name the unquantized model with --base" in capsys.readouterr().err
    assert cli.main(["generate", str(out), "the", "--base", str(tiny_model()), "--max_new_tokens", "2"]) == 0


def test_chat_keeps_the_conversation(folder, capsys, monkeypatch):
    typed, prompts = iter(["hello", "and then", ""]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    answer = cli.answer
    monkeypatch.setattr(
        cli, "answer", lambda model, tokenizer, inputs, args: prompts.append(inputs) or answer(model, tokenizer, inputs, args)
    )
    assert cli.main(["chat", str(folder), "--max_new_tokens", "3", "--temperature", "0"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    second = tokenizer.decode(prompts[1]["input_ids"][0], skip_special_tokens=True)
    assert second.startswith("user: hello\nassistant: ") and second.endswith("user: and then\nassistant: ")


def test_chat_needs_a_template(tiny_model, text_file, tmp_path, capsys):
    out = tmp_path / "folder"
    assert llama.main([str(tiny_model()), str(text_file), "--wbits", "4", "--nearest", *SHORT, "--save_path", str(out)]) == 0
    assert cli.main(["chat", str(out)]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("path, message", [("/nowhere", "does not exist"), (str(FIXTURES / "llama_base"), "holds no quantized weights")])
def test_info_refuses_what_is_not_quantized(path, message, capsys):
    assert cli.main(["info", path]) == 2
    assert message in capsys.readouterr().err
