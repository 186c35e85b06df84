"""`generate`, faster: decoding by CUDA graphs, and conversations that are not read from the start each time.

A graph: the host launches a whole forward pass at once, where it is some thousand kernels without, which take it longer than the GPU.
With a static cache transformers' `generate` would compile the model, which takes a minute and needs a compiler: a graph takes the
compiled model's place. Not here: the cache and the loop, which are transformers'; kernels.
"""

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

from .errors import first_line
from .experts import Experts

TRIED = 6  # tokens that are decoded in both ways before graphs are used
CLOSE = 0.02  # of logits: the same kernels should give the same
CACHE_NAMES = ("cache", "past_key_values")  # of what models take and give: since transformers 5.24, and before
OWN_WAYS = {  # settings with which caches are others, or tokens are guessed ahead
    *CACHE_NAMES,
    "cache_implementation",
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "use_mtp",
}
ROPES_THAT_GROW = {"dynamic", "longrope"}  # with the text, while what is cached stays as it was


def with_cuda_graphs(model: nn.Module) -> Callable:
    """`model.generate`, but a call records its second decoding step, and replays it for all later ones.

    Itself where that cannot be: not all of `model` on one GPU, a cache that is not one of all tokens (sliding windows), or a step that
    waits for the GPU (experts; rotary embeddings that grow). A few tokens are decoded in both ways first; if they differ, or cannot be
    recorded, a warning says so. Calls with a cache of the caller's, or another model's help, go to `model.generate` too.
    """
    if not _may_be_recorded(model):
        return model.generate
    stream, lock = capture_stream(model.device), threading.Lock()
    if trouble := _trouble(model, stream):
        _warn(trouble)
        return model.generate

    plain = model.generate  # whatever takes its name later

    def generate(*args, **kwargs):
        if _goes_its_own_way(kwargs):
            return plain(*args, **kwargs)
        with lock:
            return _generate(model, plain, lambda: Step(model, stream), *args, **kwargs)

    return generate


def _may_be_recorded(model: nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel) or not _is_on_one_gpu(model) or not _caches_as_usual(model.generation_config):
        return False
    return _keeps_all_tokens(model) and not any(isinstance(module, Experts) for module in model.modules())


def _caches_as_usual(config: GenerationConfig) -> bool:
    return config.use_cache is not False and not any(getattr(config, name, None) for name in OWN_WAYS)


def _goes_its_own_way(settings: dict) -> bool:
    """Does a call say how it caches, or that tokens are guessed ahead?"""
    config = settings.get("generation_config")
    return bool(settings.keys() & OWN_WAYS) or (config is not None and not _caches_as_usual(config))


def _with(settings: dict, **more) -> dict:
    """A call's settings and `more`: in its generation config if it has one, which does not go together with others."""
    if settings.get("generation_config") is None:
        return settings | more
    config = copy.deepcopy(settings["generation_config"])
    config.update(**more)
    return settings | {"generation_config": config}


def _is_on_one_gpu(model: nn.Module) -> bool:
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return len(devices) == 1 and devices.pop().type == "cuda"


def _keeps_all_tokens(model: nn.Module) -> bool:
    try:
        return _is_of_all_tokens(StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=TRIED))
    except Exception:  # models of other kinds have no such cache
        return False


def _is_of_all_tokens(cache) -> bool:
    """With lengths that are numbers on the GPU: other kinds of layers keep them on the host, where a graph does not see them."""
    return isinstance(cache, StaticCache) and not cache.offloading and all(type(layer) is StaticLayer for layer in cache.layers)


def _warn(trouble: str) -> None:
    warnings.warn(f"decoding without a CUDA graph, which is slower: {trouble}", stacklevel=3)


def _generate(model: nn.Module, plain: Callable, step: Callable[[], Callable], *args, **kwargs):
    """`plain`, the model's `generate`, with a static cache, and what `step` returns in the compiled model's place."""
    model.get_compiled_call = lambda _config: step()
    vars(model).pop("_previous_max_cache_length", None)  # no longer a cache than this call's, whatever came before it
    try:
        return plain(*args, **_with(kwargs, cache_implementation="static"))
    finally:
        del model.get_compiled_call


