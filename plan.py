"""What a run will need, before it starts: memory, disk, bytes moved, operations and time, from shapes alone.

Pure functions of a model's shapes (config and shard headers; no weight is read), of the run's settings and of a machine. Peaks
are sums of what lives at the same time, phase by phase, so a formula here describes what llama.py, quant.py and modelutils.py
hold; the tests compare them with measured peaks. Times are operations over rated speed, times what is usually reached of it.
Of texts only the size of a file is known: tokens of the hub's are what they usually are (TEST_TOKENS). Not planned: what tokenizing
a corpus from the hub takes, or a text where there is only a config; exports.
Legend: n sequences, T tokens a sequence, D hidden size, O rows, I columns, K = 2**bits levels; sizes in bytes.
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import quant
from datautils import CORPORA
from hessian import PANEL, at_a_time, statistics_size, sums_outputs
from leanquant.linear import free_host_bytes
from leanquant.packing import packed_width
from leanquant_grid import KMEANS_ELEMENTS, LOCAL_ELEMENTS, SEARCH_BYTES, TABLE_ELEMENTS

FLOAT = 4  # Hessians, and weights while they are solved
# Solving holds so many matrices of the size of the rows that are solved (quant.py): to make the target, weights, shift and a reordering
# of it; then the target, two reorderings and codes; then the target, values, errors and codes.
TARGET_COPIES, SOLVE_COPIES, REFINE_COPIES = 3.0, 3.75, 3.75
WHERE = {"device": "on the device", "host": "in host memory", "disk": "on the disk"}  # activations
LATER_LIBRARIES = 45e6  # buffers of MKL and threads, that a run's first products bring
REACHED = 0.5  # of a rated speed
DISK_SPEED = 4e9  # rated bytes a second, of an SSD on PCIe 3
TEST_TOKENS = {"wikitext2": 3.4e5, "ptb": 1.1e5, "ptb-new": 1.2e5}  # of Llama 2; c4's are 256 windows, a file's a fourth of its bytes
EVALUATION_ROOM = 2e9  # that activations of an evaluation are let have in memory
LOSS_TOKENS = 256  # whose losses are computed at once (eval_quantized.token_losses)
CUDA_CONTEXT, CUDA_HOST = 0.6e9, 2.5e9  # what CUDA itself takes on the device and, with its libraries, on the host


class Hardware(NamedTuple):
    """memory: bytes, None: this machine's. The others a second: bytes of memory, operations with 16-bit factors and with float32,
    bytes between host and device."""

    memory: float | None
    bandwidth: float
    half: float
    single: float
    link: float


# Sources: NVIDIA's data sheets of H200 (SXM), L40S, Quadro RTX 8000, and the Ada whitepaper for the RTX 4090; dense, float32 sums.
HARDWARE = {
    "h200": Hardware(141e9, 4.8e12, 989e12, 67e12, 64e9),
    "4090": Hardware(24e9, 1.008e12, 165e12, 82.6e12, 32e9),
    "l40s": Hardware(48e9, 0.864e12, 362e12, 91.6e12, 32e9),
    "rtx8000": Hardware(48e9, 0.672e12, 130e12, 16.3e12, 16e9),
    # A core of AVX2: 60 GFLOP/s in float32 and 8 GB/s each, measured with products of 4096 x 4096 on the machine of README, Numbers.
    "cpu": Hardware(None, 8e9, 60e9, 60e9, 8e9),
}


class LayerGroup(NamedTuple):
    """Linears that read the same input of `columns`: rows of each, and the layer's child that holds them. share: of the tokens that
    it sees; residual: whether it alone writes to the residual stream; stage: what groups that depend on no other have in common."""

    rows: tuple[int, ...]
    columns: int
    child: str
    bits: int
    share: float = 1.0
    residual: bool = False
    stage: str = ""


@dataclass(frozen=True)
class Layer:
    """A decoder layer: parameters of all of it, bytes of them in the checkpoint, groups in call order."""

    parameters: int
    stored: int
    groups: tuple[LayerGroup, ...]


@dataclass(frozen=True)
class Shapes:
    """layers: those to be quantized. outside: elements and stored bytes of each tensor outside the layers, by name; embedding and head
    name two of them. shifts_head: is the latter moved as the layers' linears are? vocabulary: embeddings and head to be quantized, both
    as one where they are. stored: bytes of the checkpoint. result: bytes of the quantized model."""

    layers: tuple[Layer, ...]
    outside: dict[str, tuple[int, int]]
    embedding: str
    head: str
    shifts_head: bool
    vocabulary: tuple[LayerGroup, ...]
    hidden: int
    attention: int  # heads times their size
    stored: int
    result: int


@dataclass
class Phase:
    """What a phase of the run does in all: operations, those of them with 16-bit factors, those that a GPU leaves to the host, bytes
    that it reads and writes in memory and over the link to the device."""

    operations: float = 0.0
    fast: float = 0.0
    on_host: float = 0.0
    bytes: float = 0.0
    link: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Peaks, with what they are made of, and totals, in bytes; seconds by phase. shift: how much of each peak the shifted target adds."""

    device: dict[str, float]
    host: dict[str, float]
    other_device: dict[str, float]  # the GPU of --hessian_device
    disk: float
    read: float
    written: float
    operations: dict[str, float]
    seconds: dict[str, float]
    run: object = field(repr=False)
    shift: dict[str, float] = field(default_factory=dict)

    @property
    def device_peak(self) -> float:
        return sum(self.device.values())

    @property
    def host_peak(self) -> float:
        return sum(self.host.values())

    def as_dict(self) -> dict:
        """For a report."""
        sums = {"device_peak_bytes": self.device_peak, "host_peak_bytes": self.host_peak}
        names = ("device", "host", "other_device", "disk", "read", "written", "operations", "seconds", "shift")
        return sums | {name: getattr(self, name) for name in names}


