"""Answer MT-Bench's questions with a quantized model, in the file format of FastChat's judge.

    python scripts/mt_bench.py --path ./my-chat-model-4bit [--base MODEL] --model-id my-model-4bit [--questions question.jsonl]

Two turns a question, with the model's own chat template and FastChat's temperatures by category. Answers are appended as they
are made; the same command goes on after the last one. Judge them with FastChat (`gen_judgment.py --model-list my-model-4bit`
after moving the file to `data/mt_bench/model_answer/`); that needs a paid service and is not done here.
"""

import argparse
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import eval_quantized  # noqa: E402
import modelutils  # noqa: E402
from leanquant import LeanQuantModelForCausalLM, with_cuda_graphs  # noqa: E402
from leanquant.errors import InputError, exit_code, first_line  # noqa: E402

# FastChat's; other categories get DEFAULT_TEMPERATURE.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
DEFAULT_TEMPERATURE = 0.7


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="quantized file or folder")
    add("--base", help="hub name or folder of the unquantized model (unset: --path is a folder with config and tokenizer)")
    add("--model-id", required=True, help="name of the model in the answers")
    add("--questions", type=Path, help="FastChat's question.jsonl (unset: from the hub, lmsys/mt-bench)")
    add("--answers", type=Path, help="file of the answers (unset: MODEL_ID.jsonl)")
    add("--max-new-tokens", type=int, default=1024, help="a turn")
    add("--device", help="cpu, cuda or cuda:N (unset: all GPUs, or the CPU)")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read_questions(path: Path | None) -> list[dict]:
    """Question id, category and turns of each, as FastChat writes them."""
    if path is None:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download("lmsys/mt-bench", "data/mt_bench/question.jsonl", repo_type="space"))
        except Exception as error:  # network, access, a missing file: all end here
            raise InputError(f"cannot get MT-Bench's questions from the hub ({first_line(error)}): give --questions FILE") from None
    try:
        questions = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not questions:
            raise ValueError("it is empty")
        if not all(isinstance(q["turns"], list) and q["turns"] and all(isinstance(turn, str) for turn in q["turns"]) for q in questions):
            raise ValueError("turns that are no list of texts")
        if not all(type(q["question_id"]) is int for q in questions):
            raise ValueError("a question_id that is no whole number")
        return [{"question_id": q["question_id"], "category": q["category"], "turns": q["turns"]} for q in questions]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not FastChat's question.jsonl ({first_line(error)}): get it again") from None


def answered(path: Path, model_id: str) -> set[int]:
    """Questions that the file holds the model's answers to; an answer cut off by an interruption is dropped from it. Raises InputError
    if it holds another's."""
    if not path.is_file():
        return set()
    contents = path.read_bytes()
    *lines, last = contents.split(b"\n")  # every answer ends its line: what follows the last end was cut off
    try:
        answers = [json.loads(line) for line in lines if line.strip()]
        found, models = {one["question_id"] for one in answers}, {one["model_id"] for one in answers}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} holds something else than answers: give another --answers") from None
    if others := models - {model_id}:
        raise InputError(f"{path} holds answers of {min(others)}: give another --answers, or that --model-id")
    if last:
        os.truncate(path, len(contents) - len(last))
    return found


def answer(generate: Callable, tokenizer, question: dict, max_new_tokens: int, device: torch.device) -> list[str]:
    """What the model says in each turn, given all turns before."""
    temperature = TEMPERATURES.get(question["category"], DEFAULT_TEMPERATURE)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False, "temperature": None, "top_p": None}
    )
    chat, turns = [], []
    for turn in question["turns"]:
        chat.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(device)
        out = generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling)
        turns.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        chat.append({"role": "assistant", "content": turns[-1]})
    return turns


def run(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}: give at least 1")
    path = args.answers or Path(f"{args.model_id}.jsonl")
    eval_quantized.check_json_path("--answers", path)
    done = answered(path, args.model_id)
    questions = [question for question in read_questions(args.questions) if question["question_id"] not in done]
    if args.base is None and not Path(args.path).is_dir():
        raise InputError(f"{args.path} is no folder with config and tokenizer: name the unquantized model with --base")
    base = modelutils.resolve_model(args.base or args.path, modelutils.FILES_BESIDE_WEIGHTS)
    tokenizer = modelutils.load_tokenizer(base)
    if not tokenizer.chat_template:
        raise InputError(f"{base} has no chat template: MT-Bench needs a chat model")
    model = LeanQuantModelForCausalLM.from_pretrained(base, args.path, device=args.device)
    generate = with_cuda_graphs(model)
    for number, question in enumerate(questions, 1):
        torch.manual_seed(args.seed + question["question_id"])  # the same answer, wherever a run is taken up
        turns = answer(generate, tokenizer, question, args.max_new_tokens, model.device)
        row = {
            "question_id": question["question_id"],
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": args.model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"question {question['question_id']} ({number}/{len(questions)})", flush=True)
    print(f"{len(done) + len(questions)} answers in {path}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)), "the answers that are there are kept, and the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
