"""Every family of dense decoders, from a random model of its config class to a quantized file that all readers agree on.

The oracle is transformers: its own model with the dequantized weights, and its own loss. What families bring that others do
not (groups, residual streams, layers' calls) is test_modelutils.py's.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import llama
from conftest import SIZES, write_model
from leanquant import InputError, LeanQuantModelForCausalLM
from leanquant.packing import Checkpoint
from test_cli import transformers_perplexity, whole_model
from test_mixed import dequantized
from test_modelutils import random_ids, stream, whole_logits

FOUR = {"num_hidden_layers": 4}
WINDOW = {"sliding_window": 8}  # of 32 tokens
ALTERNATING = FOUR | WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 2.0, "attention_multiplier": 0.1}
# config class, what it takes besides SIZES, and linears of a layer if they are not seven
FAMILIES = {
    "Llama 2": ("LlamaConfig", {"num_key_value_heads": 4}, 7),
    "Llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}, "tie_word_embeddings": True}, 7),
    "Llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, 7),
    "Mistral": ("MistralConfig", WINDOW, 7),
    "Mistral Large": ("MistralConfig", {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}, 7),
    "Ministral": ("MinistralConfig", ALTERNATING, 7),
    "Qwen 2": ("Qwen2Config", {}, 7),
    "Qwen 2.5": ("Qwen2Config", FOUR | WINDOW | {"use_sliding_window": True, "max_window_layers": 2, "tie_word_embeddings": True}, 7),
    "Qwen 3": ("Qwen3Config", {"head_dim": 32}, 7),
    "Gemma": ("GemmaConfig", {"head_dim": 16}, 7),
    "Gemma 2": ("Gemma2Config", ALTERNATING | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}, 7),
    "Gemma 3": ("Gemma3TextConfig", ALTERNATING, 7),
    "Phi 3": ("Phi3Config", {"pad_token_id": 0}, 4),
    "OLMo 2": ("Olmo2Config", {"pad_token_id": 0}, 7),
    "Nemotron": ("NemotronConfig", {}, 6),
    "SmolLM 3": ("SmolLM3Config", FOUR | {"no_rope_layers": [1, 1, 1, 0], "pad_token_id": 0}, 7),
    "Granite": ("GraniteConfig", GRANITE, 7),
    # and more
    "Phi 2": ("PhiConfig", {}, 6),
    "OLMo": ("OlmoConfig", {}, 7),
    "OLMo 3": ("Olmo3Config", ALTERNATING | {"pad_token_id": 0}, 7),
    "Cohere": ("CohereConfig", {}, 7),
    "Cohere 2": ("Cohere2Config", ALTERNATING, 7),
    "StarCoder 2": ("Starcoder2Config", {}, 6),
    "StableLM": ("StableLmConfig", {}, 7),
    "GLM 4": ("Glm4Config", {"head_dim": 16, "pad_token_id": 0}, 6),
    "EXAONE 4": ("Exaone4Config", ALTERNATING, 7),
    "Seed-OSS": ("SeedOssConfig", {"head_dim": 16, "pad_token_id": 0}, 7),
    "Helium": ("HeliumConfig", {"head_dim": 16, "pad_token_id": 0}, 7),
    "Arcee": ("ArceeConfig", {}, 6),
    "Apertus": ("ApertusConfig", {}, 6),
    "ERNIE 4.5": ("Ernie4_5Config", {"head_dim": 16, "pad_token_id": 0}, 7),
    "HunYuan dense": ("HunYuanDenseV1Config", {"head_dim": 16, "pad_token_id": 0}, 7),
    "GPT-NeoX": ("GPTNeoXConfig", {}, 4),
    "GPT-J": ("GPTJConfig", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 256}, 6),
    "CodeGen": ("CodeGenConfig", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 256}, 4),
    "Falcon": ("FalconConfig", {}, 4),
}
LISTED = list(FAMILIES).index("Granite")  # up to here both a file and a folder are written
OPTIONS = ["--wbits", 4, "--exponent", 4, "--true-sequential", "--act-order", "--percdamp", 0.1, "--nsamples", 4, "--seqlen", 32]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            config, arguments, _ = FAMILIES[family]
            made[family] = write_model(getattr(transformers, config)(**(SIZES | arguments)), tmp_path_factory.mktemp("family"), "float16")
        return made[family]

    return make


def run(*words) -> int:
    return llama.main([str(word) for word in words])


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_saved_and_loaded(base, text_file, tmp_path, family):
    folder, ids = base(family), random_ids(2, 24)
    outs = [tmp_path / "q.safetensors", tmp_path / "folder"][list(FAMILIES).index(family) > LISTED :]
    for out in outs:
        assert run(folder, text_file, *OPTIONS, "--eval", "none", "--save_path", out) == 0
    checkpoint = Checkpoint.open(out)
    layers = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
    assert len(checkpoint.quantized) == layers * FAMILIES[family][2]
    expected, original = logits(dequantized(folder, checkpoint).eval(), ids), whole_logits(folder, ids)
    assert original.std() > 0.1
    assert 1e-3 * original.std() < (expected - original).std() < 0.7 * original.std()
    for model in (
        LeanQuantModelForCausalLM.from_pretrained(folder, outs[0]),
        LeanQuantModelForCausalLM.from_pretrained(out, dequantize="never"),
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32),
    ):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_16_bits_has_transformers_loss(base, text_file, test_text, tmp_path, family):
    folder, report = base(family), tmp_path / "report.json"
    assert run(folder, text_file, "--wbits", 16, "--seqlen", 32, "--eval", test_text, "--report", report) == 0
    found = json.loads(report.read_text())["perplexity"][0]["perplexity"]
    assert found == pytest.approx(transformers_perplexity(whole_model(folder), folder, test_text), rel=1e-5)


def test_a_vision_tower_beside_the_decoder_stays_as_it_is(text_file, tmp_path):
    """Gemma 3 as it is published: its text model is quantized, all else is copied under its name."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=SIZES | ALTERNATING, vision_config=vision)
    folder, out, ids = write_model(config, tmp_path / "model"), tmp_path / "folder", random_ids(2, 24)
    assert run(folder, text_file, *OPTIONS, "--eval", "none", "--save_path", out) == 0
    checkpoint = Checkpoint.open(out)
    assert len(checkpoint.quantized) == 4 * 7 and all(".language_model." in linear for linear in checkpoint.quantized)
    expected = logits(dequantized(folder, checkpoint).eval(), ids)
    for model in (LeanQuantModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)):
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
UNSUPPORTED = {
    "Mamba": ("MambaConfig", SMALL, "conv1d"),
    "Falcon-H1": ("FalconH1Config", SIZES | MAMBA | {"mamba_d_ssm": 128}, "conv1d"),
    "RecurrentGemma": ("RecurrentGemmaConfig", SIZES | {"lru_width": 64, "head_dim": 16, "pad_token_id": 0}, "conv_1d"),
    "RWKV": ("RwkvConfig", SMALL, "time_mix"),
    "GPT-2": ("GPT2Config", {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}, "Conv1D"),
    "CPM-Ant": (
        "CpmAntConfig",
        {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 96},
        "inputs_embeds",
    ),
    "T5": ("T5Config", {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}, "encoder-decoder"),
    "BART": ("BartConfig", {"vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}, "encoder-decoder"),
    "Gemma 3n": ("Gemma3nTextConfig", SIZES | {"head_dim": 16, "vocab_size_per_layer_input": 300}, "an input of its own"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name_before_work_starts(tiny_model, text_file, tmp_path, capsys, monkeypatch, name):
    config, arguments, word = UNSUPPORTED[name]
    folder = shutil.copytree(tiny_model(), tmp_path / "model")  # its weights are not even looked at
    getattr(transformers, config)(**arguments).save_pretrained(folder)
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: pytest.fail(f"{name} was read"))
    assert run(folder, text_file, *OPTIONS, "--eval", "none", "--save_path", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert word in message and "supported" in message


def test_layers_that_share_weights_are_refused(tiny_model, monkeypatch):
    real = AutoModelForCausalLM.from_config

    def from_config(*args, **options):
        model = real(*args, **options)
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    with pytest.raises(InputError, match="layer 1 shares mlp.gate_proj.weight with layer 0"):
        stream(tiny_model())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_layers_that_are_told_about_the_text_are_refused(tiny_model, monkeypatch, batch_size):
    """As by a model that gives each layer embeddings of the tokens: what is noted for one batch would be used for all."""
    model = stream(tiny_model())
    inner, real = model.model.model, type(model.model.model).forward
    told = []

    def forward(input_ids=None, **kwargs):
        for layer in inner.layers:
            layer_forward = layer.forward
            layer.forward = lambda *args, told=layer_forward, **more: told(*args, tokens=input_ids.clone(), **more)
        told.append(1)
        return real(inner, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(inner, "forward", forward)
    ids = random_ids(4, 8)
    ids[:] = ids[0]
    model.embed(ids, batch_size)  # all alike: nothing to object to
    with pytest.raises(InputError, match="depends on the text"):
        model.embed(random_ids(4, 8), batch_size)
    assert told
