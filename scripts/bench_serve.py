"""`python -m leanquant serve` on this machine: tokens a second of 1, 4 and 8 clients, and the wait for an answer in a long conversation.

    python scripts/bench_serve.py [--path QUANTIZED --base MODEL] [--vllm PYTHON] [--tokens 64] [--repeats 3] [--out FILE]

Servers take turns, one that answers requests one after the other and one that answers several at once; medians. With the path of a
Python that has vLLM also vLLM, with the quantized model, which must be a folder then, and with the original. By itself with
demo/nonuniform-4bit.safetensors, which scripts/quickstart.sh makes.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"one after the other": [], "several at once": ["--continuous_batching"]}
VLLM, ORIGINAL = "vLLM", "vLLM, original"
VLLM_FLAGS = ["--dtype", "bfloat16", "--max-model-len", "2048", "--kv-cache-memory-bytes", "1G"]
CLIENTS = (1, 4, 8)
STARTS_WITHIN = 300  # seconds; answers, too
STORY = "The keeper of the lighthouse wrote down what he saw each night, and each night it was the sea. "
TOLD = 40  # times that the story is told before the question


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--path", default=str(ROOT / "demo" / "nonuniform-4bit.safetensors"))
    add("--base", default=str(ROOT / "demo" / "SmolLM2-135M-Instruct"))
    add("--vllm", help="a Python that has vLLM, such as .venv/vllm/bin/python, which scripts/vllm.sh makes")
    add("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    add("--repeats", type=int, default=3)
    add("--out", type=Path, default=ROOT / "docs" / "results" / "serve-cpu.json")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(None)
    ways = [*WAYS, VLLM, ORIGINAL] if args.vllm else list(WAYS)
    speeds, waits = ({way: {} for way in ways} for _ in range(2))
    with contextlib.ExitStack() as stack:
        servers = {way: stack.enter_context(serving(args, way)) for way in ways}
        for address in servers.values():
            complete(address, "Hello", 2)  # what is made late
        for repeat in range(args.repeats):
            for way, address in servers.items():
                for clients in CLIENTS:
                    speeds[way].setdefault(clients, []).append(tokens_per_second(address, clients, args.tokens))
                waits[way].setdefault("first", []).append(wait(address, follow_up := [message(f"{repeat}. {STORY * TOLD}Who wrote?")]))
                follow_up += [message("The keeper.", "assistant"), message("And what did he see?")]
                waits[way].setdefault("next", []).append(wait(address, follow_up))
    medians = [{way: {key: median(values) for key, values in found.items()} for way, found in table.items()} for table in (speeds, waits)]
    results = {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())), "tokens": args.tokens, "repeats": args.repeats}
    results |= {"tokens_per_second_by_clients": medians[0], "seconds_to_a_short_answer": medians[1]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


@contextlib.contextmanager
def serving(args: argparse.Namespace, way: str) -> Iterator[str]:
    """The address of a server that ends with the block."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    if way in WAYS:
        command = [sys.executable, "-m", "leanquant", "serve", args.path, "--base", args.base, "--port", str(port), *WAYS[way]]
    else:
        model = args.base if way == ORIGINAL else args.path
        command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port), *VLLM_FLAGS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(address := f"http://localhost:{port}", process)
            yield address
        finally:
            process.terminate()  # vLLM ends its own processes


def wait_for(address: str, process: subprocess.Popen) -> None:
    ends = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < ends and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{address}/health"):
            return
        time.sleep(0.5)
    sys.exit(f"error: the server does not start: try {' '.join(process.args)}")


def ask(address: str, what: str, **body) -> dict:
    request = urllib.request.Request(f"{address}/v1/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=STARTS_WITHIN) as response:
        return json.load(response)


def complete(address: str, prompt: str, tokens: int) -> int:
    """How many tokens came."""
    return ask(address, "completions", prompt=prompt, max_tokens=tokens, temperature=0)["usage"]["completion_tokens"]


def tokens_per_second(address: str, clients: int, tokens: int) -> float:
    """Of all clients together, each of which asks for something else."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        came = sum(pool.map(lambda n: complete(address, f"Chapter {n}. The story of the river is", tokens), range(clients)))
    return came / (time.perf_counter() - start)


def message(text: str, role: str = "user") -> dict:
    return {"role": role, "content": text}


def wait(address: str, messages: list[dict]) -> float:
    """Seconds to an answer of up to 4 tokens."""
    start = time.perf_counter()
    ask(address, "chat/completions", messages=messages, max_tokens=4, temperature=0)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