def _trouble(model: nn.Module, stream) -> str | None:
    """What speaks against graphs, found by decoding with them and without."""
    ids, own, steps = torch.arange(1, 5, device=model.device)[None], model.generation_config, []
    wanted = {"max_new_tokens": TRIED, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def recording() -> Step:
        steps.append(Step(model, stream))
        return steps[-1]

    def logits(step: Callable) -> torch.Tensor:
        return torch.stack(_generate(model, model.generate, step, ids, attention_mask=torch.ones_like(ids), **wanted).logits)

    try:
        model.generation_config = GenerationConfig()  # nothing of its own: the likeliest of all tokens, and no end
        plain = logits(lambda: partial(_without_waiting, model))  # a step that waits would break a recording, and CUDA with it
        graphed = logits(recording)
    except Exception as error:  # whatever a model does that a graph cannot hold
        return first_line(error)
    finally:
        model.generation_config = own
    if not any(step.replays for step in steps):
        return next((step.trouble for step in steps if step.trouble), "generate has no use for one")
    return None if (graphed - plain).norm() <= CLOSE * plain.norm() else f"{type(model).__name__} gives other logits with one"


def _without_waiting(model: nn.Module, **inputs):
    with waiting_forbidden():
        return model(**inputs)


class Step:
    """The forward pass of one decoding step, for one call of `generate`: the second is recorded, as the first makes what is made late.

    It takes what the model takes. Inputs of other kinds or sizes than the recorded ones, or a cache that has moved, go to the model itself;
    so do all where recording fails (`trouble`), which computes nothing. `replays` counts the others.
    """

    def __init__(self, model: nn.Module, stream):
        self._model, self._stream = model, stream
        self._calls = self.replays = 0
        self._graph = self.trouble = None

    def __call__(self, **inputs):
        self._calls += 1
        kinds = _kinds(inputs)
        if self._calls == 2 and kinds is not None:
            self._record(inputs, kinds)
        if self._graph is None or kinds != self._kinds:
            return self._model(**inputs)
        new = dict(_leaves(inputs))
        for name, kept in _leaves(self._inputs):
            if isinstance(kept, torch.Tensor):
                kept.copy_(new[name])
        self._graph.replay()
        self.replays += 1
        return type(self._outputs)(**{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in self._outputs.items()})

    def _record(self, inputs: dict, kinds: tuple) -> None:
        self._kinds, self._inputs = kinds, _copy(inputs)
        try:
            graph, self._outputs = recorded(self._model, self._stream, self._inputs)
        except Exception as error:  # memory, above all
            self.trouble = first_line(error.__context__ or error)  # what went wrong, not that a recording did not end well
            _warn(self.trouble)
            return
        if all(isinstance(value, torch.Tensor | StaticCache) for value in self._outputs.values()):
            self._graph = graph
        else:  # hidden states of all layers, say
            self.trouble = f"{type(self._model).__name__} returns more than logits"


def _kinds(inputs: dict) -> tuple | None:
    """What must be as it was for a recorded step to be the same one: all but the values of tensors. None if it cannot be recorded."""
    _, cache = named_cache(inputs)
    if not _is_of_all_tokens(cache):
        return None
    kinds = {name: (v.shape, v.dtype, v.device) if isinstance(v, torch.Tensor) else v for name, v in _leaves(inputs)}
    return kinds, [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]


def named_cache(values: dict) -> tuple:
    """(name, cache) of what a model takes or gives; ("", None) if there is none."""
    return next(((name, values[name]) for name in CACHE_NAMES if values.get(name) is not None), ("", None))


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


# --- conversations ---------------------------------------------------------------------------------------------


def remembering(model: nn.Module) -> Callable:
    """`model.generate` for one call after another, with settings by name: what the last one read or wrote is not read again, as far as
    inputs begin alike.

    `model.generate` itself for models that say how they cache, or whose rotary embeddings change with the length, and for such calls;
    for calls with several sequences or beams too.
    Caches that are not of all tokens (sliding windows, states) are made anew by each call.
    """
    if not isinstance(model, PreTrainedModel) or not _caches_as_usual(model.generation_config) or _ropes(model) & ROPES_THAT_GROW:
        return model.generate
    plain = model.generate  # whatever takes its name later
    kept, seen = {}, []  # the cache by its name, and the tokens that it holds

    def generate(input_ids: torch.Tensor, **settings) -> torch.Tensor:
        nonlocal kept, seen
        if _goes_its_own_way(settings) or not _is_of_one_sequence(model, input_ids, settings):
            return plain(input_ids=input_ids, **settings)
        known, kept = kept, {}  # nothing is kept of a call that is interrupted
        for cache in known.values():
            new = input_ids[0].tolist()
            if surplus := len(seen) - min(_same_at_first(seen, new), len(new) - 1):  # one token at least is read
                cache.crop(-surplus)
        out = plain(input_ids=input_ids, **known, **_with(settings, return_dict_in_generate=True))
        if isinstance(out, torch.Tensor):  # a model with a way of its own
            return out
        (name, cache), tokens = named_cache(out), out.sequences[0].tolist()
        if type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers):
            if cache.get_seq_length() == len(tokens) - 1:  # the last token is written, not read
                kept, seen = {name: cache}, tokens[:-1]
        return out.sequences

    return generate


def _ropes(model: PreTrainedModel) -> set:
    """The types of its rotary embeddings, of which kinds of layers may have their own."""
    ropes = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return {rope["rope_type"] for rope in (ropes, *ropes.values()) if isinstance(rope, dict) and "rope_type" in rope}


def _is_of_one_sequence(model: PreTrainedModel, input_ids: torch.Tensor, settings: dict) -> bool:
    """Beams have a cache each."""
    said = [settings, *(vars(config) for config in (settings.get("generation_config"), model.generation_config) if config is not None)]
    number = lambda name: next((where[name] for where in said if where.get(name) is not None), 1)  # noqa: E731
    return len(input_ids) == number("num_beams") == number("num_return_sequences") == 1


def _same_at_first(one: list, other: list) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- CUDA ------------------------------------------------------------------------------------------------------


def capture_stream(device: torch.device):
    """To record on: one for all calls, since what libraries allocate for a stream stays; of this GPU, which torch's own may not be."""
    return torch.cuda.Stream(device)


def recorded(model: nn.Module, stream, inputs: dict) -> tuple:
    """(graph, what `model` returns for `inputs` once the graph is replayed): now nothing is computed."""
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream(model.device)
    with torch.cuda.stream(current):  # which a recording that fails would not go back to
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # a streamer may have a thread
            return graph, model(**inputs)


@contextlib.contextmanager
def waiting_forbidden() -> Iterator[None]:
    """In the block a torch operation for which the host waits for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all such operations are found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
