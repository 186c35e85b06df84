"""Folders of ours in vLLM, by the plug-in, against transformers with the same folder. scripts/vllm.sh has an environment for it."""

import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from conftest import SIZES, signed, write_model
from leanquant.export import export
from leanquant.packing import Checkpoint, PackedLinear, affine_levels, pack_codes

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
import vllm  # noqa: E402

PROMPTS = [{"prompt_token_ids": [(start + 7 * i) % 290 + 5 for i in range(20)]} for start in (1, 40)]
ANSWER = 6


def pack(weight: torch.Tensor, bits: int, groups: int = 0, layout: str = "dense", shift: int = 0) -> PackedLinear:
    """`weight` to the nearest of levels: free ones, which are not equally spaced, or with `groups` scales a row, of both signs, and zero
    points `shift` off the middle."""
    rows = weight.view(len(weight), max(1, groups), -1)
    reach = rows.abs().amax(2)
    if bits == 8:
        scale, zero = (16 * reach / 119).half(), torch.full(reach.shape, 8, dtype=torch.uint8)
        stored = (None, scale, zero)
        levels = PackedLinear(None, *stored).levels(8)
    elif groups:
        scale, zero = signed(2 * reach / (2**bits - 1)).half(), torch.full(reach.shape, 2 ** (bits - 1) + shift, dtype=torch.uint8)
        levels = affine_levels(scale, zero, bits)
        stored = (None, scale, zero)
    else:
        steps = torch.linspace(-1, 1, 2**bits)
        grid = (reach * (steps.abs() ** 1.3 * steps.sign())).half()
        levels, stored = grid.float().unsqueeze(1), (grid, None, None)
    codes = (rows.unsqueeze(3) - levels.unsqueeze(2)).abs().argmin(3).flatten(1).to(torch.uint8)
    return PackedLinear(pack_codes(codes, bits, layout), *stored)


def quantized(base: Path, out: Path, how: dict) -> Path:
    """`base` as a folder of ours: each matrix whose name ends with a key of `how`, the first one, is packed with what stands there, or
    stays plain if that is None."""
    shutil.copytree(base, out)
    tensors, bits_for = load_file(out / "model.safetensors"), {}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        path = name.removesuffix(".weight")
        if options := next((options for end, options in how.items() if path.endswith(end)), None):
            tensors |= pack(tensors.pop(name).float(), *options).named(path)
            bits_for[path] = options[0]
    settings = {"method": "leanquant", "bits": 3, "bits_for": bits_for}
    save_file(tensors, out / "model.safetensors", {"leanquant": json.dumps(settings)})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "leanquant", **settings}}))
    return out


