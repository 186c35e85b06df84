"""python -m leanquant serve: what a client of OpenAI's API is answered, by a server in a process of its own."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import llama
from leanquant import LeanQuantModelForCausalLM, serving
from leanquant import __main__ as cli
from test_main import SHORT, TEMPLATE

ROOT = Path(__file__).resolve().parent.parent
STARTS_WITHIN = 120  # seconds
FIRST = [{"role": "user", "content": "the river"}]
WAYS = {"folder": [], "file": [], "several at once": ["--continuous_batching"]}


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    folder = shutil.copytree(tiny_model(), tmp_path_factory.mktemp("base") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def quantize(base, text_file, out: Path) -> Path:
    assert llama.main([str(base), str(text_file), "--wbits", "3", "--exponent", "4", *SHORT, "--save_path", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def file(base, text_file, tmp_path_factory):
    return quantize(base, text_file, tmp_path_factory.mktemp("file") / "q.safetensors")


@pytest.fixture(scope="module")
def folder(base, text_file, tmp_path_factory):
    return quantize(base, text_file, tmp_path_factory.mktemp("folder") / "q")


@pytest.fixture(scope="module", params=WAYS)
def server(request, base, file, folder):
    """(address, name of its model)"""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    path = [str(file), "--base", str(base)] if request.param == "file" else [str(folder)]
    command = [sys.executable, "-m", "leanquant", "serve", *path, "--port", str(port), *WAYS[request.param]]
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (it is ignored by what runs in the background)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        address = f"http://localhost:{port}"
        wait_for(address, process)
        yield address, path[0]
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 130) and "Traceback" not in said, said


def wait_for(address: str, process: subprocess.Popen) -> None:
    ends = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < ends and process.poll() is None:
        try:
            return ask(address, "health")
        except urllib.error.URLError:
            time.sleep(0.2)
    process.kill()
    pytest.fail(process.communicate()[1])


def ask(address: str, what: str, **body) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"{address}/{what}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def answer(address: str, messages: list, **settings) -> str:
    said = ask(address, "v1/chat/completions", messages=messages, temperature=0, max_tokens=8, **settings)
    return json.loads(said)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def expected(base, folder):
    """How the model continues a text or a conversation, by the likeliest tokens, read from the start."""
    model, tokenizer = LeanQuantModelForCausalLM.from_pretrained(base, folder), AutoTokenizer.from_pretrained(folder)

    def continued(asked: str | list, **settings) -> str:
        templated = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True)
        read = tokenizer if isinstance(asked, str) else templated
        inputs = read(asked, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return continued


def test_a_conversation(server, expected):
    address, _ = server
    messages = list(FIRST)
    for text in ("and then", "what else"):
        messages.append({"role": "assistant", "content": answer(address, messages)})
        assert messages[-1]["content"] == expected(messages[:-1])
        messages.append({"role": "user", "content": text})
    assert answer(address, FIRST) == expected(FIRST)  # another one


def test_an_answer_in_pieces(server, expected):
    address, name = server
    said = ask(address, "v1/chat/completions", model=name, messages=FIRST, temperature=0, max_tokens=8, stream=True)
    chunks = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    whole = expected(FIRST).rstrip("\N{REPLACEMENT CHARACTER}")  # bytes of a letter whose last are not there yet are not sent
    assert "".join(pieces) == whole and len(pieces) > 3


def test_requests_at_the_same_time(server, expected):
    address, _ = server
    conversations = [[{"role": "user", "content": text}] for text in ("the river", "the", "river and sea", "a long day on the road")]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda messages: answer(address, messages), conversations)) == list(map(expected, conversations))


def test_the_continuation_of_a_text(server, expected):
    address, _ = server
    for text in ("the river and the sea", "a long day"):
        said = json.loads(ask(address, "v1/completions", prompt=text, temperature=0, max_tokens=8))
        assert said["choices"][0]["text"] == expected(text)


def test_its_model_is_listed_and_no_other_is_taken(server):
    address, name = server
    assert [model["id"] for model in json.loads(ask(address, "v1/models"))["data"]] == [name]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "v1/chat/completions", model="another", messages=FIRST)
    assert refused.value.code == 400 and name in refused.value.read().decode()


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(cli, "load", lambda _: pytest.fail("a model was loaded"))


def test_a_port_that_is_taken_is_told_at_once(folder, capsys, nothing_is_loaded):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(folder), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: port {port} of localhost cannot be used (Address already in use): give another --port, or --host\n"
    assert cli.main(["serve", str(folder), "--host", "no.such.host.invalid"]) == 2
    assert "of no.such.host.invalid cannot be used" in capsys.readouterr().err


def test_a_server_that_is_not_installed_is_named(folder, capsys, monkeypatch, nothing_is_loaded):
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert cli.main(["serve", str(folder)]) == 2
    assert capsys.readouterr().err.endswith('pip install "transformers[serving]"\n')


def test_a_file_alone_cannot_be_served(file, capsys):
    assert cli.main(["serve", str(file)]) == 2
    assert "name the unquantized model with --base" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x"])
def test_no_ports(port, capsys):
    with pytest.raises(SystemExit):
        cli.parse(["serve", "path", "--port", port])
    assert "give a number from 1 to 65535" in capsys.readouterr().err or port == "-1"


def test_a_servers_model_generates_as_it_did(folder, base):
    """What takes the place of `generate` does not call itself."""
    model = LeanQuantModelForCausalLM.from_pretrained(base, folder)
    ids, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **settings)
    model.generate = cli.conversing(model, cli.parse(["serve", str(folder)]))
    for _ in range(2):
        assert torch.equal(model.generate(input_ids=ids, **settings), wanted)