# --- shapes ----------------------------------------------------------------------------------------------------


def shapes_of(model, run, config, bits: dict[str, int], shifts_head: bool) -> Shapes:
    """From a modelutils.StreamedModel, of which nothing but names and shapes is read. bits: of each linear to be quantized."""
    text, sizes = model.config.get_text_config(), model.checkpoint
    count = len(model.layers) if run.n_layers is None else min(run.n_layers, len(model.layers))
    groups, layers = {}, []
    for index in range(count):
        prefix = model.layer_prefix(index)
        linears = {name: tuple(module.weight.shape) for name, module in model.linears(index).items()}
        key = tuple((name, shape, bits.get(prefix + name, 16)) for name, shape in linears.items())
        if key not in groups:
            groups[key] = tuple(_groups(model, index, linears, bits))
        held = [prefix + name for name, _ in model.layers[index].named_parameters()]
        stored = sum(sizes.tensor_bytes(name) for name in sizes.shapes if name.startswith(prefix))
        layers.append(Layer(sum(model.model.get_parameter(name).numel() for name in held), stored, groups[key]))
    outside = {name: (math.prod(sizes.shapes[name]), sizes.tensor_bytes(name)) for name in model.outside_names() if name in sizes}
    heads = getattr(text, "num_attention_heads", 1)
    attention = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    result = result_bytes(model, run, config, bits)
    names = (model.embedding_name, model.head_name, shifts_head)
    vocabulary = [(sizes.shapes[name], bits[path]) for name in names[:2] if (path := name.removesuffix(".weight")) in bits]
    vocabulary = tuple(LayerGroup((O,), I, "", its) for (O, I), its in vocabulary)
    return Shapes(tuple(layers), outside, *names, vocabulary, text.hidden_size, attention, sizes.file_bytes(), result)


def _groups(model, index: int, linears: dict, bits: dict[str, int]) -> Iterator[LayerGroup]:
    text, prefix, experts = model.config.get_text_config(), model.layer_prefix(index), model.experts(index)
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    for names in model.shared_inputs(index):
        alike = [other for other in experts.values() if other == experts.get(names[0])]
        wanted = [name for name in names if bits.get(prefix + name, 16) < 16]
        O, I = linears[names[0]]
        yield LayerGroup(
            rows=tuple(linears[name][0] for name in wanted or names),
            columns=I,
            child=names[0].partition(".")[0],
            bits=max((bits[prefix + name] for name in wanted), default=16),
            share=min(1.0, chosen / len(alike)) if alike else 1.0,
            residual=len(names) == 1 and O == text.hidden_size and not alike,
            stage=experts.get(names[0], names[0]),
        )


def result_bytes(model, run, config, bits: dict[str, int]) -> int:
    """Of the quantized model, about: codes, levels or scales and zeros, and the rest as it is."""
    stored = model.checkpoint.file_bytes()
    for name, its in bits.items():
        if its < 16:
            O, I = model.model.get_submodule(name).weight.shape
            its_config = config.of_vocabulary(its)
            groups = 1 if its_config.groupsize == -1 else I // its_config.groupsize
            grid = 2 * 2**its if its_config.grid == "nonuniform" else 3 * groups
            stored += O * (packed_width(I, its, run.packing) + grid) - model.checkpoint.tensor_bytes(f"{name}.weight")
    return stored


def live_bytes(hidden: int, run, config, itemsize: int) -> int:
    """One generation of the activations of all streams."""
    return (2 if config.shift > 0 else 1) * run.nsamples * run.seqlen * hidden * itemsize


def evaluation_waits(run, size: float, live: float) -> str:
    """Where `size` bytes of activations of an evaluated text wait: where those of the calibration text did, of which one generation is
    `live`, if they take no more room than those and what was kept with them, or little; else on the disk."""
    return run.activations if size <= max(2 * live, EVALUATION_ROOM) else "disk"


# --- the plan --------------------------------------------------------------------------------------------------


