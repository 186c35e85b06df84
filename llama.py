"""Quantize a causal language model layer by layer and write it as safetensors.

    python llama.py MODEL DATASET --wbits 4 --exponent 4 --true-sequential --act-order --percdamp 0.1 --save_path OUT.safetensors

MODEL is a hub name or a local folder, DATASET a published corpus or a local text file. This file owns the loop over layers and
what a command does around it; flags are in flags.py, the maths is in quant.py and leanquant_grid.py, the model in modelutils.py.
Under torchrun several processes share the work (ranks.py).
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import datautils
import eval_quantized
import hessian
import modelutils
import plan
import quant
from activations import KINDS, Place
from datautils import digest
from flags import Run, parse, quant_config, run_settings
from hessian import Statistics
from journal import ON_THE_WAY, Journal, Saver, files_of, has_result
from leanquant import export, packing
from leanquant.errors import InputError, disk_trouble, first_line
from leanquant.foreign import open_checkpoint
from leanquant_grid import with_middle_zero
from ranks import Ending, RankLost, Ranks
from report import example_row, peak_host_bytes, peak_memory, print_summary, settings_of, write_report


class Phases:
    """Seconds spent in each named phase; an inner phase's time is not counted for the outer one. What was freed
    before an outermost one is given back to the system first."""

    def __init__(self, device: torch.device, seconds: dict[str, float] | None = None):
        self.seconds: dict[str, float] = dict(seconds or {})  # of an earlier run that this one goes on with
        self._device, self._open, self._mark = device, [], 0.0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._book()
        if not self._open:
            modelutils.release_memory()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def _book(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now


# --- the loop --------------------------------------------------------------------------------------------------


def quantize_model(model, ids: torch.Tensor, run: Run, config: quant.QuantConfig, writer, journal: Journal, phases: Phases) -> None:
    """Hand the tensors of the quantized model to `writer`, which the first of several ranks has, going on after the layers that
    `journal` has."""
    count, embeddings = quantized_layers(model, run), packed_embeddings(model, run, config, phases)
    if journal.layers < count:
        quantize_layers(model, range(journal.layers, count), ids, run, config, embeddings, writer, journal, phases)
    run.ranks.part()
    with phases("pack"):
        for tensors in untouched_tensors(model, count, finished_outside(model, run, config)) if run.ranks.is_first else ():
            writer.add(tensors)
        if embeddings and run.ranks.is_first:
            writer.add(embeddings.named(path_of(model.embedding_name)))
    model.checkpoint.check_unchanged()


def quantize_layers(
    model, layers: range, ids: torch.Tensor, run: Run, config: quant.QuantConfig, embeddings, writer, journal: Journal, phases: Phases
) -> None:
    """Quantize `layers` one after the other. A layer is written while the next is computed, which is read while this one is. embeddings:
    what the quantized model begins with, if it is not what the original does."""
    kind, folder = run.ranks.from_first(lambda: (run.activations, str(writer.folder)))
    if (kind == "disk" or run.save_path) and not Path(folder).is_dir():
        raise InputError(f"{folder}, where rank 0 writes, is not there for rank {run.ranks.rank}: give a --save_path that all have")
    with phases("forward"):
        place = Place(kind, run.device, Path(folder), journal.generation, run.ranks)
        mine = ids[run.ranks.rows(len(ids))]
        stream = model.embed(mine, journal.batch_size or run.batch_size, place, streams(config))
        reference = stream.twin() if config.shift > 0 else None
        if embeddings and not journal.layers:
            columns = model.checkpoint.shapes[model.embedding_name][1]
            model.embed_with(embeddings.dequantize(run.vocab_bits, columns, model.dtype), stream, mine)
            if reference:  # once more as well: activations in files are read and written in turn, those of both streams together
                model.embed_with(None, reference, mine)
    live = [stream.states] + ([reference.states] if reference else [])
    journal.restore(live)
    bar = {"desc": "quantizing", "unit": "layer", "ncols": 80, "disable": None if run.ranks.is_first else True}
    with Saver(run.ranks) as saver:
        for index in tqdm(layers, initial=layers.start, total=layers.stop, **bar):
            start = time.perf_counter()
            packed, linears = quantize_layer(model, index, stream, reference, run, config, phases, saver)
            is_last, head = index == layers.stop - 1, {}
            if is_last and finished_outside(model, run, config):
                head, rows = finished_head(model, stream, reference, run, config, phases)
                linears += rows
            ending = {"rows": linears, "seconds": dict(phases.seconds), "live": live, "is_last": is_last}
            entry = partial(journal.add, index + 1, **ending, batch_size=stream.batch_size)
            with phases("load"):  # what is read is read now: files may be gone when it is written
                rest = head | rest_of_layer(model, index, packed) if writer else {}
                model.checkpoint.check_unchanged()  # before any of it counts as finished
            saver.finish(save_layer, {model.layer_prefix(index) + name: linear for name, linear in packed.items()}, rest, writer, entry)
            loss, seconds = sum(row["loss"] or 0 for row in linears if row["layer"] is not None), time.perf_counter() - start
            tqdm.write(f"layer {index + 1}/{layers.stop}  loss {loss:.4g}  {seconds:.1f} s  peak {peak_memory(run.device)}")
            for row in linears[-1:] if linears and linears[-1]["layer"] is None else ():
                tqdm.write(f"{row['linear']}  loss {row['loss'] or math.nan:.4g}  {row['seconds']:.1f} s of these")
        with phases("save"):
            saver.wait()


def quantize_layer(model, index: int, stream, reference, run: Run, config: quant.QuantConfig, phases: Phases, saver: Saver):
    """Quantize layer `index` and move `stream` through it, and `reference`, the unquantized model's, through the original.

    Returns the layer's linears as they will be stored, by name, packed by `saver`'s thread, and a row per linear.
    """
    packed, rows, done = {}, [], set()
    following = index + 1 if index + 1 < quantized_layers(model, run) else None
    both = [stream, reference] if reference else [stream]
    with contextlib.ExitStack() as stack:
        with phases("load"):
            layer = stack.enter_context(model.layer(index, following))
        with phases("forward"):
            found = run.ranks.from_first(lambda: modelutils.in_smaller_batches(model, both, model.groups, index, stream))
            groups = [modelutils.Group(*group) for group in found]
        for stage in stages(model, index, groups, run, config):
            wanted = [group for group in (without_skipped(model, index, group, run, config) for group in stage) if group.linears]
            seen = (model, index, stream, reference, wanted, done, run, config, phases)
            statistics = modelutils.in_smaller_batches(model, both, collect_statistics, *seen) if wanted else []
            for group, total in zip(wanted, statistics, strict=True):
                share_statistics(f"layer {index}: the input of {', '.join(group.linears)}", total, run.ranks, phases)
            for group in wanted:
                for name, grid, codes, row in quantize_group(model, index, group, statistics.pop(0), run, config, phases):
                    packed[name] = saver.begin(pack_linear, codes, grid, config, run.packing) if run.ranks.is_first else None
                    replace_weight(layer.get_submodule(name), name, codes, grid, reference)
                    rows.append(row | {"layer": index})
            done |= {name for group in stage for name in group.linears}
        with phases("save"):
            saver.wait()  # what is saved of the layer before are the activations that move now
        if reference:
            with phases("reference forward"):
                modelutils.in_smaller_batches(model, both, model.advance, index, reference)
        with phases("forward"):
            modelutils.in_smaller_batches(model, both, model.advance, index, stream)
    return packed, rows


def stages(model, index: int, groups: list, run: Run, config: quant.QuantConfig) -> list[list]:
    """The `groups` of layer `index` in lists to be quantized after one pass each: what depends on no other, up to a limit; without
    --true-sequential all at once."""
    if not run.true_sequential:
        return [groups]

    def size(group) -> int:
        weights = [model.layers[index].get_submodule(name).weight for name in group.linears]
        residual = config.residual and group.residual is not None
        return hessian.statistics_size(sum(map(len, weights)), weights[0].shape[1], config.shift > 0, residual)

    return [part for stage in model.stages(index, groups) for part in hessian.at_a_time(stage, size)]


def without_skipped(model, index: int, group, run: Run, config: quant.QuantConfig):
    """`group` without what --skip names."""
    kept = [name for name in group.linears if bits_of(model.layer_prefix(index) + name, run, config.bits) < 16]
    return group._replace(linears=kept)


def bits_of(name: str, run: Run, bits: int) -> int:
    """What the linear `name` is quantized to, by its full name: `bits`, or what --bits_for says; 16 if it is skipped."""
    choices = (*((pattern, 16) for pattern in run.skip), *run.bits_for)
    return next((chosen for pattern, chosen in choices if compiled(pattern).fullmatch(name)), bits)


@functools.cache
def compiled(pattern: str) -> re.Pattern:
    """Of a mixture there may be more than `re` remembers."""
    return re.compile(pattern)


def replace_weight(linear: torch.nn.Linear, name: str, codes: torch.Tensor, grid: quant.Grid, reference) -> None:
    """Give `linear` its quantized weight; `reference` goes on passing the original one."""
    original, linear.weight = linear.weight, None
    if reference:
        reference.weights[name + ".weight"] = original
    weight = quant.dequantize(codes, grid.levels, original.dtype)
    linear.weight = torch.nn.Parameter(weight.to(original.device), requires_grad=False)


def collect_statistics(model, index: int, stream, reference, groups: list, done: set, run: Run, config, phases: Phases) -> list:
    """One pass through layer `index` as far as `groups` need: sums of the products of each group's input, over this rank's tokens."""
    layer, sums = model.layers[index], []
    for group in groups:
        weights = [layer.get_submodule(name).weight for name in group.linears]
        residual = config.residual and group.residual is not None
        sums.append(Statistics(weights, reference is not None, residual, hessian_device(weights[0].shape[1], run)))
    theirs = None
    with phases("forward"):
        original = model.inputs(index, reference, groups, done, leader=stream) if reference else None
        for ours in model.inputs(index, stream, groups, done):
            if original:
                with phases("reference forward"):
                    theirs = next(original)
            with phases("hessian"):
                for number, total in enumerate(sums):
                    if ours[number]:
                        total.add(ours[number], theirs and theirs[number])
    return sums


def share_statistics(what: str, total: Statistics, ranks: Ranks, phases: Phases) -> None:
    """Make the sums of one rank the means of all. `what` they are about."""
    with phases("hessian"):
        ranks.sum_(*total.sums())
        total.tokens = ranks.total(total.tokens)
    if not total.is_finite():
        raise InputError(f"{what} is not finite: try --dtype float32 or bfloat16")
    total.divide()


def streams(config: quant.QuantConfig) -> int:
    """The quantized model's activations, and with --shift the unquantized model's."""
    return 2 if config.shift > 0 else 1


def hessian_device(width: int, run: Run) -> torch.device:
    """Where a Hessian of this width lives: beyond --offload_threshold on --hessian_device, unset the second GPU, or the CPU where
    there is none."""
    if width < run.offload_threshold:
        return run.device
    if run.hessian_device or run.device.type == "cpu":
        return run.hessian_device or run.device
    return run.ranks.second_device(run.device)


def quantize_group(model, index: int, group, statistics: Statistics, run: Run, config: quant.QuantConfig, phases: Phases):
    """Quantize the linears that share `statistics` (overwritten), each rank its rows. Yields (name, grid, codes, report row)."""
    factor = factorize(model, index, group, statistics, run.ranks, config, phases)
    places = rows_of(model, index, group.linears)
    for its_config, names in stacks(model, index, group.linears, run, config):
        start, sizes = time.perf_counter(), [len(places[name]) for name in names]
        stacked = torch.cat([torch.arange(places[name].start, places[name].stop) for name in names])
        mine = run.ranks.rows(sum(sizes))
        matrices = targets(model, index, names, mine, stacked[mine], statistics, factor, its_config, phases)
        pieces = list(map(lambda W: quantize_weights(W, factor, its_config, phases), matrices))  # noqa: C417 (which lets go of W in time)
        grids, codes, losses = zip(*pieces, strict=True)
        grid, codes, losses = quant.Grid.joined(grids), torch.cat(codes), torch.cat(losses)
        with phases("solve"):
            grid, codes, losses = (run.ranks.gather_rows(part, sum(sizes)) for part in (grid, codes, losses))
        seconds = (time.perf_counter() - start) / len(codes)
        for name, its_codes, loss, its_grid in zip(names, codes.split(sizes), losses.split(sizes), grid.split(sizes), strict=True):
            row = {"linear": name, "loss": None if factor is None else loss.sum().item(), "seconds": seconds * len(its_codes)}
            row |= {"bits": its_config.bits, "tokens": statistics.tokens}
            if factor is not None and (shown := shown_row(model, index, name, loss, run)) is not None:
                row["example"] = example_row(model.checkpoint, f"{model.layer_prefix(index)}{name}.weight", shown, its_grid, factor)
            if factor is None or factor.percdamp != config.percdamp:
                row["percdamp_used"] = factor.percdamp if factor else "none: rounded to nearest"
            yield name, its_grid, its_codes, row


def rows_of(model, index: int, linears: list[str]) -> dict[str, range]:
    """Which rows each of the `linears` has where all are stacked."""
    ends = list(itertools.accumulate(len(model.layers[index].get_submodule(name).weight) for name in linears))
    return {name: range(start, stop) for name, start, stop in zip(linears, [0, *ends], ends, strict=False)}


def factorize(model, index: int, group, statistics: Statistics, ranks: Ranks, config: quant.QuantConfig, phases: Phases):
    """The factor of what `statistics` (overwritten) say, or None, with a warning, where they say too little."""
    warn = warnings.warn if ranks.is_first else lambda *_, **__: None
    names = ", ".join(group.linears)
    least = quant.LEAST_TOKENS * len(statistics.H)
    if group.linears[0] in model.experts(index) and statistics.tokens < least:
        warn(f"layer {index}: {names} saw {statistics.tokens} tokens, fewer than {least}: rounding to nearest", stacklevel=2)
        return None
    with phases("factorization"):
        factor = common_factor(statistics.H, config, ranks)
    if factor is None:
        warn(f"layer {index}: the Hessian of {names} cannot be factorized: rounding to nearest", stacklevel=2)
    elif factor.percdamp != config.percdamp:
        warn(f"layer {index}: the Hessian of {names} was damped with {factor.percdamp:g} instead of --percdamp", stacklevel=2)
    return factor


def common_factor(H: torch.Tensor, config: quant.QuantConfig, ranks: Ranks) -> hessian.Factor | None:
    """The factor of `H` [I, I] (overwritten), the same on every rank, or None if it has none. Rank 0 makes it and the others get it.

    They would have to wait for their own as long. Where ranks share a machine's cores, one factorization takes a share of the time of
    several; copying I^2 numbers is half of what summing H is, against I^3 operations.
    """
    factor = None
    if ranks.is_first:
        with contextlib.suppress(hessian.NotPositiveDefinite):
            factor = hessian.factorize(H, config.percdamp, config.act_order)
    percdamp = ranks.from_first(lambda: factor and factor.percdamp)
    if percdamp is None:
        return None
    if factor is None:
        vectors = (torch.empty(len(H), dtype=dtype, device=H.device) for dtype in (H.dtype, torch.int64, torch.bool))
        factor = hessian.Factor(H, *vectors, percdamp)
    ranks.copy_first_(factor.square, factor.diagonal, factor.order, factor.dead)
    return factor


def targets(model, index: int, names: list[str], rows: slice, summed: torch.Tensor, statistics: Statistics, factor, config, phases):
    """What is to be quantized in place of `rows` of the stacked linears `names`, in pieces of rows [O, I] in float32. `summed`: where
    those rows are among the ones that `statistics` are about."""
    for piece in quant.row_pieces(rows.stop - rows.start, len(statistics.H)):
        with phases("load"):
            W = read_weights(model, index, names, slice(rows.start + piece.start, rows.start + piece.stop))
        if factor is not None:
            with phases("target") if config.shift else contextlib.nullcontext():
                W = quant.target(W, statistics, factor, config.shift, summed[piece])
        yield W
        del W


def quantize_weights(W: torch.Tensor, factor, config: quant.QuantConfig, phases: Phases):
    """The recipe for some rows, `W` [O, I] (docs/design.md, How it works). Returns a Grid, codes and the loss of each row."""
    with phases("grid"):
        grid = quant.learn_grid(W, factor, config)
    with phases("solve"):
        solved = quant.quantize(W, grid, factor, config)
    if config.refine and factor is not None:
        with phases("refine"):
            grid, solved = quant.refine(W, grid, solved, factor, config)
    return grid, *solved


def read_weights(model, index: int, names: list[str], rows: slice) -> torch.Tensor:
    """`rows` of the original weights of the linears `names`, stacked, in float32 on the model's device."""
    found, first = [], 0
    for name in names:
        count = len(model.layers[index].get_submodule(name).weight)
        part = slice(max(rows.start - first, 0), min(rows.stop - first, count))
        if part.start < part.stop:
            weight = model.checkpoint.get(f"{model.layer_prefix(index)}{name}.weight", part)
            found.append(weight.to(model.device).float())
        first += count
    return found[0] if len(found) == 1 else torch.cat(found)


