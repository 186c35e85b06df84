"""Run a causal language model one decoder layer at a time, straight from its checkpoint.

The model is built on the meta device from its config; a layer gets real weights only while it runs. Which linears
a layer has, which of them read the same input, and what a layer is called with are found by watching, not by name.
No Hessians and no quantization here: the caller gets inputs. Not for encoder-decoder models.
Legend: n sequences, T tokens a sequence, B sequences a batch, D hidden size.
"""

import contextlib
import ctypes
import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from activations import Activations, Place, helper_thread, mapped
from leanquant.errors import InputError, first_line
from leanquant.experts import Experts, first_token_to_all, on_routing, routers, split_experts, use_model_names
from leanquant.foreign import METHODS, json_of
from leanquant.linear import path_in
from leanquant.modeling import where_to_look
from leanquant.packing import Checkpoint

FILES_BESIDE_WEIGHTS = ["*.json", "*.model", "*.jinja", "tokenizer*"]
HUB_FILES = ["*.safetensors", *FILES_BESIDE_WEIGHTS]
NOT_HUB_FILES = ["original/*", "consolidated*"]
# Parameters of glibc's mallopt, and their values in bytes.
M_TRIM_THRESHOLD, KEPT_AT_THE_END = -1, 2**24
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 2**22


def resolve_model(name_or_path: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a model, with a config.json: the path itself, or the hub's `files` in the local cache."""
    path = Path(name_or_path)
    folder = path if path.is_dir() else _download(name_or_path, files)
    if not (folder / "config.json").is_file():
        raise InputError(f"{name_or_path} has no config.json: give the folder, or hub name, that has the model's config and weights")
    if not json_of(folder / "config.json"):
        raise InputError(f"{name_or_path} has a config.json that is no JSON object: get it again")
    return folder


def _download(name: str, files: Sequence[str]) -> Path:
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{name} is neither a model folder nor a hub name: check the path")
    from huggingface_hub import snapshot_download

    where = where_to_look(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=NOT_HUB_FILES, **where))
    except Exception as error:  # the hub's, the network's, the disk's: their libraries have no common ancestor
        raise InputError(f"cannot get {name} from the hub ({first_line(error)}): check the name, the network and your access") from None


def load_tokenizer(folder: Path):
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what lies in it fails in as many ways as there are fields
        raise InputError(f"{folder} has no usable tokenizer ({first_line(error)}): copy its tokenizer files there") from None


def check_seqlen(folder: Path, seqlen: int) -> None:
    """Raise InputError if windows of `seqlen` tokens exceed the context of the model in `folder`."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception:
        return  # who builds the model says what is wrong
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and seqlen > limit:
        raise InputError(f"--seqlen is {seqlen} and the model's context is {limit}: give a smaller one")


def release_memory() -> None:
    """Hand freed memory back to the system: glibc keeps it in fragments, by which the peak would grow, and differ from run to run."""
    with contextlib.suppress(OSError, AttributeError):
        _libc().malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    """Made once: each CDLL has a class of its own, which stays in the heap until all garbage is collected. One for each phase lay between
    what was freed and cut it into ever smaller holes, and the peak grew with the layers."""
    return ctypes.CDLL("libc.so.6")


def steady_memory() -> None:
    """Have glibc map each large block by itself, and give it back once it is free. Left alone it does so with the first layer's only:
    blocks of their sizes come from the heap from then on, the holes they leave differ from layer to layer, and the worst is the peak.
    What is free at the heap's end is kept up to a size, as glibc would do by itself, and `release_memory` gives it back."""
    with contextlib.suppress(OSError, AttributeError):
        _libc().mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        _libc().mallopt(M_TRIM_THRESHOLD, KEPT_AT_THE_END)


class _Stop(Exception):
    """Ends a forward pass as soon as what it was run for has been seen."""


class Group(NamedTuple):
    """Linears of a layer that read the same input.

    residual: the child module whose input is the residual stream onto which the output is added as it is, "" for the
    layer's own input; None if the output goes elsewhere, or the group has several linears.
    """

    linears: list[str]
    residual: str | None = None


