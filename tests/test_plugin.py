"""Folders of ours are transformers models: Auto classes, save_pretrained, generate, pipelines, adapters, lm-eval's loader."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import llama
from leanquant import InputError, LeanQuantModelForCausalLM
from leanquant.linear import QuantizedLinear
from leanquant.packing import Checkpoint

KINDS = {
    "non-uniform": ["--wbits", "3", "--exponent", "4"],
    "affine in groups": ["--wbits", "4", "--grid", "minmax", "--groupsize", "32"],
    "first layer only": ["--wbits", "2", "--exponent", "4", "--n_layers", "1"],
}
IDS = torch.arange(20).view(1, -1) + 5


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tiny_model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "folder"
    command = [str(tiny_model(tied=True)), str(text_file), "--nsamples", "2", "--seqlen", "32", "--eval", "none", "--save_path", str(out)]
    assert llama.main([*command, *KINDS[request.param]]) == 0
    return out


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_auto_model_equals_our_loader(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == len(Checkpoint.open(folder).quantized)
    torch.testing.assert_close(logits(model), logits(LeanQuantModelForCausalLM.from_pretrained(folder)), rtol=0, atol=0)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LeanQuantModelForCausalLM])
@pytest.mark.parametrize("form", ["packed", "tiles", "dense"])
def test_save_pretrained_writes_what_was_read(folder, tmp_path, loader, form):
    model = loader.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.prepare(form, torch.float16)
    model.save_pretrained(tmp_path / "again")
    first, second = Checkpoint.open(folder), Checkpoint.open(tmp_path / "again")
    assert first.settings == second.settings
    assert set(second.shapes) <= set(first.shapes)
    for name in second.shapes:
        stored = first.get(name)
        assert torch.equal(second.get(name).to(stored.dtype), stored), name
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(expected), rtol=0, atol=0)


def test_dequantize_gives_a_plain_model(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    looked_up = logits(model)
    for linear in (m for m in model.modules() if isinstance(m, QuantizedLinear)):
        linear.prepare("dense", torch.float32)
    expected = logits(model)
    torch.testing.assert_close(looked_up, expected, rtol=1e-4, atol=1e-4)
    model.dequantize()
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "plain")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "plain"), "quantization_config")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_generate(folder, options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "cache_implementation" in options:
        options = options | {"disable_compile": True}
    torch.manual_seed(0)
    out = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, **options)
    assert out.shape == (1, 25)


def test_pipeline(folder):
    write = pipeline("text-generation", model=str(folder))
    text = write("the river", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("the river")


def test_an_adapter_on_top_learns(folder):
    """What adapters do: a trainable low-rank path beside a frozen linear, its gradients through the quantized layers."""

    class LowRank(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.down = torch.nn.Linear(inner.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, inner.out_features, bias=False)

        def forward(self, x):
            return self.inner(x) + self.up(self.down(x))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    attention = model.model.layers[0].self_attn
    attention.q_proj = adapter = LowRank(attention.q_proj)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_lm_eval_scores_with_its_own_class(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM  # takes seconds to import

    evaluated = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    assert any(isinstance(m, QuantizedLinear) for m in evaluated.model.modules())
    request = Instance(request_type="loglikelihood", doc={}, arguments=("the river", " water"), idx=0)
    (score, _), ids = evaluated.loglikelihood([request])[0], AutoTokenizer.from_pretrained(folder)("the river water")["input_ids"]
    log_p = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.tensor([ids]))[0].log_softmax(1)
    last = len(" water")  # one token a byte
    expected = sum(log_p[at - 1, ids[at]].item() for at in range(len(ids) - last, len(ids)))
    assert abs(score - expected) < 1e-3 * abs(expected)


def test_a_damaged_folder_is_refused_by_the_auto_class_too(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if n.endswith((".quant_grid", ".scale")))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} holds NaN"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_moving_the_model_keeps_its_levels(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(("quant_grid", "scale"))}
    model.to(torch.float32).to(torch.bfloat16)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_tokenizer_comes_along(folder):
    assert AutoTokenizer.from_pretrained(folder)("river")["input_ids"]


def test_peft_trains_adapters_on_top(folder):
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    torch.testing.assert_close(logits(adapted), expected)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


FOLDER_DAMAGE = {
    "a missing norm": lambda t: t.pop("model.norm.weight"),
    "a missing linear": lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.0.mlp.up_proj.")],
    "missing codes": lambda t: t.pop("model.layers.0.mlp.up_proj.weight_codes"),
    "an unknown tensor": lambda t: t.update({"model.extra": torch.ones(2)}),
    "a norm with NaN": lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * float("nan")}),
    "a norm of another size": lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()}),
    "a bias the model lacks": lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGE)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LeanQuantModelForCausalLM])
def test_damaged_folders_are_refused_by_both_loaders(folder, tmp_path, damage, loader):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    settings = Checkpoint.open(folder).settings
    tensors = load_file(broken / "model.safetensors")
    FOLDER_DAMAGE[damage](tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"leanquant": json.dumps(settings)})
    with pytest.raises(InputError, match="norm|up_proj|extra"):
        loader.from_pretrained(broken)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LeanQuantModelForCausalLM])
def test_offloaded_to_disk_or_host(folder, tmp_path, loader):
    """accelerate moves the layers' tensors in and out: nothing of a quantized linear may be left behind."""
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    if loader is AutoModelForCausalLM:
        layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(2)}
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | layers
        options = {"device_map": device_map, "offload_folder": tmp_path / "offload", "offload_buffers": True, "dtype": torch.float32}
        model = loader.from_pretrained(folder, **options)
    else:
        model = cpu_offload(loader.from_pretrained(folder, dequantize="never"), torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["packed", "tiles", "dense"])
