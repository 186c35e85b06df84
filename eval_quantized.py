"""Benchmark a quantized model, or a base model: lm-eval tasks and perplexity, beside the original if you like.

    python eval_quantized.py --base_model_name_or_path MODEL --leanquant_path FILE --tasks arc_easy --perplexity wikitext2

Perplexity is per token, by the convention of the field: consecutive windows of --seqlen tokens, no context across windows
unless --stride asks for it, the mean of all next-token losses. A tokenizer that puts a BOS in front of a text does so once
a text, not once a window, and results say in how many windows it is. The model is held whole if it fits the device, else it
passes one decoder layer at a time. Tasks are run by lm-eval itself; this file chooses, tabulates and compares.
"""

import argparse
import contextlib
import difflib
import gc
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import datautils
import leanquant
import modelutils
from leanquant import LeanQuantModelForCausalLM
from leanquant.errors import InputError, exit_code, first_line
from leanquant.foreign import METHODS, json_of, open_checkpoint
from leanquant.linear import free_host_bytes
from leanquant.modeling import parse_device
from leanquant.packing import CODES, Checkpoint, write_json

# --- perplexity ------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Token windows `ids` [n, T] of one text, each `stride` tokens after the one before; `with_bos` of them begin with a BOS."""

    source: str
    ids: torch.Tensor
    stride: int
    with_bos: int

    @classmethod
    def of(cls, source: str, tokenizer, seqlen: int, stride: int | None = None) -> "Windows":
        ids = datautils.evaluation_windows(source, tokenizer, seqlen, stride)
        bos = tokenizer.bos_token_id
        return cls(source, ids, stride or seqlen, 0 if bos is None else int((ids[:, 0] == bos).sum()))


class Perplexity(NamedTuple):
    """Perplexity of one text per token, with what it takes to compare it.

    stderr: standard error, from the spread of the windows' mean losses; None for a single window. stride: tokens by which
    windows advance. tokens: covered by the windows, each counted once. windows_with_bos: how many begin with a BOS. digest: of
    their token ids, which tells texts of one name apart.
    """

    source: str
    perplexity: float
    stderr: float | None
    seqlen: int
    stride: int
    windows: int
    tokens: int
    windows_with_bos: int
    digest: str
    window_losses: list[float]

    def __str__(self) -> str:
        spread = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        stride = "" if self.stride == self.seqlen else f", stride {self.stride}"
        return (
            f"{self.source}: perplexity {self.perplexity:.4f}{spread} per token  ({self.windows} windows of {self.seqlen}{stride}, "
            f"{self.tokens} tokens, BOS in {self.windows_with_bos})"
        )


def perplexity(windows: Windows, losses: torch.Tensor) -> Perplexity:
    """exp of the mean of next-token `losses` [n, T - 1]; of overlapping windows, only of tokens that no window before has scored."""
    scored = [row if number == 0 else row[-windows.stride :] for number, row in enumerate(losses.double())]
    value = torch.cat(scored).mean().exp().item()
    means = torch.stack([row.mean() for row in scored])
    n, T = windows.ids.shape
    return Perplexity(
        source=windows.source,
        perplexity=value,
        stderr=value * standard_error(means.tolist()) if n > 1 else None,
        seqlen=T,
        stride=windows.stride,
        windows=n,
        tokens=T + (n - 1) * windows.stride,
        windows_with_bos=windows.with_bos,
        digest=datautils.digest(windows.ids.numpy().tobytes()),
        window_losses=[round(mean, 6) for mean in means.tolist()],
    )


def standard_error(values: list[float]) -> float:
    """Of the mean of two or more independent values."""
    return torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(len(values))


def streamed_losses(model: modelutils.StreamedModel, windows: torch.Tensor, batch_size: int, label: str, place=None) -> torch.Tensor:
    """Next-token losses [n, T - 1] of token `windows` [n, T], layer by layer; activations wait at `place` (unset: in host memory)."""
    stream = last_hidden(model, windows, batch_size, f"eval {label}", place)
    with model.head() as logits:
        pairs = zip((states for batch in stream.batches() for states in batch), windows, strict=True)
        return torch.stack([token_losses(logits(states.unsqueeze(0))[0], ids.to(model.device)).cpu() for states, ids in pairs])


