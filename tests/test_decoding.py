"""Decoding by CUDA graphs: the same tokens as without. Here a graph is emulated; on a GPU it is one."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, MixtralConfig, StaticCache

import llama
from conftest import SIZES
from leanquant import LeanQuantModelForCausalLM, decoding, use_cuda_graphs
from leanquant.experts import split_experts
from leanquant.linear import QuantizedLinear
from test_families import FAMILIES, base  # noqa: F401

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3, "do_sample": False},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "all outputs": {"output_hidden_states": True, "output_scores": True, "return_dict_in_generate": True, "do_sample": False},
}


class Graph:
    """Of what a model does with `inputs`: done on `replay`, not before, in the same memory."""

    replays = 0

    def __init__(self, model, inputs: dict):
        cache = inputs["past_key_values"]
        state = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
        kept = [tensor.clone() for tensor in state]
        self.run, self.outputs = lambda: model(**inputs), model(**inputs)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        self.outputs.logits.fill_(torch.nan)

    def replay(self) -> None:
        Graph.replays += 1
        self.outputs.logits.copy_(self.run().logits)


@pytest.fixture
def emulated(monkeypatch):
    """A CPU counts as a GPU."""
    monkeypatch.setattr(decoding, "_is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(decoding, "recorded", lambda model, inputs: ((graph := Graph(model, inputs)), graph.outputs))
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda self, inputs, config: not config.disable_compile)
    monkeypatch.setattr(Graph, "replays", 0)


def load(folder, device: str = "cpu"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def continued(model, length: int = 12, **how):
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7]], device=model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length, pad_token_id=0, **how)


def assert_same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        return torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.sequences, expected.sequences)
    for step, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_as_without(tiny_model, emulated, way):
    model = load(tiny_model())
    expected = continued(model, **WAYS[way], cache_implementation="static", disable_compile=True)
    assert use_cuda_graphs(model)
    Graph.replays = 0
    assert_same(continued(model, **WAYS[way]), expected)
    # the prompt gives the first token, the first step is not recorded, and each later one is replayed, if it can be
    assert Graph.replays == (0 if way in ("beams", "all outputs") else 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_same_tokens(base, emulated, family):  # noqa: F811
    model, plain = load(base(family)), load(base(family))
    windows_slide = any(layer.is_sliding for layer in StaticCache(config=model.config, max_cache_len=8).layers)
    assert use_cuda_graphs(model) != windows_slide
    Graph.replays = 0
    assert torch.equal(continued(model, do_sample=False), continued(plain, do_sample=False))
    assert Graph.replays == (0 if windows_slide else 10)


def test_calls_of_other_lengths_follow_one_another(tiny_model, emulated):
    model, plain = load(tiny_model()), load(tiny_model())
    assert use_cuda_graphs(model)
    for length in (4, 30, 1, 2, 9):
        assert torch.equal(continued(model, length, do_sample=False), continued(plain, length, do_sample=False))


def test_other_caches_do_without(tiny_model, emulated):
    model, plain = load(tiny_model()), load(tiny_model())
    assert use_cuda_graphs(model)
    Graph.replays = 0
    expected = continued(plain, do_sample=False)
    for how in ({"disable_compile": True}, {"cache_implementation": "dynamic"}, {"use_cache": False}):
        assert torch.equal(continued(model, do_sample=False, **how), expected)
    assert Graph.replays == 0


def test_a_window_that_slides_is_not_recorded(tiny_model, emulated):
    model = load(tiny_model("mistral"))
    assert not use_cuda_graphs(model) and "get_compiled_call" not in vars(model) and not model.generation_config.cache_implementation


def test_a_mixture_whose_experts_are_called_one_by_one_is_not_recorded(emulated):
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None))
    assert use_cuda_graphs(model)  # where they are one
    split_experts(model)
    assert not use_cuda_graphs(model)


def test_what_is_not_on_one_gpu_is_not_recorded(tiny_model):
    assert not use_cuda_graphs(load(tiny_model()))


def fails(model, inputs):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    "recorded, says",
    [
        (fails, "slower: operation not permitted when stream is capturing$"),
        (lambda model, inputs: (SimpleNamespace(replay=lambda: None), Graph(model, inputs).outputs), "gives other logits with one"),
    ],
)
def test_graphs_that_fail_are_not_used(tiny_model, emulated, monkeypatch, recorded, says):
    model = load(tiny_model())
    expected = continued(model, do_sample=False)
    monkeypatch.setattr(decoding, "recorded", recorded)
    with pytest.warns(UserWarning, match=says):
        assert not use_cuda_graphs(model)
    assert "get_compiled_call" not in vars(model)
    assert torch.equal(continued(model, do_sample=False), expected)


class TestOnTheGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_quantized_model_gives_the_same(self, tiny_model, text_file, tmp_path, dtype):
        out, original = tmp_path / "q.safetensors", tiny_model()
        flags = ["--nsamples", "2", "--seqlen", "32", "--eval", "none", "--save_path", str(out), "--wbits", "4", "--exponent", "4"]
        assert llama.main([str(original), str(text_file), *flags]) == 0
        model = LeanQuantModelForCausalLM.from_pretrained(original, out, dtype=dtype, device="cuda")
        assert {linear.form for linear in model.modules() if isinstance(linear, QuantizedLinear)} == {"tiles"}
        expected = continued(model, 100, do_sample=False, cache_implementation="static", disable_compile=True)
        assert use_cuda_graphs(model)
        assert torch.equal(continued(model, 100, do_sample=False), expected)

    @pytest.mark.parametrize("way", WAYS)
    def test_the_same_tokens_as_without(self, tiny_model, way):
        model = load(tiny_model(), "cuda")
        expected = continued(model, **WAYS[way], cache_implementation="static", disable_compile=True)
        assert use_cuda_graphs(model)
        for _ in range(2):
            assert_same(continued(model, **WAYS[way]), expected)

    def test_what_asks_the_gpu_for_something_does_without(self, tiny_model):
        """As mixtures of experts do, whose tokens go where the GPU says; and it works as before."""
        model = load(tiny_model(), "cuda")
        expected = continued(model, do_sample=False)
        hook = model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output.sum().item() and None)
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            assert not use_cuda_graphs(model)
        assert torch.equal(continued(model, do_sample=False), expected)
        hook.remove()
        assert use_cuda_graphs(model)
        assert torch.equal(continued(model, do_sample=False), expected)
