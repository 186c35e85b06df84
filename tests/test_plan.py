"""What a run is planned to need is what it needs: peaks against measured ones, numbers against shapes, and who may begin.

Peaks are of processes of their own, of which each plans and measures itself.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import bench_scale
import datautils
import flags
import llama
import modelutils
import plan
from conftest import SIZES, make_text, write_model
from leanquant.packing import Checkpoint
from live_tensors import LiveTensors, compute_as_a_gpu_does
from ranks import Ranks
from test_cli import environment

RECIPE = ["--wbits", "4", "--exponent", "4", "--true-sequential", "--act-order", "--percdamp", "0.1"]
LLAMA_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
LLAMA_405B |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}


@pytest.fixture(scope="module")
def large_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("405b")
    LlamaConfig(**LLAMA_405B, dtype="bfloat16").save_pretrained(folder)
    return folder / "config.json"


def planned(*arguments, tmp_path) -> dict:
    report = tmp_path / "plan.json"
    assert llama.main([str(part) for part in (*arguments, *RECIPE, "--report", report)]) == 0
    return json.loads(report.read_text())["plan"]


# --- against what is measured ----------------------------------------------------------------------------------

AFFINE = ["--grid", "affine", "--grid_partitions", "8"]  # the fastest to learn
# What dominates: sizes of the model, of the calibration text, and the settings.
MEASURED = {
    "activations": ({"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8}, 48, 512, []),
    "activations on the disk": (
        {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8},
        48,
        512,
        ["--activations", "disk"],
    ),
    "refinement": ({"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}, 2, 256, ["--recipe", "best"]),
    "groups": (
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        2,
        256,
        ["--recipe", "best", "--grid", "affine", "--groupsize", "64", "--grid_partitions", "64"],
    ),
    "experts": ({"hidden_size": 256, "intermediate_size": 1536, "num_local_experts": 16}, 2, 256, ["--refine", "0", *AFFINE]),
    "text": ({}, 2, 256, ["--nearest"]),
    "weights and Hessians": ({"hidden_size": 1024, "intermediate_size": 4096}, 2, 256, ["--nearest"]),
    "embeddings": ({"hidden_size": 256, "vocab_size": 200_000}, 2, 256, ["--nearest"]),
    "head": ({"hidden_size": 256, "vocab_size": 400_000, "num_hidden_layers": 1}, 2, 256, ["--shift_head", *AFFINE]),
}


@pytest.mark.parametrize("sizes, nsamples, seqlen, options", MEASURED.values(), ids=MEASURED)
def test_host_peak_is_as_planned(tmp_path, sizes, nsamples, seqlen, options):
    folder, report = tmp_path / "model", tmp_path / "report.json"
    kind = MixtralConfig if "num_local_experts" in sizes else LlamaConfig
    write_model(kind(**(SIZES | {"max_position_embeddings": 1024} | sizes)), folder, "float16")
    (tmp_path / "text.txt").write_text(make_text(30_000 if sizes else 1_500_000))
    settings = ["--wbits", "4", *options] if "--nearest" in options else [*RECIPE, "--recipe", "published", "--shift", "0.5", *options]
    command = [sys.executable, "llama.py", folder, tmp_path / "text.txt", *settings, "--n_layers", "1", "--eval", "none"]
    command += ["--nsamples", nsamples, "--seqlen", seqlen, "--save_path", tmp_path / "q.safetensors", "--report", report]
    subprocess.run([str(part) for part in command], check=True, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    contents = json.loads(report.read_text())
    assert contents["plan"]["host_peak_bytes"] == pytest.approx(contents["peak_host_bytes_quantizing"], rel=0.15)
    assert contents["plan"]["host_peak_bytes"] == pytest.approx(sum(contents["plan"]["host"].values()))


# What dominates on a device: sizes of the model, tokens a sequence, and the settings.
ON_A_DEVICE = {
    "both streams": ({"intermediate_size": 1024}, 1024, ["--recipe", "published", "--shift", "1", *AFFINE]),
    "one stream": ({"intermediate_size": 1024}, 1024, ["--recipe", "published", *AFFINE]),
    "k-means": ({"intermediate_size": 1024}, 64, ["--recipe", "best"]),
    "refinement": ({"intermediate_size": 1024}, 64, ["--recipe", "best", "--groupsize", "64", *AFFINE]),
    "experts": ({"intermediate_size": 768, "num_local_experts": 8}, 64, ["--recipe", "published", "--shift", "1", *AFFINE]),
}


@pytest.mark.filterwarnings("ignore:layer 0. mlp.experts.* rounding to nearest")  # their statistics are what counts
@pytest.mark.parametrize("sizes, seqlen, options", ON_A_DEVICE.values(), ids=ON_A_DEVICE)
def test_device_peak_is_as_planned(tmp_path, monkeypatch, text_file, sizes, seqlen, options):
    """Of the same functions on a CPU, by the tensors that live, as far as they would on a device."""
    compute_as_a_gpu_does(monkeypatch)
    kind = MixtralConfig if "num_local_experts" in sizes else LlamaConfig
    model = write_model(kind(**(SIZES | {"hidden_size": 256, "max_position_embeddings": 1024} | sizes)), tmp_path / "model", "float16")
    command = [model, text_file, *RECIPE, *options, "--nsamples", "4", "--batch_size", "4", "--seqlen", seqlen, "--n_layers", "1"]
    command += ["--dtype", "float16", "--activations", "device", "--eval", "none", "--save_path", tmp_path / "q.safetensors"]
    with LiveTensors() as live:
        assert llama.main([str(part) for part in command]) == 0
    device = planned(*command[:2], *command[2 + len(RECIPE) :], "--overwrite", "--plan", "4090", tmp_path=tmp_path)["device"]
    assert sum(device.values()) - device["CUDA"] == pytest.approx(live.peak, rel=0.15)


def test_host_peak_of_an_evaluation_is_as_planned(tmp_path, tiny_model, text_file, test_text):
    """A window's logits over a large vocabulary are more than all of a small model's quantization."""
    report, model = tmp_path / "report.json", tiny_model(vocab_size=200_000)
    command = [sys.executable, "llama.py", model, text_file, "--wbits", "4", "--nearest", "--nsamples", "2", "--seqlen", "256"]
    command += ["--eval", test_text, "--save_path", tmp_path / "q.safetensors", "--n_layers", "1", "--report", report]
    subprocess.run([str(part) for part in command], check=True, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    contents = json.loads(report.read_text())
    assert contents["plan"]["host_peak_bytes"] == pytest.approx(contents["peak_host_bytes"], rel=0.15)
    assert contents["peak_host_bytes"] > 1.3 * contents["peak_host_bytes_quantizing"]


def test_what_is_evaluated_may_be_what_does_not_fit(tmp_path, capsys):
    LlamaConfig(**SIZES | {"vocab_size": 2_000_000, "max_position_embeddings": 4096}).save_pretrained(tmp_path)
    model = modelutils.PlannedModel(tmp_path / "config.json", "F32", torch.float32)
    args = flags.parse([str(tmp_path / "config.json"), "c4-new", *RECIPE, "--seqlen", "2048", "--nsamples", "4"])
    run, config = flags.run_settings(args, torch.device("cpu"), Ranks()), flags.quant_config(args, torch.float16)
    bits = llama.assigned_bits(model, run, config)
    limits = plan.Limits(float("inf"), 4e9, float("inf"))
    wanted, make, shapes = llama.planned(model, run, config, bits, "cpu", limits)
    assert "logits" in wanted.host and plan.advice(make, wanted.run, limits, shapes) == "it fits with --eval none"


@pytest.mark.parametrize("hardware, activations", [("4090", "device"), ("4090", "host"), ("cpu", "host")])
def test_a_plan_says_what_the_shift_costs(large_config, tmp_path, capsys, hardware, activations):
    options = [large_config, "--plan", hardware, "--nsamples", 64, "--activations", activations, "--eval", "none"]
    found, without = (planned(*options, *shift, tmp_path=tmp_path) for shift in ([], ["--shift", "0"]))
    added = {side: found[f"{side}_peak_bytes"] - without[f"{side}_peak_bytes"] for side in found["shift"]}
    assert list(added) == (["host"] if hardware == "cpu" else ["device", "host"]) and without["shift"] == {}
    assert found["shift"] == pytest.approx(added, rel=0.01, abs=2e7)  # the second has a larger process before it
    assert max(added.values()) > 64 * 2048 * 16384 * 2, "the second stream at least"
    assert capsys.readouterr().out.count("the shifted target adds") == 1


def test_the_largest_text_is_planned(tiny_model, text_file, tmp_path):
    long, tokenizer = tmp_path / "long.txt", modelutils.load_tokenizer(tiny_model())
    long.write_text(4 * text_file.read_text())
    run = argparse.Namespace(dataset=str(text_file), nsamples=2, seqlen=32, seed=0, eval=())
    least = llama.tokenizing_bytes(run, tokenizer)
    run.eval = (str(long), "wikitext2")
    assert llama.tokenizing_bytes(run, tokenizer) == pytest.approx(4 * least, rel=0.01)
    datautils.evaluation_windows(str(long), tokenizer, 32)
    assert llama.tokenizing_bytes(run, tokenizer) == least, "windows that are kept need no tokens"


def test_an_evaluation_is_planned(large_config, tmp_path):
    options = [large_config, "--plan", "4090", "--nsamples", 64, "--activations", "disk"]
    none = planned(*options, "--eval", "none", tmp_path=tmp_path)
    some = planned(*options, "--eval", "c4-new", tmp_path=tmp_path)
    assert "evaluation" not in none["operations"] and some["seconds"]["evaluation"] > 0
    once = 256 * 2048 * 16384 * 2 * 127  # the activations, and what is read of weights besides
    assert some["written"] - none["written"] == pytest.approx(once, rel=1e-6)
    assert once < some["read"] - none["read"] < 1.2 * once
    parameters = 126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248)
    assert 2 * 256 * 2048 * parameters < some["operations"]["evaluation"] < 2.3 * 256 * 2048 * parameters


def test_host_peak_does_not_grow_with_the_number_of_layers(tmp_path, tiny_model, text_file):
    """A layer is 4 MB: 28 of them are a fifth of the peak."""
    peaks = []
    for layers in (2, 10, 30):
        report = tmp_path / f"{layers}.json"
        model = tiny_model(num_hidden_layers=layers, hidden_size=256, intermediate_size=1024)
        command = [sys.executable, "llama.py", model, text_file, "--wbits", "4", "--nearest", "--eval", "none", "--nsamples", "16"]
        command += ["--seqlen", "256", "--save_path", tmp_path / f"{layers}.safetensors", "--report", report]
        subprocess.run([str(part) for part in command], check=True, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        peaks.append(json.loads(report.read_text())["peak_host_bytes_quantizing"])
    assert max(peaks) < 1.05 * min(peaks), peaks


def test_the_benchmark_of_scale_measures(tmp_path):
    command = [sys.executable, "scripts/bench_scale.py", "--run", "tiny", "--layers", "1", "2", "--plan", "--nsamples", "2"]
    command += ["--seqlen", "64", "--out", str(tmp_path / "scale.json")]
    subprocess.run(command, check=True, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    results = json.loads((tmp_path / "scale.json").read_text())["results"]
    assert [row["layers"] for row in results] == [1, 2]
    assert "lm_head.weight" in bench_scale.shapes_of(bench_scale.config_of("tiny"))
    assert "lm_head.weight" not in bench_scale.shapes_of(bench_scale.config_of("smollm2"))
    for row in results:
        assert row["measured"] and row["tokens"] == 128
        assert row["checkpoint_gb_on_disk"] < row["checkpoint_gb"]
        assert row["planned_peak_host_gb"] == pytest.approx(row["peak_host_gb"], rel=0.15)


def test_the_disk_is_as_planned(tmp_path, tiny_model, text_file, monkeypatch):
    """Free room that is needed: what lies there at the worst moments, and no more than a few kilobytes less than planned."""
    folder, layers, joining = tmp_path / "q.safetensors.partial", [], []

    def measured(sizes, real):
        def call(*args, **options):
            sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
            return real(*args, **options)

        return call

    monkeypatch.setattr(llama.Journal, "add", measured(layers, llama.Journal.add))
    monkeypatch.setattr(llama.packing.ModelWriter, "publish", measured(joining, llama.packing.ModelWriter.publish))
    command = [tiny_model(num_hidden_layers=4), text_file, *RECIPE, "--nsamples", "16", "--seqlen", "64", "--activations", "disk"]
    command += ["--eval", "none", "--save_path", tmp_path / "q.safetensors", "--report", tmp_path / "r.json"]
    assert llama.main([str(part) for part in command]) == 0
    disk, result = json.loads((tmp_path / "r.json").read_text())["plan"]["disk"], (tmp_path / "q.safetensors").stat().st_size
    assert 0.6 * disk < max(layers) < disk and disk == pytest.approx(max(max(layers), 2 * result), rel=0.35)
    assert joining[0] == pytest.approx(2 * result, rel=0.05), "activations are gone when the parts are joined"


def test_activations_give_their_room_back_before_the_result_is_made(tmp_path, tiny_model, text_file, monkeypatch):
    """Not even open files that have no name any more."""
    real, held = llama.packing.merge_files, []

    def merge_files(*args, **options):
        held.extend(os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        return real(*args, **options)

    monkeypatch.setattr(llama.packing, "merge_files", merge_files)
    command = [tiny_model(), text_file, *RECIPE, "--nsamples", "4", "--seqlen", "32", "--activations", "disk", "--eval", "none"]
    assert llama.main([str(part) for part in [*command, "--save_path", tmp_path / "q.safetensors"]]) == 0
    assert held and not [name for name in held if "live-" in name or "kept-" in name]


# --- against shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True], ids=["one gpu", "two gpus"])
def test_a_config_is_enough_and_says_that_405b_fits_24_gb(large_config, tmp_path, second):
    options = ["--hessian_device", "cuda:1"] if second else []
    found = planned(large_config, "--plan", "4090", "--nsamples", 64, "--activations", "disk", *options, tmp_path=tmp_path)
    D, I, layer = 16384, 53248, 2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248
    assert found["device"]["layer"] >= 2 * (layer + 2 * D)
    widest = found["other_device" if second else "host"]["Hessians"]
    assert 4 * (I**2 + D * I) < widest < 1.05 * 4 * (I**2 + D * I), "H and its factor in one square, S, panels"
    assert found["device_peak_bytes"] < 24e9 and found["host_peak_bytes"] < 24e9
    tokens, streams = 64 * 2048, 2
    once = 2 * tokens * streams * 126 * layer
    assert once < found["operations"]["forward"] < 2 * once, "attention's first linears and the mlp's pass twice"
    assert found["disk"] > 405e9 / 2 + 3 * streams * 2 * tokens * D


def test_of_a_hubs_model_the_config_is_enough(offline, tmp_path):
    repository = tmp_path / "hub/models--someone--tiny"
    config = LlamaConfig(**SIZES, tie_word_embeddings=True, dtype="bfloat16")
    config.save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    tied = planned("someone/tiny", "--plan", "cpu", tmp_path=tmp_path)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path / "untied")
    untied = planned(tmp_path / "untied/config.json", "--plan", "cpu", tmp_path=tmp_path)
    assert untied["read"] - tied["read"] >= 2 * SIZES["vocab_size"] * SIZES["hidden_size"], "a tied head is stored once"
    assert llama.main(["nobody/nothing", *RECIPE, "--plan", "cpu"]) == 2


def test_of_a_hubs_model_no_more_weights_are_fetched(offline, tiny_model, tmp_path):
    """Where one of two shards is at hand, the config is what counts."""
    snapshot = tmp_path / "hub/models--someone--tiny/snapshots" / ("a" * 40)
    AutoModelForCausalLM.from_pretrained(tiny_model()).save_pretrained(snapshot, max_shard_size="200KB")
    (tmp_path / "hub/models--someone--tiny/refs").mkdir()
    (tmp_path / "hub/models--someone--tiny/refs/main").write_text("a" * 40)
    next(snapshot.glob("model-00002-*.safetensors")).unlink()
    found = planned("someone/tiny", "--plan", "cpu", tmp_path=tmp_path)
    assert found["disk"] == planned(snapshot / "config.json", "--plan", "cpu", tmp_path=tmp_path)["disk"]


@pytest.mark.parametrize("hardware", plan.HARDWARE)
def test_every_hardware_prints_every_phase(large_config, capsys, tmp_path, hardware):
    found = planned(large_config, "--plan", hardware, tmp_path=tmp_path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("forward", "hessian", "factorization", "grid", "solve", "refine", "disk"))
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert ("device peak" in printed) == (hardware != "cpu")


def test_groups_without_weights_are_those_that_are_watched(tiny_model):
    model = modelutils.StreamedModel(tiny_model(), Checkpoint.open(tiny_model()), torch.float32, torch.device("cpu"))
    states = model.embed(torch.randint(2, 300, (2, 8)), 2)
    with model.layer(1):
        watched = [group.linears for group in model.groups(1, states)]
    assert model.shared_inputs(1) == watched


def test_passes_are_those_that_are_run():
    """As tests/test_modelutils.py counts them: twice what lies before in the same child, never what is finished."""
    attention, mlp = (plan.LayerGroup((8,), 8, child, 4) for child in ("attention", "mlp"))
    assert plan._passes([[attention], [attention], [mlp], [mlp]]) == [2, 1, 2, 1]
    assert plan._passes([[attention, attention, mlp, mlp]]) == [2, 2, 2, 1]
    assert plan._passes([[attention], [attention], [mlp, mlp, mlp], [mlp, mlp, mlp]]) == [2, 1, 3, 3, 2, 2, 2, 1]


# --- who may begin ---------------------------------------------------------------------------------------------


def arguments(tiny_model, text_file, out) -> list[str]:
    settings = [*RECIPE, "--nsamples", "8", "--seqlen", "64", "--batch_size", "4", "--eval", "none"]
    return [str(part) for part in (tiny_model(), text_file, *settings, "--save_path", out)]


def test_a_run_that_does_not_fit_is_refused_with_a_remedy(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    command, real = arguments(tiny_model, text_file, tmp_path / "q.safetensors"), plan.limits_of
    base = plan.resident_bytes() + plan.LATER_LIBRARIES
    monkeypatch.setattr(plan, "limits_of", lambda *args: real(*args)._replace(host=base / 2))
    assert llama.main(command) == 2
    assert "the host needs" in (error := capsys.readouterr().err) and "--force" in error
    assert list(tmp_path.iterdir()) == []
    assert llama.main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    "hardware, options, limits, expected",
    [
        ("h200", ["--activations", "host", "--nsamples", "512"], (141e9, 70e9, 4e12), ["--activations disk"]),
        ("l40s", ["--activations", "disk"], (48e9, 20e9, 4e12), ["--offload_threshold 53249"]),
        ("4090", ["--offload_threshold", "60000"], (24e9, 24e9, 4e12), None),
        ("4090", [], (1e9, 1e9, 1e9), []),
    ],
)
def test_the_remedy_fits(large_config, capsys, hardware, options, limits, expected):
    """What is advised is what a plan with those flags calls enough."""

    def plan_with(*more):
        words = [str(large_config), "c4-new", *RECIPE, "--plan", hardware, "--nsamples", "64", *options, *more]
        args = flags.parse([*words, "--eval", "none"])
        args.hessian_device = None  # but cpu, which is where it goes without another GPU
        run = flags.run_settings(args, torch.device("cuda"), Ranks())
        config = flags.quant_config(args, torch.bfloat16)
        model = modelutils.PlannedModel(large_config, "BF16", torch.bfloat16)
        return run, *llama.planned(model, run, config, llama.assigned_bits(model, run, config), hardware, plan.Limits(*limits))

    run, wanted, make, _ = plan_with()
    assert plan.lacks(wanted, plan.Limits(*limits))
    remedy = plan.remedies(make, run, plan.Limits(*limits), 53248)
    assert expected is None or (remedy or []) == expected
    if remedy:
        assert not plan.lacks(plan_with(*" ".join(remedy).split())[1], plan.Limits(*limits))


def test_auto_takes_the_first_place_that_fits(tiny_model, text_file, tmp_path, monkeypatch):
    command, real, found = arguments(tiny_model, text_file, tmp_path / "q.safetensors"), plan.limits_of, []
    for host in (1e12, 1.0):
        monkeypatch.setattr(plan, "limits_of", lambda *args, host=host: real(*args)._replace(host=host))
        assert llama.main([*command, "--overwrite", "--force", "--report", str(tmp_path / "r.json")]) == 0
        found.append(json.loads((tmp_path / "r.json").read_text())["run"]["activations"])
    assert found == ["host", "disk"]


@pytest.mark.parametrize("options, what", [([], "--plan is of a quantization"), (["--wbits", "5"], "--wbits is 5")])
def test_a_plan_of_nothing_is_refused(large_config, capsys, options, what):
    assert llama.main([str(large_config), "--plan", "cpu", *options]) == 2
    assert what in capsys.readouterr().err


def test_a_run_needs_a_text(tiny_model, capsys):
    assert llama.main([str(tiny_model()), *RECIPE]) == 2
    assert "calibration text is missing" in capsys.readouterr().err
