"""python -m leanquant: info without loading, generation and chat in the terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

import llama
from leanquant import __main__ as cli
from leanquant import decoding, errors, packing

FIXTURES = Path(__file__).with_name("fixtures")
ROOT = Path(__file__).resolve().parent.parent
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


def test_generate_takes_cuda_graphs_where_it_can(folder, capsys, monkeypatch):
    command, asked = ["generate", str(folder), "the river", "--max_new_tokens", "12", "--temperature", "0"], []
    monkeypatch.setattr(decoding, "with_cuda_graphs", lambda model: asked.append(model) or model.generate)
    outputs = [(cli.main(command + flags), capsys.readouterr().out) for flags in (["--no_graphs"], [])]
    assert outputs[0] == outputs[1] and outputs[0][0] == 0
    assert len(asked) == 1


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


REVISED = TEMPLATE.replace("m.content", "(m.content if m.role == 'user' or loop.last else 'well')")  # as those that leave thoughts out


@pytest.mark.parametrize("template, at_most", [(TEMPLATE, 0.6), (REVISED, 0.8)])
def test_chat_reads_only_what_is_new(folder, template, at_most):
    """And says what `generate` says to all of it."""
    args = cli.parse(["chat", str(folder), "--max_new_tokens", "6", "--temperature", "0"])
    tokenizer, model, read, said = cli.load_tokenizer(args), cli.load(args), [], []
    tokenizer.chat_template = template
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    for continued in (model.generate, decoding.remembering(model)):
        messages = []
        for text in ("hello there my friend", "and then we went on to the river", "what else was there", "who knows"):
            messages.append({"role": "user", "content": text})
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            messages.append({"role": "assistant", "content": cli.answer(continued, tokenizer, inputs, args)})
        said.append(([m["content"] for m in messages], sum(read)))
        read.clear()
    (plain, all_tokens), (remembered, fewer) = said
    assert plain == remembered and fewer < at_most * all_tokens


@pytest.mark.parametrize("setting", ["prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "cache_implementation", "rope"])
def test_chat_reads_again_where_a_model_goes_its_own_ways(folder, setting):
    """Tokens that are guessed ahead, caches of other kinds, and positions that change with the length."""
    model = cli.load(cli.parse(["chat", str(folder)]))
    if setting == "rope":
        model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    else:
        setattr(model.generation_config, setting, "dynamic" if setting == "cache_implementation" else 1)
    assert decoding.remembering(model) == model.generate


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}, {}])
def test_calls_with_a_generation_config_of_their_own(folder, how):
    """As the server makes them: what beams need is not what was remembered, and the config stays the caller's."""
    model = cli.load(cli.parse(["chat", str(folder)]))
    continued, ids = decoding.remembering(model), torch.tensor([[5, 6, 7, 8]])
    own = {"num_beams": 3} if "num_beams" in how else {}
    model.generation_config.update(**own)
    for settings in ({}, how, {"num_beams": 1}, how):
        config = GenerationConfig(**{"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | settings)
        found, expected = ((torch.manual_seed(0), generate(ids, generation_config=config))[1] for generate in (continued, model.generate))
        assert torch.equal(found, expected)
        assert not config.return_dict_in_generate


def test_chat_forgets_an_interrupted_call(folder, monkeypatch):
    model = cli.load(cli.parse(["chat", str(folder)]))
    continued, settings = decoding.remembering(model), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9, 10]])
    continued(first, **settings)
    layer = model.get_decoder().layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        continued(second, **settings)
    hook.remove()
    assert torch.equal(continued(second, **settings), model.generate(second, **settings))


def test_chat_needs_a_template(tiny_model, text_file, tmp_path, capsys):
    out = tmp_path / "folder"
    assert llama.main([str(tiny_model()), str(text_file), "--wbits", "4", "--nearest", *SHORT, "--save_path", str(out)]) == 0
    assert cli.main(["chat", str(out)]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("path, message", [("/nowhere", "does not exist"), (str(FIXTURES / "llama_base"), "holds no quantized weights")])
def test_info_refuses_what_is_not_quantized(path, message, capsys):
    assert cli.main(["info", path]) == 2
    assert message in capsys.readouterr().err


def run(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "leanquant", *map(str, words)], cwd=ROOT, capture_output=True, timeout=120, **options)


def test_whoever_reads_may_stop_early(folder):
    command = f"{sys.executable} -m leanquant info {folder} | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert ran.returncode == 0 and not ran.stderr
    ran = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m leanquant info {folder} > /dev/full"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.startswith("error: ") and len(ran.stderr.splitlines()) == 1


# A module that is interrupted while it is imported, and loses the exception, as those in C++ do.
INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100000): pass
except KeyboardInterrupt:
    pass
