"""python -m leanquant serve: what a client of OpenAI's API is answered, by a server in a process of its own."""

import errno
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import llama
from leanquant import LeanQuantModelForCausalLM, serving
from leanquant import __main__ as cli
from leanquant.errors import InputError
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
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, cwd=ROOT, stderr=said, preexec_fn=heeded) as process:
        try:
            wait_for(address := f"http://localhost:{port}", process)
            yield address, path[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 130)
        finally:
            process.kill()
            said.seek(0)
            print(said.read())


def wait_for(address: str, process: subprocess.Popen) -> None:
    ends = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < ends and process.poll() is None:
        try:
            return ask(address, "health")
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail("the server does not start")


def ask(address: str, what: str, **body) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"{address}/{what}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def answer(address: str, messages: list, **settings) -> str:
    said = ask(address, "v1/chat/completions", **{"messages": messages, "temperature": 0, "max_tokens": 8} | settings)
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


def test_a_temperature_is_heeded(server, expected, request):
    """Where requests wait for one another; the config of this model says nothing of sampling."""
    address, _ = server
    answers = {answer(address, FIRST, temperature=5, seed=seed) for seed in range(4)}
    assert answers == {expected(FIRST)} if "several at once" in request.node.name else len(answers) > 1
    assert answer(address, FIRST) == expected(FIRST)


def test_its_model_is_listed_and_no_other_is_taken(server):
    address, name = server
    assert [model["id"] for model in json.loads(ask(address, "v1/models"))["data"]] == [name]
    said = json.loads(ask(address, "v1/completions", model=name, prompt="the river", max_tokens=1))
    assert said["model"] == name
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
    assert "no.such.host.invalid cannot be listened at (Name or service not known): give another --host" in capsys.readouterr().err


def test_addresses_of_both_families_are_tried(monkeypatch):
    """One that this machine lacks does not matter, if it has the other."""
    families, fails = [], {socket.AF_INET6}

    def create_server(address, family):
        families.append(family)
        if family in fails:
            raise OSError(errno.EADDRNOTAVAIL, "not here")
        return socket.socket()

    monkeypatch.setattr(socket, "create_server", create_server)
    places = [(family, socket.SOCK_STREAM, 6, "", ("x", 1, 0, 0)) for family in (socket.AF_INET6, socket.AF_INET)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    serving.check_server("x", 1)
    assert families == [socket.AF_INET6, socket.AF_INET]
    fails.add(socket.AF_INET)
    with pytest.raises(InputError, match="port 1 of x cannot be used"):
        serving.check_server("x", 1)


def test_a_server_that_is_not_installed_is_named(folder, capsys, monkeypatch, nothing_is_loaded):
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert cli.main(["serve", str(folder)]) == 2
    assert capsys.readouterr().err.endswith('pip install "transformers[serving]"\n')


def test_a_prompt_without_tokens_reaches_no_worker():
    """And all requests have the model's own temperature, which the first one would decide otherwise."""
    manager, configs = SimpleNamespace(add_request=lambda ids, **_: len(ids)), []
    model = SimpleNamespace(generation_config=GenerationConfig(do_sample=True, temperature=0.5))
    init = serving.one_config(model, lambda generation_config: configs.append(generation_config) or manager)
    found = init(generation_config=GenerationConfig(do_sample=False, use_cache=False, max_new_tokens=7))
    assert found.add_request([1, 2], request_id="x") == 2
    with pytest.raises(ValueError, match="has no tokens: give some text"):
        found.add_request([], request_id="y")
    (config,) = configs
    assert (config.do_sample, config.temperature, config.use_cache, config.max_new_tokens) == (True, 0.5, False, 7)
    assert model.generation_config.use_cache is not False


def test_a_model_without_a_template_says_so(folder, tmp_path, capsys, monkeypatch):
    served = []
    monkeypatch.setattr(serving, "serve", lambda *args: served.append(args))
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    for path, batching in ((folder, []), (plain, ["--continuous_batching", "--temperature", "0.5"])):
        assert cli.main(["serve", str(path), *batching]) == 0
    assert capsys.readouterr().out == f"{plain} has no chat template: /v1/chat/completions will fail, /v1/completions will not\n"
    assert [generate is None for _, _, _, generate, *_ in served] == [False, True]
    assert served[1][0].generation_config.temperature == 0.5 and served[1][0].generation_config.do_sample


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