class GroupInput(NamedTuple):
    """What a group reads, [B, T, I], and the residual stream it writes to, [B, T, D], if it writes to one."""

    X: torch.Tensor
    residual: torch.Tensor | None


@dataclass
class Stream:
    """Hidden states [n, T, D] on their way through the model; each layer moves them on.

    weights: parameters of the layer that this stream passes instead of the layer's own. finished: outputs of the
    layer's children that can no longer change, one a batch, so that the next pass need not compute them again. routing: the
    experts that each module of experts was last told to use, and their weights, for a stream that is to follow. moved:
    sequences that a pass which was broken off has moved already.
    """

    states: Activations
    batch_size: int
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    finished: dict[str, list] = field(default_factory=dict)
    routing: dict[str, tuple] = field(default_factory=dict)
    moved: int = 0

    @property
    def hidden(self) -> torch.Tensor:
        """All of them, in memory."""
        return self.states.whole()

    def twin(self) -> "Stream":
        return Stream(self.states.twin(), self.batch_size)

    def spans(self) -> list[slice]:
        """The sequences still to be moved, by batches."""
        return self.states.spans(self.batch_size, self.moved)

    def batches(self) -> Iterator[torch.Tensor]:
        """The hidden states of those, on the device."""
        for batch, _ in self.loaded():
            yield batch

    def loaded(self) -> Iterator[tuple[torch.Tensor, tuple]]:
        """A batch at a time: its hidden states, and its outputs of each finished child."""
        spans, finished = self.spans(), list(self.finished.values())

        def load(number: int):
            outputs = (mapped(self.states.recall, child[number]) for child in finished)
            return self.states.read(spans[number]), tuple(outputs)

        return self.states.batches(load, len(spans))

    def forget(self) -> None:
        """Let go of the outputs of finished children."""
        self.finished = {}
        self.states.forget()


def check_patterns(patterns: Iterable[str], names: list[str], option: str) -> None:
    """Raise InputError unless each of `patterns` is a regular expression that matches some of the linears `names` as a whole."""
    for pattern in patterns:
        try:
            hits = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise InputError(f"{option} {pattern} is no regular expression ({error})") from None
        if not hits:
            raise no_such_linear(option, pattern, names)


def no_such_linear(option: str, pattern: str, names: list[str]) -> InputError:
    near = ", ".join(difflib.get_close_matches(pattern.replace("\\", ""), names, 3, 0))
    return InputError(f"{option} {pattern} matches no linear to be quantized by its whole name: they are called {near} and so on")


def cpu_units(dtype: torch.dtype) -> list[str]:
    """What this CPU, x86 or ARM, has to multiply numbers of a 16-bit `dtype` with and to sum them in float32."""
    units = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    found = getattr(torch.cpu, "get_capabilities", dict)()  # which older versions of torch lack
    return [unit for unit in units.get(dtype, ()) if found.get(unit)]