def stacks(model, index: int, group: list[str], run: Run, config: quant.QuantConfig):
    """Rows are independent given the Hessian: a group's linears of as many bits are solved as one matrix, unless that grows too large.

    Returns pairs of a QuantConfig and names.
    """
    by_bits = {}
    for name in group:
        by_bits.setdefault(bits_of(model.layer_prefix(index) + name, run, config.bits), []).append(name)
    found = []
    for bits, names in by_bits.items():
        total = sum(model.layers[index].get_submodule(name).weight.numel() for name in names)
        found += [(replace(config, bits=bits), part) for part in ([names] if total <= quant.MOST_WEIGHTS else [[name] for name in names])]
    return found


def pack_linear(codes: torch.Tensor, grid: quant.Grid, config: quant.QuantConfig, layout: str) -> packing.PackedLinear:
    if grid.affine is None:
        levels = grid.levels.squeeze(1).to(config.levels_dtype)
        return packing.PackedLinear(packing.pack_codes(codes, grid.bits, layout).cpu(), grid=levels.cpu())
    affine = grid.affine
    if config.sym:
        codes, affine = with_middle_zero(codes, affine, grid.bits)
    scale, zero = affine if grid.bits < 8 else (16 * affine.scale, affine.zero // 17)  # those of a digit
    return packing.PackedLinear(packing.pack_codes(codes, grid.bits, layout).cpu(), scale=scale.half().cpu(), zero=zero.cpu())


def save_layer(packed: dict[str, Future], rest: dict[str, torch.Tensor], writer, entry: Callable) -> None:
    """Write a layer, its linears as `packed` and the `rest`, and then, once that is durable, the journal's `entry`."""
    if writer:
        stored = (linear.result().named(name) for name, linear in packed.items())
        writer.add(rest | {name: tensor for tensors in stored for name, tensor in tensors.items()})
    entry(parts=len(writer.parts) if writer else 0)


def rest_of_layer(model, index: int, linears: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors of layer `index` beside the weights of its `linears`, as they are."""
    quantized = {f"{model.layer_prefix(index)}{name}.weight" for name in linears}
    return {name: model.checkpoint.get(name) for name in layer_names(model, index) if name not in quantized}


def layer_names(model, index: int) -> list[str]:
    return [name for name in model.checkpoint.shapes if name.startswith(model.layer_prefix(index))]


def untouched_tensors(model, first: int, finished: set[str]) -> Iterator[dict[str, torch.Tensor]]:
    """What is copied as it is: the layers from `first` on, then everything outside the layers but what is `finished`, one tensor at a
    time."""
    for index in range(first, len(model.layers)):
        yield {name: model.checkpoint.get(name) for name in layer_names(model, index)}
    for name in model.checkpoint.shapes:
        if not name.startswith(model.layers_name + ".") and name not in finished:
            yield {name: model.checkpoint.get(name)}


# --- embeddings and head ---------------------------------------------------------------------------------------


def path_of(weight: str) -> str:
    """The module that has it."""
    return weight.removesuffix(".weight")


def vocabulary(model: modelutils.StreamedModel, run: Run) -> dict[str, int]:
    """The bits of embeddings and head by their paths, of both in one by the embeddings'; nothing if they stay. Raises InputError."""
    if run.vocab_bits == 16:
        return {}
    if quantized_layers(model, run) < len(model.layers):
        raise InputError("--vocab_bits is for whole models, whose last layer the head reads: leave out --n_layers, or give it all layers")
    network = model.model
    if not (
        isinstance(network.get_input_embeddings(), torch.nn.Embedding) and isinstance(network.get_output_embeddings(), torch.nn.Linear)
    ):
        raise InputError(f"{type(network).__name__} has other embeddings, or another head, than --vocab_bits can quantize: leave it out")
    if not model.has_own_head and model.head_name in model.checkpoint and not same_tensors(model, model.head_name, model.embedding_name):
        raise InputError(
            f"the model has a {model.head_name} of its own and a config.json that ties it: set tie_word_embeddings to false there"
        )
    names = (model.embedding_name, model.head_name) if model.has_own_head else (model.embedding_name,)
    linears = {f"{model.layer_prefix(index)}{name}.weight" for index in range(len(model.layers)) for name in model.linears(index)}
    if not {name for name, _ in network.named_parameters()} - linears - {*names, model.head_name}:
        raise InputError(f"{type(network).__name__} has nothing but linears and embeddings: transformers needs one that is not quantized")
    return {path_of(name): run.vocab_bits for name in names}


def same_tensors(model, one: str, other: str) -> bool:
    shape = model.checkpoint.shapes[one]
    pieces = quant.row_pieces(*shape) if shape == model.checkpoint.shapes[other] else ()
    return bool(pieces) and all(torch.equal(model.checkpoint.get(one, rows), model.checkpoint.get(other, rows)) for rows in pieces)


def packed_embeddings(model, run: Run, config: quant.QuantConfig, phases: Phases) -> packing.PackedLinear | None:
    """Embeddings rounded to the nearest of levels for which all columns count alike; None if they are not quantized, or are the head."""
    if run.vocab_bits == 16 or not model.has_own_head:
        return None
    return quantized_rows(model, model.embedding_name, None, None, 0.0, run, config, phases)[0]


def shifts_head(model, run: Run, config: quant.QuantConfig) -> bool:
    """Does the head follow what the layers give now? Only one of its own can."""
    return config.shift > 0 and config.shift_head and model.has_own_head and quantized_layers(model, run) == len(model.layers)


def finished_outside(model, run: Run, config: quant.QuantConfig) -> set[str]:
    """What the file does not have as it was, of embeddings and head."""
    if run.vocab_bits < 16:
        return {model.embedding_name, model.head_name}
    return {model.head_name} if shifts_head(model, run, config) else set()


def finished_head(model, stream, reference, run: Run, config: quant.QuantConfig, phases: Phases) -> tuple[dict[str, torch.Tensor], list]:
    """The head, or the embeddings that it is, as the file will have it, on the first rank; and a row of the report if it is quantized.

    One of its own is moved first so that it gives on what `stream` has become what it gave on `reference`; further than the layers'
    linears, the further the more tokens there are: no layer comes after it that would learn from how well it fits the calibration text.
    """
    shifts, start = shifts_head(model, run, config), time.perf_counter()
    both, name = [stream, reference] if shifts else [stream], model.head_name if model.has_own_head else model.embedding_name
    total = modelutils.in_smaller_batches(model, both, head_statistics, model, both, run, phases)
    share_statistics(f"the input of {name}", total, run.ranks, phases)
    with phases("factorization"):
        factor = common_factor(total.H, config, run.ranks)
    if factor is None and run.ranks.is_first:
        as_it_is = "is rounded to nearest" if run.vocab_bits < 16 else "stays as it is"
        warnings.warn(f"the Hessian of {name} cannot be factorized: it {as_it_is}", stacklevel=2)
    strength = total.tokens / (total.tokens + quant.HEAD_TOKENS * len(total.H))
    if run.vocab_bits == 16:
        return {name: moved_head(model, name, total, factor, strength, phases)} if run.ranks.is_first else {}, []
    packed, loss = quantized_rows(model, name, total, factor, strength, run, config, phases)
    row = {"linear": path_of(name), "layer": None, "loss": None if factor is None else loss.sum().item()}
    row |= {"seconds": time.perf_counter() - start, "bits": run.vocab_bits, "tokens": total.tokens}
    return packed.named(path_of(name)), [row]


def moved_head(model, name: str, total: Statistics, factor, strength: float, phases: Phases) -> torch.Tensor:
    with phases("load"):
        head = model.checkpoint.get(name)
    for rows in quant.row_pieces(*head.shape) if factor else ():
        with phases("target"):
            head[rows] = quant.shifted(head[rows].to(model.device, torch.float32), total, factor, strength, rows).to(head)
    return head


def quantized_rows(
    model, name: str, total: Statistics | None, factor, strength: float, run: Run, config: quant.QuantConfig, phases: Phases
):
    """Matrix `name` to --vocab_bits, packed, and the loss of each row; each rank has done its rows. Without a factor to nearest."""
    config = config.of_vocabulary(run.vocab_bits)
    count, columns = model.checkpoint.shapes[name]
    mine, packed, losses = run.ranks.rows(count), [], []
    for piece in quant.row_pieces(mine.stop - mine.start, columns):
        rows = slice(mine.start + piece.start, mine.start + piece.stop)
        with phases("load"):
            W = model.checkpoint.get(name, rows).to(model.device).float()
        if factor and model.has_own_head:  # what is embeddings too is read in all columns
            with phases("target"):
                W = quant.target(W, total, factor, strength, rows)
        grid, codes, loss = quantize_weights(W, factor, config, phases)
        packed.append(pack_linear(codes, grid, config, run.packing))
        losses.append(loss.cpu())
    return [run.ranks.gather_rows(mine, count) for mine in (packing.PackedLinear.joined(packed), torch.cat(losses))]


def head_statistics(model, streams: list, run: Run, phases: Phases) -> Statistics:
    """One pass through what comes after the layers: sums over this rank's tokens of what the head reads, in the quantized model and, if
    it is one of the `streams`, in the unquantized one."""
    total = None
    with phases("forward"):
        for inputs in model.head_inputs(*streams):
            with phases("hessian"):
                if total is None:
                    weight = model.model.get_output_embeddings().weight
                    total = Statistics([weight], len(streams) == 2, False, hessian_device(weight.shape[1], run))
                total.add(inputs[0], inputs[1] if len(streams) == 2 else None)
    return total


# --- the linears of the model ----------------------------------------------------------------------------------


def shown_row(model, index: int, name: str, loss: torch.Tensor, run: Run) -> int | None:
    """The row of linear `name` that the report shows: one of --example_rows, or, without it, that of median `loss` in the first, the
    middle and the last layer."""
    if run.example_rows:
        return dict(run.example_rows).get(model.layer_prefix(index) + name)
    count = quantized_layers(model, run)
    return int(loss.argsort()[len(loss) // 2]) if run.report and index in (0, count // 2, count - 1) else None


def quantized_layers(model, run: Run) -> int:
    return len(model.layers) if run.n_layers is None else min(run.n_layers, len(model.layers))


def assigned_bits(model: modelutils.StreamedModel, run: Run, config: quant.QuantConfig) -> dict[str, int]:
    """The bits of each linear in the layers to be quantized, by its full name, 16 if it is skipped; and of embeddings and head."""
    names = [model.layer_prefix(index) + name for index in range(quantized_layers(model, run)) for name in model.linears(index)]
    modelutils.check_patterns(run.skip, names, "--skip")
    modelutils.check_patterns([pattern for pattern, _ in run.bits_for], names, "--bits_for")
    bits = {name: bits_of(name, run, config.bits) for name in names} | vocabulary(model, run)
    if set(bits.values()) == {16}:
        raise InputError("--skip leaves nothing to quantize: give it fewer patterns")
    if config.kmeans_bins < (most := max((2**its for its in bits.values() if its < 8), default=0)):
        raise InputError(f"--kmeans_bins is {config.kmeans_bins}: give at least {most}")
    return bits


def check_example_rows(model: modelutils.StreamedModel, run: Run, bits: dict[str, int]) -> None:
    """Are the rows of --example_rows among those to be quantized? Raises InputError."""
    quantized = [name for name, its in bits.items() if its < 16 and name.startswith(f"{model.layers_name}.")]
    for name, row in run.example_rows:
        if name not in quantized:
            raise modelutils.no_such_linear("--example_rows", name, quantized)
        if row >= (count := len(model.model.get_submodule(name).weight)):
            raise InputError(f"--example_rows {name}={row}: it has {count} rows, counted from 0")


def warn_of_missing_examples(model: modelutils.StreamedModel, run: Run, rows: list[dict]) -> None:
    """Rows of --example_rows can be missing from a report's `rows`: an earlier run, which this one went on with, was asked for others,
    or their linear was rounded to nearest."""
    shown = {(model.layer_prefix(row["layer"]) + row["linear"], row["example"]["row"]) for row in rows if "example" in row}
    if missing := [f"{name}={row}" for name, row in run.example_rows if (name, row) not in shown]:
        warnings.warn(f"the report does not show {', '.join(missing)}: finished before, or rounded to nearest", stacklevel=2)


def check_groups(model: modelutils.StreamedModel, config: quant.QuantConfig, bits: dict[str, int]) -> None:
    """Do groups of columns fit the model's linears? Raises InputError."""
    for name, its in bits.items():
        columns = model.model.get_submodule(name).weight.shape[1]
        if its < 8 and config.groupsize != -1 and (config.groupsize < 1 or columns % config.groupsize):
            raise InputError(f"--groupsize {config.groupsize} does not divide the {columns} inputs of {name}: give a divisor, or -1")


def check_exports(model, run: Run, config: quant.QuantConfig, bits: dict[str, int], made: bool) -> None:
    """Can each format of --export hold what the run will make, and its folder be written? made: by an earlier run, which may have been
    killed after some of them. Raises InputError."""
    home = [run.save_path.parent if run.save_path.suffix == ".safetensors" else run.save_path] if run.save_path else []
    for name, out in run.export:
        if not (made and is_exported(run, name, out)):
            export.check_output(out, run.overwrite, "--export", model.folder, *home)
        export.check_plan(name, model.model, model.folder, bits, config.groupsize, config.grid != "nonuniform", config.sym)


# --- the plan --------------------------------------------------------------------------------------------------


def show_plan(args: argparse.Namespace, ranks: Ranks) -> None:
    """Print what the run would need on the hardware that --plan names, and what would make it fit there. Of the model nothing is read but
    its config and headers of shards."""
    if args.wbits == 16:
        raise InputError("--plan is of a quantization: give --wbits 2, 3 or 4, and the other settings of the run")
    hardware = plan.name_of(eval_quantized.pick_device(args.device)) if args.plan == "auto" else args.plan
    device = torch.device("cpu" if hardware == "cpu" else "cuda")
    wide, args.hessian_device = args.hessian_device, None  # which need not be there
    args.dataset = args.dataset or "c4-new"
    run = replace(run_settings(args, device, ranks), hessian_device=torch.device(wide) if wide else None)
    model, text = model_to_plan(args, run, device)
    modelutils.refuse_quantized(model, args.model)
    config = quant_config(args, model.checkpoint.stored_dtype)
    limits = limits_here(run, hardware)
    wanted, make, shapes = planned(model, run, config, assigned_bits(model, run, config), hardware, limits, text)
    print(plan.as_text(wanted, hardware))
    if run.report:
        packing.write_json(run.report, {"plan": wanted.as_dict(), "run": vars(wanted.run)})
    if missing := plan.lacks(wanted, limits):
        print("\n".join([*(f"does not fit: {part}" for part in missing), plan.advice(make, wanted.run, limits, shapes)]))
    else:
        print(f"fits: the host has {plan.gb(limits.host)}, the disk {plan.gb(limits.disk)}")


def model_to_plan(args: argparse.Namespace, run: Run, device: torch.device) -> tuple[modelutils.StreamedModel, int]:
    """The model, without its weights where they are not at hand, and what tokenizing the texts takes, 0 where there is no tokenizer."""
    path = Path(args.model)
    if not path.exists():  # of a hub's model the config is enough, and whatever else has been fetched before
        path = modelutils.resolve_model(args.model, ["config.json"])
        with contextlib.suppress(InputError):
            return weighed_model(args, run, device, path)
        path /= "config.json"
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path /= "config.json"
    if path.is_file() and path.suffix == ".json":
        stored = modelutils.read_config(path).dtype or torch.bfloat16
        names = {kind: name for name, kind in packing.TORCH_DTYPES.items()}
        bare = argparse.Namespace(stored_dtype=torch.float16 if stored == torch.float16 else torch.bfloat16)
        return modelutils.PlannedModel(path, names[stored], eval_quantized.pick_dtype(args.dtype, bare, device)), 0
    return weighed_model(args, run, device, modelutils.resolve_model(args.model))


def weighed_model(args: argparse.Namespace, run: Run, device: torch.device, folder: Path) -> tuple[modelutils.StreamedModel, int]:
    """`model_to_plan` where the weights are in `folder`, whose headers alone are read, and a tokenizer too."""
    checkpoint = packing.Checkpoint.open(folder)
    model = modelutils.StreamedModel(folder, checkpoint, eval_quantized.pick_dtype(args.dtype, checkpoint, device), torch.device("cpu"))
    on_the_hub = {run.dataset, *run.eval} <= set(datautils.CORPORA)
    return model, 0 if on_the_hub else tokenizing_bytes(run, modelutils.load_tokenizer(folder))


def limits_here(run: Run, hardware: str) -> plan.Limits:
    """What this machine's host and disk have, and the memory of that hardware."""
    return plan.limits_of(hardware, run.save_path.absolute().parent if run.save_path else Path(tempfile.gettempdir()))


def planned(model, run: Run, config: quant.QuantConfig, bits: dict[str, int], hardware: str, limits: plan.Limits, text: int = 0):
    """The plan of `run` with its activations where they fit, the function that makes plans of other runs, and the shapes."""
    check_groups(model, config, bits)
    check_example_rows(model, run, bits)
    shapes, base = plan.shapes_of(model, run, config, bits, shifts_head(model, run, config)), plan.resident_bytes()
    rest = (model.dtype, hardware, base, text)
    make = lambda other: plan.make(shapes, other, config, *rest)  # noqa: E731
    kinds = [kind for kind in KINDS if hardware != "cpu" or kind != "device"] if run.activations == "auto" else [run.activations]
    plans = [make(replace(run, activations=kind)) for kind in kinds]
    wanted = next((one for one in plans if not plan.lacks(one, limits)), plans[-1])
    return plan.with_shift_costs(wanted, shapes, config, *rest), make, shapes


def tokenizing_bytes(run: Run, tokenizer) -> int:
    """What the largest of the run's texts takes in memory while it is tokenized."""
    calibration = datautils.tokenizing_bytes(run.dataset, tokenizer, run.nsamples, run.seqlen, run.seed)
    return max([calibration, *(datautils.tokenizing_bytes(source, tokenizer, run.seqlen) for source in run.eval)])


def checked_plan(model, run: Run, config: quant.QuantConfig, bits: dict[str, int], text: int) -> plan.Plan:
    """The plan of a run that is to begin here, tokenizing the text taking `text` bytes. Raises InputError, with what to change, if
    device or host are too small for it, unless --force."""
    hardware = plan.name_of(run.device)
    limits = limits_here(run, hardware)
    if run.device.type == "cuda":
        limits = limits._replace(device=torch.cuda.mem_get_info(run.device)[0])
    limits = limits._replace(host=limits.host / run.ranks.local_size, disk=float("inf"))  # the writer knows what is there to be reused
    share = replace(run, nsamples=-(-run.nsamples // run.ranks.size), hessian_device=hessian_device(run.offload_threshold, run))
    share = share if run.ranks.is_first else replace(share, eval=())  # which rank 0 does alone
    wanted, make, shapes = planned(model, share, config, bits, hardware, limits, text)
    if (missing := plan.lacks(wanted, limits)) and not run.force:
        raise InputError(f"{'; '.join(missing)}: {plan.advice(make, wanted.run, limits, shapes)}, or --force to try")
    run = replace(run, activations=wanted.run.activations)
    return replace(wanted, run=run, disk=make(run).disk)


# --- the command -----------------------------------------------------------------------------------------------


def run_command(args: argparse.Namespace, ranks: Ranks) -> None:
    if args.plan:
        return show_plan(args, ranks) if ranks.is_first else None
    device = ranks.device(eval_quantized.pick_device(args.device))
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # an environment variable of some images rounds float32 products to TF32
    run = run_settings(args, device, ranks)
    folder = modelutils.resolve_model(args.model)
    checkpoint = open_checkpoint(folder)
    config = None if args.wbits == 16 else quant_config(args, checkpoint.stored_dtype)
    model = modelutils.StreamedModel(folder, checkpoint, eval_quantized.pick_dtype(args.dtype, checkpoint, device), device)
    modelutils.check_seqlen(folder, run.seqlen)
    tokenizer = modelutils.load_tokenizer(folder)
    if config:
        quantize_command(model, tokenizer, run, config)
    else:
        ranks.part()
        settings = {"method": "none", "base_model": run.model, "versions": eval_quantized.versions("safetensors")}
        if ranks.is_first:
            evaluate_and_export(model, texts(run, tokenizer), run, report_of(model, run, settings), math.inf)


def texts(run: Run, tokenizer) -> list[eval_quantized.Windows]:
    """What rank 0 will evaluate."""
    return [eval_quantized.Windows.of(source, tokenizer, run.seqlen) for source in run.eval if run.ranks.is_first]


def report_of(model, run: Run, settings: dict) -> dict:
    """The report, as far as it is known at the beginning."""
    return {"settings": settings, "run": vars(run), "dtype": str(model.dtype).removeprefix("torch.")}


def quantize_command(model, tokenizer, run: Run, config: quant.QuantConfig) -> None:
    """Quantize and do what comes after it, going on with what an earlier run left of either."""
    ranks, made = run.ranks, run.ranks.from_first(lambda: is_made(run))
    modelutils.refuse_quantized(model, run.model)
    bits = assigned_bits(model, run, config)
    wanted = checked_plan(model, run, config, bits, tokenizing_bytes(run, tokenizer) if ranks.is_first else 0)
    check_exports(model, run, config, bits, made)
    if ranks.is_first and run.save_path and not made:
        packing.check_output(run.save_path, run.overwrite, "--save_path")  # before texts are read
        if not run.fresh:
            packing.check_unfinished(run.save_path, "--save_path", packing.JOURNAL)
    run, live = wanted.run, plan.live_bytes(model.config.get_text_config().hidden_size, run, config, model.dtype.itemsize) / ranks.size
    tests, ids = texts(run, tokenizer), calibration_tokens(run, tokenizer)
    settings = settings_of(run, config, bits, ids)
    needed = 0 if run.force or made else wanted.disk / (2 if run.save_path else 1)  # the writer counts parts and result
    with working(run, made, needed, fingerprint(settings, model, run)) as (writer, journal):
        contents = report_of(model, run, settings) | {"plan": wanted.as_dict()}
        if made:
            ranks.part()
        else:
            print(f"activations wait {plan.WHERE[run.activations]}; planned {plan.peaks(wanted)}", flush=True)
            quantize_anew(model, ids, run, config, settings, writer, journal)
        if not ranks.is_first:
            return
        if made:
            writer.publish()
            model.checkpoint = packing.Checkpoint.open(run.save_path)
            if model.checkpoint.settings != json.loads(json.dumps(settings)):
                raise InputError(f"{run.save_path} is not what this run has written: put it back, or start over with --fresh")
            print(f"{run.save_path} is complete: going on with what comes after it", flush=True)
        else:
            print_summary(journal.result, run)
        warn_of_missing_examples(model, run, journal.rows)
        contents |= journal.result | {"bits_per_weight": model.checkpoint.bits_per_weight, "linears": journal.rows}
        write_report(run, contents)
        evaluate_and_export(model, tests, run, contents, live, writer.folder, made)


def is_made(run: Run) -> bool:
    """Has an earlier run finished the result, and been killed in what comes after it?"""
    return run.save_path is not None and not run.fresh and has_result(packing.work_folder(run.save_path))


@contextlib.contextmanager
def working(run: Run, made: bool, needed: float, fingerprint: dict) -> Iterator[tuple]:
    """For the block: the writer, None but on the first rank, and the journal. If the block fails, what is finished is kept, and the
    error says how to go on. made, needed: is there a result, what room will be needed."""
    ranks, writer, journal, done = run.ranks, None, None, False
    if ranks.is_first:
        published = made and not packing.waits_there(packing.work_folder(run.save_path))
        writer = packing.ModelWriter(run.save_path, run.overwrite, needed, resume=not run.fresh, published=published)
    try:
        kept_in = ranks.from_first(lambda: str(writer.folder)) if run.save_path else None
        journal = Journal(kept_in and Path(kept_in), fingerprint, ranks)
        if made != (journal.result is not None):
            raise InputError(f"another run has been at work on {run.save_path} until now: give the command again")
        yield writer, journal
        done = True
    except BaseException as error:
        if journal and run.save_path and journal.result:
            error.add_note("the result is complete: the same command goes on with what comes after it")
        elif journal and journal.layers:
            error.add_note(f"{journal.layers} finished layers are kept: the same command goes on after them")
        raise
    finally:
        if writer:  # without a journal nothing there is this run's
            writer.close(keep=not done and (journal is None or journal.layers > 0))


def quantize_anew(model, ids: torch.Tensor, run: Run, config: quant.QuantConfig, settings: dict, writer, journal: Journal) -> None:
    """Quantize `model`, going on after the layers that `journal` has; its checkpoint is the result then, and the journal has the report."""
    modelutils.steady_memory()
    if writer and run.save_path:
        writer.keep(journal.parts)
    if journal.layers:
        print(f"going on after layer {journal.layers}, which an earlier run finished", flush=True)
    else:
        model.checkpoint.check_finite(run.ranks.rank, run.ranks.size)  # last: it reads everything
    phases, start, earlier = Phases(run.device, journal.seconds), time.perf_counter(), sum(journal.seconds.values())
    quantize_model(model, ids, run, config, writer, journal, phases)
    if not run.ranks.is_first:
        return

    def measured() -> dict:
        found = {"quantization_seconds": time.perf_counter() - start + earlier, "phase_seconds": phases.seconds}
        if run.device.type == "cuda":
            found["peak_device_bytes_quantizing"] = torch.cuda.max_memory_allocated(run.device)
        return found | {"peak_host_bytes_quantizing": peak_host_bytes()}

    with phases("pack"):
        model.checkpoint = writer.finish(settings, model.folder, before_publishing=lambda: journal.add_result(measured()))
    journal.result = measured()  # with the time that publishing took


def calibration_tokens(run: Run, tokenizer) -> torch.Tensor:
    """The calibration text's windows [nsamples, seqlen], the first rank's on every rank."""
    ids = torch.empty(run.nsamples, run.seqlen, dtype=torch.int64)
    if run.ranks.is_first:
        ids = datautils.calibration_windows(run.dataset, tokenizer, run.nsamples, run.seqlen, run.seed)
    run.ranks.copy_first_(ids)
    return ids


def evaluate_and_export(model, tests: list, run: Run, contents: dict, live: float, folder: Path | None = None, made: bool = False) -> None:
    """What comes after the result: perplexities, the whole report, the folders of --export (made: but for those that are there).

    live: bytes of a generation of the calibration text's activations. folder: where a text's may wait (unset: among temporary files).
    """
    contents["perplexity"] = []
    for windows in tests:
        size = windows.ids.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize
        with tempfile.TemporaryDirectory(prefix="leanquant-", dir=folder) as waiting:
            place = Place(plan.evaluation_waits(run, size, live), run.device, Path(waiting))
            losses = eval_quantized.streamed_losses(model, windows.ids, run.batch_size, windows.source, place)
        result = eval_quantized.perplexity(windows, losses)
        contents["perplexity"].append(result._asdict())
        print(result, flush=True)
    contents["peak_host_bytes"] = peak_host_bytes()
    write_report(run, contents)
    for name, out in run.export:
        if made and is_exported(run, name, out):
            packing.ModelWriter(out, True, 0, published=True).close()  # what a kill at its very end has left
            print(f"{out} is there", flush=True)
            continue
        export.export(model.checkpoint, model.folder, name, out, run.overwrite, contents["perplexity"], run.command, flag="--export")
        print(f"exported {out}: {name}, every weight read back and compared", flush=True)


def is_exported(run: Run, name: str, out: Path) -> bool:
    """Is `out` the result in the format `name`?"""
    with contextlib.suppress(InputError):
        return packing.Checkpoint.open(out).settings == {**packing.Checkpoint.open(run.save_path).settings, "exported": name}
    return False


def fingerprint(settings: dict, model, run: Run) -> dict:
    """Everything that decides what a run writes, for its journal: a run that differs in any of it cannot go on with another's layers."""
    here = Path(__file__).parent
    on_the_way = {
        "code": digest(*(file.read_bytes() for folder in (here, here / "leanquant") for file in sorted(folder.glob("*.[pc][yu]")))),
        "batch_size": run.batch_size,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
        "kernels": os.environ.get("LEANQUANT_KERNELS") or "where they can run",
        "instructions of the CPU": [torch.backends.cpu.get_cpu_capability(), *modelutils.cpu_units(model.dtype)],
        "offload_threshold": run.offload_threshold,
        "hessian_device": run.hessian_device and run.hessian_device.type,
    }
    return {
        **settings,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config of the model": digest(model.config.to_json_string().encode()),
        "files of the model": files_of(model.checkpoint),
        ON_THE_WAY: on_the_way,
    }


def main(argv: list[str] | None = None) -> int:
    ranks = Ranks.join()
    mine = "" if ranks.size == 1 else f" (rank {ranks.rank})"
    warnings.formatwarning = lambda message, *_, **__: f"warning{mine}: {message}\n"
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(terminated_as_interrupted(ranks))
            if not ranks.is_first:  # what all would print alike is printed once
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            ranks.from_first(lambda: bool(parse(argv)))  # which may print help or an error: once
            args = parse(argv)
            with torch.no_grad():
                run_command(args, ranks)
            sys.stdout.flush()  # while it can still be told that nobody reads it
    except InputError as error:
        return ranks.leave(Ending(2, str(error), True), kept(error))
    except RuntimeError as error:
        if not modelutils.is_out_of_memory(error):
            raise
        what = "give a smaller --batch_size or --offload_threshold, --activations host or disk, or more memory (--plan shows what fits)"
        return ranks.leave(Ending(2, f"out of memory ({first_line(error)}): {what}", True), kept(error))
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ranks.leave(Ending(1, "whoever read what is printed here is gone", True), kept(error))
    except OSError as error:
        if (what := disk_trouble(error)) is None:
            raise
        return ranks.leave(Ending(2, what, True), kept(error))
    except KeyboardInterrupt as error:
        return ranks.leave(Ending(130, "interrupted"), kept(error) or ": nothing was finished yet")
    except RankLost as error:
        return ranks.leave(Ending(1, str(error)), kept(error))
    except SystemExit as end:  # of the parser, which has said why
        if ranks.size == 1:
            raise
        return ranks.leave(Ending(end.code or 0, is_cause=True))
    except Exception as error:
        if ranks.size == 1:
            raise
        traceback.print_exc()
        return ranks.leave(Ending(1, f"{type(error).__name__}: {error}", True), kept(error))
    return ranks.leave(Ending(0))


def kept(error: BaseException) -> str:
    """What of the run remains, as `run_command` noted it on `error` or on the one that `error` interrupted."""
    notes = getattr(error, "__notes__", None) or getattr(error.__context__, "__notes__", [])
    return "".join(f"; {note}" for note in notes)


@contextlib.contextmanager
def terminated_as_interrupted(ranks: Ranks) -> Iterator[None]:
    """For the block, SIGTERM ends the run as Ctrl-C does. Only a program's main thread may say so.

    One of several ranks ignores both from then on: all that is left to it is to say why it ends, and torchrun terminates it as
    soon as another rank is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if ranks.size == 1:
            signal.signal(signal.SIGTERM, before)
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
