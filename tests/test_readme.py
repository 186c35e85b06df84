"""The README's commands parse, its Python compiles, and what it and the pages under docs/ name exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch.distributed.run as torchrun

import allocate
import bench_inference
import bench_quantize
import bench_scale
import bench_serve
import eval_quantized
import export
import flags
import mt_bench
import plot
import reproduce
import rotate
import tune
from leanquant import __main__ as leanquant_main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_command_parses():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith(("python ", "torchrun "))]
    parsers = {"llama.py": flags.parse, "eval_quantized.py": eval_quantized.parse, "scripts/plot.py": plot.parse}
    parsers |= {"scripts/reproduce.py": reproduce.parse, "scripts/mt_bench.py": mt_bench.parse, "scripts/export.py": export.parse}
    parsers |= {"scripts/bench_scale.py": bench_scale.parse, "scripts/rotate.py": rotate.parse, "scripts/tune.py": tune.parse}
    parsers["scripts/allocate.py"] = allocate.parse
    assert len(lines) >= 4
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "torchrun":
            started = torchrun.parse_args(arguments)
            arguments = [started.training_script, *started.training_script_args]
        script, *arguments = arguments
        if script == "-m":
            assert arguments.pop(0) == "leanquant"
            leanquant_main.parse(arguments)
            continue
        parsed = parsers[script](arguments)
        if script == "llama.py":
            assert flags.quant_config(parsed, None).bits == parsed.wbits


def test_first_screen_has_the_two_commands_and_they_exist():
    first = blocks("bash")[0]
    scripts = re.findall(r"bash (\S+)", first)
    assert scripts == ["scripts/quickstart.sh", "scripts/test.sh"]
    assert all((ROOT / script).is_file() for script in scripts)
    assert README.index(first) < 1200


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)


def test_python_compiles():
    assert blocks("python")
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_named_files_exist():
    layout = re.findall(r"^\| `([^`]+)` \|", README[README.index("## Layout") :], re.MULTILINE)
    assert len(layout) >= 10
    assert all((ROOT / name).exists() for name in layout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        there = page.parent / name if name else page
        assert there.exists(), name
        if anchor:
            assert anchor in anchors(there.read_text()), anchor


def anchors(text: str) -> list[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


def test_options_that_are_named_exist(capsys):
    for parse in (
        flags.parse,
        eval_quantized.parse,
        export.parse,
        bench_quantize.parse,
        bench_inference.parse,
        bench_serve.parse,
        reproduce.parse,
        mt_bench.parse,
        plot.parse,
        allocate.parse,
        rotate.parse,
        tune.parse,
        torchrun.parse_args,
    ):
        with pytest.raises(SystemExit):
            parse(["--help"])
    for command in ("generate", "serve"):
        with pytest.raises(SystemExit):
            leanquant_main.parse([command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in (page for page in PAGES if page.name in ("README.md", "design.md", "inference.md", "export.md")):
        own = re.sub(r"```text\n.*?```", "", page.read_text(), flags=re.DOTALL)  # other software's commands are plain text
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", own))
        assert named and named <= known, named - known
