"""python -m leanquant chat|generate|serve|info: talk to a quantized model in the terminal, serve it, or ask what a file is."""

import argparse
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import InputError, end_at_once, exit_code, first_line, printable
from .foreign import open_checkpoint
from .packing import GRID, SCALE, Checkpoint


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m leanquant", description=__doc__.split(": ", 1)[1])
    commands, made = parser.add_subparsers(dest="command", required=True), {}
    for name, summary in (
        ("chat", "talk to the model, its answers appear word by word; an empty line or Ctrl-D ends"),
        ("generate", "continue one prompt"),
        ("serve", "answer requests of OpenAI's API, by the server of transformers; Ctrl-C ends it after the answers in progress"),
        ("info", "what a file or folder is, without loading it"),
    ):
        made[name] = commands.add_parser(name, help=summary, description=summary)
        made[name].add_argument("path", help="quantized .safetensors file or folder")
    made["generate"].add_argument("prompt", help="text to continue")
    add_answer_options(made["chat"], 512)
    add_answer_options(made["generate"], 64)
    add_server_options(made["serve"])
    for name in ("chat", "generate", "serve"):
        add_loading_options(made[name])
    return parser.parse_args(argv)


def add_answer_options(command: argparse.ArgumentParser, most: int) -> None:
    add = command.add_argument
    add("--max_new_tokens", type=at_least_one, metavar="N", default=most, help="most tokens in an answer (default: %(default)s)")
    add(
        "--temperature",
        type=temperature,
        metavar="T",
        help="0 takes the likeliest token (unset: as the model's generation config says)",
    )


def add_server_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--host", default="localhost", help="where to listen; 0.0.0.0: everywhere, for whoever comes (default: %(default)s)")
    add("--port", type=port, default=8000, help="of the host (default: %(default)s)")
    add("--temperature", type=temperature, metavar="T", help="where a request names none (unset: as the model's generation config says)")
    add(
        "--continuous_batching",
        action="store_true",
        help="answer several requests at once, all with the server's temperature, whatever they name (unset: one after the other)",
    )


def add_loading_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--base", help="hub name or folder of the unquantized model: needed for a single file, which has no config and tokenizer")
    add("--device", help="cpu, cuda or cuda:1 (unset: the GPUs if there are any)")
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="type of what is computed, and of the head and the embeddings (unset: float32 on a CPU, the file's type on a GPU)",
    )
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    add("--no_graphs", action="store_true", help="launch kernel by kernel, slower, where tokens would be decoded by a CUDA graph")
    add(
        "--dequantize",
        choices=["auto", "always", "never"],
        default="auto",
        help="keep rebuilt weights too (default: on a CPU, without a kernel for it)",
    )


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens: give at least 1")
    return int(text)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a temperature: give 0 or more")
    return value


def port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not a port: give a number from 1 to {2**16 - 1}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter, bytes that are none
    try:
        return exit_code(lambda: {"chat": chat, "generate": generate, "serve": serve, "info": info}[args.command](args), "nothing is lost")
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- info ------------------------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> None:
    for name, value in describe(open_checkpoint(args.path)).items():
        print(f"{name + ':':<14}{printable(str(value))}", flush=True)


def describe(checkpoint: Checkpoint) -> dict:
    """What a quantized checkpoint is, from its header alone."""
    checkpoint.check_bits(None, next(iter(checkpoint.stamps), "it"))
    checkpoint.check_headers()
    settings, linears = checkpoint.settings, checkpoint.quantized
    bits = Counter(map(checkpoint.bits_of, linears))
    counts = ", ".join(str(b) if len(bits) == 1 else f"{b} in {n} linears" for b, n in sorted(bits.items()))
    weights = sum(checkpoint.weights_of(linear) for linear in linears)
    size = checkpoint.file_bytes()
    original = size - weights * checkpoint.bits_per_weight / 8 + 2 * weights
    usual = [linear for linear in linears if checkpoint.bits_of(linear) < 8] or linears
    groups = {checkpoint.shapes[linear + SCALE][1] for linear in usual if linear + SCALE in checkpoint}
    grid = "non-uniform levels" if usual[0] + GRID in checkpoint else f"affine, {'row-wise' if groups == {1} else 'in groups'}"
    found = {
        "format": checkpoint.format,
        "method": settings.get("method", "leanquant (no metadata: a file of the published tool)"),
        "bits": f"{counts} ({checkpoint.bits_per_weight:.2f} a weight with levels)",
        "grid": grid,
        "linears": f"{len(linears)}, {weights / 1e6:.1f} M weights",
        "size": f"{size / 1e6:.1f} MB, {original / size:.2f} times less than 16 bits ({original / 1e6:.1f} MB)",
    }
    if settings.get("skip") and isinstance(settings["skip"], list):
        found["unquantized"] = f"linears called {' '.join(map(str, settings['skip']))}"
    if (width := settings.get("vocab_bits")) in (2, 3, 4, 8):
        found["vocabulary"] = f"embeddings and head in {width} bits"
    for name in ("groupsize", "exponent", "percdamp", "shift", "refine"):
        if settings.get(name) is not None:
            found[name] = settings[name]
    if "calibration" in settings:
        found["calibration"] = _text_of(settings)
    if isinstance(times := settings.get("tuned"), list) and times:
        found["tuned on"] = "; ".join(_text_of(one) for one in times if isinstance(one, dict))
    for name, key in (("base model", "base_model"), ("versions", "versions")):
        if key in settings:
            value = settings[key]
            found[name] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
    return found


