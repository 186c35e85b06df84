"""eval_quantized.py: perplexity against transformers' own loss, lm-eval on tasks of our own, comparisons, the offline task pack.

lm-eval is the real library; its tasks here need no network. What the command refuses is in test_cli.py too.
"""

import copy
import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import datautils
import eval_quantized
import modelutils
from conftest import make_text
from leanquant import LeanQuantModelForCausalLM
from leanquant.errors import InputError
from test_cli import GRIDS, quantize

ROOT = Path(__file__).resolve().parent.parent

TASKS_PY = """
import random
import datasets

def items(count, **_):
    rng = random.Random(0)
    contexts = ["the old ", "a river ", "light on ", "small city "]
    rows = [{"context": rng.choice(contexts) * 3, "endings": ["house", "water"], "label": i % 2} for i in range(count)]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
"""
TASK = """
tag:
  - mine_tag
task: {name}
custom_dataset: !function items.items
dataset_kwargs:
  count: {count}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GROUP = """
group: {name}
task: [mine_a, mine_b]
aggregate_metric_list:
  - metric: acc
    weight_by_size: {by_size}
"""


@pytest.fixture(scope="module", autouse=True)
def own_tasks_are_parsed_once():
    """lm-eval's own, thousands of files, which each command would parse again."""
    import lm_eval.tasks._index as index

    home, load = Path(index.__file__).parent, index.load_yaml
    load_once = functools.cache(load)

    def load_yaml(path, **options):
        return copy.deepcopy(load_once(path, **options)) if home in Path(path).parents else load(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "load_yaml", load_yaml)
        yield


@pytest.fixture
def task_folder(tmp_path) -> Path:
    """Tasks of 13 and 5 items, a tag and two groups over both."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.py").write_text(TASKS_PY)
    for name, count in {"mine_a": 13, "mine_b": 5}.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, count=count))
    for name, by_size in {"mine_group": "true", "mine_even": "false"}.items():
        (folder / f"{name}.yaml").write_text(GROUP.format(name=name, by_size=by_size))
    return folder


@pytest.fixture
def quantized(tiny_model, text_file, tmp_path) -> Path:
    quantize(tiny_model(), text_file, "--wbits", 2, *GRIDS["nonuniform"], "--save_path", tmp_path / "q.safetensors")
    return tmp_path / "q.safetensors"


def evaluate(output: Path, *options) -> dict:
    assert eval_quantized.main([*map(str, options), "--output", str(output)]) == 0
    return json.loads(output.read_text())


def refusal(capsys, *options) -> str:
    assert eval_quantized.main([*map(str, options)]) == 2
    return capsys.readouterr().err


# --- perplexity ------------------------------------------------------------------------------------------------


def own_loss(model, windows: torch.Tensor) -> torch.Tensor:
    """transformers' mean loss of each window."""
    with torch.no_grad():
        return torch.stack([model(input_ids=ids[None], labels=ids[None]).loss for ids in windows]).double()