@torch.no_grad()
def whole_losses(model: torch.nn.Module, windows: torch.Tensor, batch_size: int, label: str) -> torch.Tensor:
    """The same of a transformers model in memory."""
    losses = []
    batches = windows.split(batch_size)
    for batch in tqdm(batches, desc=f"eval {label}", unit="batch", ncols=80, leave=False, disable=None):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        losses += [token_losses(row, ids.to(row.device)).cpu() for row, ids in zip(logits, batch, strict=True)]
    return torch.stack(losses)


def last_hidden(model: modelutils.StreamedModel, windows: torch.Tensor, batch_size: int, label: str, place=None) -> modelutils.Stream:
    """What the last decoder layer gives for token `windows` [n, T]; layer by layer, under a progress bar. It waits at `place`."""
    stream = model.embed(windows, batch_size, place)
    for index in tqdm(range(len(model.layers)), desc=label, unit="layer", ncols=80, leave=False, disable=None):
        with model.layer(index, index + 1 if index + 1 < len(model.layers) else None):
            modelutils.in_smaller_batches(model, [stream], model.advance, index, stream)
    return stream


def token_losses(logits: torch.Tensor, ids: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Cross entropy [T - 1] of each next token, from `logits` [T, V] and `ids` [T]; float32, in chunks to save memory."""
    pieces = zip(logits[:-1].split(chunk), ids[1:].split(chunk), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(piece.float(), targets, reduction="none") for piece, targets in pieces])


# --- lm-eval ---------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """One metric, behind one of lm-eval's filters, of one task or of a group of tasks. `stderr` is None where lm-eval gives none.

    shots: worked examples, the fewest and the most. leaves, weights: the single tasks behind it, and what share of the
    value each has.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool
    shots: tuple[int, int]
    items: int
    leaves: list[str]
    weights: list[float]


class Tasks(NamedTuple):
    """What --tasks named: each name with its leaf tasks; the metrics of groups that weight tasks by size; lm-eval's own objects."""

    leaves: dict[str, list[str]]
    by_size: dict[str, set[str]]
    objects: list
    manager: object


class Matches(NamedTuple):
    """What --tasks named, not loaded yet: each name with all that lm-eval's `manager` knows by it. with_own: lm-eval's own tasks too."""

    found: list[tuple[str, list[str]]]
    manager: object
    with_own: bool

    @classmethod
    def of(cls, names: list[str], include_path: Path | None, with_own: bool = True) -> "Matches":
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=with_own)
        return cls([(name, manager.match_tasks([name])) for name in names], manager, with_own)