"""


def test_ctrl_c_ends_the_imports_with_a_word(tmp_path):
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (it is ignored by what runs in the background)
    ran = run("info", "x", env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=heeded)
    assert (ran.returncode, ran.stderr) == (130, b"interrupted: nothing is lost\n")


def test_info_does_not_wait_for_transformers(folder, tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('not needed')")
    ran = run("info", folder, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ran.returncode == 0 and b"non-uniform levels" in ran.stdout, ran.stderr


def test_a_package_that_is_run_has_all_that_it_imports_from_here(tmp_path):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/__init__.py").write_text("import leanquant\n")
    (tmp_path / "tool/__main__.py").write_text(
        "import leanquant\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "print('leanquant' in known, leanquant.LeanQuantModelForCausalLM.__name__)\n"
    )
    command = [sys.executable, "-m", "tool", "leanquant"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert ran.stdout.split() == ["True", "LeanQuantModelForCausalLM"], ran.stderr


def test_a_terminal_without_letters_or_input(folder):
    short = ["--max_new_tokens", 3, "--temperature", 0]
    ran = run("generate", folder, "Café", *short, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0 and ran.stdout.startswith(b"Caf?")
    assert run("generate", folder, b"the \xff".decode(errors="surrogateescape"), *short).returncode == 0
    ran = run("chat", folder, *short, input=b"a \xff b\n")
    assert ran.returncode == 0 and not ran.stderr


@pytest.mark.parametrize(
    "flags", [["--max_new_tokens", "0"], ["--max_new_tokens", "-3"], ["--temperature", "-1"], ["--temperature", "nan"]]
)
def test_numbers_out_of_range_are_refused_at_once(folder, flags, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(folder), "the", *flags])
    assert end.value.code == 2 and flags[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "contents", "says"),
    [
        ("generation_config.json", "[]", "generation_config.json that cannot be used"),
        ("tokenizer.json", "[]", "has no usable tokenizer"),
        ("tokenizer_config.json", "[]", "has no usable tokenizer"),
        ("config.json", "[]", "has no usable"),
        ("chat_template.jinja", "{% for %}", "chat template fails"),
        ("chat_template.jinja", "{{ raise_exception('only users') }}", "chat template fails (only users)"),
    ],
)
def test_files_of_the_model_that_cannot_be_used(folder, tmp_path, monkeypatch, capsys, file, contents, says):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).write_text(contents)
    monkeypatch.setattr("builtins.input", lambda _: "hello")
    command = ["chat", str(copy)] if "chat" in file else ["generate", str(copy), "the"]
    assert cli.main([*command, "--max_new_tokens", "3"]) == 2
    assert says in (said := capsys.readouterr().err) and "Traceback" not in said


def with_generation_config(folder: Path, copy: Path, **settings) -> Path:
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1} | settings))
    return copy


@pytest.mark.parametrize("settings", [{"return_dict_in_generate": True}, {"stop_strings": ["river"]}, {"stop_strings": "river"}])
def test_generation_configs_that_may_be(folder, tmp_path, capsys, settings):
    copy = with_generation_config(folder, tmp_path / "copy", **settings)
    assert cli.main(["generate", str(copy), "the", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": "x"},
        {"bos_token_id": "x"},
        {"max_time": "x"},
        {"forced_eos_token_id": 1000000},
        {"exponential_decay_length_penalty": [1]},
        {"exponential_decay_length_penalty": {"a": 1}},
        {"stop_strings": [1]},
        {"guidance_scale": 10**30},
    ],
)
def test_generation_configs_that_lie(folder, tmp_path, capsys, settings):
    copy = with_generation_config(folder, tmp_path / "copy", **settings)
    assert cli.main(["generate", str(copy), "the", "--max_new_tokens", "3"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the model cannot generate (") and said.endswith("): see its generation_config.json")


def test_escapes_in_names_do_not_reach_the_terminal(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"evil\x1b]0;pwn\x07.weight_codes": torch.zeros(2, 2, dtype=torch.uint8)}, copy / "model.safetensors")
    assert cli.main(["generate", str(copy), "the"]) == 2
    assert "evil?]0;pwn?" in (said := capsys.readouterr().err) and "\x1b" not in said


def test_a_loaded_chat_can_be_interrupted(folder, monkeypatch):
    before, seen = signal.signal(signal.SIGINT, errors.end_at_once), []
    monkeypatch.setattr("builtins.input", lambda _: seen.append(signal.getsignal(signal.SIGINT)) or "")
    try:
        assert cli.main(["chat", str(folder)]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler]


def test_an_answer_that_is_interrupted_does_not_end_the_chat(folder, capsys, monkeypatch):
    typed, asked = iter(["hello", "and then", ""]), []

    def answer(model, tokenizer, inputs, args):
        asked.append(tokenizer.decode(inputs["input_ids"][0]))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return "well"

    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(cli, "answer", answer)
    assert cli.main(["chat", str(folder)]) == 0
    assert len(asked) == 2 and "hello" not in asked[1] and "the message is taken back" in capsys.readouterr().out