def engine(folder: Path, **options):
    return vllm.LLM(str(folder), **({"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "seed": 0} | options))


def answers(llm) -> list[tuple[list[int], torch.Tensor]]:
    """For each prompt the tokens that were written, and the log probabilities of the prompt's own."""
    params = vllm.SamplingParams(temperature=0, max_tokens=ANSWER, prompt_logprobs=0, ignore_eos=True)
    found = []
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        told = zip(prompt["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True)
        found.append((list(output.outputs[0].token_ids), torch.tensor([place[token].logprob for token, place in told])))
    return found


@torch.no_grad()
def expected(folder: Path) -> list[tuple[list[int], torch.Tensor]]:
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt["prompt_token_ids"]])
        written = model.generate(ids, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, eos_token_id=None, pad_token_id=0)
        told = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).flatten()
        found.append((written[0, ids.shape[1] :].tolist(), told))
    return found


def check(folder: Path, tolerance: float = 2e-3, like: Path | None = None, **options) -> None:
    compare(answers(engine(folder, **options)), expected(like or folder), tolerance)


def compare(found: list, wanted: list, tolerance: float = 2e-3) -> None:
    """What `answers` and `expected` give."""
    for (tokens, told), (wanted_tokens, wanted_told) in zip(found, wanted, strict=True):
        torch.testing.assert_close(told, wanted_told, rtol=tolerance / 2, atol=tolerance)
        assert tokens == wanted_tokens or tolerance > 0.01


def tiny(tiny_model, **sizes) -> Path:
    """With heads of a size that vLLM's attention takes."""
    return tiny_model(**{"head_dim": 32, "hidden_size": 128} | sizes)


CASES = {
    "free levels": (False, {"proj": (3,)}),
    "nibbles": (False, {"proj": (2, 0, "nibble")}),
    "a scale a row": (False, {"proj": (4, 1)}),
    "groups": (False, {"proj": (3, 4)}),
    "bits differ, one layer is plain": (
        False,
        {"0.mlp.gate_proj": None, "0.mlp.up_proj": None, "q_proj": (2,), "v_proj": (4,), "down_proj": (3,), "proj": (3,)},
    ),
    "scales of bits that differ": (False, {"q_proj": (2, 4), "proj": (3, 4)}),
    "embeddings that are the head": (True, {"proj": (3,), "embed_tokens": (4,)}),
    "embeddings of 8 bits that are the head": (True, {"proj": (3,), "embed_tokens": (8,)}),
    "embeddings and a head": (False, {"proj": (2,), "embed_tokens": (4, 2), "lm_head": (3,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_says_what_transformers_says(tiny_model, tmp_path, case):
    tied, how = CASES[case]
    check(quantized(tiny(tiny_model, tied=tied), tmp_path / "folder", how))


def test_biases_and_the_compiler(tmp_path):
    """With the operator for rotary embeddings, which writes to q and k in place (see QuantizedLinear's bias in test_lut_cpu.py)."""
    config = Qwen2Config(**(SIZES | {"hidden_size": 128}))
    options = {"enforce_eager": False, "compilation_config": {"custom_ops": ["+rotary_embedding"]}}
    check(quantized(write_model(config, tmp_path / "base"), tmp_path / "folder", {"proj": (4,)}), **options)


@pytest.mark.parametrize(("how", "vocabulary"), [((3,), (4,)), ((4, 8), (8,))], ids=["free levels", "groups"])
def test_two_ranks_share_a_model(tiny_model, tmp_path, monkeypatch, how, vocabulary):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = quantized(tiny(tiny_model, tied=True), tmp_path / "folder", {"proj": how, "embed_tokens": vocabulary})
    check(folder, tensor_parallel_size=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES)
def test_vllm_on_a_gpu(tiny_model, tmp_path, case):
    """With the CUDA kernels and graphs, in 16 bits."""
    tied, how = CASES[case]
    check(quantized(tiny(tiny_model, tied=tied), tmp_path / "folder", how), 0.2, dtype="float16", enforce_eager=False)


EXPORTS = {"awq": 1, "gptq": 0, "compressed-tensors": 1, "compressed-tensors, symmetric": 0}  # and the shift of zero points from the middle


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_vllm_reads_exports(tiny_model, tmp_path, kind, groups):
    """By itself: nothing in them is the plug-in's."""
    base = tiny(tiny_model, intermediate_size=128)
    folder = quantized(base, tmp_path / "folder", {"proj": (4, groups, "dense", EXPORTS[kind])})
    export(Checkpoint.open(folder), base, kind.split(",")[0], tmp_path / "exported")
    check(tmp_path / "exported", 0.05, dtype="float16", like=folder)


class Hub(BaseHTTPRequestHandler):
    """One repository, org/model, with the files of `folder`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        route, name, sha = self.path.partition("?")[0], self.path.rpartition("/")[2], 40 * "a"
        files = [file for file in sorted(self.folder.iterdir()) if "/resolve/" not in route or file.name == name]
        there = files if route.startswith(("/api/models/org/model", f"/org/model/resolve/{sha}/")) else []
        if "/tree/" in route:
            entries = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name} for file in files]
            said = json.dumps(entries).encode()
        elif "/resolve/" in route:
            said = there[0].read_bytes() if there else b""
        else:
            said = json.dumps({"id": "org/model", "sha": sha, "siblings": [{"rfilename": file.name} for file in files]}).encode()
        self.asked.append(f"{self.command} {name}")
        self.send_response(200 if there else 404)
        headers = {"X-Repo-Commit": sha, "ETag": name, "Content-Length": len(said)} | ({} if there else {"X-Error-Code": "EntryNotFound"})
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else said)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


FROM_THE_HUB = "import sys, torch; from test_vllm import answers, engine; torch.save(answers(engine('org/model')), sys.argv[1])"


def test_a_name_of_the_hub(tiny_model, tmp_path):
    """Its weights are fetched once."""
    Hub.folder, Hub.asked = quantized(tiny(tiny_model), tmp_path / "folder", {"proj": (3,)}), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FROM_THE_HUB, str(tmp_path / "answers.pt")]
    try:
        subprocess.run(command, env=os.environ | there | {"PYTHONPATH": str(Path(__file__).parent)}, check=True)
    finally:
        server.shutdown()
        server.server_close()
    assert Hub.asked.count("GET model.safetensors") == 1
    compare(torch.load(tmp_path / "answers.pt"), expected(Hub.folder))


def damage(folder: Path, name: str, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"leanquant": json.dumps(settings)})


Q = "model.layers.1.self_attn.q_proj"
DAMAGES = {
    "NaN": ("quant_grid", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "holds NaN"),
    "rows": ("weight_codes", lambda t: t[:-1].contiguous(), "rows"),
    "codes of other columns": ("weight_codes", lambda t: t[:, :-3].contiguous(), "weight_codes"),
    "levels of other bits": ("quant_grid", lambda t: t[:, :4].contiguous(), "levels a row"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_is_refused(tiny_model, tmp_path, kind):
    folder = quantized(tiny(tiny_model), tmp_path / "folder", {"proj": (3,)})
    tensor, change, said = DAMAGES[kind]
    damage(folder, f"{Q}.{tensor}", change)
    with pytest.raises(ValueError, match=said) as refused:
        engine(folder)
    assert Q in str(refused.value)


def test_what_vllm_cannot_multiply_with_is_refused(tiny_model, tmp_path):
    base = tiny(tiny_model)
    for number, how in enumerate(({"q_proj": None, "proj": (3,)}, {"q_proj": (4, 1), "proj": (4,)})):
        with pytest.raises(ValueError, match="vLLM multiplies with.* as one: load it with LeanQuantModelForCausalLM"):
            engine(quantized(base, tmp_path / str(number), how))
