"""Decoding by CUDA graphs: the same tokens as without. Here a graph is emulated; on a GPU it is one."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, GenerationMixin, MixtralConfig, StaticCache

import llama
from conftest import SIZES
from leanquant import LeanQuantModelForCausalLM, decoding, with_cuda_graphs
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
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal")  # a GPU is waited for in these


class Tape(TorchDispatchMode):
    """The operations that torch is asked for in the block, with their tensors; `forbidden` ones fail."""

    def __init__(self, forbidden: tuple = ()):
        super().__init__()
        self.operations, self.forbidden = [], forbidden

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.forbidden):
            raise RuntimeError("called a synchronizing CUDA operation")
        result = function(*args, **kwargs or {})
        self.operations.append((function, args, kwargs or {}, result))
        return result


class Graph:
    """What a model does with `inputs`, as a CUDA graph has it: operations on tensors that stay where they are, done on `replay` and not
    before. No line of the model's is run again."""

    replays = 0

    def __init__(self, model, inputs: dict):
        state = [t for layer in decoding.named_cache(inputs)[1].layers for t in (layer.keys, layer.values, layer.cumulative_length)]
        kept = [tensor.clone() for tensor in state]
        with Tape() as tape:
            self.outputs = model(**inputs)
        self.operations = tape.operations
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        self.outputs.logits.fill_(torch.nan)

    def replay(self) -> None:
        Graph.replays += 1
        for function, args, kwargs, result in self.operations:
            theirs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in theirs:
                    old.copy_(new)


@pytest.fixture
def emulated(monkeypatch):
    """A CPU counts as a GPU."""
    real = GenerationMixin._valid_auto_compile_criteria

    def criteria(model, inputs, config) -> bool:
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = True
        return real(model, inputs, config)

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", criteria)
    monkeypatch.setattr(decoding, "_is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(decoding, "capture_stream", lambda device: None)
    monkeypatch.setattr(decoding, "recorded", lambda model, stream, inputs: ((graph := Graph(model, inputs)), graph.outputs))
    monkeypatch.setattr(decoding, "waiting_forbidden", lambda: Tape(WAITS))
    monkeypatch.setattr(Graph, "replays", 0)


def load(folder, device: str = "cpu"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def continued(generate, length: int = 12, ids=((5, 6, 7),), **how):
    torch.manual_seed(0)
    ids = torch.tensor(ids, device=getattr(generate, "__self__", SimpleNamespace(device=how.pop("device", "cpu"))).device)
    mask = (ids != 0).long()
    return generate(ids, attention_mask=mask, max_new_tokens=length, min_new_tokens=length, pad_token_id=0, **how)


def recording(model):
    """`model.generate` by graphs."""
    generate = with_cuda_graphs(model)
    assert generate != model.generate
    Graph.replays = 0
    return generate


def assert_same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        return torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.sequences, expected.sequences)
    for step, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens_as_without(tiny_model, emulated, way):
    model = load(tiny_model())
    expected, generate = continued(model.generate, **WAYS[way]), recording(model)
    assert_same(continued(generate, **WAYS[way]), expected)
    # the prompt gives the first token, the first step is not recorded, and each later one is replayed, if it can be
    assert Graph.replays == (0 if way in ("beams", "all outputs") else 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_same_tokens(base, emulated, family):  # noqa: F811
    model = load(base(family))
    expected = [continued(model.generate, ids=ids, do_sample=False) for ids in ([[5, 6, 7]], [[0, 0, 9], [5, 6, 7]])]
    if any(layer.is_sliding for layer in StaticCache(config=model.config, max_cache_len=8).layers):
        assert with_cuda_graphs(model) == model.generate
    elif family == "Falcon":  # its steps make an index on the host
        with pytest.warns(UserWarning, match="slower: called a synchronizing CUDA operation"):
            assert with_cuda_graphs(model) == model.generate
    else:
        generate = recording(model)
        assert torch.equal(continued(generate, do_sample=False), expected[0])
        assert torch.equal(continued(generate, ids=[[0, 0, 9], [5, 6, 7]], do_sample=False), expected[1])
        assert Graph.replays == 20


def test_calls_of_other_lengths_follow_one_another(tiny_model, emulated):
    """And know nothing of each other: the cache of a short call is as short as it would be."""
    model, lengths = load(tiny_model()), []
    generate = recording(model)
    length_of = lambda inputs: decoding.named_cache(inputs)[1].layers[0].max_cache_len  # noqa: E731
    model.register_forward_pre_hook(lambda *inputs: lengths.append(length_of(inputs[2])), with_kwargs=True)
    for length in (4, 30, 1, 2, 9):
        assert torch.equal(continued(generate, length, do_sample=False), continued(load(tiny_model()).generate, length, do_sample=False))
        assert lengths[-1] == 2 + length  # the last token is not read again


def test_calls_with_another_cache_do_without(tiny_model, emulated):
    model = load(tiny_model())
    expected, generate = continued(model.generate, do_sample=False), recording(model)
    for how in ({"disable_compile": True}, {"cache_implementation": "dynamic"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(continued(generate, do_sample=False, **how), expected)
    assert Graph.replays == 0


def test_settings_in_a_generation_config_and_another_name(tiny_model, emulated):
    """As the server has them."""
    model, ids = load(tiny_model()), torch.tensor([[5, 6, 7]])
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, generation_config=config)
    model.generate = recording(model)
    assert torch.equal(model.generate(ids, generation_config=config), expected)
    assert Graph.replays == 10 and config.cache_implementation is None
    config.prompt_lookup_num_tokens = 2
    assert torch.equal(model.generate(ids, generation_config=config), expected)
    assert Graph.replays == 10


def test_the_model_stays_as_it_was(tiny_model, emulated, tmp_path):
    """To be saved, copied, and freed without the garbage collector."""
    model = load(tiny_model())
    before, own = set(vars(model)), model.generation_config.to_dict()
    generate = recording(model)
    continued(generate)
    assert set(vars(model)) <= before | {"_previous_max_cache_length"} and model.generation_config.to_dict() == own
    copy.deepcopy(model).save_pretrained(tmp_path)
    gone, _ = weakref.ref(model), gc.collect()
    gc.disable()
    del model, generate
    gc.enable()
    assert gone() is None


def refuses(model, **how) -> None:
    with pytest.warns(UserWarning, **how):
        assert with_cuda_graphs(model) == model.generate


def test_a_window_that_slides_is_not_recorded(tiny_model, emulated):
    model = load(tiny_model("mistral"))
    assert with_cuda_graphs(model) == model.generate


def test_a_mixture_whose_experts_are_called_one_by_one_is_not_recorded(emulated):
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None))
    split_experts(model)
    assert with_cuda_graphs(model) == model.generate


def test_what_is_not_on_one_gpu_is_not_recorded(tiny_model):
    model = load(tiny_model())
    assert with_cuda_graphs(model) == model.generate


def test_a_step_that_waits_is_not_recorded(tiny_model, emulated, monkeypatch):
    model = load(tiny_model())
    monkeypatch.setattr(decoding, "recorded", lambda *_: pytest.fail("it was recorded"))
    model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output.sum().item() and None)
    refuses(model, match="slower: called a synchronizing CUDA operation$")