def make(shapes: Shapes, run, config, dtype: torch.dtype, hardware: str, base: float, text: int = 0) -> Plan:
    """The plan of `run` on one of HARDWARE. base: bytes that a process of ours takes before it reads a weight; text: those that
    tokenizing takes."""
    on_gpu, d = hardware != "cpu", dtype.itemsize
    live = live_bytes(shapes.hidden, run, config, d)
    peaks = [_embedding(shapes, d), _outside(shapes)]
    for layer in shapes.layers:
        peaks += _layer_needs(layer, shapes, run, config, dtype, hardware)
    peaks += _head_needs(shapes, run, config, dtype, hardware) if shapes.shifts_head or shapes.vocabulary else ()
    waiting = {"activations": (*_activations(live, run, d, shapes, on_gpu), 0)}
    waiting["packed embeddings"] = (0, sum(map(_packed_bytes, shapes.vocabulary[:-1])), 0)
    peaks = [needs | waiting for needs in peaks]
    peaks += [_evaluation(shapes, run, live, d, on_gpu)] if run.eval else []
    device, other = _largest(peaks, 0), _largest(peaks, 2)
    host = _largest(peaks, 1) if on_gpu else _largest(peaks, 0, 1)
    device = (device | {"CUDA": CUDA_CONTEXT}) if on_gpu else {}
    host |= {"Python and libraries": base + LATER_LIBRARIES + CUDA_HOST * on_gpu}
    before = {"the text's tokens": text, "Python and libraries": base + CUDA_HOST * on_gpu}
    host = max(host, before, key=lambda needs: sum(needs.values()))
    phases = _phases(shapes, run, config, dtype, on_gpu, hardware)
    disk, read, written = _disk(shapes, run, live, d)
    seconds = {name: _seconds(phase, HARDWARE[hardware], on_gpu) for name, phase in phases.items()}
    operations = {name: phase.operations for name, phase in phases.items()} | {"disk": 0.0}
    seconds["disk"] = (read + written) / (DISK_SPEED * REACHED)  # much of it beside the rest, where that does not wait for it
    return Plan(_positive(device), _positive(host), _positive(other), disk, read, written, operations, seconds, run)


def with_shift_costs(plan: Plan, shapes: Shapes, config, *rest) -> Plan:
    """`plan`, which `make` gave, with what its peaks are above those of the same run without the shifted target."""
    if config.shift == 0:
        return plan
    without = make(replace(shapes, shifts_head=False), plan.run, replace(config, shift=0.0), *rest)
    added = {"device": plan.device_peak - without.device_peak} if plan.device else {}
    return replace(plan, shift=added | {"host": plan.host_peak - without.host_peak})