class StreamedModel:
    """A causal LM whose weights stay in the checkpoint. `dtype` is that of weights and activations while running."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device):
        self.folder, self.checkpoint, self.dtype, self.device = folder, checkpoint, dtype, device
        self.config = read_config(folder)
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        except ValueError as error:
            raise InputError(f"{folder} is not a causal language model that transformers knows ({first_line(error)})") from None
        split_experts(self.model)
        self._bare = dict(self.model.named_parameters(remove_duplicate=False))  # without values, to be put back in their place
        use_model_names(checkpoint, self.model)
        self.layers_name, self.layers = find_layers(self.model)
        self.embedding_name = f"{path_in(self.model, self.model.get_input_embeddings())}.weight"
        self.head_name = f"{path_in(self.model, self.model.get_output_embeddings())}.weight"
        if device.type == "cpu" and dtype.itemsize == 2 and not cpu_units(dtype):
            for module in self.model.modules():
                if type(module) is nn.Linear:
                    module.__class__ = _WideLinear
        for buffer_owner in self.model.modules():
            for name, buffer in buffer_owner._buffers.items():
                buffer_owner._buffers[name] = None if buffer is None else buffer.to(device)
        self._calls: dict[tuple[int, int], list] = {}  # (B, T) -> (args, kwargs) of each layer
        self._returns_tuple = False
        self._reader = helper_thread("reader")
        self.check()

    # --- what there is ---

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers_name}.{index}."

    def outside_names(self) -> list[str]:
        """Parameters outside the decoder layers: embeddings, last norm, head."""
        names = (n for n, _ in self.model.named_parameters(remove_duplicate=False))
        return [n for n in names if not n.startswith(self.layers_name + ".")]

    def _source(self, name: str) -> str:
        """The tensor of the checkpoint that parameter `name` is read from: a tied head reads the embeddings."""
        tied = self.config.get_text_config().tie_word_embeddings and name == self.head_name and not self.checkpoint.holds(name)
        return self.embedding_name if tied else name

    @property
    def has_own_head(self) -> bool:
        """Is what gives the logits a linear that is not the embeddings?"""
        own = self.checkpoint.holds(self.head_name) and not self.config.get_text_config().tie_word_embeddings
        return own and isinstance(self.model.get_output_embeddings(), nn.Linear)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """What can be quantized of layer `index`, by its name in the layer: all linears, but those that choose among experts."""
        layer = self.layers[index]
        kept = tuple(f"{name}." for name in routers(layer))
        return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear) and not f"{n}.".startswith(kept)}

    def experts(self, index: int) -> dict[str, str]:
        """The linears of layer `index` that belong to one of several experts, by name: what they have in common with other experts'."""
        blocks = [f"{name}." for name, module in self.layers[index].named_modules() if isinstance(module, Experts)]
        inside = [(name, block) for name in self.linears(index) for block in blocks if name.startswith(block)]
        return {name: block + name.removeprefix(block).partition(".")[2] for name, block in inside}

    def stages(self, index: int, groups: list[Group]) -> list[list[Group]]:
        """The `groups` of layer `index`, those together that do not depend on one another: the same linear of several experts."""
        experts = self.experts(index)
        part = lambda group: experts.get(group.linears[0], group.linears[0])  # noqa: E731
        return [list(stage) for _, stage in itertools.groupby(groups, part)]

    def check(self) -> None:
        """Every tensor the config asks for is in the checkpoint with its shape, and every layer is one we can quantize."""
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise InputError(f"{type(self.model).__name__} takes no embeddings (inputs_embeds) in place of tokens, so it is not supported")
        seen = {}
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)
            for name, parameter in layer.named_parameters():
                if id(parameter) in seen:
                    raise InputError(f"layer {index} shares {name} with layer {seen[id(parameter)]}: such models are not supported")
                self._check_tensor(self.layer_prefix(index) + name, parameter)
            seen |= {id(parameter): index for parameter in layer.parameters()}
        for name in self.outside_names():
            self._check_tensor(self._source(name), self.model.get_parameter(name))

    def _check_layer(self, index: int, layer: nn.Module) -> None:
        """All matrices of the layer are linears', or choose among experts. The largest other one is named."""
        deciding = tuple(f"{name}." for name in routers(layer))
        others = [
            (p.ndim, f"{name}.{leaf} {list(p.shape)} in a {type(module).__name__}")
            for name, module in layer.named_modules()
            if not isinstance(module, nn.Linear) and not f"{name}.".startswith(deciding)
            for leaf, p in module.named_parameters(recurse=False)
            if p.ndim > 1
        ]
        if others:
            worst = max(others, key=lambda other: other[0])[1]
            raise InputError(f"layer {index} holds {worst}: only stacks of nn.Linear can be quantized, so this model is not supported")

    def _check_tensor(self, name: str, parameter: torch.Tensor) -> None:
        if name not in self.checkpoint:
            if not self.checkpoint.is_quantized(name.removesuffix(".weight")):
                raise InputError(f"the checkpoint has no tensor {name}: it does not match its config.json")
        elif self.checkpoint.shapes[name] != tuple(parameter.shape):
            found = list(self.checkpoint.shapes[name])
            raise InputError(f"tensor {name} is {found} where config.json wants {list(parameter.shape)}: do they belong together?")

    # --- weights in and out ---

    def _fill(self, names: list[str]) -> None:
        """Give the named parameters their values on the device."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            shape = tuple(module._parameters[leaf].shape)
            value = self.checkpoint.weight(self._source(name), shape, self.dtype, self.device)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _empty(self, names: list[str]) -> None:
        """Take the values away. New parameters without any would lie in the heap between what a layer frees, and cut it into holes."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            module._parameters[leaf] = self._bare[name]

    @contextlib.contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on the device, for as long as the block lasts. Those of layer `following` are read
        ahead meanwhile."""
        names = [self.layer_prefix(index) + name for name, _ in self.layers[index].named_parameters()]
        self._fill(names)
        if following is not None:
            self._reader.submit(self.checkpoint.read_ahead, self.layer_prefix(following))
        try:
            yield self.layers[index]
        finally:
            self._empty(names)

    # --- running ---

    def _forward(self, on_layer: Callable, **inputs):
        """The model's own forward with `on_layer(index, hidden, args, kwargs)` in place of each layer."""
        first_ndim = []

        def replacement(index: int):
            def forward(hidden, *args, **kwargs):
                first_ndim.append(hidden.ndim)
                if hidden.ndim != first_ndim[0]:  # the model unpacked a tuple: it is of the older convention
                    self._returns_tuple = True
                    raise _Restart
                out = on_layer(index, hidden, args, kwargs)
                return (out,) if self._returns_tuple else out

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = replacement(index)
        try:
            return self.model(use_cache=False, **inputs)
        except _Restart:
            pass
        finally:
            for layer in self.layers:
                del layer.forward
        return self._forward(on_layer, **inputs)

    @torch.no_grad()
    def embed(self, windows: torch.Tensor, batch_size: int, place: Place | None = None, streams: int = 1) -> Stream:
        """The hidden states that enter the first layer, for token `windows` [n, T]; notes each layer's call.

        They wait at `place` (unset: in host memory), as the first of so many streams.
        """
        stream = None
        with self._outside_layers():
            for start in range(0, len(windows), batch_size):
                batch = windows[start : start + batch_size]
                entering = self._record(batch)
                if stream is None:
                    shape = (*windows.shape, entering.shape[-1])
                    place = place or Place("host", self.device)
                    stream = Stream(place.activations(shape, entering.dtype, streams), batch_size)
                stream.states.write(slice(start, start + len(batch)), entering)
        stream.states.commit()
        return stream

    @torch.no_grad()
    def embed_with(self, table: torch.Tensor | None, stream: Stream, windows: torch.Tensor) -> None:
        """Have `stream`, which `embed` made of `windows`, begin again, with another `table` of embeddings [V, D] if it is given."""
        with self._outside_layers(table):
            for rows in stream.spans():
                stream.states.write(rows, self._record(windows[rows]))
        stream.states.commit()

    @contextlib.contextmanager
    def _outside_layers(self, table: torch.Tensor | None = None) -> Iterator[None]:
        """For the block: what runs before the layers has its weights, the embeddings those of `table` if it is given."""
        names = [n for n in self.outside_names() if n != self.head_name]
        self._fill([name for name in names if table is None or name != self.embedding_name])
        if table is not None:
            embedding = self.model.get_input_embeddings()
            embedding._parameters["weight"] = nn.Parameter(table.to(self.device, self.dtype), requires_grad=False)
        try:
            yield
        finally:
            self._empty(names)

    def _record(self, batch: torch.Tensor) -> torch.Tensor:
        """The hidden states of a `batch` of tokens as they enter the first layer; notes what each layer is called with."""
        calls, entering = [], []

        def record(index, states, args, kwargs):
            if index == 0:  # also after a restart
                calls.clear()
                entering[:] = [states]
            calls.append((args, kwargs))
            if index == len(self.layers) - 1:
                raise _Stop
            return states

        with contextlib.suppress(_Stop):
            self._forward(record, input_ids=batch.to(self.device))
        if entering[0].shape[:-1] != batch.shape:
            raise InputError(f"hidden states {list(entering[0].shape)} enter the first layer: only one state a token is supported")
        if not _same_tensors(self._calls.setdefault(tuple(batch.shape), calls), calls):
            raise InputError("the layers are given something besides hidden states that depends on the text: such models are not supported")
        return entering[0]

    @torch.no_grad()
    def halve_batches(self, streams: list[Stream]) -> None:
        """Let `streams` go on with batches of half the size; what their layer's finished children gave is computed again."""
        for stream in streams:
            stream.batch_size = max(1, stream.batch_size // 2)
            stream.forget()
        spans = (span for stream in streams for span in (*stream.spans(), *stream.states.spans(stream.batch_size)))
        shapes = {(span.stop - span.start, streams[0].states.shape[1]) for span in spans}
        with self._outside_layers():
            for shape in shapes - set(self._calls):
                self._record(torch.zeros(shape, dtype=torch.long))

    def run_layer(self, index: int, hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """One batch [B, T, D] through layer `index`, which must hold its weights; those named in `weights` are replaced."""
        args, kwargs = self._calls[tuple(hidden.shape[:2])][index]
        out = functional_call(self.layers[index], weights, (hidden.to(self.device, self.dtype), *args), kwargs)
        self._returns_tuple = isinstance(out, tuple)
        return out[0] if self._returns_tuple else out

    @torch.no_grad()
    def advance(self, index: int, stream: Stream) -> None:
        """Move `stream` through layer `index`. Raises InputError if it leaves the finite numbers."""
        for rows, (batch, finished) in zip(stream.spans(), stream.loaded(), strict=True):
            with self._skipping_finished(index, stream, finished):
                out = self.run_layer(index, batch, stream.weights)
            if not torch.isfinite(out).all():
                where = self._first_not_finite(index, batch, stream)
                raise InputError(f"layer {index} gives non-finite activations in {self.dtype}, {where}: try --dtype float32 or bfloat16")
            stream.states.write(rows, out)
            stream.moved = rows.stop
        stream.states.commit()
        stream.weights, stream.moved = {}, 0
        stream.forget()

    def _first_not_finite(self, index: int, batch: torch.Tensor, stream: Stream) -> str:
        """Which linear of layer `index` is the first to give something that is not finite for `batch`."""
        found = []
        look = lambda name: lambda _module, _inputs, out: None if torch.isfinite(out).all() else found.append(name)  # noqa: E731
        linears = [(name, m) for name, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)]
        handles = [module.register_forward_hook(look(name)) for name, module in linears]
        self.run_layer(index, batch, stream.weights)
        for handle in handles:
            handle.remove()
        return f"first in {found[0]}" if found else "though its linears do not"

    @contextlib.contextmanager
    def _skipping_finished(self, index: int, stream: Stream, outputs: tuple) -> Iterator[None]:
        """For the block: children of the layer that `stream` has finished return `outputs`."""
        children = [self.layers[index].get_submodule(name) for name in stream.finished]
        for child, output in zip(children, outputs, strict=True):
            child.forward = lambda *_, output=output, **__: output
        try:
            yield
        finally:
            for child in children:
                del child.forward

    @torch.no_grad()
    def inputs(
        self, index: int, stream: Stream, groups: list[Group], final: set[str] = frozenset(), leader: Stream | None = None
    ) -> Iterator[list[GroupInput | None]]:
        """Run layer `index` only as far as the inputs of `groups`: a list of them for each batch of `stream`, None for an expert
        without tokens in it.

        final: linears whose weights will not change any more. The outputs of the layer's children that hold only such
        are kept in the stream's memory and not computed again by later passes. leader: a stream that has just shown its inputs
        for the same batch, and whose choice of experts this one follows.
        """
        layer = self.layers[index]
        children = {name for name, _ in layer.named_children()} - set(stream.finished)
        kept = {name: [] for name in children if _is_final(name, set(self.linears(index)), final)}
        for number, (batch, finished) in enumerate(stream.loaded()):
            found, residuals = {}, {"": batch}

            def see(position, found=found, residuals=residuals):
                def before(_module, inputs):
                    source = groups[position].residual
                    found[position] = GroupInput(inputs[0], None if source is None else residuals[source].to(inputs[0]))
                    if len(found) == len(groups):
                        raise _Stop

                return before

            def keep(name):
                return lambda _module, _inputs, output: kept[name].append(mapped(stream.states.keep, output))

            handles = [layer.get_submodule(g.linears[0]).register_forward_pre_hook(see(i)) for i, g in enumerate(groups)]
            handles += on_routing(layer, leader.routing.get if leader else stream.routing.__setitem__)
            for name in {group.residual for group in groups if group.residual}:
                note = lambda _module, inputs, name=name, residuals=residuals: residuals.__setitem__(name, inputs[0])  # noqa: E731
                handles.append(layer.get_submodule(name).register_forward_pre_hook(note))
            handles += [layer.get_submodule(name).register_forward_hook(keep(name)) for name in kept]
            try:
                with contextlib.suppress(_Stop), self._skipping_finished(index, stream, finished):
                    self.run_layer(index, batch, stream.weights)
            finally:
                for handle in handles:
                    handle.remove()
            if number == len(stream.spans()) - 1:
                stream.states.finish()
                stream.finished |= {name: outputs for name, outputs in kept.items() if len(outputs) == number + 1}
            yield [found.get(position) for position in range(len(groups))]

    @torch.no_grad()
    def groups(self, index: int, stream: Stream) -> list[Group]:
        """The linears of layer `index`, those that read the very same input together, in the order they are called.

        One batch of `stream` is watched. A linear writes to the residual stream if what some child of the layer reads, or
        the layer's output, is the sum of its output and of an earlier state of that stream.
        """
        layer, batch, linears = self.layers[index], next(stream.batches()), self.linears(index)
        seen: list[tuple[torch.Tensor, list[str]]] = []
        outputs: dict[str, torch.Tensor | None] = {}  # of each linear called, if it is of the residual stream's shape
        states: list[tuple[str, int, torch.Tensor]] = []  # (child, linears called before, what it reads)

        def enter(name: str):
            def before(_module, inputs):
                if name in outputs:
                    raise InputError(f"layer {index} calls {name} more than once: models that share linears are not supported")
                group = next((names for tensor, names in seen if tensor is inputs[0]), None)
                if group is None:
                    seen.append((inputs[0], group := []))
                group.append(name)

            return before

        def leave(name: str):
            def after(_module, _inputs, output):
                outputs[name] = output.clone() if output.shape == batch.shape else None  # a clone: some add to it in place

            return after

        def note(name: str):
            return lambda _module, inputs: states.append((name, len(outputs), inputs[0])) if inputs else None

        handles = [m.register_forward_pre_hook(enter(name)) for name, m in linears.items()]
        handles += [m.register_forward_hook(leave(name)) for name, m in linears.items()]
        handles += [m.register_forward_pre_hook(note(name)) for name, m in layer.named_children()]
        handles += on_routing(layer, lambda name, told: first_token_to_all(layer.get_submodule(name), *told))
        try:
            out = self.run_layer(index, batch, stream.weights)
        finally:
            for handle in handles:
                handle.remove()
        if missing := sorted(set(linears) - set(outputs)) or (not linears and ["any linear"]):
            raise InputError(f"layer {index} never calls {', '.join(missing)}: models with such layers are not supported")
        residuals = _residual_writers(outputs, batch.to(out), [*states, ("", len(outputs), out)])
        return [Group(names, residuals.get(names[0]) if len(names) == 1 else None) for _, names in seen]

    @torch.no_grad()
    def shared_inputs(self, index: int) -> list[list[str]]:
        """`groups` without weights: the linears of layer `index` in call order, those that read the same input together.

        Two tokens pass the layer as shapes only. What cannot be followed so, as experts cannot, is grouped by module and width, all
        experts' first linears before any of their last.
        """
        linears, seen = self.linears(index), []

        def note(name: str):
            def before(_module, inputs):
                group = next((names for tensor, names in seen if tensor is inputs[0]), None)
                if group is None:
                    seen.append((inputs[0], group := []))
                group.append(name)

            return before

        handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
        with contextlib.suppress(Exception), _tensors_kept(self.layers[index]):  # of a model that decides by values
            hidden, args, kwargs = self._call_of_two_tokens(index)
            self.layers[index](hidden, *args, **kwargs)
        for handle in handles:
            handle.remove()
        found = [names for _, names in seen]
        left = [name for name in linears if not any(name in names for names in found)]
        alike = itertools.groupby(left, lambda name: (name.rpartition(".")[0], linears[name].in_features))
        experts = self.experts(index)
        order = list(dict.fromkeys(experts.get(name, name) for name in left))
        return found + sorted((list(names) for _, names in alike), key=lambda names: order.index(experts.get(names[0], names[0])))

    def _call_of_two_tokens(self, index: int):
        """What layer `index` is called with, on the meta device."""
        calls = []

        def record(_index, states, args, kwargs):
            calls.append((states, args, kwargs))
            if len(calls) == len(self.layers):
                raise _Stop
            return states

        width = self.model.get_input_embeddings().embedding_dim
        with contextlib.suppress(_Stop):
            self._forward(record, inputs_embeds=torch.zeros(1, 2, width, dtype=self.dtype, device=self.device))
        hidden, args, kwargs = calls[index - len(self.layers)]
        to_meta = lambda value: mapped(lambda tensor: tensor.to("meta"), value)  # noqa: E731
        return to_meta(hidden), to_meta(args), {name: to_meta(value) for name, value in kwargs.items()}

    @contextlib.contextmanager
    def head(self, with_gradients: bool = False) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For the block: a function from last hidden states [B, T, D] to logits [B, T, vocabulary]; `with_gradients`: for autograd."""
        names = [n for n in self.outside_names() if n != self.embedding_name]
        self._fill(names)
        last = len(self.layers) - 1

        @torch.set_grad_enabled(with_gradients)
        def logits(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.to(self.device, self.dtype)
            on_layer = lambda index, states, *_: hidden if index == last else states  # noqa: E731
            unread = hidden.new_zeros(*hidden.shape[:2], self.model.get_input_embeddings().embedding_dim)
            return self._forward(on_layer, inputs_embeds=unread).logits

        try:
            yield logits
        finally:
            self._empty(names)

    def head_inputs(self, *streams: Stream) -> Iterator[tuple[GroupInput, ...]]:
        """What the head reads of each batch of each of the `streams`, which have left the last layer. It has its weights meanwhile."""
        found = []

        def see(_module, inputs):
            found.append(GroupInput(inputs[0], None))
            raise _Stop

        with self.head() as logits:
            handle = self.model.get_output_embeddings().register_forward_pre_hook(see)
            try:
                for batches in zip(*(stream.batches() for stream in streams), strict=True):
                    for batch in batches:
                        with contextlib.suppress(_Stop):
                            logits(batch)
                    yield tuple(found)
                    found.clear()
            finally:
                handle.remove()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of the host where an allocation is refused; a host that overcommits kills instead."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_is_input(remedy: str) -> Iterator[None]:
    """For the block: memory that is too small is bad input, with this remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory ({first_line(error)}): {remedy}") from None


def refuse_quantized(model: StreamedModel, name: str) -> None:
    if model.checkpoint.quantized:
        raise InputError(f"{name} is already quantized: give the original model")


def in_smaller_batches(model: StreamedModel, streams: list[Stream], phase: Callable, *args):
    """phase(*args), and again with half the batch if the device runs out of memory, at most twice."""
    for left in (2, 1, 0):
        try:
            return phase(*args)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = streams[0].batch_size
            if not left or size == 1:
                raise InputError(
                    f"{model.device} ran out of memory with batches of {size} sequences: give a smaller --batch_size (--eval_batch_size) "
                    "or --seqlen; llama.py also takes --activations host or disk and a smaller --offload_threshold (--plan shows what fits)"
                ) from None
        torch.cuda.empty_cache()
        model.halve_batches(streams)
        tqdm.write(f"{model.device} ran out of memory: going on with batches of {streams[0].batch_size} sequences instead of {size}")


@contextlib.contextmanager
def _tensors_kept(layer: nn.Module) -> Iterator[None]:
    """After the block, buffers and tensors that modules of `layer` hold are those from before: some move theirs to where they run."""
    tensors = lambda place: {name: value for name, value in place.items() if torch.is_tensor(value)}  # noqa: E731
    before = [(place, tensors(place)) for module in layer.modules() for place in (vars(module), module._buffers)]
    try:
        yield
    finally:
        for place, kept in before:
            place.update(kept)


class _WideLinear(nn.Linear):
    """A linear that multiplies 16-bit numbers in float32, for CPUs without units for them, where that is 3 to 10 times faster.

    Products of such numbers are exact in float32, and the units that other CPUs have sum them in float32 too.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class _Restart(Exception):
    """The forward pass must be run again with the other return convention."""


def _is_final(child: str, linears: set[str], final: set[str]) -> bool:
    """Does `child` hold some of `linears`, all of them in `final`?"""
    held = {name for name in linears if f"{name}.".startswith(f"{child}.")}
    return bool(held) and held <= final


def _residual_writers(outputs: dict[str, torch.Tensor | None], entering: torch.Tensor, states: list) -> dict[str, str]:
    """For each linear whose output is added as it is to the residual stream: where that stream can be read.

    outputs: of the linears, in call order, None where the shape is not the stream's. states: (name of the reader, linears
    called before, tensor), in call order.
    """
    writers, stream, source = {}, entering, ""
    for called, (name, output) in enumerate(outputs.items(), 1):
        later = ((reader, state) for reader, before, state in states if before >= called and torch.is_tensor(state))
        total = None if output is None else stream + output
        reached = next(((reader, state) for reader, state in later if output is not None and torch.equal(state, total)), None)
        if reached:
            writers[name] = source
            source, stream = reached
    return writers


def _same_tensors(first, second) -> bool:
    """Do two lists of calls, nested in the same way, hold equal tensors?"""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    distinct = {(id(a), id(b)): (a, b) for a, b in pairs if torch.is_tensor(a) and a is not b}  # layers share most of them
    return all(torch.equal(a, b) for a, b in distinct.values())


class PlannedModel(StreamedModel):
    """A model of which there is only a config: the checkpoint is taken to hold what the model would have, in `stored` (safetensors'
    name of a dtype)."""

    def __init__(self, config: Path, stored: str, dtype: torch.dtype):
        self._stored = stored
        super().__init__(config, Checkpoint([]), dtype, torch.device("cpu"))

    def check(self) -> None:
        tied = {self.head_name} if self.config.get_text_config().tie_word_embeddings else ()
        for name, parameter in self.model.named_parameters():
            if name not in tied:
                self.checkpoint.shapes[name], self.checkpoint.dtypes[name] = tuple(parameter.shape), self._stored
        super().check()


def read_config(folder: Path):
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{folder}/config.json cannot be used ({first_line(error)})") from None
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{folder} is an encoder-decoder model ({config.model_type}): only stacks of decoder layers are supported")
    if getattr(config.get_text_config(), "hidden_size_per_layer_input", None):
        raise InputError(f"{folder} gives each layer an input of its own ({config.model_type}): such models are not supported")
    # A quantized folder that we read is a plain model here: its weights are dequantized on the way in.
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method")
        if method not in ("leanquant", *METHODS):
            raise InputError(f"{folder} is already quantized ({method}): give the original, unquantized model")
        del config.quantization_config
    return config


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers: the ModuleList as long as the config says."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers: this model type is not supported")