def fails(*_):
    try:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    except RuntimeError:
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904


@pytest.mark.parametrize(
    "recorded, says",
    [
        (fails, "slower: operation not permitted when stream is capturing$"),
        (lambda model, _, inputs: (SimpleNamespace(replay=lambda: None), Graph(model, inputs).outputs), "gives other logits with one"),
    ],
)
def test_graphs_that_fail_are_not_used(tiny_model, emulated, monkeypatch, recorded, says):
    model = load(tiny_model())
    expected = continued(model.generate, do_sample=False)
    monkeypatch.setattr(decoding, "recorded", recorded)
    refuses(model, match=says)
    assert torch.equal(continued(model.generate, do_sample=False), expected)


def test_a_recording_that_fails_later_is_done_without(tiny_model, emulated, monkeypatch):
    model = load(tiny_model())
    expected, generate = continued(model.generate, do_sample=False), recording(model)
    monkeypatch.setattr(decoding, "recorded", fails)
    with pytest.warns(UserWarning, match="operation not permitted"):
        assert torch.equal(continued(generate, do_sample=False), expected)


def test_a_model_that_generate_would_not_compile_is_not_recorded(tiny_model, emulated):
    model = load(tiny_model())
    model.hf_quantizer = SimpleNamespace(is_compileable=False)
    refuses(model, match="generate has no use for one")


class TestOnTheGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_quantized_model_gives_the_same(self, tiny_model, text_file, tmp_path, dtype):
        out, original = tmp_path / "q.safetensors", tiny_model()
        flags = ["--nsamples", "2", "--seqlen", "32", "--eval", "none", "--save_path", str(out), "--wbits", "4", "--exponent", "4"]
        assert llama.main([str(original), str(text_file), *flags]) == 0
        model = LeanQuantModelForCausalLM.from_pretrained(original, out, dtype=dtype, device="cuda")
        assert {linear.form for linear in model.modules() if isinstance(linear, QuantizedLinear)} == {"tiles"}
        expected = continued(model.generate, 100, do_sample=False, cache_implementation="static", disable_compile=True)
        assert torch.equal(continued(recording(model), 100, device="cuda", do_sample=False), expected)

    @pytest.mark.parametrize("way", WAYS)
    def test_the_same_tokens_as_without(self, tiny_model, way):
        model = load(tiny_model(), "cuda")
        expected = continued(model.generate, **WAYS[way], cache_implementation="static", disable_compile=True)
        generate = recording(model)
        for _ in range(2):
            assert_same(continued(generate, device="cuda", **WAYS[way]), expected)

    def test_a_step_that_waits_is_launched_as_ever(self, tiny_model):
        """It is seen without recording it, which would break more than the recording."""
        model = load(tiny_model(), "cuda")
        expected = [continued(model.generate, do_sample=sample) for sample in (False, True)]
        hook = model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: output.sum().item() and None)
        refuses(model, match="without a CUDA graph, which is slower: called a synchronizing CUDA operation")
        hook.remove()
        for generate in (model.generate, recording(model)):
            for sample in (False, True):
                assert torch.equal(continued(generate, device="cuda", do_sample=sample), expected[sample])