def _positive(parts: dict[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size > 0}


def _largest(peaks: list[dict], *sides: int) -> dict[str, float]:
    """Of alternative needs, each a dict of (device, host, other device), the one that takes most on `sides`; as bytes by name."""
    sums = [{name: sum(size[side] for side in sides) for name, size in needs.items()} for needs in peaks]
    return max(sums, key=lambda needs: sum(needs.values()))


def _embedding(shapes: Shapes, d: int) -> dict:
    """The table of embeddings on its way in: as stored, and in the run's dtype; and a quantized one, rebuilt on the host."""
    elements, stored = shapes.outside.get(shapes.embedding, (0, 0))
    rebuilt = elements * d if len(shapes.vocabulary) == 2 else 0
    return {"embeddings": (elements * d, (stored if stored != elements * d else 0) + rebuilt, 0)}


def _outside(shapes: Shapes) -> dict:
    """The largest tensor outside the layers on its way from the checkpoint to its part, for which safetensors copies it once more."""
    return {"copied tensors": (0, 2 * max((stored for _, stored in shapes.outside.values()), default=0), 0)}


def _evaluation(shapes: Shapes, run, live: float, d: int, on_gpu: bool) -> dict:
    """The head and the logits of one window, on CPUs without units for 16 bits both in float32 too; of a part of the logits, logarithms in
    float32, which 16-bit ones are copied for; and the activations of the longest text."""
    elements, stored = head_of(shapes)
    logits, chunk = elements / shapes.hidden * run.seqlen, elements / shapes.hidden * min(LOSS_TOKENS, run.seqlen)
    wide = FLOAT * (d < FLOAT and not on_gpu)
    needs = {"head": (elements * (d + wide), stored if stored != elements * d else 0, 0)}
    needs["logits"] = (logits * (d + wide) + (1 + (d < FLOAT)) * FLOAT * chunk, 0, 0)
    size = max(tokens_of(source, run.seqlen) for source in run.eval) * shapes.hidden * d
    where = evaluation_waits(run, size, live)
    if where == "disk":  # batches that are read and written
        size = 3 * run.batch_size * run.seqlen * shapes.hidden * d
    return needs | {"activations": (size, 0, 0) if where == "device" else (0, size, 0)}


def _head_needs(shapes: Shapes, run, config, dtype: torch.dtype, hardware: str) -> Iterator[dict]:
    """Moving the head: as it sees both streams' states of a batch, in 16 bits and as a difference in float32; as its rows are moved; as
    it is written with the last layer, for which safetensors copies both. Or quantizing it, as a layer's linears, a piece at a time."""
    elements, stored = head_of(shapes)
    d = dtype.itemsize
    rows, I = elements // shapes.hidden, shapes.hidden
    last = sum(map(_packed_bytes, shapes.layers[-1].groups))
    squares = FLOAT * statistics_size(rows, I, True, False)
    states = run.batch_size * run.seqlen * I * (8 * d + 3 * FLOAT)
    matrix = FLOAT * quant.row_pieces(rows, I)[0].stop * I
    panel = 2 * FLOAT * PANEL * I
    yield {"head": (elements * d, stored if stored != elements * d else 0, 0), "Hessians": (squares, 0, 0), "states": (states, 0, 0)}
    if not shapes.vocabulary:
        yield {"head": (TARGET_COPIES * matrix, stored, 0), "Hessians": (squares + 3 * panel, 0, 0), "finished linears": (last, last, 0)}
        yield {"copied tensors": (0, 2 * (stored + last), 0)}
        return
    group, finished = shapes.vocabulary[-1], last + _packed_bytes(shapes.vocabulary[-1])
    piece = Layer(0, 0, (group._replace(rows=(quant.row_pieces(rows, I)[0].stop,)),))
    config = _config_of_head(shapes, config)
    for needs in _layer_needs(piece, shapes, run, config, dtype, hardware):
        if "forward pass" not in needs:
            yield needs | {"packed head": (0, finished, 0)}
    yield {"copied tensors": (0, 2 * finished, 0)}


def _config_of_head(shapes: Shapes, config):
    """What decides the codes of a head that is quantized."""
    return (config if shapes.shifts_head else replace(config, shift=0.0)).of_vocabulary(shapes.vocabulary[-1].bits)


def _packed_bytes(group: LayerGroup) -> float:
    """Of codes."""
    return sum(group.rows) * group.columns * group.bits / 8


def head_of(shapes: Shapes) -> tuple[int, int]:
    """Elements and stored bytes of the matrix that gives the logits."""
    return shapes.outside.get(shapes.head) or shapes.outside.get(shapes.embedding, (0, 0))


def _activations(live: int, run, d: int, shapes: Shapes, on_gpu: bool) -> tuple[float, float]:
    """Bytes on the device and the host of the streams and of what their layer's finished children gave, which is as much again. Of
    files, memory holds a few batches: two that are read, one that is written."""
    per_token = live / (run.nsamples * run.seqlen)
    if run.activations == "disk":
        return 0.0, 3 * 2 * per_token * run.batch_size * run.seqlen
    if run.activations == "device":
        return 2.0 * live, 0.0
    pinned = (lambda size: 2 ** math.ceil(math.log2(size))) if on_gpu else float  # torch rounds pinned memory up
    streams = 2 if live > run.nsamples * run.seqlen * shapes.hidden * d else 1
    return 0.0, streams * 2 * pinned(live / streams)


def _layer_needs(layer: Layer, shapes: Shapes, run, config, dtype: torch.dtype, hardware: str) -> Iterator[dict]:
    """For each moment of a layer that can be the peak: what is held, as bytes of (device, host, other device) by name.

    While group g is solved the device holds the layer, the original weights of the linears that were replaced so far (with
    --shift), the statistics of g, the factor in the memory of H, and the solver's copies of the rows that are solved at a time.
    """
    d, on_gpu, shift = dtype.itemsize, hardware != "cpu", config.shift > 0
    where = "cuda" if on_gpu else "cpu"
    replaced = packed = 0
    all_packed = sum(_packed_bytes(group) for group in layer.groups if group.bits < 16)
    for stage in _parts(layer, run, config):
        stage = [group for group in stage if group.bits < 16]
        all_statistics = [_statistics(group, config) for group in stage]
        for number, group in enumerate(stage):
            side = 0  # of device, host and another GPU
            if on_gpu and group.columns >= run.offload_threshold:
                side = 2 if run.hessian_device and run.hessian_device.type == "cuda" else 1
            # what is finished of this layer, and of the one before, which is being written and is copied for it
            waiting = packed + (2 * all_packed if group is layer.groups[0] else 0)
            weights = {"layer": (layer.parameters * d + replaced * d * shift, 0, 0), "finished linears": (0, waiting, 0)}
            held = sum(all_statistics[number:])
            if number == 0:
                batch = _batch_bytes(stage, layer, shapes, run, config, dtype, on_gpu)
                yield weights | {"forward pass": (batch, 0, 0)} | _placed("Hessians", held, side)
            yield weights | _placed("Hessians", held + 3 * FLOAT * PANEL * group.columns, side)  # with panels of the factorization
            rows = quant.row_pieces(sum(group.rows), group.columns)[0].stop
            matrix = FLOAT * rows * group.columns
            done = sum(group.rows) * group.columns * 2  # codes, and once more where pieces are joined
            fit = _fit_bytes(rows, group, config, side > 0, where) * (config.refine > 0)
            for moment, copies, more in (
                ("target", TARGET_COPIES * shift, done),
                ("grid", 1, _grid_bytes(rows, group.columns, config, where) + done),
                ("solver", REFINE_COPIES if config.refine else SOLVE_COPIES, done + fit),
            ):
                panel = 2 * FLOAT * PANEL * group.columns  # of the factor or of H, and what it is made of
                there = held + (matrix if side and moment == "target" else 0)  # rows of S
                yield weights | {moment: (copies * matrix + more + panel, 0, 0)} | _placed("Hessians", there, side)
            replaced += sum(group.rows) * group.columns
            packed += _packed_bytes(group)
    weights = {"layer": (layer.parameters * d + replaced * d * shift, 0, 0), "finished linears": (0, packed, 0)}
    yield weights | {"forward pass": (_forward_bytes(layer, shapes, run, dtype, on_gpu), 0, 0)}


def _parts(layer: Layer, run, config) -> list[list[LayerGroup]]:
    """Groups whose statistics are summed in one pass (llama.stages)."""
    if not run.true_sequential:
        return [list(layer.groups)]
    return [part for stage in _stages(layer) for part in at_a_time(stage, lambda group: _statistics(group, config) // FLOAT)]


def _stages(layer: Layer) -> list[list[LayerGroup]]:
    """Groups together that do not depend on one another."""
    return [list(stage) for _, stage in itertools.groupby(layer.groups, lambda group: group.stage)]


def _fit_bytes(rows: int, group: LayerGroup, config, is_far: bool, where: str) -> float:
    """What the fit of so many rows takes (quant.fit_grid): of levels, B, on a GPU in 16 bits too, and its products with a panel of H,
    there two at a time; of scales, B's rows in one, and two as large, on a GPU three; coefficients, as solved and as factorized."""
    on_gpu, unknowns, is_affine = where != "cpu", unknowns_of(group, config), config.grid != "nonuniform"
    chunk, block = quant.fit_rows(unknowns, group.columns, is_affine, not on_gpu)
    held = min(rows, block if is_far else min(chunk, block))
    chunk = min(chunk, held) * group.columns
    if is_affine:
        products = FLOAT * (held * group.columns + (2 + on_gpu) * chunk)
    else:
        panel = min(1, quant.fit_panel(group.columns) / group.columns)
        products = unknowns * chunk * ((6 if on_gpu else FLOAT) + FLOAT * (1 + on_gpu) * panel)
    return products + 2 * 8 * held * unknowns**2


def _grid_bytes(rows: int, columns: int, config, where: str) -> float:
    """What learning the grids of so many rows takes besides the weights (leanquant_grid.py)."""
    size = rows * columns
    if config.grid == "nonuniform" and config.kmeans != "exact":
        return 200 * min(LOCAL_ELEMENTS[where], size)
    if config.grid == "nonuniform":
        chunk = min(KMEANS_ELEMENTS[where], size)
        tables = min(TABLE_ELEMENTS[where], chunk // columns * (min(config.kmeans_bins, columns) + 1) ** 2)
        return max(60 * chunk, 28 * chunk + 24 * tables)
    return min(SEARCH_BYTES[where], 60 * size) * (config.grid == "affine")


def _placed(name: str, size: float, side: int) -> dict:
    return {name: tuple(size if number == side else 0 for number in range(3))}


def _statistics(group: LayerGroup, config) -> float:
    """Bytes of a group's hessian.Statistics."""
    return FLOAT * statistics_size(sum(group.rows), group.columns, config.shift > 0, config.residual and group.residual)


def _batch_bytes(stage: list[LayerGroup], layer: Layer, shapes: Shapes, run, config, dtype: torch.dtype, on_gpu: bool) -> float:
    """What a batch takes at most on its way to the groups of a stage and into their statistics.

    The second stream passes while what the groups read of the first waits. Then there are both streams' inputs, for one group after the
    other their difference in float32, and beside it what that becomes: on a GPU a factor of 16 bits, where S is summed outputs.
    """
    tokens, d, shift = run.batch_size * run.seqlen, dtype.itemsize, config.shift > 0
    seen = tokens * d * (shapes.hidden + sum(group.columns * group.share for group in stage)) + _copied_bytes(shapes, run, d, on_gpu)
    most = 0.0
    for group in stage:
        its_tokens, I, O = tokens * group.share, group.columns, sum(group.rows)
        residual, half = config.residual and group.residual, on_gpu and d < FLOAT
        difference, rounded = shift * FLOAT * its_tokens * I, shift * d * its_tokens * I * half
        taken = difference + rounded
        if shift and sums_outputs(O, I, residual):
            taken = max(taken, (rounded or difference) + FLOAT * its_tokens * O * (1 + (residual or len(group.rows) > 1)))
        taken += FLOAT * PANEL * I if on_gpu else FLOAT * its_tokens * I * (d < FLOAT)  # a product, or the inputs in float32
        most = max(most, taken)
    return max(_forward_bytes(layer, shapes, run, dtype, on_gpu) + shift * seen, (1 + shift) * seen + most)


def _copied_bytes(shapes: Shapes, run, d: int, on_gpu: bool) -> float:
    """What lies on a GPU of activations that wait elsewhere: of a stream two batches, with what its finished children gave."""
    return 2 * 2 * run.batch_size * run.seqlen * shapes.hidden * d * (on_gpu and run.activations != "device")


def _forward_bytes(layer: Layer, shapes: Shapes, run, dtype: torch.dtype, on_gpu: bool) -> float:
    """What a batch takes on its way through a layer: what a stage reads, of all experts, twice the widest that one of its linears reads or
    gives, and three tensors of the hidden size, or in attention nine of its; on CPUs without units for 16 bits also the widest linear
    in float32."""
    tokens = run.batch_size * run.seqlen
    widest = lambda stage: max(max(g.columns, *g.rows) * g.share for g in stage)  # noqa: E731
    width = max(sum(g.columns * g.share for g in stage) + 2 * widest(stage) for stage in _stages(layer))
    taken = tokens * dtype.itemsize * max(width + 3 * shapes.hidden, 9 * max(shapes.hidden, shapes.attention))
    taken += _copied_bytes(shapes, run, dtype.itemsize, on_gpu)
    if not on_gpu and dtype.itemsize == 2:
        taken += FLOAT * max(
            max(group.rows) * group.columns + tokens * group.share * max(group.columns, *group.rows) for group in layer.groups
        )
    return taken


# --- disk, operations, time ------------------------------------------------------------------------------------


def _disk(shapes: Shapes, run, live: int, itemsize: int) -> tuple[float, float, float]:
    """Bytes that must be free, bytes read, bytes written.

    Free: the parts and either the result made of them or two generations of activations, which are gone before; or the result and
    two generations of a text's that is evaluated. Read: the checkpoint to check it, to run its layers, and to solve them; parts to
    join them; the result for each text. Written: parts, result, and activations once a layer.
    """
    layers, on_disk = len(shapes.layers), run.activations == "disk"
    kept, passes = live * on_disk, 6 if run.true_sequential else 3
    texts = [tokens_of(source, run.seqlen) * shapes.hidden * itemsize for source in run.eval]
    texts = [size for size in texts if evaluation_waits(run, size, live) == "disk"]
    joined = shapes.result if run.save_path else 0
    saved = live if run.save_path or on_disk else 0  # after each layer
    free = shapes.result + max(joined, (2 * live + kept) * bool(saved), 2 * max(texts, default=0))
    read = 3.0 * shapes.stored + joined + passes * kept * layers + len(run.eval) * shapes.result + sum(texts) * (layers + 1)
    return free, read, shapes.result + joined + (saved + kept) * layers + sum(texts) * (layers + 1)


def _phases(shapes: Shapes, run, config, dtype: torch.dtype, on_gpu: bool, hardware: str) -> dict[str, Phase]:
    tokens, d, shift = run.nsamples * run.seqlen, dtype.itemsize, config.shift > 0
    names = ("load", "forward", "hessian", "factorization", "target", "grid", "solve", "refine", "save")
    phases = {name: Phase() for name in names}
    for layer in shapes.layers:
        phases["load"].link += layer.stored + sum(FLOAT * sum(g.rows) * g.columns for g in layer.groups)
        parts = _parts(layer, run, config)
        passes = _passes(parts)
        for group, times in zip(layer.groups, passes, strict=True):
            O, I = sum(group.rows), group.columns
            phases["forward"].operations += (1 + shift) * times * 2 * group.share * tokens * O * I
            if group.bits < 16:
                _add_group(phases, O, I, group, tokens * group.share, config)
                if on_gpu and I >= run.offload_threshold:
                    _add_far(phases, O, I, group, run, config)
        attention = 2 * tokens * run.seqlen * shapes.attention  # half of all pairs, scores and values, 2 operations each
        phases["forward"].operations += (1 + shift) * max(passes, default=1) * attention
        moved = (1 + shift) * tokens * shapes.hidden * d * (len(parts) + 2)
        phases["forward"].link += moved if on_gpu and run.activations != "device" else 0
    for group in shapes.vocabulary[-1:]:
        phases["load"].link += FLOAT * sum(group.rows) * group.columns
        _add_group(phases, sum(group.rows), group.columns, group, tokens, _config_of_head(shapes, config))
    for group in shapes.vocabulary[:-1]:  # embeddings, rounded to nearest
        _add_grid(phases, sum(group.rows), group, config.of_vocabulary(group.bits))
    if shapes.shifts_head and not shapes.vocabulary:
        elements, stored = head_of(shapes)
        phases["load"].link += stored
        _add_statistics(phases, elements // shapes.hidden, shapes.hidden, False, tokens, config)
    if on_gpu:
        for name in ("forward", "hessian") if d == 2 else ():
            phases[name].fast = phases[name].operations
        phases["refine"].operations += 2 * phases["refine"].fast  # a product in float32 is three of bfloat16 (hessian.times_whole)
        phases["refine"].fast *= 3
    else:
        phases["refine"].fast = 0.0
    if run.eval:
        phases["evaluation"] = _evaluation_phase(shapes, run, dtype, on_gpu)
    phases["save"].link += shapes.result + live_bytes(shapes.hidden, run, config, d) * len(shapes.layers)
    return {name: phase for name, phase in phases.items() if phase.operations or phase.bytes or phase.link}


def _evaluation_phase(shapes: Shapes, run, dtype: torch.dtype, on_gpu: bool) -> Phase:
    """One pass of the quantized model over each text, and the head."""
    tokens = sum(map(partial(tokens_of, seqlen=run.seqlen), run.eval))
    elements, _ = head_of(shapes)
    linears = sum(sum(group.rows) * group.columns * group.share for layer in shapes.layers for group in layer.groups)
    operations = 2 * tokens * (elements + linears + len(shapes.layers) * run.seqlen * shapes.attention)
    return Phase(operations, operations if on_gpu and dtype.itemsize == 2 else 0, link=len(run.eval) * shapes.result)


def tokens_of(source: str, seqlen: int) -> float:
    """About how many tokens of `source` perplexity is measured on."""
    if source in CORPORA:
        return TEST_TOKENS.get(source, 256 * seqlen)
    return Path(source).stat().st_size / 4 if Path(source).is_file() else 0


def _add_group(phases: dict[str, Phase], O: int, I: int, group: LayerGroup, tokens: float, config) -> None:
    """Operations of quantizing `O` x `I` weights that see `tokens` tokens (quant.py)."""
    squares = I * I
    _add_statistics(phases, O, I, group.residual, tokens, config)
    _add_grid(phases, O, group, config)
    if not config.nearest:
        phases["solve"].operations += O * squares
        phases["solve"].bytes += 40 * O * I
    if config.refine:
        factors = unknowns_of(group, config) if config.grid == "nonuniform" else 1  # rows of B that a row of weights has for each column
        factors *= (1 + min(1, quant.fit_panel(I) / I)) / 2  # products stop at the diagonal
        sweeps, fits = config.refine + 1, config.refine
        phases["refine"].operations += 2 * O * squares * (sweeps + fits * (factors + 2) + 1)
        phases["refine"].fast += 2 * O * squares * fits * factors
        phases["refine"].bytes += 60 * O * I * sweeps
        if config.grid != "nonuniform":
            phases["refine"].bytes += 20 * O * I * unknowns_of(group, config) * fits  # sums by group of each group's products


def _add_grid(phases: dict[str, Phase], O: int, group: LayerGroup, config) -> None:
    K, I = 2**group.bits, group.columns
    if config.grid == "nonuniform":
        phases["grid"].bytes += O * (8 * K * config.kmeans_bins**2 + 600 * I)  # its tables, sorting and Lloyd's iteration
    elif config.grid == "affine":
        groups = 1 if config.groupsize == -1 else I // config.groupsize
        phases["grid"].bytes += O * groups * 190 * K * 100  # candidates, coarse to fine


def _add_statistics(phases: dict[str, Phase], O: int, I: int, residual: bool, tokens: float, config) -> None:
    """Operations of a Hessian, its factor and the shifted target of `O` x `I` weights."""
    squares = I * I
    panels = 1.0 if I < 1024 else 5 / 8  # H's upper triangle by panels
    per_token = 2 * squares * panels
    if config.shift:
        outputs = sums_outputs(O, I, config.residual and residual)
        per_token += 4 * O * I if outputs else 2 * squares
        phases["target"].operations += (2 if outputs else 4) * O * squares  # U^T U from the right, each half of a square, and W C
    phases["hessian"].operations += tokens * per_token
    phases["factorization"].operations += squares * I * 2 / 3  # Cholesky, triangular inverse


def unknowns_of(group: LayerGroup, config) -> int:
    """What is fitted of each row: its levels, or its groups' scales."""
    if config.grid == "nonuniform":
        return 2**group.bits
    return 1 if config.groupsize == -1 else max(1, group.columns // config.groupsize)


def _add_far(phases: dict[str, Phase], O: int, I: int, group: LayerGroup, run, config) -> None:
    """What a group takes longer because its Hessian lies on the host, or on another GPU: sums go there once a batch, factor and Hessian
    come back for every piece of rows, the factorization is made there."""
    square, pieces = FLOAT * I * I, len(quant.row_pieces(O, I))
    batches = -(-run.nsamples // run.batch_size)
    outputs = sums_outputs(O, I, config.residual and group.residual)
    phases["hessian"].link += batches * (square * 5 / 8 + _statistics(group, config) - square)  # H's upper triangle, by panels
    phases["target"].link += square * pieces * (1 if outputs else 2) * (config.shift > 0)
    phases["solve"].link += square * pieces / 2
    fits = config.refine * -(-O // quant.fit_rows(unknowns_of(group, config), I, config.grid != "nonuniform", False)[1])
    phases["refine"].link += square * (pieces * (3 * config.refine + 2) + fits / 2)  # sweeps, two losses a fit, one more of both; fits
    if not (run.hessian_device and run.hessian_device.type == "cuda"):
        phases["factorization"].on_host += I**3 * 2 / 3


def _passes(parts: list[list[LayerGroup]]) -> list[int]:
    """How often each group's linears are run for all tokens: a pass goes as far as the last group of the part that it is made for, and
    skips children of the layer that are finished (modelutils.StreamedModel.inputs); one more moves the activations on."""
    groups, finished, first = [group for part in parts for group in part], set(), 0
    times = [0] * len(groups)
    for part in parts:
        wanted = [number for number, group in enumerate(part, first) if group.bits < 16]
        for number in range(max(wanted, default=0)):
            times[number] += groups[number].child not in finished
        finished |= {group.child for group in groups[:first]} - {group.child for group in groups[first:]}
        first += len(part)
    return [count + (group.child not in finished) for count, group in zip(times, groups, strict=True)]


def _seconds(phase: Phase, hardware: Hardware, on_gpu: bool) -> float:
    """What limits it: operations, memory, or the link, each at half its rated speed; a CPU's speeds are those of one core."""
    cores = 1 if on_gpu else torch.get_num_threads()
    rated = (phase.operations - phase.fast - phase.on_host) / hardware.single + phase.fast / hardware.half
    on_host = phase.on_host / (HARDWARE["cpu"].single * torch.get_num_threads())
    work = on_host + rated / (cores * (REACHED if on_gpu else 1)) + phase.bytes / (hardware.bandwidth * cores * REACHED)
    return max(work, phase.link / (hardware.link * REACHED))


# --- what fits -------------------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """Bytes that can be had."""

    device: float
    host: float
    disk: float


def limits_of(hardware: str, folder: Path) -> Limits:
    """Of this machine's host and of the disk that holds `folder`, with that hardware's memory."""
    while not folder.exists():
        folder = folder.parent
    return Limits(HARDWARE[hardware].memory or math.inf, free_host_bytes(), shutil.disk_usage(folder).free)


def lacks(plan: Plan, limits: Limits) -> list[str]:
    """What does not fit, a clause each. The GPU of --hessian_device is taken to be like the first."""
    largest = max(plan.device_peak, sum(plan.other_device.values()))
    needs = {"the device": largest, "the host": plan.host_peak, "the disk": plan.disk}
    pairs = zip(needs.items(), limits, strict=True)
    return [f"{where} needs {gb(need)} and has {gb(there)}" for (where, need), there in pairs if need > there]


def advice(plan_for: Callable[[object], Plan], run, limits: Limits, shapes: Shapes) -> str:
    """A clause that says what makes `run` fit: flags, for memory, and what to do about the disk."""
    found, wanted = [], plan_for(run)
    if wanted.disk > limits.disk:
        found.append("free as much of the disk, or give a --save_path on another one")
    if wanted.host_peak > limits.host and "the text's tokens" in wanted.host:
        found.append("give a shorter text")
    elif lacks(wanted, limits._replace(disk=math.inf)):
        widest = max(group.columns for layer in shapes.layers for group in layer.groups)
        flags = remedies(plan_for, run, limits._replace(disk=math.inf), widest)
        smaller = "no smaller batch or number of windows makes it fit: take a larger machine"
        found.append(f"it fits with {' '.join(flags)}" if flags else smaller)
    return "; ".join(found)


def remedies(plan_for: Callable[[object], Plan], run, limits: Limits, groups_width: int) -> list[str] | None:
    """Flags that make `run` fit, the least harmful first, each added only if the ones before do not do; None if all together do not."""
    changes = [("--activations disk", {"activations": "disk"})]
    changes += [(f"--batch_size {size}", {"batch_size": size}) for size in _halves(run.batch_size)]
    on_host = {"offload_threshold": groups_width, "hessian_device": torch.device("cpu")}
    changes += [(f"--offload_threshold {groups_width} --hessian_device cpu", on_host)]
    changes += [("--eval none", {"eval": ()})] if run.eval else []
    changes += [(f"--nsamples {count}", {"nsamples": count}) for count in _halves(run.nsamples)]
    if run.eval and not lacks(plan_for(replace(run, eval=())), limits):
        return ["--eval none"]
    on_device = replace(run, offload_threshold=groups_width + 1)
    if not lacks(plan_for(on_device), limits):
        return [f"--offload_threshold {groups_width + 1}"]
    flags = {}
    for flag, change in changes:
        run = replace(run, **change)
        flags[flag.split()[0]] = flag
        if not lacks(plan_for(run), limits):
            return list(flags.values())
    return None


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(1, number.bit_length())]


def name_of(device: torch.device) -> str:
    """Of HARDWARE, the one that `device` is, or what is nearest."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((hardware for hardware in HARDWARE if hardware in name), "h200")


def peaks(plan: Plan) -> str:
    return (f"device peak {gb(plan.device_peak)}, " if plan.device else "") + f"host peak {gb(plan.host_peak)}, disk {gb(plan.disk)}"


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def resident_bytes() -> int:
    """Of this process, now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def as_text(plan: Plan, hardware: str) -> str:
    """The plan for people to read."""
    parts = lambda sizes: ", ".join(f"{name} {gb(size)}" for name, size in sorted(sizes.items(), key=lambda part: -part[1]))  # noqa: E731
    lines = [f"plan for {hardware}, activations {WHERE[plan.run.activations]}, batches of {plan.run.batch_size} sequences:"]
    if plan.device:
        lines.append(f"  device peak {gb(plan.device_peak)}: {parts(plan.device)}")
    if plan.other_device:
        lines.append(f"  {plan.run.hessian_device} {gb(sum(plan.other_device.values()))}: {parts(plan.other_device)}")
    lines.append(f"  host peak   {gb(plan.host_peak)}: {parts(plan.host)}")
    if plan.shift:
        added = " and ".join(f"{gb(size)} ({name})" for name, size in plan.shift.items())
        lines.append(f"  of these peaks the shifted target adds {added}")
    lines.append(f"  disk        {gb(plan.disk)} free at the start; read {gb(plan.read)}, written {gb(plan.written)}")
    lines.append(f"  {'phase':<14}{'operations':>12}{'estimated s':>14}")
    for name, seconds in plan.seconds.items():
        lines.append(f"  {name:<14}{f'{plan.operations[name]:.3g}' if plan.operations[name] else '-':>12}{seconds:>14.1f}")
    lines.append(f"  {'in all':<14}{sum(plan.operations.values()):>12.3g}{sum(plan.seconds.values()):>14.1f}")
    return "\n".join(lines)
