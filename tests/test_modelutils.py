"""A streamed model computes what transformers computes, holds one layer at a time, and refuses what it cannot run.

The oracle is always the whole model in memory, loaded by transformers from the same folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SIZES, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modelutils
from leanquant.errors import InputError
from leanquant.packing import Checkpoint

LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
NO_GQA = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GEMMA3_LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OPT_SIZES = {"vocab_size": 300, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
# What a family brings that Llama does not: config class, its arguments, the groups of a layer.
FAMILIES = {
    "fused linears": (
        "Phi3Config",
        SIZES | {"pad_token_id": 0},
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    ),
    "biases": ("Qwen2Config", SIZES, LLAMA_GROUPS),
    "norms of queries and keys": ("Qwen3Config", SIZES | {"head_dim": 16}, LLAMA_GROUPS),
    "a sliding window": ("MistralConfig", SIZES | {"sliding_window": 8}, LLAMA_GROUPS),
    "layers called differently": ("Gemma3TextConfig", SIZES | GEMMA3_LAYERS | {"head_dim": 16, "sliding_window": 8}, LLAMA_GROUPS),
    "parallel attention and mlp": (
        "PhiConfig",
        SIZES,
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    ),
    "learned positions": (
        "OPTConfig",
        OPT_SIZES | {"max_position_embeddings": 256, "word_embed_proj_dim": 64},
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    ),
    "narrow embeddings": (
        "OPTConfig",
        OPT_SIZES | {"max_position_embeddings": 256, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    ),
    "layers that return tuples": (
        "FalconConfig",
        {name: NO_GQA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        [["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"]],
    ),
    "tuples and a norm after the embeddings": (
        "BloomConfig",
        {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        [["self_attention.query_key_value"], ["self_attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
    ),
}


def random_ids(n: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 258, (n, T), generator=torch.Generator().manual_seed(seed))


def stream(folder: Path, dtype=torch.float32) -> modelutils.StreamedModel:
    return modelutils.StreamedModel(folder, Checkpoint.open(folder), dtype, torch.device("cpu"))


def whole(folder: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def streamed_logits(model: modelutils.StreamedModel, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    hidden = model.embed(ids, batch_size)
    for index in range(len(model.layers)):
        with model.layer(index):
            model.advance(index, hidden, batch_size)
    with model.head() as logits:
        return torch.cat([logits(batch) for batch in hidden.split(batch_size)])


@torch.no_grad()
def whole_logits(folder: Path, ids: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return whole(folder, dtype)(ids).logits


def assert_same_logits(folder: Path, batch_size: int = 2) -> None:
    ids = random_ids(5, 16)
    expected = whole_logits(folder, ids)
    assert expected.std() > 0.1  # else agreement would mean little
    torch.testing.assert_close(streamed_logits(stream(folder), ids, batch_size), expected, rtol=1e-5, atol=1e-5)


# --- the same numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_logits_equal_those_of_the_whole_model(tiny_model, family, tied, sharded):
    folder = tiny_model(family, tied, sharded)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == sharded
    assert ("lm_head.weight" in Checkpoint.open(folder)) != tied
    assert_same_logits(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_checkpoint_dtype_is_computed_in_float32(tiny_model, dtype):
    folder = tiny_model("llama", dtype=dtype)
    assert set(Checkpoint.open(folder).dtypes.values()) == {{"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[dtype]}
    assert_same_logits(folder)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])  # of 5 sequences: 2 and 3 leave a remainder
def test_batch_size_does_not_matter(tiny_model, batch_size):
    assert_same_logits(tiny_model("llama"), batch_size)


def test_bfloat16_activations_follow_transformers(tiny_model):
    folder, ids = tiny_model("llama"), random_ids(3, 16)
    expected = whole_logits(folder, ids, torch.bfloat16).float()
    found = streamed_logits(stream(folder, torch.bfloat16), ids, 3).float()
    exact = whole_logits(folder, ids)
    assert (found - exact).abs().mean() <= 1.5 * (expected - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_give_their_own_logits_and_groups(tmp_path, family):
    config, arguments, groups = FAMILIES[family]
    folder = write_model(getattr(transformers, config)(**arguments), tmp_path / "model")
    model = stream(folder)
    hidden = model.embed(random_ids(2, 12), 2)
    with model.layer(1):
        assert model.groups(1, hidden) == groups
    assert_same_logits(folder)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_groups_are_the_linears_that_read_the_same_input_in_call_order(tiny_model, family):
    model = stream(tiny_model(family, num_hidden_layers=3))
    hidden = model.embed(random_ids(2, 12), 2)
    for index in range(3):
        with model.layer(index):
            assert model.groups(index, hidden) == LLAMA_GROUPS
            model.advance(index, hidden, 2)


# --- what watch() shows ----------------------------------------------------------------------------------------


def inputs_of_whole_model(folder: Path, ids: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """What each linear of the whole model reads, by module path: [n, T, I]."""
    model, seen = whole(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].clone()))
    with torch.no_grad():
        for batch in ids.split(batch_size):
            model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("wanted", [slice(0, 4), slice(1, 2), slice(2, 4)], ids=["all groups", "one group", "the last two"])
def test_watch_shows_each_group_what_the_whole_model_feeds_it(tiny_model, wanted):
    folder, ids, groups = tiny_model("llama", num_hidden_layers=3), random_ids(5, 16), LLAMA_GROUPS[wanted]
    expected = inputs_of_whole_model(folder, ids, 2)
    model = stream(folder)
    hidden = model.embed(ids, 2)
    for index in range(3):
        seen = [[] for _ in groups]
        with model.layer(index):
            before = hidden.clone()
            model.watch(index, hidden, 2, groups, lambda number, X, seen=seen: seen[number].append(X.clone()))
            assert torch.equal(hidden, before)
            model.advance(index, hidden, 2)
        for group, parts in zip(groups, seen, strict=True):
            assert [len(part) for part in parts] == [2, 2, 1]
            for name in group:
                torch.testing.assert_close(torch.cat(parts), expected[f"model.layers.{index}.{name}"], rtol=1e-6, atol=1e-6)


def test_watch_goes_no_further_than_needed_and_leaves_no_hooks(tiny_model):
    model = stream(tiny_model())
    hidden, called = model.embed(random_ids(3, 8), 2), []
    with model.layer(0) as layer:
        handle = layer.mlp.gate_proj.register_forward_hook(lambda *_: called.append(1))
        model.watch(0, hidden, 2, LLAMA_GROUPS[:2], lambda *_: None)
        handle.remove()
        assert not called
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.model.modules())


def test_a_changed_weight_changes_what_the_next_group_sees(tiny_model):
    """True-sequential quantization rests on it."""
    model, seen = stream(tiny_model()), []
    hidden = model.embed(random_ids(2, 8), 2)
    with model.layer(0) as layer:
        for _ in range(2):
            model.watch(0, hidden, 2, LLAMA_GROUPS[1:2], lambda _, X: seen.append(X.clone()))
            layer.self_attn.v_proj.weight.data.mul_(2)
    torch.testing.assert_close(seen[1], 2 * seen[0])


# --- one layer at a time ---------------------------------------------------------------------------------------


def off_meta(model: modelutils.StreamedModel) -> set[str]:
    """Names of the parameters that hold memory."""
    return {name for name, p in model.model.named_parameters(remove_duplicate=False) if p.device.type != "meta"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_the_part_in_use_holds_weights(tiny_model, monkeypatch, tied):
    model, while_embedding = stream(tiny_model(tied=tied, num_hidden_layers=3)), []
    forward = model._forward
    monkeypatch.setattr(model, "_forward", lambda *a, **k: while_embedding.append(off_meta(model)) or forward(*a, **k))
    assert off_meta(model) == set()
    hidden = model.embed(random_ids(3, 8), 2)
    assert while_embedding[0] == {"model.embed_tokens.weight", "model.norm.weight"}
    assert off_meta(model) == set()
    for index in range(3):
        with model.layer(index) as layer:
            assert off_meta(model) == {f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()}
            model.advance(index, hidden, 2)
        assert off_meta(model) == set()
    with model.head():
        assert off_meta(model) == {"lm_head.weight", "model.norm.weight"}
    assert off_meta(model) == set()


def test_an_error_inside_a_layer_still_frees_it(tiny_model):
    model = stream(tiny_model())
    with pytest.raises(RuntimeError, match="a bug"), model.layer(0):
        raise RuntimeError("a bug")
    assert off_meta(model) == set()


def test_a_layer_reads_its_own_tensors_only(tiny_model, monkeypatch):
    model, read = stream(tiny_model(sharded=True)), []
    get = model.checkpoint.get
    monkeypatch.setattr(model.checkpoint, "get", lambda name: read.append(name) or get(name))
    with model.layer(1):
        pass
    assert read and all(name.startswith("model.layers.1.") for name in read)
    assert len(read) == len(set(read))


# --- refusals --------------------------------------------------------------------------------------------------


def refusal(function, *args) -> str:
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


@pytest.fixture
def broken(tiny_model, tmp_path) -> Path:
    """A copy of the tiny Llama, to be broken."""
    return shutil.copytree(tiny_model(), tmp_path / "broken")


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "config, kind",
    [
        (transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=256), "Conv1D"),
        (transformers.MixtralConfig(**SIZES, num_local_experts=2), "Mixtral"),
    ],
    ids=["gpt2", "mixtral"],
)
def test_layers_that_are_not_linears_are_refused_by_name(tmp_path, config, kind):
    message = refusal(stream, write_model(config, tmp_path / "model"))
    assert "layer 0" in message and kind in message and "nn.Linear" in message


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight"]
)
def test_missing_tensor_is_named(broken, name):
    edit_tensors(broken, lambda tensors: tensors.pop(name))
    assert name in refusal(stream, broken)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_wrong_shape_is_named_with_both_shapes(broken, name):
    shape = load_file(broken / "model.safetensors")[name].shape
    edit_tensors(broken, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    message = refusal(stream, broken)
    assert name in message and str(list(shape)) in message and str([shape[0] - 1, *shape[1:]]) in message


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_model_quantized_by_another_method_is_refused(broken, method):
    edit_config(broken, quantization_config={"quant_method": method, "bits": 4})
    message = refusal(stream, broken)
    assert method in message and "unquantized" in message


def test_unknown_model_type_is_refused(broken):
    edit_config(broken, model_type="nosuchmodel", architectures=["NoSuchModel"])
    assert "config.json" in refusal(stream, broken)


def test_config_that_is_not_json_is_refused(broken):
    (broken / "config.json").write_text('{"model_type": "llama", ')
    assert "config.json" in refusal(stream, broken)


def test_model_that_is_not_a_causal_one_is_refused(broken):
    transformers.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4).save_pretrained(broken)
    assert "causal language model" in refusal(stream, broken)


def test_folder_without_tokenizer_is_refused(broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(modelutils.load_tokenizer, broken)


def test_resolve_returns_a_local_folder_as_it_is(tiny_model):
    assert modelutils.resolve_model(str(tiny_model())) == tiny_model()


def test_folder_without_config_is_refused(broken):
    (broken / "config.json").unlink()
    assert f"{broken} has no config.json" in refusal(modelutils.resolve_model, str(broken))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no/folder", "no-such-folder", "a/b/c"])
def test_path_that_is_neither_folder_nor_hub_name_is_refused(name):
    assert name in refusal(modelutils.resolve_model, name)


def test_file_instead_of_a_folder_is_refused(broken):
    assert "config.json" in refusal(modelutils.resolve_model, str(broken / "config.json"))


def test_hub_name_without_network_is_refused(offline):
    message = refusal(modelutils.resolve_model, "nobody/no-such-model")
    assert "nobody/no-such-model" in message and "network" in message


def test_hub_name_finds_the_cached_snapshot_without_network(tiny_model, offline, tmp_path):
    repository = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(tiny_model(), repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    found = modelutils.resolve_model("someone/tiny")
    assert found == repository / "snapshots" / ("a" * 40)
    assert_same_logits(found)