@pytest.mark.parametrize("held", ["whole", "streamed"])
def test_perplexity_is_transformers_own_loss(tiny_model, test_text, tokenizer, tmp_path, monkeypatch, held):
    used = []
    for name in ("whole_losses", "streamed_losses"):
        real = getattr(eval_quantized, name)
        monkeypatch.setattr(eval_quantized, name, lambda *a, real=real, name=name: used.append(name) or real(*a))
    if held == "streamed":
        monkeypatch.setattr(eval_quantized, "free_host_bytes", lambda: 1000.0)
    base = ["--base_model_name_or_path", tiny_model(), "--perplexity", test_text, "--seqlen", 32, "--device", "cpu"]
    row = evaluate(tmp_path / "e.json", *base)["perplexity"][0]
    windows = datautils.evaluation_windows(str(test_text), tokenizer, 32)
    expected = own_loss(AutoModelForCausalLM.from_pretrained(tiny_model()), windows)
    assert used == [f"{held}_losses"]
    assert math.log(row["perplexity"]) == pytest.approx(expected.mean().item(), abs=1e-5)
    assert row["window_losses"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert row["stderr"] == pytest.approx(row["perplexity"] * expected.std().item() / len(windows) ** 0.5, rel=1e-3)
    assert (row["windows_with_bos"], row["tokens"], row["windows"]) == (1, 18 * 32, 18)


@pytest.mark.parametrize("stride", [1, 5, 31])
def test_stride_scores_each_token_once_with_all_the_context_there_is(tiny_model, tokenizer, tmp_path, stride):
    text = tmp_path / "short.txt"
    text.write_text(make_text(70, seed=3))
    base = ["--base_model_name_or_path", tiny_model(), "--perplexity", text, "--seqlen", 32, "--stride", stride]
    row = evaluate(tmp_path / "e.json", *base)["perplexity"][0]
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[: 71 // 32 * 32]
    model, losses, end = AutoModelForCausalLM.from_pretrained(tiny_model()), [], 32
    losses += eval_quantized.token_losses(model(ids[None, :32]).logits[0], ids[:32]).tolist()
    while end + stride <= len(ids):
        window = ids[end + stride - 32 : end + stride]
        losses += eval_quantized.token_losses(model(window[None]).logits[0], window)[-stride:].tolist()
        end += stride
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (row["stride"], row["tokens"]) == (stride, end) and len(losses) == end - 1


def test_stride_needs_one_text_and_fits_the_window(tiny_model, test_text, capsys):
    base = ["--base_model_name_or_path", tiny_model(), "--seqlen", 32]
    assert "--stride" in refusal(capsys, *base, "--perplexity", "c4", "--stride", 8)
    assert "--stride is 33" in refusal(capsys, *base, "--perplexity", test_text, "--stride", 33)
    assert "--stride is 0" in refusal(capsys, *base, "--perplexity", test_text, "--stride", 0)


@pytest.mark.parametrize("grid", ["nonuniform", "affine"])
def test_a_folder_of_ours_is_a_model_by_itself(tiny_model, text_file, test_text, tmp_path, monkeypatch, grid):
    quantize(tiny_model(), text_file, "--wbits", 3, *GRIDS[grid], "--save_path", tmp_path / "folder")
    text = ["--perplexity", test_text, "--seqlen", 32]
    alone = evaluate(tmp_path / "a.json", "--base_model_name_or_path", tmp_path / "folder", "--bits", 3, *text)
    base = ["--base_model_name_or_path", tiny_model(), "--leanquant_path", tmp_path / "folder"]
    beside = evaluate(tmp_path / "b.json", *base, *text)
    monkeypatch.setattr(eval_quantized, "free_host_bytes", lambda: 1000.0)
    streamed = evaluate(tmp_path / "c.json", "--base_model_name_or_path", tmp_path / "folder", *text)
    assert alone["perplexity"] == beside["perplexity"]
    assert streamed["perplexity"][0]["perplexity"] == pytest.approx(alone["perplexity"][0]["perplexity"], rel=1e-5)
    assert alone["bits"] == [3] and alone["settings"]["grid"] == grid and "torch" in alone["versions"]


# --- lm-eval ---------------------------------------------------------------------------------------------------


def own_choices(model, tokenizer, contexts, endings) -> list[int]:
    """The likelier ending after each context, from the model's logits alone."""
    choices = []
    for context in contexts:
        sums = []
        for ending in endings:
            before, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, f"{context} {ending}"))
            log_p = torch.log_softmax(model(ids).logits[0, :-1].float(), 1).gather(1, ids[0, 1:, None])
            sums.append(log_p[before.shape[1] - 1 :].sum().item())
        choices.append(max(range(len(sums)), key=sums.__getitem__))
    return choices


