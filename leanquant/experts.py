"""Mixture-of-experts layers as ordinary linears: one nn.Linear for each projection of each expert.

transformers holds all experts of a layer in two 3-D parameters. `split_experts` puts in their place a module that computes
the same and whose linears can be quantized one by one; `use_model_names` lets a checkpoint be read under that module's names,
however it stores the experts. Routers and what surrounds them stay transformers'. Experts of another kind (with biases,
transposed or interleaved weights, or without a gate) are left as they are.
Legend: E experts, N tokens, k experts a token, D hidden size, M an expert's inner size.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from .packing import SUFFIXES, Checkpoint

# The names of the parameters that hold all experts, and of the linears that take their rows, in order.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# What transformers notes on a module of experts about their layout, and what is understood here.
LAYOUT = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False, "has_post_expert_norm": False}


class Expert(nn.Module):
    """The linears of one expert: D -> M twice, M -> D."""

    def __init__(self, hidden: int, inner: int, activation: Callable, device=None, dtype=None):
        super().__init__()
        self.activation = activation
        linear = lambda rows, columns: nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)  # noqa: E731
        self.gate_proj, self.up_proj, self.down_proj = linear(inner, hidden), linear(inner, hidden), linear(hidden, inner)


class Experts(nn.ModuleList):
    """The experts of one layer. An expert that no token is routed to is not called."""

    def __init__(self, count: int, hidden: int, inner: int, activation: Callable, device=None, dtype=None):
        super().__init__(Expert(hidden, inner, activation, device, dtype) for _ in range(count))

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum [N, D] of what the `chosen` experts [N, k] make of `states` [N, D], with `weights` [N, k].

        An index of E or more stands for no expert. All experts' first linears are called before any of their last.
        """
        out, k, inner = torch.zeros_like(states), chosen.shape[1], {}
        rows = dict(self._rows(chosen))  # of the flattened choice, by expert
        for number, row in rows.items():
            expert, x = self[number], states[row // k]
            inner[number] = expert.activation(expert.gate_proj(x)) * expert.up_proj(x)
        for number, row in rows.items():
            y = self[number].down_proj(inner.pop(number)) * weights.flatten()[row, None]
            out.index_add_(0, row // k, y.to(out.dtype))
        return out

    def _rows(self, chosen: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(expert, where it is chosen), sorted, for the experts that are: one wait for the device in all."""
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self))[: len(self)].tolist()
        start = 0
        for number, count in enumerate(counts):
            if count:
                yield number, order[start : start + count]
            start += count


def split_experts(model: nn.Module) -> None:
    """Replace each module of fused experts in `model` by an `Experts` on the same device; its values are not copied."""
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            count, hidden, inner = module.down_proj.shape
            experts = Experts(count, hidden, inner, module.act_fn, module.down_proj.device, module.down_proj.dtype)
            model.set_submodule(name, experts.train(module.training))


def _is_fused(module: nn.Module) -> bool:
    """Does `module` compute what `Experts` does, from two 3-D parameters?"""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != set(FUSED) or any(getattr(module, name, value) != value for name, value in LAYOUT.items()):
        return False
    (E, D, M), gate_up = parameters["down_proj"].shape, parameters["gate_up_proj"].shape
    gate = getattr(module, "_apply_gate", None)  # transformers' own, unless the class brings another
    return gate_up == (E, 2 * M, D) and getattr(gate, "__module__", None) == "transformers.integrations.moe"


def routers(layer: nn.Module) -> set[str]:
    """The children that decide about the experts of `layer`: those beside them whose weights have a row for each, or a single one."""
    found = set()
    for name, experts in layer.named_modules():
        if isinstance(experts, Experts):
            block = name.rpartition(".")[0]
            for child, module in layer.get_submodule(block).named_children():
                rows = {len(p) for p in module.parameters() if p.ndim > 1}
                if module is not experts and rows and rows <= {1, len(experts)}:
                    found.add(f"{block}.{child}".removeprefix("."))
    return found


def on_routing(layer: nn.Module, route: Callable) -> list:
    """Have `route(name, (chosen, weights))` see what each module of experts of `layer` is told, or return what replaces it. Returns
    the hooks."""

    def before(name):
        def hook(_module, inputs):
            states, *chosen = inputs
            other = route(name, chosen)
            return None if other is None else (states, *other)

        return hook

    found = [(name, module) for name, module in layer.named_modules() if isinstance(module, Experts)]
    return [module.register_forward_pre_hook(before(name)) for name, module in found]


def first_token_to_all(experts: Experts, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A routing [N, E] that calls every expert, with the first token, and none with any other."""
    every = torch.full((len(chosen), len(experts)), len(experts), device=chosen.device)
    every[0] = torch.arange(len(experts), device=chosen.device)
    return every, weights.new_ones(every.shape)


def use_model_names(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Name the tensors of `checkpoint` as `model`, its experts split, does.

    Understood: names that transformers itself changes when it loads the model, experts stored one by one, and fused ones. What
    has no place in the model keeps its name.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    wanted = model.state_dict(keep_vars=True)
    blocks = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    for stored, shape in list(checkpoint.shapes.items()):
        if stored in wanted or stored.endswith(SUFFIXES):
            continue
        name, source = rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
        block, _, leaf = name.rpartition(".")
        if name in wanted and source is None:
            checkpoint.cut(stored, [name], shape)
        elif block in blocks and leaf in FUSED and len(shape) == 3 and shape[1] % len(FUSED[leaf]) == 0:
            rows = shape[1] // len(FUSED[leaf])
            names = [f"{block}.{number}.{linear}.weight" for number in range(shape[0]) for linear in FUSED[leaf]]
            checkpoint.cut(stored, names, (rows, shape[2]))
        elif block in blocks and leaf in FUSED and (linear := _stacked_as(source, converters, leaf)):
            number = next(part for part in reversed(stored.split(".")) if part.isdigit())
            checkpoint.cut(stored, [f"{block}.{number}.{linear}.weight"], shape)


def _stacked_as(source: str | None, converters: list[WeightConverter], leaf: str) -> str | None:
    """Which of an expert's linears is stored under the pattern `source`, if its converter only stacks them to the fused `leaf`."""
    converter = next(c for c in converters if source in c.source_patterns)
    steps = [(type(op), op.dim) for op in converter.operations if hasattr(op, "dim")]
    stacks = steps == [(MergeModulelist, 0), (Concatenate, 1)][: len(FUSED[leaf])] and len(steps) == len(converter.operations)
    return FUSED[leaf][converter.source_patterns.index(source)] if stacks else None