def _text_of(told: dict) -> str:
    return f"{told.get('calibration')}, {told.get('nsamples')} x {told.get('seqlen')} tokens, seed {told.get('seed')}"


# --- generation ------------------------------------------------------------------------------------------------


def load_tokenizer(args: argparse.Namespace):
    open_checkpoint(args.path)  # a path that is not there is told before anything is looked up
    if args.base is None and not Path(args.path).is_dir():
        raise InputError(f"{args.path} is a single file, without config and tokenizer: name the unquantized model with --base")
    from transformers import AutoTokenizer

    from .modeling import where_to_look

    base = args.base or args.path
    where = where_to_look(base)
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=args.trust_remote_code, **where)
    except Exception as error:  # files that lie fail in many ways
        remedy = "copy its tokenizer files there" if Path(base).is_dir() else "check the name and your access to it"
        raise InputError(f"{base} has no usable tokenizer ({first_line(error)}): {remedy}") from None


def load(args: argparse.Namespace):
    from .modeling import LeanQuantModelForCausalLM

    options = {"device": args.device, "dtype": args.dtype, "dequantize": args.dequantize, "trust_remote_code": args.trust_remote_code}
    return LeanQuantModelForCausalLM.from_pretrained(args.base or args.path, args.path, **options)


def generator(model, args: argparse.Namespace) -> Callable:
    """`model.generate`, or what does the same faster."""
    from .decoding import with_cuda_graphs

    return model.generate if args.no_graphs else with_cuda_graphs(model)


def conversing(model, args: argparse.Namespace) -> Callable:
    """Its `generator`, for calls of which each may go on where the last one ended."""
    from .decoding import remembering

    found = generator(model, args)
    return remembering(model) if found == model.generate else found  # a recorded step has its own cache, and a GPU reads fast


def sampling(temperature: float | None) -> dict:
    if temperature is None:
        return {}
    return (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )


def generate(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args)
    inputs = tokenizer(well_formed(args.prompt), return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("the prompt is empty and the tokenizer begins with nothing of its own: give some text")
    model = load(args)
    answer(generator(model, args), tokenizer, inputs.to(model.device), args, skip_prompt=False)


def chat(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args)
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template: it is not made for conversation, use generate")
    model, messages = load(args), []
    continued = conversing(model, args)
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on it ends an answer
    print(f"{args.path}: type your message, an empty line ends", flush=True)
    while text := said():
        messages.append({"role": "user", "content": text})
        try:
            inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        except Exception as error:  # a template is a program
            raise InputError(f"the model's chat template fails ({first_line(error)}): use generate, or mend the template") from None
        try:
            messages.append({"role": "assistant", "content": answer(continued, tokenizer, inputs.to(model.device), args)})
        except KeyboardInterrupt:
            print("\n(interrupted: the message is taken back)", flush=True)
            messages.pop()


def serve(args: argparse.Namespace) -> None:
    from . import serving

    tokenizer = load_tokenizer(args)
    serving.check_server(args.host, args.port)
    if not tokenizer.chat_template:
        print(f"{args.path} has no chat template: /v1/chat/completions will fail, /v1/completions will not", flush=True)
    with ThreadPoolExecutor(1) as loader:  # OpenMP's threads go with it: beside those of the thread that answers they would halve its speed
        model = loader.submit(load, args).result()
    model.generation_config.update(**sampling(args.temperature))
    generate = None if args.continuous_batching else conversing(model, args)
    serving.serve(model, tokenizer, args.path, generate, args.host, args.port, not args.no_graphs)


def said() -> str:
    """The user's next message, empty at the end."""
    try:
        return well_formed(input("\n> ")).strip()
    except (EOFError, KeyboardInterrupt, RuntimeError):  # the last if there is no input at all
        print(flush=True)
        return ""


def well_formed(text: str) -> str:
    """Bytes that are no text, which Python keeps as lone surrogates, as question marks."""
    return text.encode(errors="replace").decode()


def answer(continued: Callable, tokenizer, inputs, args: argparse.Namespace, skip_prompt: bool = True) -> str:
    """Stream the model's continuation of `inputs`, by its `generator` and on its device, to the terminal, and return it."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    settings = {"max_new_tokens": args.max_new_tokens, "num_beams": 1, "pad_token_id": tokenizer.eos_token_id}
    settings |= {"return_dict_in_generate": False, "tokenizer": tokenizer}  # for stop_strings
    try:
        out = continued(**inputs, streamer=streamer, **settings, **sampling(args.temperature))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # settings that contradict each other, or lie
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the model cannot generate ({reason}): see its generation_config.json") from None
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
