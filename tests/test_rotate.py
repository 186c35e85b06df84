"""Rotated copies of models: every family of decoders is either the same function, by transformers, or refused and nothing written."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llama
import rotate
from conftest import SIZES, write_model
from leanquant import LeanQuantModelForCausalLM
from leanquant.packing import Checkpoint
from test_families import FAMILIES
from test_modelutils import random_ids, whole_logits

KEPT = {"Gemma", "Gemma 2", "Gemma 3", "OLMo", "OLMo 2", "OLMo 3", "Nemotron", "Granite", "Phi 2", "Cohere", "Cohere 2", "StarCoder 2"}
KEPT |= {"StableLM", "GLM 4", "EXAONE 4", "GPT-NeoX", "GPT-J", "CodeGen", "Falcon"}  # other norms, or outputs that are scaled


def rotated(*words) -> int:
    return rotate.main([str(word) for word in words])


@pytest.fixture
def model(tmp_path):
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    return write_model(config, tmp_path / "model", "float16")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_same_function_or_refused(tmp_path, capsys, family):
    config, arguments, _ = FAMILIES[family]
    folder, out = write_model(getattr(transformers, config)(**(SIZES | arguments)), tmp_path / "model", "float16"), tmp_path / "out"
    if family in KEPT:
        assert rotated(folder, "--out", out) == 2
        assert "only dense text models can be rotated" in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == [folder]
        return
    assert rotated(folder, "--out", out) == 0
    ids = random_ids(2, 24)
    expected, found = whole_logits(folder, ids), whole_logits(out, ids)
    assert (found - expected).std() < 3e-3 * expected.std()  # weights are rounded to float16, to others
    before, after = Checkpoint.open(folder), Checkpoint.open(out)
    assert set(after.shapes) - set(before.shapes) <= {"lm_head.weight"}
    assert after.get("model.norm.weight").eq(1).all()
    for name in before.shapes:
        if name.endswith("proj.weight"):
            assert not torch.equal(before.get(name), after.get(name))


def test_outliers_are_spread(model, tmp_path):
    """What it is for: a column of large weights no longer takes the whole range of each row."""
    weights = transformers.LlamaForCausalLM.from_pretrained(model)
    weights.model.layers[0].mlp.up_proj.weight.data[:, 5] *= 30
    weights.save_pretrained(model)
    assert rotated(model, "--out", tmp_path / "out") == 0
    peaks = []
    for folder in (model, tmp_path / "out"):
        W = Checkpoint.open(folder).get("model.layers.0.mlp.up_proj.weight").float()
        peaks.append((W.abs().amax(1) / W.square().mean(1).sqrt()).mean())
    assert peaks[1] < 0.6 * peaks[0]


def test_a_rotated_model_is_quantized_like_any_other(model, text_file, tmp_path):
    """A tied model gets a head of its own, which llama.py may move; folders load by themselves."""
    out, quantized = tmp_path / "rotated", tmp_path / "quantized"
    assert rotated(model, "--out", out, "--seed", 3) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert Checkpoint.open(out).get("lm_head.weight").dtype == torch.float16
    options = ["--wbits", 4, "--grid", "affine", "--true-sequential", "--act-order", "--nsamples", 4, "--seqlen", 32, "--eval", "none"]
    assert llama.main([str(word) for word in (out, text_file, *options, "--save_path", quantized)]) == 0
    ids = random_ids(2, 24)
    expected = whole_logits(model, ids)
    for loaded in (
        LeanQuantModelForCausalLM.from_pretrained(quantized),
        AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32),
    ):
        with torch.no_grad():
            assert (loaded(ids).logits - expected).std() < 0.5 * expected.std()
    assert rotated(quantized, "--out", tmp_path / "again") == 2


def test_the_same_seed_gives_the_same_bytes(model, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert rotated(model, "--out", tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("width", [1, 7, 64, 96, 576])
def test_a_rotation_is_orthogonal(width):
    Q = rotate.rotation(width, 0, torch.device("cpu"))
    dense = rotate.rotate(torch.eye(width), Q)
    torch.testing.assert_close(dense @ dense.T, torch.eye(width), rtol=0, atol=1e-5)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate.rotate(x, Q), x @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [64, 4096])
def test_a_power_of_two_is_spread_evenly(width):
    one = torch.zeros(width)
    one[5] = 1
    torch.testing.assert_close(
        rotate.rotate(one[None], rotate.rotation(width, 0, torch.device("cpu")))[0].abs(), torch.full((width,), width**-0.5)
    )


@pytest.mark.parametrize("config", ["MixtralConfig", "Qwen3MoeConfig"])
def test_mixtures_are_refused(tmp_path, capsys, config):
    experts = {"MixtralConfig": {"num_local_experts": 4}, "Qwen3MoeConfig": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16}}
    folder = write_model(getattr(transformers, config)(**SIZES, num_experts_per_tok=2, **experts[config]), tmp_path / "model")
    assert rotated(folder, "--out", tmp_path / "out") == 2
    assert "only dense text models can be rotated" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence(model, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "unfinished.partial").mkdir()
    (tmp_path / "unfinished.partial" / "journal.jsonl").touch()
    for words, message in (
        ((model, "--out", tmp_path / "out.safetensors"), "is a folder, give its name"),
        ((model, "--out", model), "exists: give another --out"),
        ((model, "--out", tmp_path / "taken", "--overwrite"), "other things in it"),
        ((model, "--out", tmp_path / "unfinished"), "an unfinished run of llama.py"),
        ((tmp_path / "gone", "--out", tmp_path / "out"), "neither a model folder nor a hub name"),
        ((model, "--out", tmp_path / "out", "--device", "cuda:99"), "CUDA devices"),
    ):
        assert rotated(*words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "unfinished.partial" / "journal.jsonl").exists()


def test_a_rotated_model_may_be_replaced(model, tmp_path):
    out = tmp_path / "out"
    assert rotated(model, "--out", out) == 0
    first = (out / "model.safetensors").read_bytes()
    assert rotated(model, "--out", out) == 2
    assert (out / "model.safetensors").read_bytes() == first
    assert rotated(model, "--out", out, "--overwrite", "--seed", 1) == 0
    assert (out / "model.safetensors").read_bytes() != first


def spoiled(name: str, monkeypatch) -> None:
    """Have the rotation leave out what lies outside the layers under that name."""
    ends = rotate.rotated_ends

    def without(model, hidden, Q):
        values = ends(model, hidden, Q)
        source = name if name in model.checkpoint else "model.embed_tokens.weight"
        return values | {name: model.checkpoint.get(source).float()}

    monkeypatch.setattr(rotate, "rotated_ends", without)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_the_whole_is_compared_too(model, tmp_path, capsys, monkeypatch, name):
    spoiled(name, monkeypatch)
    assert rotated(model, "--out", tmp_path / "out") == 2
    assert "would compute something else (KL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "visual.projector.weight"])
def test_tensors_of_no_known_use_are_refused(model, tmp_path, capsys, name):
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: torch.zeros(96, 64)}, model / "model.safetensors", metadata={"format": "pt"})
    assert rotated(model, "--out", tmp_path / "out") == 2
    assert f"has no use for the tensor {name}" in capsys.readouterr().err


def test_a_model_with_images_is_refused(tmp_path, capsys):
    """Its projector writes to the stream, too, where no text goes through."""
    text = SIZES | {"model_type": "qwen2", "tie_word_embeddings": False}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_dim": 16, "image_size": 64, "output_channels": 16}
    config = transformers.GotOcr2Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    folder = write_model(config, tmp_path / "model")
    assert rotated(folder, "--out", tmp_path / "out") == 2
    assert "outside its layers" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["awq", "gptq", "compressed-tensors"])
def test_exported_models_are_refused(text_file, tmp_path, capsys, form):
    folder, out = write_model(transformers.LlamaConfig(**SIZES), tmp_path / "model", "float16"), tmp_path / "exported"
    options = ["--wbits", 4, "--grid", "affine", "--groupsize", 32, "--sym", "--nsamples", 4, "--seqlen", 32, "--eval", "none"]
    assert llama.main([str(w) for w in (folder, text_file, *options, "--save_path", tmp_path / "q", "--export", f"{form}:{out}")]) == 0
    capsys.readouterr()
    assert rotated(out, "--out", tmp_path / "rotated") == 2
    assert "already quantized" in capsys.readouterr().err


def test_short_contexts_and_empty_rows(tmp_path):
    """Fewer positions than the tokens to compare on; tokens whose embedding is zero, as a padding token's may be."""
    folder = write_model(transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 32}), tmp_path / "model", "float16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][::2] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert rotated(folder, "--out", tmp_path / "out") == 0


def test_numbers_beyond_float16_are_not_called_damage(model, tmp_path, capsys):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(6e4)
    save_file(
        tensors | {"model.layers.0.self_attn.q_proj.weight": torch.full((64, 64), 5.0).half()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    assert rotated(model, "--out", tmp_path / "out") == 2
    assert "cannot hold once it is rotated: store the model in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "x", "99999999999999999999"])
def test_a_seed_is_checked(model, tmp_path, seed):
    with pytest.raises(SystemExit):
        rotated(model, "--out", tmp_path / "out", "--seed", seed)