def match_tasks(names: list[str], include_path: Path | None) -> Matches:
    """The tasks, groups and tags called `names` (also with wildcards). Raises InputError for what is not there, or cannot be read."""
    if include_path and not include_path.is_dir():
        raise InputError(f"--include_path: {include_path} is not a folder: give the one that holds your tasks' YAML files")
    names = [name.strip() for name in ",".join(names).split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names nothing: give names of tasks, or leave it out")
    if include_path:  # reading lm-eval's own thousands takes seconds: perhaps they are not needed
        alone = Matches.of(names, include_path, with_own=False)
        if all(matches for _, matches in alone.found):
            return alone
    matched = Matches.of(names, include_path)
    if unknown := [name for name, matches in matched.found if not matches]:
        if include_path:
            _check_yaml(include_path)
        hints = "; ".join(_hint(name, matched.manager.all_tasks) for name in unknown)
        raise InputError(f"unknown task {hints} (--include_path names the folder of your own)")
    return matched


def _hint(name: str, tasks: list[str]) -> str:
    known = {task.casefold(): task for task in tasks}
    near = [known[match] for match in difflib.get_close_matches(name.casefold(), known, n=5, cutoff=0.5)]
    return f"{name}: " + (f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`")


def _check_yaml(folder: Path) -> None:
    """lm-eval leaves out what it cannot read. Raises InputError for the first such file."""
    import yaml

    for file in sorted(folder.rglob("*.yaml")):
        try:
            list(yaml.parse(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            what = " ".join(str(error).split())
            raise InputError(f"--include_path: {file} cannot be read ({what}): mend it, or move it away") from None


def load_tasks(matched: Matches, include_path: Path | None) -> Tasks:
    """With their data. Raises InputError for what cannot be had."""
    if not matched.with_own:
        with contextlib.suppress(InputError):  # groups of the user's may hold tasks of lm-eval's own
            return _load_all(matched)
        matched = Matches.of([name for name, _ in matched.found], include_path)
    return _load_all(matched)


def _load_all(matched: Matches) -> Tasks:
    found, names = Tasks({}, {}, [], matched.manager), [name for name, _ in matched.found]
    taken: set[str] = set()
    for name, matches in matched.found:
        loaded = {match: _load_task(matched.manager, match) for match in matches}
        for match in sorted(matches, key=lambda match: -len(loaded[match]["tasks"])):  # a pattern meets groups and their members
            leaves = list(loaded[match]["tasks"])
            if repeated := taken.intersection(leaves):
                if matches != [name]:
                    continue
                within = "" if names.count(min(repeated)) > 1 else ", once within a group"
                raise InputError(f"--tasks names {min(repeated)} twice{within}: leave one of them out")
            taken.update(leaves)
            group = loaded[match]["groups"].get(match)
            found.leaves[match] = leaves
            found.by_size[match] = {m.metric for m in (group and group.aggregate_metric_list) or () if m.weight_by_size}
            found.objects.extend([group] if group else loaded[match]["tasks"].values())
    return found


def _load_task(manager, name: str) -> dict:
    """lm-eval's own loader, which fetches the task's data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # YAML, a data set's script, the hub: each fails in its own way
        remedy = "check the network, or the task's files (those of scripts/tasks need no network)"
        raise InputError(f"task {name} cannot be loaded ({first_line(error)}): {remedy}") from None
    for leaf, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {leaf} runs code that the model writes, which is not done here: leave it out, or use lm-eval itself")
    return loaded


def lm_eval_seeds(seed: int | None) -> dict[str, int]:
    """lm-eval's own, behind published results, unless another is wanted."""
    own = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
    return own if seed is None else dict.fromkeys(own, seed)


def set_seeds(seed: int | None) -> None:
    """For tasks that draw their items while they load."""
    import numpy

    seeds = lm_eval_seeds(seed)
    random.seed(seeds["random_seed"])
    numpy.random.seed(seeds["numpy_random_seed"])
    torch.manual_seed(seeds["torch_random_seed"])


def run_tasks(model, tokenizer, tasks: Tasks, args: argparse.Namespace) -> dict:
    """lm-eval's results, samples included, for a transformers `model`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    automatic = "auto" if model.device.type == "cuda" else 16
    settings = {"num_fewshot": args.num_fewshot, "limit": args.limit, "log_samples": args.compare, **lm_eval_seeds(args.seed)}
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.eval_batch_size or automatic)
        for kind in () if sys.stderr.isatty() else ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, kind, partial(getattr(lm, kind), disable_tqdm=True))  # thousands of steps of a bar, in a log
        tokens = count_tokens(lm)
        with contextlib.redirect_stdout(sys.stderr):  # it chats
            found = simple_evaluate(lm, tasks=tasks.objects, task_manager=tasks.manager, bootstrap_iters=1000, **settings)
        return found | {"seqlen": lm.max_length, "tokens": sum(tokens)}
    except Exception as error:  # a task's own code, too many shots, memory
        hint = "look at --num_fewshot, --limit and --eval_batch_size, or run that task alone"
        raise InputError(f"lm-eval could not finish ({type(error).__name__}: {first_line(error)}): {hint}") from error


def count_tokens(lm) -> list[int]:
    """A list that grows by the tokens of all that lm-eval's `lm` is asked: contexts with their continuations, and prompts; no padding."""
    tokens, score, encode = [], lm._loglikelihood_tokens, lm.tok_batch_encode

    def counted_score(requests, *rest, **named):
        tokens.append(sum(len(context) + len(continuation) for _, context, continuation in requests))
        return score(requests, *rest, **named)

    def counted_encode(*rest, **named):
        ids, mask = encode(*rest, **named)
        tokens.append(int(mask.sum()))
        return ids, mask

    lm._loglikelihood_tokens, lm.tok_batch_encode = counted_score, counted_encode
    return tokens


def scores(results: dict, tasks: Tasks) -> list[Score]:
    """One row for each metric of each name that was asked for; subtasks of groups and tags are aggregated."""
    return [score for name in tasks.leaves for score in _scores_of(results, name, tasks.leaves[name], tasks.by_size[name])]


def _scores_of(results: dict, name: str, leaves: list[str], by_size: set[str]) -> list[Score]:
    """A group's value and error are lm-eval's; a tag has none: its tasks count alike."""
    parts = [_leaf_scores(results, leaf) for leaf in leaves]
    if leaves == [name]:
        return parts[0]
    official = {(score.metric, score.filter): score for score in (_leaf_scores(results, name) if name in results["results"] else ())}
    rows = []
    for key in dict.fromkeys((score.metric, score.filter) for part in parts for score in part):
        found = [score for part in parts for score in part if (score.metric, score.filter) == key]
        items = sum(score.items for score in found)
        weights = [score.items / items if key in official and key[0] in by_size else 1 / len(found) for score in found]
        errors = [score.stderr for score in found]
        stderr = None if None in errors else math.sqrt(sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True)))
        value = sum(w * score.value for w, score in zip(weights, found, strict=True))
        if key in official:
            value, stderr = official[key].value, official[key].stderr
        label = f"{name} ({len(found)} tasks)" if len(found) > 1 else found[0].task
        shots = min(score.shots[0] for score in found), max(score.shots[1] for score in found)
        row = found[0]._replace(task=label, value=value, stderr=stderr, items=items, shots=shots)
        rows.append(row._replace(leaves=[score.task for score in found], weights=weights))
    return rows


def _leaf_scores(results: dict, name: str) -> list[Score]:
    better = results.get("higher_is_better", {}).get(name, {})
    items = results.get("n-samples", {}).get(name, {}).get("effective", 0)
    rows = []
    for key, value in results["results"][name].items():
        metric, _, kind = key.partition(",")
        if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
            continue
        stderr = results["results"][name].get(f"{metric}_stderr,{kind}")
        stderr = stderr if isinstance(stderr, float) and math.isfinite(stderr) else None
        shots = results.get("n-shot", {}).get(name, 0)
        rows.append(Score(name, metric, kind, float(value), stderr, better.get(metric) is not False, (shots, shots), items, [name], [1.0]))
    return rows


# --- comparison ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table. difference: this model minus the original, with its standard error; None without --compare."""

    name: str
    metric: str
    detail: str
    value: float
    stderr: float | None
    original: float | None = None
    original_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


class Evaluation(NamedTuple):
    """Everything measured on one model: perplexities, and lm-eval's results (empty without tasks)."""

    perplexities: list[Perplexity]
    results: dict

    def rows(self, tasks: Tasks | None, original: "Evaluation | None") -> list[Row]:
        rows = []
        for number, text in enumerate(self.perplexities):
            row = Row(text.source, "perplexity", f"{text.windows} windows of {text.seqlen}", text.perplexity, text.stderr)
            if original:
                other = original.perplexities[number]
                row = _beside(row, other.perplexity, other.stderr, _perplexity_error(text, other))
            rows.append(row)
        theirs = scores(original.results, tasks) if original and self.results else []
        for number, score in enumerate(scores(self.results, tasks) if self.results else []):
            fewest, most = score.shots
            detail = f"{score.items} items, {fewest if fewest == most else f'{fewest} to {most}'} shots"
            detail += "" if score.higher_is_better else ", lower is better"
            metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
            row = Row(score.task, metric, detail, score.value, score.stderr)
            if original:
                other = theirs[number]
                row = _beside(row, other.value, other.stderr, _score_error(self.results, original.results, score, other))
            rows.append(row)
        return rows


def _beside(row: Row, original: float, original_stderr: float | None, difference_stderr: float | None) -> Row:
    return row._replace(
        original=original, original_stderr=original_stderr, difference=row.value - original, difference_stderr=difference_stderr
    )


def _perplexity_error(ours: Perplexity, theirs: Perplexity) -> float | None:
    """Standard error of the difference of two perplexities of the same windows, to first order in the windows' mean losses."""
    if ours.windows < 2:
        return None
    pairs = zip(ours.window_losses, theirs.window_losses, strict=True)
    return standard_error([ours.perplexity * mine - theirs.perplexity * other for mine, other in pairs])


def _score_error(ours: dict, theirs: dict, score: Score, other: Score) -> float | None:
    """Standard error of score - other. For means over the same items it comes from the items' differences, which vary less."""
    paired = [_paired_error(ours, theirs, leaf, score.metric, score.filter) for leaf in score.leaves]
    if None not in paired:
        return math.sqrt(sum((weight * error) ** 2 for weight, error in zip(score.weights, paired, strict=True)))
    if score.stderr is None or other.stderr is None:
        return None
    return math.hypot(score.stderr, other.stderr)


def _paired_error(ours: dict, theirs: dict, leaf: str, metric: str, kind: str) -> float | None:
    """Standard error of the difference of a leaf task's value; None if its metric, behind filter `kind`, is neither the mean over its
    items nor, as perplexity is, the exponential of minus that."""
    mine, others = (_item_values(results, leaf, metric, kind) for results in (ours, theirs))
    if mine is None or others is None or mine.keys() != others.keys():
        return None
    return standard_error([mine[item] - others[item] for item in mine])


def _item_values(results: dict, leaf: str, metric: str, kind: str) -> dict | None:
    """What the task's value is the mean of, from each item, to first order up to a constant."""
    samples = results["samples"][leaf]  # one of each item for each filter
    values = {sample["doc_id"]: sample.get(metric) for sample in samples if sample.get("filter", kind) == kind}
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values.values()):
        return None
    mean, value = sum(values.values()) / len(values), results["results"][leaf][f"{metric},{kind}"]
    if abs(mean - value) < 1e-6:
        return values
    is_perplexity = mean < 0 and math.isclose(math.exp(min(-mean, 700)), value, rel_tol=1e-6)
    return {item: -value * log for item, log in values.items()} if is_perplexity else None


def as_table(rows: list[Row]) -> str:
    """Markdown; with columns for the original and the difference if there is one."""
    compared = any(row.original is not None for row in rows)
    header = ["", "metric", "on", "value"] + (["original", "difference"] if compared else [])
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.name, row.metric, row.detail, _with_error(row.value, row.stderr)]
        if compared:
            cells += [_with_error(row.original, row.original_stderr), _with_error(row.difference, row.difference_stderr, "+")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    as_text = lambda number, sign="": f"{number:{sign}.4f}" if abs(number) < 1e6 else f"{number:{sign}.4g}"  # noqa: E731
    return as_text(value, sign) + ("" if error is None else f" ± {as_text(error)}")


# --- one model -------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """What is evaluated: a quantized file or folder with its base, or a folder by itself."""

    base: str
    quantized: str | None
    folder: Path
    checkpoint: Checkpoint
    foreign: dict  # the quantization_config of other software, whose layers transformers must build; else empty

    @classmethod
    def open(cls, base: str, quantized: str | None, bits: int | None) -> "Model":
        folder = modelutils.resolve_model(base, modelutils.HUB_FILES if quantized is None else modelutils.FILES_BESIDE_WEIGHTS)
        config = json_of(folder / "config.json").get("quantization_config")
        config = config if isinstance(config, dict) else {}
        try:
            checkpoint = open_checkpoint(quantized or folder)
        except InputError:
            if quantized or config.get("quant_method") not in METHODS:
                raise
            checkpoint = Checkpoint.open(folder)  # transformers may know what to do with it
        foreign = {} if quantized or checkpoint.quantized or config.get("quant_method", "leanquant") == "leanquant" else config
        model = cls(base, quantized, folder, checkpoint, foreign)
        if model.foreign:
            if bits is not None and model.bits and model.bits != [bits]:
                raise InputError(f"{base} holds {model.bits} bits, not {bits}: correct the bits or leave them out")
        elif quantized or bits is not None:
            model.checkpoint.check_bits(bits, quantized or base)
        return model

    @property
    def bits(self) -> list[int]:
        if self.foreign:
            return [self.foreign["bits"]] if "bits" in self.foreign else []
        return sorted({self.checkpoint.bits_of(linear) for linear in self.checkpoint.quantized})

    @property
    def settings(self) -> dict:
        return {"method": self.foreign["quant_method"], **self.foreign} if self.foreign else self.checkpoint.settings

    def fits(self, dtype: torch.dtype, device: str) -> bool:
        """Can it be held whole, with a fifth of the memory left over? Packed on GPUs, rebuilt in `dtype` on a CPU."""
        on_gpus = free_gpu_bytes(device)
        return self.bytes_held(dtype, rebuilt=not on_gpus) < 0.8 * (on_gpus or free_host_bytes())

    def bytes_held(self, dtype: torch.dtype, rebuilt: bool) -> int:
        packed = sum(self.checkpoint.tensor_bytes(linear + CODES) for linear in self.checkpoint.quantized)
        plain = dtype.itemsize * (sum(map(math.prod, self.checkpoint.shapes.values())) - packed)
        return plain + (dtype.itemsize * sum(map(self.checkpoint.weights_of, self.checkpoint.quantized)) if rebuilt else packed)

    def check_memory(self, dtype: torch.dtype, device: str) -> None:
        """Raise InputError if not even packed weights fit this machine, for tasks, which need the whole model. (What does not fit the
        GPUs waits on the host.)"""
        if self.foreign:  # whose loader knows what it holds
            return
        needed, free = self.bytes_held(dtype, rebuilt=False), free_host_bytes() + free_gpu_bytes(device)
        if needed > free:
            what = f"{self.quantized or self.base} takes {needed / 1e9:.2f} GB in memory and {free / 1e9:.2f} GB are free"
            remedy = "take fewer bits, a 16-bit --dtype or a larger machine"
            raise InputError(f"{what}: --tasks need the whole model, --perplexity streams it; {remedy}")

    def load(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """In memory; spread over the GPUs if `device` is auto."""
        place = "auto" if device == "auto" and torch.cuda.is_available() else {"": str(pick_device(device))}
        if self.checkpoint.quantized:
            # On a CPU rebuilt: quicker for many tokens, and to the last digit what llama.py measures.
            options = {"dequantize": "always" if place == {"": "cpu"} and self.fits(dtype, device) else "auto"}
            return LeanQuantModelForCausalLM.from_pretrained(self.folder, self.quantized, torch_dtype=dtype, device_map=place, **options)
        from transformers import AutoModelForCausalLM

        try:
            model, found = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, device_map=place, output_loading_info=True)
        except (ImportError, OSError, ValueError) as error:
            raise InputError(f"{self.base} cannot be loaded ({first_line(error)})") from None
        if missing := sorted(found["missing_keys"]):  # transformers makes up what it misses, and only warns
            raise InputError(f"{self.base} cannot be loaded: {missing[0]} is missing, and {len(missing) - 1} others; get it again")
        return model.eval()


def evaluate(model: Model, tokenizer, dtype, windows: list[Windows], tasks: Tasks | None, args) -> Iterator[Evaluation]:
    """What is measured on `model`, as far as it has come: with perplexities, then with the tasks too."""
    device = pick_device(args.device)
    sequences = args.eval_batch_size or default_batch_size(args.seqlen, device)
    whole = bool(model.foreign) or model.fits(dtype, args.device)
    if whole or not windows:
        runner, losses = model.load(dtype, args.device), whole_losses
    else:
        runner, losses = modelutils.StreamedModel(model.folder, model.checkpoint, dtype, device), streamed_losses
    perplexities = []
    for text in windows:
        perplexities.append(perplexity(text, losses(runner, text.ids, sequences, text.source)))
        print(perplexities[-1], flush=True)
    yield Evaluation(perplexities, {})
    if tasks:
        if losses is streamed_losses:
            del runner
            runner = model.load(dtype, args.device)
        yield Evaluation(perplexities, run_tasks(runner, tokenizer, tasks, args))
    del runner
    gc.collect()
    torch.cuda.empty_cache()


def default_batch_size(seqlen: int, device: torch.device) -> int:
    """As many sequences as make 1024 tokens, on a GPU 8192: enough to keep matrix products busy, little memory."""
    return max(1, (1024 if device.type == "cpu" else 8192) // seqlen)


def check_json_path(flag: str, path: Path | None) -> None:
    """Raise InputError unless results can be written later to the `path` that `flag` gave."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise InputError(f"{flag}: {path} cannot be written: give a file name in a folder that exists")


def free_gpu_bytes(name: str) -> int:
    """Of the GPUs over which a model would be spread; 0 on a CPU."""
    device = pick_device(name)
    if device.type == "cpu":
        return 0
    devices = range(torch.cuda.device_count()) if name == "auto" else [device]
    return sum(torch.cuda.mem_get_info(one)[0] for one in devices)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return parse_device(name)


def pick_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU (it is the fastest there) and the checkpoint's 16-bit type on a GPU."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else checkpoint.stored_dtype


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its sentence; a sentence with "unset:" says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or isinstance(action, argparse._HelpAction) or action.required:
            return action.help
        return action.help + " (off by default)" if action.default is False else super()._get_help_string(action)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=HelpWithDefaults, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--base_model_name_or_path",
        required=True,
        metavar="MODEL",
        help="hub name or folder: the unquantized model (its config and tokenizer are used), or a quantized folder by itself",
    )
    add("--leanquant_path", metavar="FILE", help="quantized .safetensors file or folder (unset: MODEL itself is evaluated)")
    add("--bits", type=int, help="bits of the quantized file, checked if given (unset: read from the file)")
    add("--tasks", nargs="+", metavar="NAME", help="lm-eval tasks, groups or tags, also with wildcards: arc_easy mmlu 'hellaswag*'")
    add("--include_path", type=Path, metavar="FOLDER", help="folder with YAML files of tasks of your own")
    add("--num_fewshot", type=int, help="worked examples before each item (unset: what each task says)")
    add("--limit", type=float, help="only the first so many items of each task, or that share of them if below 1 (unset: all)")
    add("--perplexity", nargs="+", default=[], metavar="NAME|PATH", help=f"texts: {', '.join(datautils.CORPORA)} or local text files")
    add("--seqlen", type=int, default=2048, help="tokens a window of --perplexity")
    add(
        "--stride",
        type=int,
        help="advance windows by so many tokens: each is scored once, with more context, but for a rest at the end (unset: --seqlen)",
    )
    add("--compare", action="store_true", help="evaluate the base model too, and print both with the difference and its standard error")
    add("--eval_batch_size", type=batch_size, metavar="N|auto", help="sequences per forward pass (unset: auto)")
    add("--use_bf16", action="store_true", help="compute in bfloat16, same as --dtype bfloat16")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float16", "bfloat16", "float32"],
        help="type of weights and activations; auto: float32 on a CPU, the model's 16-bit type on a GPU",
    )
    add("--device", default="auto", help="auto (all GPUs if there are any), cpu, cuda or cuda:N")
    add("--seed", type=int, help="of the choice of worked examples, and of tasks that sample (unset: lm-eval's own, 0 and 1234)")
    add("--output", type=Path, metavar="FILE.json", help="write the results to this file (unset: only print them)")
    return parser.parse_args(argv)


def batch_size(text: str) -> int | None:
    """`auto` is None: what fits a GPU, for tasks; for perplexity and on a CPU `default_batch_size`, or 16 items of a task."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor a number of sequences")
    return int(text)


def check(args: argparse.Namespace) -> None:
    """Raise InputError for what can be seen to be wrong before anything is loaded."""
    if not args.tasks and not args.perplexity:
        raise InputError("nothing to evaluate: give --tasks, --perplexity or both")
    if args.seqlen < 2:
        raise InputError(f"--seqlen is {args.seqlen}: give at least 2")
    if args.stride is not None and not 1 <= args.stride <= args.seqlen:
        raise InputError(f"--stride is {args.stride}: give 1 to --seqlen, which is {args.seqlen}")
    if args.limit is not None and not 0 < args.limit < math.inf or args.num_fewshot is not None and args.num_fewshot < 0:
        raise InputError("--limit must be above 0, and --num_fewshot at least 0")
    if args.limit is not None and args.limit >= 1 and args.limit != int(args.limit):
        raise InputError(f"--limit {args.limit} is neither a number of items nor a share below 1")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}: give 0 to 4294967295")
    if args.use_bf16 and args.dtype not in ("auto", "bfloat16"):
        raise InputError(f"--use_bf16 and --dtype {args.dtype} contradict each other: give one of them")
    if args.leanquant_path == "":
        raise InputError("--leanquant_path is empty: give the quantized file or folder, or leave the flag out for the original model")
    if args.compare and not args.leanquant_path:
        raise InputError("--compare needs two models: give the quantized one with --leanquant_path")
    for source in args.perplexity:
        datautils.check_source(source)
    check_json_path("--output", args.output)


def run(args: argparse.Namespace) -> None:
    check(args)
    device = pick_device(args.device)
    matched = match_tasks(args.tasks, args.include_path) if args.tasks else None
    model = Model.open(args.base_model_name_or_path, args.leanquant_path, args.bits)
    base = Model.open(args.base_model_name_or_path, None, None) if args.compare else None
    dtype = torch.bfloat16 if args.use_bf16 else pick_dtype(args.dtype, model.checkpoint, device)
    if args.perplexity:
        modelutils.check_seqlen(model.folder, args.seqlen)
    set_seeds(args.seed)
    for opened in filter(None, (model, base)) if matched else ():
        opened.check_memory(dtype, args.device)
    tasks = load_tasks(matched, args.include_path) if matched else None
    tokenizer = modelutils.load_tokenizer(model.folder)
    windows = [Windows.of(source, tokenizer, args.seqlen, args.stride) for source in args.perplexity]
    print(describe(model, dtype), flush=True)
    found = original = None
    for found in evaluate(model, tokenizer, dtype, windows, tasks, args):
        if found.results:
            print(f"\n{as_table(found.rows(tasks, None))}", flush=True)
        write_results(args, model, dtype, tasks, found, None)  # what is measured is not lost to what comes after
    if base:
        print(f"\n{describe(base, dtype)}", flush=True)
        *_, original = evaluate(base, tokenizer, dtype, windows, tasks, args)
        print(f"\n{as_table(found.rows(tasks, original))}", flush=True)
        write_results(args, model, dtype, tasks, found, original)


def describe(model: Model, dtype: torch.dtype) -> str:
    settings, named = model.settings, ("method", "grid", "exponent", "groupsize", "recipe")
    kind = f"{'/'.join(map(str, model.bits))} bits" if model.bits else "quantized" if model.foreign else "not quantized"
    details = [f"{name} {settings[name]}" for name in named if settings.get(name) is not None]
    return f"{model.quantized or model.base}: {', '.join([kind, *details])}; computed in {str(dtype).removeprefix('torch.')}"


def write_results(args, model: Model, dtype: torch.dtype, tasks: Tasks | None, found: Evaluation, original: Evaluation | None) -> None:
    """What was measured, and all that is needed to measure it again."""
    if not args.output:
        return
    report = {
        "base_model": args.base_model_name_or_path,
        "leanquant_path": args.leanquant_path,
        "bits": model.bits,
        "settings": model.settings,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(pick_device(args.device)),
        "eval_batch_size": args.eval_batch_size or "auto",
        "include_path": args.include_path and str(args.include_path),
        **{name: getattr(args, name) for name in ("seed", "limit", "num_fewshot")},
        "versions": versions("lm-eval", "datasets", "tokenizers"),
        "rows": [row._asdict() for row in found.rows(tasks, original)],
        "perplexity": [text._asdict() for text in found.perplexities],
        "tasks": without_samples(found.results),
    }
    if original:
        report["original"] = {
            "perplexity": [text._asdict() for text in original.perplexities],
            "tasks": without_samples(original.results),
        }
    write_json(args.output, report)


def versions(*packages: str) -> dict[str, str]:
    """Of those that decide what comes out, and of `packages`; torch's with its build, which the one that it is installed by may lack."""
    others = {name: version(name) for name in ("transformers", *packages)}
    return {"torch": str(torch.__version__), **others, "leanquant": leanquant.__version__}


def without_samples(results: dict) -> dict:
    kept = ("results", "versions", "n-shot", "n-samples", "higher_is_better", "seqlen", "tokens")
    return {name: results[name] for name in kept if name in results}


def main(argv: list[str] | None = None) -> int:
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return exit_code(lambda: run_in_memory(parse(argv)), "what was measured before is in --output, if that was given")


def run_in_memory(args: argparse.Namespace) -> None:
    with modelutils.memory_is_input("give a smaller --eval_batch_size or --seqlen"):
        run(args)


if __name__ == "__main__":
    sys.exit(main())
