"""A base model by its hub name: from a hub that answers, a stand-in on this machine, from the cache, or nowhere."""

import re
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import huggingface_hub
import pytest
from transformers import AutoTokenizer

import datautils
import llama
from leanquant import InputError, LeanQuantModelForCausalLM, modeling
from leanquant import __main__ as cli

NAME = "org/model"
NOBODY = "http://127.0.0.1:9"  # no one listens there
SAYS = r"org/model is neither a folder here nor in the cache, and the hub cannot be reached \(.+\): give a folder"


@pytest.fixture(scope="module")
def file(tiny_model, text_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "q.safetensors"
    flags = ["--wbits", "4", "--nearest", "--nsamples", "2", "--seqlen", "32", "--eval", "none", "--save_path", str(out)]
    assert llama.main([str(tiny_model()), str(text_file), *flags]) == 0
    return out


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
    """A function that has the hub at another address, with a cache of its own."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def move(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")

    return move


@pytest.fixture
def hub(hub_at, tiny_model):
    """A hub that has one model. Returns what it is asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            file = tiny_model() / self.path.rpartition("/")[2]
            there = self.path.startswith(f"/{NAME}/resolve/main/") and file.is_file()
            self.send_response(200 if there else 404)
            self.send_header("X-Repo-Commit", 40 * "a")
            self.send_header("ETag", file.name)
            self.send_header("Content-Length", str(file.stat().st_size if there else 0))
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound" if NAME in self.path else "RepoNotFound")
            self.end_headers()
            return file.read_bytes() if there else b""

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    hub_at(f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def generate(base: str, path: Path) -> int:
    return cli.main(["generate", str(path), "the", "--base", base, "--max_new_tokens", "1"])


def no_retries(monkeypatch) -> None:
    """The libraries wait between their tries."""
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it tries again"))


def test_a_hub_that_answers_is_used_and_then_its_cache(hub, hub_at, file, monkeypatch):
    LeanQuantModelForCausalLM.from_pretrained(NAME, file)
    assert generate(NAME, file) == 0
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert f"/{NAME}/resolve/main/{name}" in hub
    hub_at(NOBODY)
    no_retries(monkeypatch)
    LeanQuantModelForCausalLM.from_pretrained(NAME, file)
    assert generate(NAME, file) == 0


def test_a_name_that_the_hub_does_not_know(hub, file, capsys):
    with pytest.raises(InputError, match="no usable config.json .*not a valid model identifier.*check the name"):
        LeanQuantModelForCausalLM.from_pretrained("org/typo", file)
    assert generate("org/typo", file) == 2
    assert "not a valid model identifier" in (said := capsys.readouterr().err) and "check the name" in said


def test_no_hub_is_said_at_once(hub_at, file, capsys, monkeypatch):
    hub_at(NOBODY)
    no_retries(monkeypatch)
    with pytest.raises(InputError, match=SAYS):
        LeanQuantModelForCausalLM.from_pretrained(NAME, file)
    assert generate(NAME, file) == 2
    assert re.search(SAYS, said := capsys.readouterr().err) and len(said.splitlines()) == 1


def test_a_hub_that_never_answers_is_not_waited_for(hub_at, file, monkeypatch):
    no_retries(monkeypatch)
    monkeypatch.setattr(modeling, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(InputError, match=SAYS):
            LeanQuantModelForCausalLM.from_pretrained(NAME, file)


def test_no_hub_is_said_at_once_of_a_corpus_too(hub_at, tiny_model, tmp_path, monkeypatch):
    """But for one that datasets may have kept, which is left to it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    hub_at(NOBODY)
    no_retries(monkeypatch)
    with pytest.raises(InputError, match=r"cannot get Salesforce/wikitext from the hub \(.+\): check the network"):
        datautils.evaluation_windows("wikitext2", tokenizer, 32)
    (tmp_path / "kept/Salesforce___wikitext").mkdir(parents=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": 99 * ["the old house "]})
    assert len(datautils.evaluation_windows("wikitext2", tokenizer, 32)) > 0


def test_a_hub_that_answers_is_left_to_datasets(hub, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"text": 99 * ["the old house "]})
    assert len(datautils.evaluation_windows("wikitext2", AutoTokenizer.from_pretrained(tiny_model()), 32)) > 0
    assert hub == ["/datasets/Salesforce/wikitext/resolve/main/README.md"]


def test_offline_mode_asks_nobody(hub, file, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=SAYS):
        LeanQuantModelForCausalLM.from_pretrained(NAME, file)
    assert not hub


@pytest.mark.parametrize("base", ["./typo", "/nowhere/typo", "a/b/c", "x" * 5000])
def test_what_is_neither_a_folder_nor_a_name(hub, file, capsys, base):
    with pytest.raises(InputError, match="neither a folder here nor a hub name: check the path"):
        LeanQuantModelForCausalLM.from_pretrained(base, file)
    assert generate(base, file) == 2
    assert "nor a hub name" in capsys.readouterr().err and not hub


def test_the_path_is_opened_before_anything_is_looked_up(hub, capsys):
    assert generate(NAME, Path("/nowhere/q.safetensors")) == 2
    assert "/nowhere/q.safetensors does not exist" in capsys.readouterr().err and not hub
