"""Run layers of the exact shapes of very large models through llama.py and measure memory and time; plan what is too large for here.

    python scripts/bench_scale.py --run 70b --layers 1 --nsamples 2 --seqlen 128 --flags '--refine 0' --out docs/results/scale.json
    python scripts/bench_scale.py --run smollm2 --layers 2 10 30 --nsamples 32 --seqlen 512 --plan --out docs/results/scale.json

The checkpoint is random, cheap to make and sparse on the disk: a few rows of each linear hold numbers, drawn once and put at other
places for every linear, all others are holes that read as zeros; embeddings and head are holes but for the tokens in use. Memory
and operations are those of any weights. For every model the plan (plan.py) for its whole run is written beside, marked as plan.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VOCABULARY = 128  # tokens in use: one a letter
MODELS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary of the published configs
    "70b": (8192, 28672, 80, 64, 8, 128256),  # Llama-3.1-70B
    "123b": (12288, 28672, 88, 96, 8, 32768),  # Mistral-Large-2407
    "405b": (16384, 53248, 126, 128, 8, 128256),  # Llama-3.1-405B
    "smollm2": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "tiny": (64, 192, 4, 4, 2, 512),  # to try the script
}


def config_of(name: str, layers: int | None = None) -> dict:
    hidden, intermediate, count, heads, pairs, vocabulary = MODELS[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers or count, "vocab_size": vocabulary}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": pairs, "max_position_embeddings": 131072, "rope_theta": 500000.0}
    more = {"rms_norm_eps": 1e-5, "tie_word_embeddings": name == "smollm2", "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16"}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, **more}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    D, I, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    pairs = D // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (V, D)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = {"q_proj": (D, D), "k_proj": (pairs, D), "v_proj": (pairs, D), "o_proj": (D, D)}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {
            f"{layer}mlp.{name}.weight": shape for name, shape in {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}.items()
        }
    return shapes


def make_checkpoint(folder: Path, config: dict, filled: int = 64) -> None:
    """Write a model of `config`: of each matrix about `filled` rows, spread evenly, hold random numbers; the rest are holes."""
    import torch

    shapes, offset, header = shapes_of(config), 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    blob = json.dumps(header).encode()
    blob += b" " * (-len(blob) % 8)
    pool = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        start = file.tell()
        file.truncate(start + offset)
        for number, (name, shape) in enumerate(shapes.items()):
            begin = start + header[name]["data_offsets"][0]
            if len(shape) == 1:
                file.seek(begin)
                file.write(_bytes(torch.ones(shape)))
                continue
            rows, columns = shape
            chosen = range(VOCABULARY) if "embed" in name or "head" in name else range(0, rows, max(1, rows // filled))
            for row in chosen:
                file.seek(begin + 2 * row * columns)
                first = (7919 * (row + 31 * number)) % (len(pool) - columns)
                file.write(_bytes(pool[first : first + columns] * (0.3 if "embed" in name else (rows / filled / columns) ** 0.5)))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _bytes(values) -> bytes:
    import torch

    return values.bfloat16().view(torch.uint8).numpy().tobytes()


def make_tokenizer(folder: Path) -> None:
    """One token a letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1} | {chr(code): code for code in range(32, VOCABULARY - 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def settings(args: argparse.Namespace) -> list[str]:
    recipe = ["--wbits", "4", "--exponent", "4", "--true-sequential", "--act-order", "--percdamp", "0.1"]
    return [*recipe, *args.flags.split()]


def run(name: str, layers: int, args: argparse.Namespace) -> dict:
    """Quantize the first `layers` of a model of that shape; what its report says, beside the plan that it made before."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=args.work) as work:
        folder, report = Path(work) / "model", Path(work) / "report.json"
        folder.mkdir()
        make_checkpoint(folder, config_of(name, layers))
        make_tokenizer(folder)
        letters = "".join(chr(32 + (i * i + 7 * i // 3) % 94) for i in range(args.nsamples * args.seqlen * 2 + 100))
        (Path(work) / "text.txt").write_text(letters)
        on_disk = 512 * (folder / "model.safetensors").stat().st_blocks
        command = [sys.executable, str(ROOT / "llama.py"), str(folder), str(Path(work) / "text.txt"), *settings(args), "--eval", "none"]
        command += ["--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen), "--activations", args.activations]
        command += ["--save_path", str(Path(work) / "out.safetensors"), "--report", str(report)]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds, contents = time.perf_counter() - start, json.loads(report.read_text())
    planned = contents["plan"]
    return {
        "model": name,
        "measured": True,
        "layers": layers,
        "tokens": args.nsamples * args.seqlen,
        "activations": args.activations,
        "flags": args.flags,
        "checkpoint_gb": config_bytes(name, layers) / 1e9,
        "checkpoint_gb_on_disk": on_disk / 1e9,
        "seconds": seconds,
        "seconds_a_layer": contents["quantization_seconds"] / layers,
        "phase_seconds": contents["phase_seconds"],
        "peak_host_gb": contents["peak_host_bytes_quantizing"] / 1e9,
        "peak_device_gb": contents.get("peak_device_bytes_quantizing", 0) / 1e9,
        "planned_peak_host_gb": planned["host_peak_bytes"] / 1e9,
        "planned_peak_device_gb": planned["device_peak_bytes"] / 1e9,
        "planned_seconds": sum(planned["seconds"].values()),
        "machine": contents["machine"],
    }


def config_bytes(name: str, layers: int) -> int:
    import math

    return 2 * sum(map(math.prod, shapes_of(config_of(name, layers)).values()))


def planned(name: str, hardware: str, second_gpu: bool, args: argparse.Namespace) -> dict:
    """The plan of the whole model with 64 windows of 2048 tokens, activations on the disk, in one process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as work:
        (Path(work) / "config.json").write_text(json.dumps(config_of(name)))
        command = [sys.executable, str(ROOT / "llama.py"), f"{work}/config.json", *settings(args), "--nsamples", "64", "--plan", hardware]
        command += ["--eval", "none"]
        command += ["--activations", "disk", "--save_path", f"{work}/out.safetensors"] + ["--hessian_device", "cuda:1"] * second_gpu
        command += ["--report", f"{work}/plan.json"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        text = text.partition("does not fit")[0].partition("fits:")[0]  # this machine, which does not matter here
        contents = json.loads(Path(f"{work}/plan.json").read_text())["plan"]
    gigabytes = {key: contents[key] / 1e9 for key in ("host_peak_bytes", "device_peak_bytes", "disk", "read", "written")}
    other = sum(contents["other_device"].values()) / 1e9
    totals = {"other_device_gb": other, "seconds": sum(contents["seconds"].values()), "operations": sum(contents["operations"].values())}
    return {
        "model": name,
        "measured": False,
        "hardware": hardware,
        "second_gpu": second_gpu,
        "flags": args.flags,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())),
        "gigabytes": gigabytes,
        **totals,
        "text": text,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", nargs="*", default=[], choices=list(MODELS), help="models whose layers are run here")
    parser.add_argument(
        "--plan", nargs="*", default=["70b", "123b", "405b"], choices=list(MODELS), help="models that are planned as a whole"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="how many layers of each model are run; several: one run each")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--activations", default="disk", choices=["auto", "device", "host", "disk"])
    parser.add_argument("--flags", default="", help="further flags of llama.py, as one word: '--recipe published'")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for the checkpoint, sparse, and the results")
    parser.add_argument("--out", type=Path, help="JSON file for the results; those of earlier runs in it stay")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(None)
    results = [run(name, layers, args) for name in args.run for layers in args.layers]
    machines = [("4090", False), ("l40s", True), ("h200", False), ("cpu", False)]
    results += [planned(name, hardware, second, args) for name in args.plan for hardware, second in machines]
    for result in results:
        if result["measured"]:
            print(
                f"{result['model']}: {result['layers']} layers, {result['tokens']} tokens, {result['seconds_a_layer']:.0f} s a layer;",
                end=" ",
            )
            print(f"host peak {result['peak_host_gb']:.2f} GB measured, {result['planned_peak_host_gb']:.2f} GB planned")
        else:
            print(f"{result['model']} (plan):\n{result['text']}")
    if args.out:
        earlier = json.loads(args.out.read_text())["results"] if args.out.is_file() else []
        kept = [old for old in earlier if not any(same(old, new) for new in results)]
        args.out.write_text(json.dumps({"results": kept + results}, indent=2) + "\n")


def same(old: dict, new: dict) -> bool:
    return all(
        old.get(key) == new.get(key) for key in ("model", "measured", "hardware", "second_gpu", "flags", "tokens", "layers", "activations")
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
