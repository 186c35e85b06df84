"""Decoding by CUDA graphs: a token costs the host one launch, where it is some thousand without, which is what bounds its speed then.

With a static cache `generate` would compile the model, which takes a minute and needs a compiler: a graph takes the compiled model's
place. Not here: the cache and the loop, which are transformers'; kernels.
"""

import warnings
from collections.abc import Iterator
from itertools import chain
from types import MethodType

import torch
from torch import nn
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer

from .errors import first_line
from .experts import Experts

TRIED = 6  # tokens that are decoded in both ways before graphs are used
CLOSE = 0.02  # of logits: the same kernels should give the same


def use_cuda_graphs(model: nn.Module) -> bool:
    """From now on `model.generate` records a decoding step once a call, and replays it, with the static cache that it takes by itself then.

    False, with `model` as it was, where that cannot be: not all of it on one GPU, a cache that is not one of all tokens (sliding windows),
    or a step that asks the GPU which way to go (experts). A few tokens are decoded in both ways first; if they differ, or
    cannot be recorded, a warning says so.
    """
    if not (_is_on_one_gpu(model) and _keeps_all_tokens(model)) or any(isinstance(module, Experts) for module in model.modules()):
        return False
    model.get_compiled_call = MethodType(lambda self, _config: Step(self), model)
    if trouble := _trouble(model):
        del model.get_compiled_call
        warnings.warn(f"decoding without a CUDA graph, which is slower: {trouble}", stacklevel=2)
        return False
    model.generation_config.cache_implementation = "static"
    return True


def _is_on_one_gpu(model: nn.Module) -> bool:
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return len(devices) == 1 and devices.pop().type == "cuda"


def _keeps_all_tokens(model: nn.Module) -> bool:
    """In a static cache whose length is a number on the GPU: other kinds of layers keep it on the host, where a graph does not see it."""
    if model.generation_config.use_cache is False:
        return False
    return _is_of_all_tokens(StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=TRIED))


def _is_of_all_tokens(cache) -> bool:
    return isinstance(cache, StaticCache) and all(type(layer) is StaticLayer for layer in cache.layers)


def _trouble(model: nn.Module) -> str | None:
    """What speaks against graphs, found by decoding with them and without."""
    ids, own = torch.arange(1, 5, device=model.device)[None], model.generation_config
    wanted = {"max_new_tokens": TRIED, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def logits(**how) -> torch.Tensor:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **wanted, **how)
        return torch.stack(found.logits)

    try:
        model.generation_config = GenerationConfig()  # nothing of its own: the likeliest of all tokens, and no end
        plain, graphed = logits(disable_compile=True), logits()
    except Exception as error:  # whatever a model does that a graph cannot hold
        return first_line(error)
    finally:
        model.generation_config = own
    return None if (graphed - plain).norm() <= CLOSE * plain.norm() else f"{type(model).__name__} gives other logits with one"


class Step:
    """The forward pass of one decoding step, for one call of `generate`: the second is recorded, as the first makes what is made late.

    It takes what the model takes. Inputs of other kinds or sizes than the recorded ones, or a cache that has moved (beam search), go to
    the model itself.
    """

    def __init__(self, model: nn.Module):
        self._model, self._calls, self._graph = model, 0, None

    def __call__(self, **inputs):
        self._calls += 1
        if self._calls == 2 and _is_of_all_tokens(inputs.get("past_key_values")):
            self._record(inputs)
        if self._graph is None or _kinds(inputs) != self._kinds:
            return self._model(**inputs)
        for (_, kept), (_, new) in zip(_leaves(self._inputs), _leaves(inputs), strict=True):
            if isinstance(kept, torch.Tensor):
                kept.copy_(new)
        self._graph.replay()
        return type(self._outputs)(**{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in self._outputs.items()})

    def _record(self, inputs: dict) -> None:
        self._kinds = _kinds(inputs)
        self._inputs = _copy(inputs)
        graph, self._outputs = recorded(self._model, self._inputs)
        if all(isinstance(value, torch.Tensor | StaticCache) for value in self._outputs.values()):  # else hidden states of all layers
            self._graph = graph


def _kinds(inputs: dict) -> tuple:
    """What must be as it was for a recorded step to be the same one: all but the values of tensors."""
    kinds = {name: (v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else v for name, v in _leaves(inputs)}
    layers = inputs["past_key_values"].layers
    return kinds, [tensor.data_ptr() for layer in layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]


def _leaves(inputs: dict) -> Iterator[tuple]:
    """Each value with the names that lead to it: some models have a dictionary of masks."""
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield from (((name, *path), leaf) for path, leaf in _leaves(value))
        else:
            yield (name,), value


def _copy(inputs: dict) -> dict:
    """With tensors of its own, and the cache itself."""
    own = {dict: _copy, torch.Tensor: torch.clone}
    return {name: own.get(type(value), lambda other: other)(value) for name, value in inputs.items()}


def recorded(model: nn.Module, inputs: dict) -> tuple:
    """(graph, what `model` returns for `inputs` once the graph is replayed): now nothing is computed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(model.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a streamer may have a thread
        return graph, model(**inputs)