def test_load_state_dict_takes_effect_in_every_form(folder, form):
    model, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16) for _ in range(2))
    for module in other.modules():
        if isinstance(module, QuantizedLinear):
            module._levels.mul_(0.5)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.prepare(form, torch.float16)
    model.load_state_dict(other.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.form == form
            x = torch.randn(2, module.in_features).half()
            torch.testing.assert_close(module(x), x @ other.get_submodule(name).weight.half().T, rtol=0.01, atol=0.02)


def test_a_copy_is_equal(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(model), rtol=0, atol=0)


def merged(model, adapters: str):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=adapters))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "safe", "pissa", "olora"])
def test_what_would_be_lost_in_a_quantized_weight_is_refused(folder, how):
    """Adapters write into the weight when they are merged, and some when they begin."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="call model.dequantize"):
        adapted = merged(model, how if how in ("pissa", "olora") else False)
        adapted.merge_adapter() if how == "merge_adapter" else adapted.merge_and_unload(safe_merge=how == "safe")


def test_adapters_are_merged_into_the_dequantized_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    adapted, ids = merged(model, False), torch.arange(12).view(1, -1)
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_can_be_looked_at_and_not_written_to(folder):
    linear = next(m for m in AutoModelForCausalLM.from_pretrained(folder).modules() if isinstance(m, QuantizedLinear))
    weight, plain = linear.weight, linear.packed().dequantize(linear.bits, linear.in_features, linear.weight.dtype).float()
    assert type(weight.float() @ weight.float().T) is torch.Tensor and torch.equal(weight.float(), plain)
    assert torch.equal(torch.empty_like(plain).copy_(weight), plain) and weight.abs().max() > 0 and weight.dtype == linear.weight.data.dtype
    assert len(list(weight)) == linear.out_features and not weight.requires_grad_(False).requires_grad
    torch.testing.assert_close(torch.add(input=weight.float(), other=1), plain + 1)
    for write in (
        lambda w: w.data.add_(1),
        lambda w: w.data.__iadd__(1),
        lambda w: w.detach().mul_(2),
        lambda w: w.__setitem__(0, 0),
        lambda w: w.copy_(plain),
        lambda w: setattr(w, "data", plain),
        lambda w: setattr(linear, "weight", plain),
        lambda w: setattr(linear, "weight", torch.nn.Parameter(plain)),
    ):
        with pytest.raises(ValueError, match="cannot be written to"):
            write(linear.weight)
    assert torch.equal(linear.weight.float(), plain)


# --- what comes back after a save, and what is damaged ---------------------------------------------------------


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, LeanQuantModelForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_model_of_any_type_comes_back(folder, tmp_path, loader, dtype):
    """Levels keep theirs, whatever the rest was cast to."""
    model = loader.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    stored, again = Checkpoint.open(folder), Checkpoint.open(tmp_path / "again")
    levels = [name for name in stored.shapes if name.endswith(".quant_grid")]
    assert all(torch.equal(stored.get(name), again.get(name)) for name in levels)
    for reader in (AutoModelForCausalLM, LeanQuantModelForCausalLM):
        torch.testing.assert_close(logits(reader.from_pretrained(tmp_path / "again", dtype=dtype)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("where", ["a norm", "levels or scales"])
def test_what_waits_on_the_disk_is_checked_too(folder, tmp_path, where):
    shutil.copytree(folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    suffixes = ("input_layernorm.weight",) if where == "a norm" else (".quant_grid", ".scale")
    name = [name for name in sorted(tensors) if name.startswith("model.layers.0") and name.endswith(suffixes)][0]
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk"}
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        tmp_path / "damaged", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    torch.testing.assert_close(logits(load()), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata)
    with pytest.raises(InputError, match=name.removesuffix(".weight").replace(".", "[.]")):
        load()


def test_a_folder_without_metadata_in_its_file_is_read_by_its_config(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    for loader in (AutoModelForCausalLM, LeanQuantModelForCausalLM):
        torch.testing.assert_close(
            logits(loader.from_pretrained(tmp_path / "bare", dtype=torch.float32)), logits_of(folder), rtol=0, atol=0
        )


def logits_of(folder) -> torch.Tensor:
    return logits(LeanQuantModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_what_config_json_says_wrongly_is_not_written_into_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "lying")
    config = json.loads((tmp_path / "lying" / "config.json").read_text())
    config["quantization_config"]["bits"] = 2 if config["quantization_config"]["bits"] != 2 else 4
    (tmp_path / "lying" / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(tmp_path / "lying", dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").settings == Checkpoint.open(folder).settings
    torch.testing.assert_close(logits_of(tmp_path / "again"), logits_of(folder), rtol=0, atol=0)


def test_a_cast_does_not_round_what_the_kernels_read(folder):
    model = LeanQuantModelForCausalLM.from_pretrained(folder, dtype=torch.float32, dequantize="never")
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for linear in linears:
        linear.prepare("tiles", torch.float16)
    before = [None if linear.levels is None else linear.levels.clone() for linear in linears]
    for linear in linears:
        linear.bfloat16().half()
    for linear, levels in zip(linears, before, strict=True):
        assert levels is linear.levels is None or torch.equal(linear.levels, levels)
