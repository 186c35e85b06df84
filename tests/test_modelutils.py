"""A streamed model computes what transformers computes, holds one layer at a time, and refuses what it cannot run.

The oracle is always the whole model in memory, loaded by transformers from the same folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modelutils
from conftest import SIZES, write_model
from leanquant.errors import InputError
from leanquant.packing import Checkpoint
from modelutils import Group

BEHIND_ATTENTION = "post_attention_layernorm"  # what it reads is the residual stream that the attention has written to
LLAMA_LINEARS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
LLAMA_RESIDUALS = [None, "", None, BEHIND_ATTENTION]
LLAMA_GROUPS = [Group(*group) for group in zip(LLAMA_LINEARS, LLAMA_RESIDUALS, strict=True)]
NO_GQA = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
GEMMA3_LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OPT_SIZES = {"vocab_size": 300, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
FALCON_SIZES = {name: NO_GQA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
FALCON_LINEARS = [["self_attention.query_key_value"], ["self_attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]]
OPT_LINEARS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]]
NOWHERE = [None] * 4
# What a family brings that Llama does not: config class, its arguments, the groups of a layer, the residual stream of each.
FAMILIES = {
    "fused linears": (
        "Phi3Config",
        SIZES | {"pad_token_id": 0},
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        LLAMA_RESIDUALS,
    ),
    "biases": ("Qwen2Config", SIZES, LLAMA_LINEARS, LLAMA_RESIDUALS),
    "norms of queries and keys": ("Qwen3Config", SIZES | {"head_dim": 16}, LLAMA_LINEARS, LLAMA_RESIDUALS),
    "a sliding window": ("MistralConfig", SIZES | {"sliding_window": 8}, LLAMA_LINEARS, LLAMA_RESIDUALS),
    "layers called differently": (
        "Gemma3TextConfig",
        SIZES | GEMMA3_LAYERS | {"head_dim": 16, "sliding_window": 8},
        LLAMA_LINEARS,
        NOWHERE,
    ),
    "norms behind attention and mlp": ("Olmo2Config", SIZES | {"pad_token_id": 0}, LLAMA_LINEARS, NOWHERE),
    "scaled outputs": ("GraniteConfig", SIZES | {"residual_multiplier": 0.5}, LLAMA_LINEARS, NOWHERE),
    "parallel attention and mlp": (
        "PhiConfig",
        SIZES,
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
        NOWHERE[:3],
    ),
    "parallel attention and gated mlp": (
        "CohereConfig",
        SIZES,
        [[*LLAMA_LINEARS[0], *LLAMA_LINEARS[2]], LLAMA_LINEARS[1], LLAMA_LINEARS[3]],
        NOWHERE[:3],
    ),
    "learned positions": (  # and tokens in one row, which hides the residual stream
        "OPTConfig",
        OPT_SIZES | {"max_position_embeddings": 256, "word_embed_proj_dim": 64},
        OPT_LINEARS,
        NOWHERE,
    ),
    "narrow embeddings": (  # and norms of the residual stream itself
        "OPTConfig",
        OPT_SIZES | {"max_position_embeddings": 256, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        OPT_LINEARS,
        [None, "", None, None],
    ),
    "layers that return tuples": (
        "FalconConfig",
        FALCON_SIZES,
        [["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"]],
        NOWHERE[:3],
    ),
    "tuples, attention before mlp": ("FalconConfig", FALCON_SIZES | {"parallel_attn": False}, FALCON_LINEARS, LLAMA_RESIDUALS),
    "tuples and a norm after the embeddings": (
        "BloomConfig",
        {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        FALCON_LINEARS,
        LLAMA_RESIDUALS,
    ),
}


def random_ids(n: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 258, (n, T), generator=torch.Generator().manual_seed(seed))


def stream(folder: Path, dtype=torch.float32) -> modelutils.StreamedModel:
    return modelutils.StreamedModel(folder, Checkpoint.open(folder), dtype, torch.device("cpu"))


def whole(folder: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def streamed_logits(model: modelutils.StreamedModel, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    states = model.embed(ids, batch_size)
    for index in range(len(model.layers)):
        with model.layer(index):
            model.advance(index, states)
    with model.head() as logits:
        return torch.cat([logits(batch) for batch in states.batches()])


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("units", [[], ["avx512_bf16", "avx512_fp16"]])
def test_16_bit_activations_follow_transformers(tiny_model, monkeypatch, dtype, units):
    folder, ids = tiny_model("llama"), random_ids(3, 16)
    expected = whole_logits(folder, ids, dtype).float()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True) | {"avx512_f": True})
    model = stream(folder, dtype)
    assert all((type(m) is not torch.nn.Linear) == (not units) for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    found = streamed_logits(model, ids, 3)
    assert found.dtype == dtype
    found, exact = found.float(), whole_logits(folder, ids)
    assert (found - exact).abs().mean() <= 1.5 * (expected - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_give_their_own_logits_and_groups(tmp_path, family):
    config, arguments, linears, residuals = FAMILIES[family]
    folder = write_model(getattr(transformers, config)(**arguments), tmp_path / "model")
    model = stream(folder)
    states = model.embed(random_ids(2, 12), 2)
    with model.layer(1):
        assert model.groups(1, states) == [Group(*group) for group in zip(linears, residuals, strict=True)]
    assert_same_logits(folder)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_groups_are_the_linears_that_read_the_same_input_in_call_order(tiny_model, family):
    model = stream(tiny_model(family, num_hidden_layers=3))
    states = model.embed(random_ids(5, 12), 2)
    for index in range(3):
        with model.layer(index):
            assert model.groups(index, states) == LLAMA_GROUPS
            model.advance(index, states)


# --- what inputs() shows ---------------------------------------------------------------------------------------


def inputs_of_whole_model(folder: Path, ids: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
    """What each linear, norm and layer of the whole model reads, by module path: [n, T, I]."""
    model, seen = whole(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name.split(".")[-1].isdigit() or name.endswith("norm"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].clone()))
    with torch.no_grad():
        for batch in ids.split(batch_size):
            model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def collect(model: modelutils.StreamedModel, index: int, states: modelutils.Stream, groups: list[Group], final=frozenset()):
    """What each of `groups` reads, [n, T, I], and its residual stream; the batches must be those of `states`."""
    batches = [[(X.clone(), residual) for X, residual in found] for found in model.inputs(index, states, groups, final)]
    assert [found[0][0][..., 0].numel() for found in batches] == [batch[..., 0].numel() for batch in states.batches()]
    joined = lambda parts: None if parts[0] is None else torch.cat(parts)  # noqa: E731
    return [tuple(map(joined, zip(*parts, strict=True))) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("wanted", [slice(0, 4), slice(1, 2), slice(2, 4)], ids=["all groups", "one group", "the last two"])
def test_inputs_are_what_the_whole_model_feeds_each_group(tiny_model, wanted):
    folder, ids, groups = tiny_model("llama", num_hidden_layers=3), random_ids(5, 16), LLAMA_GROUPS[wanted]
    expected = inputs_of_whole_model(folder, ids, 2)
    model = stream(folder)
    states = model.embed(ids, 2)
    for index in range(3):
        prefix = f"model.layers.{index}"
        with model.layer(index):
            before = states.hidden.clone()
            seen = collect(model, index, states, groups)
            assert torch.equal(states.hidden, before)
            model.advance(index, states)
        for group, (X, residual) in zip(groups, seen, strict=True):
            for name in group.linears:
                torch.testing.assert_close(X, expected[f"{prefix}.{name}"], rtol=1e-6, atol=1e-6)
            if group.residual is None:
                assert residual is None
            else:
                source = f"{prefix}.{group.residual}".removesuffix(".")
                torch.testing.assert_close(residual, expected[source], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_output_and_residual_make_the_next_state_of_the_stream(tiny_model):
    """What --residual rests on, from the whole model: the sum is what the next norm or layer reads."""
    folder, ids = tiny_model(), random_ids(4, 16)
    expected, model = inputs_of_whole_model(folder, ids, 4), stream(folder)
    states = model.embed(ids, 4)
    with model.layer(0) as layer:
        (X, entering), (Y, between) = collect(model, 0, states, LLAMA_GROUPS[1::2])
        sums = entering + layer.self_attn.o_proj(X), between + layer.mlp.down_proj(Y)
    torch.testing.assert_close(sums[0], expected[f"model.layers.0.{BEHIND_ATTENTION}"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums[1], expected["model.layers.1"], rtol=1e-6, atol=1e-6)


def hooks(model: modelutils.StreamedModel) -> list:
    modules = model.model.modules()
    return [module for module in modules if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)]


def test_inputs_go_no_further_than_needed_and_leave_no_hooks(tiny_model):
    model = stream(tiny_model())
    states, called = model.embed(random_ids(3, 8), 2), []
    with model.layer(0) as layer:
        handle = layer.mlp.gate_proj.register_forward_hook(lambda *_: called.append(1))
        collect(model, 0, states, LLAMA_GROUPS[:2])
        collect(model, 0, states, LLAMA_GROUPS[2:3], {name for linears in LLAMA_LINEARS[:2] for name in linears})
        handle.remove()
        assert not called
        assert not hooks(model)
        next(model.inputs(0, states, LLAMA_GROUPS[3:], {"mlp.gate_proj"}))  # and no more
    assert not hooks(model)


def test_a_changed_weight_changes_what_the_next_group_sees(tiny_model):
    """True-sequential quantization rests on it."""
    model, seen = stream(tiny_model()), []
    states = model.embed(random_ids(2, 8), 2)
    with model.layer(0) as layer:
        for _ in range(2):
            seen.append(collect(model, 0, states, LLAMA_GROUPS[1:2])[0][0])
            layer.self_attn.v_proj.weight.data.mul_(2)
    torch.testing.assert_close(seen[1], 2 * seen[0])


# --- what a stream remembers -----------------------------------------------------------------------------------


def spoil(linear: torch.nn.Linear) -> None:
    """A stand-in for quantization: a weight that differs, in a new tensor."""
    linear.weight = torch.nn.Parameter((4 * linear.weight).round() / 4, requires_grad=False)


def sequential_pass(folder: Path, ids: torch.Tensor, remember: bool, calls: list[str] | None = None) -> list[torch.Tensor]:
    """Every group's input and residual stream and every layer's output where each group is spoilt once it was seen."""
    model, found = stream(folder), []
    states = model.embed(ids, 2)
    for index in range(len(model.layers)):
        final = set()
        with model.layer(index) as layer:
            groups = model.groups(index, states)
            for name, module in layer.named_modules():
                if calls is not None and isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(lambda *_, name=name: calls.append(name))
            for group in groups:
                found += [part for part in collect(model, index, states, [group], final if remember else set())[0] if part is not None]
                for name in group.linears:
                    spoil(layer.get_submodule(name))
                final |= set(group.linears)
            model.advance(index, states)
            found.append(states.hidden.clone())
            assert states.finished == {} and states.weights == {}
    return found


REMEMBERED = ["llama", "parallel attention and mlp", "narrow embeddings", "layers that return tuples", "tuples, attention before mlp"]


@pytest.mark.parametrize("family", REMEMBERED)
def test_finished_children_change_nothing_that_is_seen(tiny_model, tmp_path, family):
    if family == "llama":
        folder = tiny_model()
    else:
        folder = write_model(getattr(transformers, FAMILIES[family][0])(**FAMILIES[family][1]), tmp_path / "model")
    ids = random_ids(5, 12)
    remembered, plain = sequential_pass(folder, ids, True), sequential_pass(folder, ids, False)
    assert len(remembered) >= 8  # two layers, each with three groups and an output
    assert all(torch.equal(a, b) for a, b in zip(remembered, plain, strict=True))


def test_finished_children_are_not_computed_again(tiny_model):
    """In the order of the groups: each linear runs until its child is finished, and once more where its outputs are kept."""
    passes = {True: [], False: []}
    for remember, calls in passes.items():
        sequential_pass(tiny_model(num_hidden_layers=1), random_ids(4, 8), remember, calls)
    count = {remember: {name: calls.count(name) // 2 for name in calls} for remember, calls in passes.items()}  # of two batches
    attention, mlp = [*LLAMA_LINEARS[0], *LLAMA_LINEARS[1]], [*LLAMA_LINEARS[2], *LLAMA_LINEARS[3]]
    assert count[False] == dict(zip(attention + mlp, [4, 4, 4, 3, 2, 2, 1], strict=True))
    assert count[True] == dict(zip(attention + mlp, [2, 2, 2, 1, 2, 2, 1], strict=True))


def test_a_child_is_kept_only_if_all_its_linears_are_final(tiny_model):
    model = stream(tiny_model())
    states = model.embed(random_ids(5, 8), 2)
    with model.layer(0):
        collect(model, 0, states, LLAMA_GROUPS[2:3], set(LLAMA_LINEARS[0]))
        assert states.finished == {}
        collect(model, 0, states, LLAMA_GROUPS[2:3], {*LLAMA_LINEARS[0], *LLAMA_LINEARS[1]})
        assert {name: len(outputs) for name, outputs in states.finished.items()} == {"self_attn": 3}
        before = states.finished["self_attn"]
        collect(model, 0, states, LLAMA_GROUPS[3:], {name for linears in LLAMA_LINEARS for name in linears})
        assert list(states.finished) == ["self_attn"] and states.finished["self_attn"] is before  # the mlp was not left


def test_a_stream_can_pass_other_weights_than_the_layers(tiny_model):
    model, other = stream(tiny_model()), torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) / 8
    states = model.embed(random_ids(5, 8), 2)
    passing = states.twin()
    passing.weights = {"mlp.up_proj.weight": other, "self_attn.q_proj.weight": torch.zeros(64, 64)}
    with model.layer(0) as layer:
        own = layer.mlp.up_proj.weight
        before, shown = collect(model, 0, states, LLAMA_GROUPS), collect(model, 0, passing, LLAMA_GROUPS)
        model.advance(0, passing)
        assert layer.mlp.up_proj.weight is own and not torch.equal(own, other)
        assert passing.weights == {}
        layer.mlp.up_proj.weight.data.copy_(other)
        layer.self_attn.q_proj.weight.data.zero_()
        expected = collect(model, 0, states, LLAMA_GROUPS)
        model.advance(0, states)
    for (X, residual), (Y, also), (Z, _), changed in zip(shown, expected, before, [False, True, True, True], strict=True):
        assert torch.equal(X, Y) and torch.equal(X, Z) != changed
        assert (residual is also is None) or torch.equal(residual, also)
    assert torch.equal(passing.hidden, states.hidden)


def test_a_twin_goes_its_own_way(tiny_model):
    model = stream(tiny_model())
    states = model.embed(random_ids(3, 8), 2)
    before, twin = states.hidden.clone(), states.twin()
    assert torch.equal(twin.hidden, before) and twin.batch_size == states.batch_size
    with model.layer(0):
        collect(model, 0, twin, LLAMA_GROUPS[2:3], {*LLAMA_LINEARS[0], *LLAMA_LINEARS[1]})
        twin.weights["mlp.up_proj.weight"] = torch.zeros(96, 64)
        assert states.finished == {} and states.weights == {}
        model.advance(0, twin)
    assert torch.equal(states.hidden, before) and not torch.equal(twin.hidden, before)


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
    states = model.embed(random_ids(3, 8), 2)
    assert while_embedding[0] == {"model.embed_tokens.weight", "model.norm.weight"}
    assert off_meta(model) == set()
    for index in range(3):
        with model.layer(index) as layer:
            assert off_meta(model) == {f"model.layers.{index}.{name}" for name, _ in layer.named_parameters()}
            model.advance(index, states)
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


def test_layers_that_are_not_linears_are_refused_by_name(tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    message = refusal(stream, write_model(config, tmp_path / "model"))
    assert "layer 0" in message and "Conv1D" in message and "nn.Linear" in message


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


@pytest.mark.parametrize("method", ["aqlm", "bitsandbytes"])
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
    transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4).save_pretrained(broken)
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
    config = (found / "config.json").read_text()
    (found / "config.json").unlink()  # a repository of an adapter, or of GGUF files
    (repository / "snapshots" / ("a" * 40) / "adapter_config.json").write_text(config)
    assert "cannot be reached" in refusal(modelutils.resolve_model, "someone/tiny")


def test_a_hub_repository_without_config_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(modelutils, "where_to_look", lambda _: {})
    assert "someone/adapter has no config.json: give the folder, or hub name" in refusal(modelutils.resolve_model, "someone/adapter")