def test_tasks_give_what_the_models_own_logits_say(tiny_model, quantized, tokenizer, task_folder, tmp_path):
    base = ["--base_model_name_or_path", tiny_model(), "--leanquant_path", quantized, "--include_path", task_folder]
    found = evaluate(tmp_path / "e.json", *base, "--tasks", "mine_a", "--eval_batch_size", 4, "--device", "cpu")
    scope: dict = {}
    exec(TASKS_PY, scope)
    items = scope["items"](13)["test"]
    model = LeanQuantModelForCausalLM.from_pretrained(tiny_model(), quantized)
    with torch.no_grad():
        chosen = own_choices(model, tokenizer, items["context"], ["house", "water"])
    right = [choice == label for choice, label in zip(chosen, items["label"], strict=True)]
    row = found["rows"][0]
    assert row["value"] == pytest.approx(sum(right) / 13) and 0 < sum(right) < 13
    assert row["stderr"] == pytest.approx(eval_quantized.standard_error([float(r) for r in right]), rel=1e-6)
    assert found["tasks"]["n-samples"]["mine_a"]["effective"] == 13
    assert found["bits"] == [2]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_has_no_bar_of_the_requests(tiny_model, task_folder, tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    base = ["--base_model_name_or_path", tiny_model(), "--include_path", task_folder]
    evaluate(tmp_path / "e.json", *base, "--tasks", "mine_a", "--device", "cpu")
    assert ("Running loglikelihood requests" in capsys.readouterr().err) == terminal


def test_groups_and_tags_are_one_row(tiny_model, task_folder, tmp_path, capsys):
    base = ["--base_model_name_or_path", tiny_model(), "--include_path", task_folder]
    weights = {"mine_group": (7 / 12, 5 / 12), "mine_even": (0.5, 0.5), "mine_tag": (0.5, 0.5)}
    for name, (a, b) in weights.items():
        found = evaluate(tmp_path / "e.json", *base, "--tasks", name, "--limit", 7)
        (row,) = found["rows"]
        first, second = (found["tasks"]["results"][leaf] for leaf in ("mine_a", "mine_b"))
        assert row["name"] == f"{name} (2 tasks)" and "12 items" in row["detail"]
        assert row["value"] == pytest.approx(a * first["acc,none"] + b * second["acc,none"])
        if name == "mine_tag":
            assert row["stderr"] == pytest.approx(math.hypot(a * first["acc_stderr,none"], b * second["acc_stderr,none"]))
        else:
            assert row["stderr"] == found["tasks"]["results"][name]["acc_stderr,none"]
        assert capsys.readouterr().out.count("| acc |") == 1


@pytest.mark.parametrize("by_size, weights", [({"acc"}, (0.75, 0.25)), (set(), (0.5, 0.5))])
def test_a_groups_difference_weights_tasks_as_the_group_does(by_size, weights):
    def results(first, second):
        values = {"a": first, "b": second}
        means = {name: {"acc,none": sum(v) / len(v), "acc_stderr,none": 0.1} for name, v in values.items()}
        samples = {name: [{"doc_id": i, "acc": x, "filter": "none"} for i, x in enumerate(v)] for name, v in values.items()}
        sizes = {name: {"effective": len(v)} for name, v in values.items()}
        return {"samples": samples, "results": means | {"g": {"acc,none": 0.5, "acc_stderr,none": 0.07}}, "n-samples": sizes}

    ours, theirs = results([1, 0, 1, 1, 0, 1], [1, 0]), results([1, 1, 0, 1, 0, 1], [0, 0])
    mine, other = (eval_quantized._scores_of(found, "g", ["a", "b"], by_size)[0] for found in (ours, theirs))
    assert mine.weights == list(weights) and mine.stderr == 0.07
    spreads = [eval_quantized.standard_error([0, -1, 1, 0, 0, 0]), eval_quantized.standard_error([1, 0])]
    expected = math.hypot(*(w * e for w, e in zip(weights, spreads, strict=True)))
    assert eval_quantized._score_error(ours, theirs, mine, other) == pytest.approx(expected)


def test_each_filter_is_compared_by_its_own_items():
    def results(strict, flexible):
        rows = {"strict": strict, "flexible": flexible}
        samples = [{"doc_id": i, "match": v, "filter": kind} for kind, values in rows.items() for i, v in enumerate(values)]
        return {"samples": {"t": samples}, "results": {"t": {f"match,{kind}": sum(v) / len(v) for kind, v in rows.items()}}}

    ours, theirs = results([1, 0, 0], [1, 1, 1]), results([0, 0, 0], [1, 1, 1])
    strict, flexible = (eval_quantized._paired_error(ours, theirs, "t", "match", kind) for kind in ("strict", "flexible"))
    assert strict == pytest.approx(1 / 3) and flexible == 0


def test_the_same_model_twice_differs_by_nothing(tiny_model, text_file, test_text, task_folder, tmp_path):
    folder = tmp_path / "folder"
    quantize(tiny_model(), text_file, "--wbits", 4, *GRIDS["nonuniform"], "--save_path", folder)
    base = ["--base_model_name_or_path", folder, "--leanquant_path", folder, "--include_path", task_folder, "--seqlen", 32]
    found = evaluate(
        tmp_path / "e.json", *base, "--tasks", "mine_a", "--num_fewshot", 2, "--perplexity", test_text, "--seqlen", 32, "--compare"
    )
    assert [(row["difference"], row["difference_stderr"]) for row in found["rows"]] == [(0, 0), (0, 0)]
    assert "2 shots" in found["rows"][1]["detail"]


def test_comparison_pairs_items_and_windows(tiny_model, quantized, test_text, task_folder, tmp_path, capsys):
    base = ["--base_model_name_or_path", tiny_model(), "--leanquant_path", quantized, "--include_path", task_folder]
    found = evaluate(tmp_path / "e.json", *base, "--tasks", "mine_tag", "--perplexity", test_text, "--seqlen", 32, "--compare")
    text, task = found["rows"]
    ours, theirs = found["perplexity"][0], found["original"]["perplexity"][0]
    assert text["difference"] == pytest.approx(ours["perplexity"] - theirs["perplexity"])
    pairs = zip(ours["window_losses"], theirs["window_losses"], strict=True)
    differences = torch.tensor([ours["perplexity"] * a - theirs["perplexity"] * b for a, b in pairs]).double()
    assert text["difference_stderr"] == pytest.approx((differences.std() / len(differences) ** 0.5).item(), rel=1e-5)
    assert task["difference"] == pytest.approx(task["value"] - task["original"])
    assert "| original | difference |" in capsys.readouterr().out
    scores = [eval_quantized._leaf_scores(found["tasks"], leaf)[0] for leaf in ("mine_a", "mine_b")]
    assert task["value"] == pytest.approx(sum(score.value for score in scores) / 2)
    assert 0 < task["difference_stderr"] < math.hypot(task["stderr"], task["original_stderr"]) * 2


def test_paired_error_is_that_of_the_items_differences():
    def results(values):
        samples = {"t": [{"doc_id": number, "acc": value} for number, value in enumerate(values)]}
        return {"samples": samples, "results": {"t": {"acc,none": sum(values) / len(values)}}}

    ours, theirs = results([1.0, 0.0, 1.0, 1.0]), results([1.0, 1.0, 0.0, 1.0])
    assert eval_quantized._paired_error(ours, theirs, "t", "acc", "none") == pytest.approx((2 / 3) ** 0.5 / 2)
    assert eval_quantized._paired_error(ours, results([1.0] * 3), "t", "acc", "none") is None
    ours["results"]["t"]["acc,none"] = 0.3  # not a mean over items
    assert eval_quantized._paired_error(ours, theirs, "t", "acc", "none") is None


def test_a_perplexity_is_paired_by_its_items_log_likelihoods():
    def results(logs):
        samples = {"t": [{"doc_id": number, "perplexity": log} for number, log in enumerate(logs)]}
        return {"samples": samples, "results": {"t": {"perplexity,none": math.exp(-sum(logs) / len(logs))}}}

    logs = [-1.0, -2.5, -0.2, -4.0]
    shift = [0.02, 0.01, 0.03, 0.02]
    ours, theirs = results(logs), results([a + b for a, b in zip(logs, shift, strict=True)])
    found = eval_quantized._paired_error(ours, theirs, "t", "perplexity", "none")
    values = [result["results"]["t"]["perplexity,none"] for result in (ours, theirs)]
    pairs = zip(logs, shift, strict=True)
    assert found == pytest.approx(eval_quantized.standard_error([values[0] * a - values[1] * (a + b) for a, b in pairs]))
    assert eval_quantized._paired_error(ours, ours, "t", "perplexity", "none") == 0


def test_an_error_of_any_size_has_a_readable_length():
    assert eval_quantized._with_error(3.25, 0.5) == "3.2500 ± 0.5000"
    assert eval_quantized._with_error(3.25e31, 4e30, "+") == "+3.25e+31 ± 4e+30"


def found_tasks(names, include_path) -> eval_quantized.Tasks:
    return eval_quantized.load_tasks(eval_quantized.match_tasks(names, include_path), include_path)


def test_patterns_take_each_task_once(task_folder):
    tasks = found_tasks(["mine_*"], task_folder)
    assert list(tasks.leaves.values()) == [["mine_a", "mine_b"]]
    assert list(found_tasks(["mine_?"], task_folder).leaves) == ["mine_a", "mine_b"]


def test_a_group_may_hold_lm_evals_own_tasks(task_folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    (task_folder / "mixed.yaml").write_text("group: mixed\ntask: [mine_a, arithmetic_1dc]\n")
    real, managers = TaskManager.load, []

    def load(self, names):
        managers.append(self)
        if "arithmetic_1dc" not in self.all_tasks:
            return real(self, names)
        return {"tasks": {"mine_a": None, "arithmetic_1dc": None}, "groups": {}}  # its data lies on the hub

    monkeypatch.setattr(TaskManager, "load", load)
    assert found_tasks(["mixed"], task_folder).leaves == {"mixed": ["mine_a", "arithmetic_1dc"]}
    assert len(managers) == 2
    monkeypatch.setattr(TaskManager, "load", lambda self, names: managers.append(self) or 1 / 0)
    with pytest.raises(InputError, match="cannot be loaded"):
        found_tasks(["arithmetic_1dc"], task_folder)
    assert len(managers) == 3, "lm-eval's own task, which fails, is not tried twice"


def test_tasks_that_draw_while_they_load_are_reproducible(tiny_model, task_folder, tmp_path):
    drawn = tmp_path / "drawn"
    noted = f"open({str(drawn)!r}, 'w').write(str(random.getstate()))\n    rng = random"
    (task_folder / "items.py").write_text(TASKS_PY.replace("rng = random.Random(0)", noted))
    base = ["--base_model_name_or_path", tiny_model(), "--include_path", task_folder, "--tasks", "mine_a"]
    found = [
        (evaluate(tmp_path / "e.json", *base, *seed)["rows"], drawn.read_text())
        for seed in ([], [], ["--seed", 5], ["--seed", 5], ["--seed", 6])
    ]
    assert found[0] == found[1] and found[2] == found[3]
    assert len({items for _, items in found}) == 3


@pytest.mark.parametrize("text", ["{", "[]", "", "7"])
def test_a_damaged_config_is_one_sentence(tiny_model, test_text, tmp_path, capsys, text):
    shutil.copytree(tiny_model(), tmp_path / "m")
    (tmp_path / "m/config.json").write_text(text)
    assert "config.json" in refusal(capsys, "--base_model_name_or_path", tmp_path / "m", "--perplexity", test_text, "--seqlen", 32)


def test_what_was_measured_survives_a_task_that_fails(tiny_model, test_text, task_folder, tmp_path, capsys):
    base = ["--base_model_name_or_path", tiny_model(), "--include_path", task_folder, "--perplexity", test_text, "--seqlen", 32]
    options = [*base, "--tasks", "mine_a", "--num_fewshot", 100, "--output", tmp_path / "e.json"]
    assert "lm-eval could not finish" in refusal(capsys, *options)
    assert json.loads((tmp_path / "e.json").read_text())["rows"][0]["metric"] == "perplexity"


def test_the_hub_is_asked_for_no_more_than_is_needed(tiny_model, quantized, test_text, task_folder, monkeypatch, capsys):
    """Nothing for an unknown task; for a quantized file what lies beside the weights, and for --compare the weights, before the work."""
    asked = []

    def download(name, allow_patterns, **_):
        asked.append(allow_patterns)
        return tiny_model()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(modelutils, "where_to_look", lambda _: {})
    base = ["--base_model_name_or_path", "someone/tiny", "--leanquant_path", quantized]
    assert "unknown task mine_aa" in refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_aa")
    assert asked == []
    assert eval_quantized.main(list(map(str, [*base, "--perplexity", test_text, "--seqlen", 32]))) == 0
    assert [[pattern for pattern in patterns if "safetensors" in pattern] for patterns in asked] == [[]]
    asked.clear()

    def evaluate(*_):
        raise InputError("the work began")

    monkeypatch.setattr(eval_quantized, "evaluate", evaluate)
    assert "the work began" in refusal(capsys, *base, "--perplexity", test_text, "--seqlen", 32, "--compare")
    assert ["*.safetensors" in patterns for patterns in asked] == [False, True]


def test_a_connection_that_breaks_is_one_sentence(tiny_model, test_text, monkeypatch, capsys):
    import datasets

    class ReadTimeout(Exception):
        """Of the hub client's HTTP library, whose errors are not OSErrors."""

    def broken(*_, **__):
        raise ReadTimeout("The read operation timed out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    monkeypatch.setattr(modelutils, "where_to_look", lambda _: {})
    monkeypatch.setattr("leanquant.modeling.ask_hub", lambda *_: None)  # it still answers
    monkeypatch.setattr(datasets, "load_dataset", broken)
    assert "someone/tiny from the hub (The read operation" in refusal(
        capsys, "--base_model_name_or_path", "someone/tiny", "--perplexity", test_text
    )
    options = ["--base_model_name_or_path", tiny_model(), "--seqlen", 32]
    assert "wikitext from the hub (The read operation" in refusal(capsys, *options, "--perplexity", "wikitext2")


def test_bad_task_options_are_refused_before_the_model_loads(tiny_model, quantized, task_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_quantized, "evaluate", lambda *_: pytest.fail("evaluation began"))
    base = ["--base_model_name_or_path", tiny_model(), "--leanquant_path", quantized]
    assert "hellaswag," in refusal(capsys, *base, "--tasks", "HellaSwagg")
    error = refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_aa", "mine_a", "zzzzz9")
    assert re.search("unknown task mine_aa: did you mean .*mine_a.*; zzzzz9: see `lm-eval ls tasks`", error)
    assert "not a folder" in refusal(capsys, *base, "--include_path", tmp_path / "none", "--tasks", "mine_a")
    assert "twice, once within a group" in refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_tag", "mine_a")
    assert "mine_a twice: leave" in refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_a, mine_a")
    assert "--include_path names the folder" in refusal(capsys, *base, "--tasks", "mine_a")
    assert "--tasks names nothing" in refusal(capsys, *base, "--tasks", " , ")
    assert "--leanquant_path is empty" in refusal(capsys, base[0], tiny_model(), "--leanquant_path", "", "--tasks", "mine_a")
    assert "nothing to evaluate" in refusal(capsys, *base)
    assert "--compare" in refusal(capsys, "--base_model_name_or_path", tiny_model(), "--tasks", "mine_a", "--compare")
    assert "--limit" in refusal(capsys, *base, "--tasks", "mine_a", "--limit", 0)
    assert "--limit" in refusal(capsys, *base, "--tasks", "mine_a", "--limit", "nan")
    assert "neither a number of items" in refusal(capsys, *base, "--tasks", "mine_a", "--limit", 1.5)
    assert "--seed is -1" in refusal(capsys, *base, "--tasks", "mine_a", "--seed", -1)
    assert "contradict" in refusal(capsys, *base, "--tasks", "mine_a", "--use_bf16", "--dtype", "float16")
    (task_folder / "broken.yaml").write_text("task: mine_d\nmetric_list: [\n")
    assert re.search("broken.yaml cannot be read .*line 3", refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_d"))
    assert found_tasks(["mine_a"], task_folder).leaves == {"mine_a": ["mine_a"]}, "it is in nobody's way"
    (task_folder / "broken.yaml").unlink()
    (task_folder / "unsafe.yaml").write_text(TASK.format(name="mine_c", count=3) + "unsafe_code: true\n")
    assert "runs code that the model writes" in refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_c")
    (task_folder / "items.py").write_text("raise RuntimeError('no data')")
    assert "mine_a cannot be loaded" in refusal(capsys, *base, "--include_path", task_folder, "--tasks", "mine_a")
    with pytest.raises(SystemExit):
        eval_quantized.parse([*map(str, base), "--eval_batch_size", "none"])
    assert eval_quantized.parse([*map(str, base), "--eval_batch_size", "auto"]).eval_batch_size is None


def test_tasks_of_a_model_that_does_not_fit(tiny_model, quantized, test_text, task_folder, tmp_path, monkeypatch, capsys):
    """Texts are streamed all the same; what no memory holds is refused before anything is loaded."""
    base = ["--base_model_name_or_path", tiny_model(), "--leanquant_path", quantized, "--device", "cpu", "--perplexity", test_text]
    options = [*base, "--seqlen", 32, "--include_path", task_folder, "--tasks", "mine_a"]
    whole = evaluate(tmp_path / "whole.json", *options)
    streamed, real = [], eval_quantized.streamed_losses
    monkeypatch.setattr(eval_quantized, "streamed_losses", lambda *args: streamed.append(1) or real(*args))
    with monkeypatch.context() as patch:
        patch.setattr(eval_quantized.Model, "fits", lambda *_: False)
        apart = evaluate(tmp_path / "apart.json", *options)
    assert streamed and apart["rows"][0]["value"] == pytest.approx(whole["rows"][0]["value"], rel=1e-5)
    assert apart["rows"][1:] == whole["rows"][1:] and len(apart["rows"]) > 1
    monkeypatch.setattr(eval_quantized, "free_host_bytes", lambda: 1000)
    assert "--tasks need the whole model" in refusal(capsys, *options)
    assert evaluate(tmp_path / "text.json", *base, "--seqlen", 32)["rows"] == apart["rows"][:1]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.00 GiB\nmore"),
            2,
            "11.00 GiB): give a smaller --eval_batch_size",
        ),
        (OSError(28, "No space left on device", "x.json"), 2, "x.json cannot be written (No space left on device): make room"),
        (KeyboardInterrupt(), 130, "interrupted: what was measured before is in --output"),
    ],
)
def test_an_evaluation_ends_with_a_sentence(monkeypatch, capsys, error, code, says):
    def fail(_):
        raise error

    monkeypatch.setattr(eval_quantized, "run", fail)
    assert eval_quantized.main(["--base_model_name_or_path", "m", "--tasks", "t"]) == code
    assert says in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    monkeypatch.setattr(eval_quantized, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eval_quantized.main(["--base_model_name_or_path", "m", "--tasks", "t"])


def test_results_say_what_was_measured_how(tiny_model, quantized, test_text, task_folder, tmp_path):
    base = ["--base_model_name_or_path", tiny_model(), "--leanquant_path", quantized, "--device", "cpu"]
    found = evaluate(tmp_path / "e.json", *base, "--include_path", task_folder, "--tasks", "mine_a", "--num_fewshot", 1, "--limit", 5)
    assert (found["num_fewshot"], found["limit"], found["device"]) == (1, 5, "cpu") and found["versions"]["leanquant"]
    assert found["tasks"]["seqlen"] > 0 and found["tasks"]["tokens"] > 0
    texts = [
        evaluate(tmp_path / "p.json", *base, "--perplexity", test_text, "--seqlen", length)["perplexity"][0] for length in (32, 32, 16)
    ]
    assert texts[0]["digest"] == texts[1]["digest"] != texts[2]["digest"]


def test_tokens_that_tasks_read_are_counted(tiny_model, tokenizer):
    """Each token once, whatever the batches and their padding."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=eval_quantized.Model.open(tiny_model(), None, None).load(torch.float32, "cpu"), tokenizer=tokenizer, batch_size=2)
    texts = ["the old house", "a river", "light on the small city"]
    wanted = [len(tokenizer(text).input_ids) for text in texts]
    asked = {
        "loglikelihood": [(text.rsplit(" ", 1)[0], " " + text.rsplit(" ", 1)[1]) for text in texts],
        "loglikelihood_rolling": [(text,) for text in texts],
        "generate_until": [(text, {"max_gen_toks": 2, "until": ["."]}) for text in texts],
    }
    for kind, arguments in asked.items():
        tokens = eval_quantized.count_tokens(lm)
        getattr(lm, kind)([Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)], disable_tqdm=True)
        assert sum(tokens) == sum(wanted) + len(texts) * (kind == "loglikelihood_rolling"), kind  # which begin with a token more


def test_models_of_other_software_are_left_to_transformers(tiny_model, test_text, tmp_path, capsys):
    """A folder that names another method goes to transformers, and what that says is passed on."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.save_pretrained(tmp_path / "awq")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "awq" / file).write_bytes((tiny_model() / file).read_bytes())
    config = json.loads((tmp_path / "awq/config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    (tmp_path / "awq/config.json").write_text(json.dumps(config))
    assert eval_quantized.Model.open(str(tmp_path / "awq"), None, None).bits == [4]
    assert "cannot be loaded" in refusal(capsys, "--base_model_name_or_path", tmp_path / "awq", "--perplexity", test_text, "--seqlen", 32)


# --- the offline task pack -------------------------------------------------------------------------------------


def test_task_pack_runs_with_lm_eval_and_keeps_to_held_out_articles(monkeypatch):
    import demo_data

    tasks = found_tasks(["demo_words,demo_continuations"], ROOT / "scripts" / "tasks")
    words, continuations = (task.dataset["test"] for task in tasks.objects)
    assert len(words) >= 500 and len(continuations) >= 500
    calibration, tests = ("\n".join(texts) for texts in demo_data.split_articles(demo_data.articles(), demo_data.CALIBRATION_SHARE))
    plain = lambda text: text.replace("'''", "").replace("''", "")  # noqa: E731
    calibration, tests = plain(calibration), plain(tests)
    for item in words.select(range(0, len(words), 40)):
        assert item["context"][:60] in tests and item["context"][:60] not in calibration
        assert 39 <= len(item["context"].split()) < 90 and item["word"] in item["context"]
    for item in continuations.select(range(0, len(continuations), 40)):
        assert f"{item['context']} {item['endings'][item['label']]}" in tests
        assert len(set(item["endings"])) == 4
    counts = torch.bincount(torch.tensor(continuations["label"]))
    assert counts.min() > 0.15 * len(continuations)


# --- the cache of token windows --------------------------------------------------------------------------------


def test_windows_come_from_the_cache(tokenizer, tmp_path, cache):
    text = tmp_path / "text.txt"
    text.write_text(make_text(500, seed=4))
    first = datautils.evaluation_windows(str(text), tokenizer, 32)
    sampled = datautils.calibration_windows(str(text), tokenizer, 4, 32, 0)
    assert len(list(cache.iterdir())) == 2

    class Untouchable:
        backend_tokenizer = tokenizer.backend_tokenizer

    assert torch.equal(datautils.evaluation_windows(str(text), Untouchable, 32), first)
    assert torch.equal(datautils.calibration_windows(str(text), Untouchable, 4, 32, 0), sampled)
    assert not torch.equal(datautils.calibration_windows(str(text), tokenizer, 4, 32, 1), sampled)
    assert datautils.evaluation_windows(str(text), tokenizer, 32, 8).shape != first.shape


def test_another_text_or_tokenizer_or_a_damaged_cache_gives_no_stale_windows(tokenizer, tmp_path, cache):
    text = tmp_path / "text.txt"
    text.write_text(make_text(500, seed=4))
    first = datautils.evaluation_windows(str(text), tokenizer, 32)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(datautils.evaluation_windows(str(text), tokenizer, 32), first)
    assert torch.equal(load_file(file)["windows"], first)
    text.write_text(make_text(500, seed=5))
    assert not torch.equal(datautils.evaluation_windows(str(text), tokenizer, 32), first)
    from tokenizers import processors

    from conftest import make_tokenizer

    other = make_tokenizer()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 0)])
    assert datautils.evaluation_windows(str(text), other, 32)[0, :2].tolist() == [0, 0]


def test_without_a_place_for_the_cache_all_works(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LEANQUANT_CACHE", str(tmp_path / "file" / "below"))
    text = tmp_path / "text.txt"
    text.write_text(make_text(500, seed=4))
    assert datautils.evaluation_windows(str(text), tokenizer, 32).shape == (15, 32)
