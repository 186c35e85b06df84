"""Several ranks on gloo: the result of one process, one voice for errors, and runs that go on with any number of ranks.

torchrun itself is run once. Elsewhere its agent is started from a process that has imported everything, because each rank would
take seconds to do so; ranks are then forks of that process, and all else is torchrun's own: the environment, signals, ends.
"""

import json
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig

import journal
import llama
import ranks
from conftest import SIZES, write_model
from leanquant import packing
from leanquant.errors import InputError
from ranks import Ending, RankLost, Ranks
from test_cli import GRIDS, ROOT, SEQUENTIAL, environment

LAYERS = 4
SETTINGS = ["--nsamples", "7", "--seqlen", "64", "--percdamp", "0.1", "--wbits", "3", *SEQUENTIAL, "--device", "cpu"]
KEPT = "2 finished layers are kept: the same command goes on after them"

# Reads {ranks, arguments, log, hook} a line; answers with the exit codes of the ranks. The hook is code that each rank runs first.
SERVER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import datautils, hessian, journal, llama, quant, ranks, torch._dynamo, transformers.models.llama.modeling_llama
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def at_layer(number, rank, action):
    real = llama.quantize_layer
    def quantize_layer(model, index, *rest):
        if index == number and int(os.environ["RANK"]) == rank:
            rest[-1].wait()  # for the layer before, which is being saved
            action()
        return real(model, index, *rest)
    llama.quantize_layer = quantize_layer

def work(arguments, hook):
    ranks.GRACE = 2.0
    exec(hook, globals())
    sys.exit(llama.main(arguments) if arguments else 0)

def launch(job):
    config = LaunchConfig(1, 1, job["ranks"], run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
                          max_restarts=job["restarts"])
    try:
        elastic_launch(config, work)(job["arguments"], job["hook"])
        return {}
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException:
        return {"signal": 1}

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        with open(job["log"] + ".codes", "w") as f:
            json.dump(launch(job), f)
        os._exit(0)
    os.waitpid(child, 0)
    print(flush=True)
"""


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER]
    surroundings = environment() | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=surroundings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def launch(server, tmp_path):
    """launch(ranks, arguments, hook): the exit codes of the ranks that failed, by rank, and what all have printed together."""
    count = iter(range(100))

    def run(ranks: int, arguments=(), hook: str = "", restarts: int = 0) -> tuple[dict, str]:
        log = tmp_path / f"log-{next(count)}"
        job = {"ranks": ranks, "arguments": [str(word) for word in arguments], "log": str(log), "hook": hook, "restarts": restarts}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        server.stdout.readline()
        printed = "".join(line for line in log.read_text().splitlines(True) if "torch/distributed" not in line)
        return json.loads(Path(f"{log}.codes").read_text()), printed

    return run


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def command(model, text_file):
    """Arguments of llama.py that write to the path they are given; options may replace what stands before them."""
    return lambda save_path, *options: [
        model,
        text_file,
        *SETTINGS,
        *GRIDS["nonuniform"],
        "--eval",
        "none",
        "--save_path",
        save_path,
        *options,
    ]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """alone(*options): the file and the report of a single process."""
    made = {}

    def run(*options) -> tuple[Path, dict]:
        if options not in made:
            path = tmp_path_factory.mktemp("alone") / "q.safetensors"
            arguments = command(path, "--report", path.with_suffix(".json"), *options)
            assert llama.main([str(word) for word in arguments]) == 0
            made[options] = path, json.loads(path.with_suffix(".json").read_text())
        return made[options]

    return run


@pytest.fixture(scope="module")
def two(command, tmp_path_factory) -> tuple[Path, str]:
    """What torchrun itself wrote and printed, with two ranks."""
    path = tmp_path_factory.mktemp("two") / "q.safetensors"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "llama.py")]
    arguments = [str(word) for word in command(path, "--report", path.with_suffix(".json"))]
    done = subprocess.run([*start, *arguments], env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def equal_codes(one: Path, other: Path, layers=range(LAYERS)) -> float:
    """The share of codes that are the same."""
    files, equal, count = [packing.Checkpoint.open(path) for path in (one, other)], 0, 0
    for name in files[0].quantized:
        if int(re.search(r"layers\.(\d+)\.", name)[1]) in layers:
            columns = 96 if name.endswith("down_proj") else 64
            bits = files[0].bits_of(name)
            codes = [packing.unpack_codes(file.get(name + packing.CODES), bits, columns) for file in files]
            equal += int((codes[0] == codes[1]).sum())
            count += codes[0].numel()
    return equal / count


# --- the same result -------------------------------------------------------------------------------------------


def test_two_machines_give_what_two_ranks_of_one_do(command, two, tmp_path):
    """Two agents, as on two machines that see one folder."""
    path, port = tmp_path / "q.safetensors", free_port()
    machines = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    start = [sys.executable, "-m", "torch.distributed.run", *machines]
    arguments = [str(ROOT / "llama.py"), *(str(word) for word in command(path))]
    options = {"env": environment() | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen([*start, "--node_rank", str(number), *arguments], **options) for number in range(2)]
    printed = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert path.read_bytes() == two[0].read_bytes()
    assert ["saved" in text for text in printed] == [True, False], "rank 0 speaks"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_torchrun_gives_one_process_result_and_prints_once(two, alone):
    path, printed = two
    assert equal_codes(path, alone()[0], [0]) >= 0.99
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("layer")] == [f"{i + 1}/{LAYERS}" for i in range(LAYERS)]
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["machine"]["ranks"] == 2 and len(report["linears"]) == 7 * LAYERS
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["q.json", "q.safetensors"]


def test_ranks_count_the_tokens_of_an_expert_together(launch, text_file, tmp_path):
    """Behind attention as it was the router sees the same in both runs; where a rank sees too few tokens, all may see enough."""
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    base, rows = write_model(config, tmp_path / "model"), {}
    options = ["--nsamples", 20, "--seqlen", 32, "--percdamp", 0.1, "--wbits", 4, "--exponent", 4, "--true-sequential", "--n_layers", 1]
    for count in (1, 2):
        report = tmp_path / f"{count}.json"
        words = [base, text_file, *options, "--eval", "none", "--skip", ".*self_attn.*", "--report", report]
        assert launch(count, [*words, "--save_path", tmp_path / f"{count}.safetensors"])[0] == {}
        rows[count] = {row["linear"]: row for row in json.loads(report.read_text())["linears"]}
    one, two = ({name: row["tokens"] for name, row in rows[count].items()} for count in (1, 2))
    assert one == two and sum(one.values()) == 3 * 2 * 20 * 32
    assert any(192 <= tokens < 2 * 192 for name, tokens in one.items() if "down" in name)  # more than is needed, less than that for each
    assert [row["loss"] is None for row in rows[1].values()] == [row["loss"] is None for row in rows[2].values()]
    losses = [[row["loss"] for row in rows[count].values() if row["loss"] is not None] for count in (2, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize(
    "count, options",
    [
        (2, []),
        (3, []),
        (3, ["--grid", "affine", "--exponent", "2", "--groupsize", "32", "--grid_partitions", "256"]),
        (2, ["--recipe", "published", "--sensitivity", "inverse"]),
    ],
    ids=["2", "3", "3-affine", "2-published"],
)
def test_ranks_give_what_one_process_gives_but_for_the_order_of_sums(launch, command, alone, tmp_path, count, options):
    """7 windows, 3 or 4 of them, or 2 or 3, a rank."""
    path, report = tmp_path / "q.safetensors", tmp_path / "r.json"
    assert launch(count, command(path, "--report", report, *options))[0] == {}
    assert_nearly_the_same(path, report, alone(*options))


def assert_nearly_the_same(path: Path, report: Path, other: tuple[Path, dict]) -> None:
    """The first layer's codes, and every layer's loss.

    A tiny random model makes of one last bit ever more different codes from layer to layer: one process with batches of 1 and of 7
    sequences agrees in 87, 78 and 79 % of the codes of layers 1 to 3, and in their losses within 1.4 %.
    """
    assert equal_codes(path, other[0], [0]) >= 0.99
    ours, theirs = json.loads(report.read_text())["linears"], other[1]["linears"]
    for layer in range(LAYERS):
        losses = [sum(row["loss"] for row in rows if row["layer"] == layer) for rows in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=0.03), layer


def test_ranks_share_the_rows_of_embeddings_and_head(launch, command, alone, tmp_path):
    """Embeddings, rounded to nearest, do not depend on the order of sums."""
    path, report = tmp_path / "q.safetensors", tmp_path / "r.json"
    assert launch(3, command(path, "--report", report, "--vocab_bits", "4"))[0] == {}
    files = [packing.Checkpoint.open(file) for file in (path, alone("--vocab_bits", "4")[0])]
    for name in ("model.embed_tokens", "lm_head"):
        codes, levels = ([file.get(name + suffix) for file in files] for suffix in (packing.CODES, packing.GRID))
        assert codes[0].shape == codes[1].shape and levels[0].shape == levels[1].shape
        if name == "model.embed_tokens":
            assert torch.equal(*codes) and torch.equal(*levels)
    losses = [row["loss"] for run in (json.loads(report.read_text()), alone("--vocab_bits", "4")[1]) for row in run["linears"][-1:]]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_as_many_ranks_write_the_same_bytes_wherever_activations_wait(launch, command, two, tmp_path, place):
    assert launch(2, command(tmp_path / "q.safetensors", "--activations", place))[0] == {}
    assert (tmp_path / "q.safetensors").read_bytes() == two[0].read_bytes()


def test_fewer_rows_than_ranks(launch, tiny_model, text_file, tmp_path):
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    arguments = [tiny_model(**sizes), text_file, *SETTINGS, *GRIDS["nonuniform"], "--eval", "none", "--save_path"]
    assert llama.main([str(word) for word in (*arguments, tmp_path / "one.safetensors")]) == 0
    assert launch(3, [*arguments, tmp_path / "three.safetensors"])[0] == {}
    one, three = (packing.Checkpoint.open(tmp_path / f"{name}.safetensors") for name in ("one", "three"))
    for name in one.shapes:
        if name == "lm_head.weight":  # moved by sums over tokens, which come in another order
            torch.testing.assert_close(one.get(name), three.get(name), rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(one.get(name), three.get(name)), name


# --- ends ------------------------------------------------------------------------------------------------------


def killed(rank: int) -> str:
    return f"at_layer(2, {rank}, lambda: os.kill(os.getpid(), signal.SIGKILL))"


def spoken(printed: str) -> list[str]:
    """The lines that say why a run ended."""
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if line.startswith(("error", "interrupted"))]


def test_a_killed_rank_ends_the_run_which_torchrun_can_start_again(launch, command, two, tmp_path):
    """--max-restarts: ranks that are started again go on as the same command does, and write the same bytes."""
    hook = f"if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': {killed(1)}"
    codes, printed = launch(2, command(tmp_path / "q.safetensors"), hook, restarts=1)
    assert codes == {} and printed.count("going on after layer 2") == 1
    assert spoken(printed) == [f"error: rank 1 ended without a message (killed?); {KEPT}"]
    assert (tmp_path / "q.safetensors").read_bytes() == two[0].read_bytes()


@pytest.mark.parametrize("before, after, place", [(3, 1, "disk"), (1, 2, "disk"), (2, 3, "host")])
def test_another_number_of_ranks_goes_on(launch, command, alone, tmp_path, before, after, place):
    """Rank 0 is killed: where there is another one, it says so."""
    path, report = tmp_path / "q.safetensors", tmp_path / "r.json"
    codes, printed = launch(before, command(path, "--activations", place), killed(0))
    assert codes["0"] == -signal.SIGKILL
    assert spoken(printed) == (before > 1) * [f"error: rank 0 ended without a message (killed?); {KEPT}"]
    codes, printed = launch(after, command(path, "--activations", place, "--report", report))
    assert codes == {} and printed.count("going on after layer 2") == 1
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("layer")] == ["3/4", "4/4"]
    assert_nearly_the_same(path, report, alone())
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("q.")] == ["q.safetensors"]


@pytest.mark.parametrize("moment", ["contextlib.redirect_stdout.__exit__", "llama.kept"], ids=["leaving", "left"])
def test_a_rank_that_is_terminated_while_it_ends_says_why(launch, command, tmp_path, moment):
    """torchrun does so as soon as another one is gone, at whatever moment."""
    hook = f"""
import contextlib
def with_sigterm(*arguments, real={moment}):
    {moment} = real
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments)
if os.environ["RANK"] == "1":
    {moment} = with_sigterm
{killed(0)}
"""
    codes, printed = launch(2, command(tmp_path / "q.safetensors"), hook)
    assert codes["0"] == -signal.SIGKILL
    assert spoken(printed) == [f"error: rank 0 ended without a message (killed?); {KEPT}"]


def test_ranks_go_on_with_what_comes_after_the_result(launch, command, two, test_text, tmp_path):
    path = tmp_path / "q.safetensors"
    hook = "import eval_quantized; eval_quantized.streamed_losses = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    assert launch(2, command(path, "--eval", test_text), hook)[0]["0"] == -signal.SIGKILL
    codes, printed = launch(2, command(path, "--eval", test_text))
    assert codes == {} and printed.count("is complete: going on with what comes after it") == 1 and "perplexity" in printed
    assert path.read_bytes() == two[0].read_bytes()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("q.")] == ["q.safetensors"]


def test_sigterm_to_torchrun_ends_as_ctrl_c(launch, command, tmp_path):
    hook = "at_layer(2, 0, lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(20)))"
    codes, printed = launch(2, command(tmp_path / "q.safetensors"), hook)
    assert codes == {"signal": 1}
    assert spoken(printed) == [f"interrupted; {KEPT}"]


@pytest.mark.parametrize(
    "options, hook, message",
    [
        (["--percdampp", "1"], "", "unrecognized arguments: --percdampp 1"),
        (["--nsamples", "2"], "", "--nsamples is 2 and there are 3 ranks"),
        (["--save_path", "/proc/nowhere/q.safetensors"], "", "cannot write to"),
        ([], "at_layer(2, 2, lambda: (_ for _ in ()).throw(llama.InputError('no good')))", f"rank 2 ended: no good; {KEPT}"),
        ([], "if os.environ['RANK'] == '1': ranks.Ranks.device = lambda *_: (_ for _ in ()).throw(llama.InputError('no GPU'))", "no GPU"),
    ],
    ids=["flag", "windows", "folder", "one-rank-later", "one-rank-at-once"],
)
def test_bad_input_is_refused_once(launch, command, tmp_path, options, hook, message):
    codes, printed = launch(3, command(tmp_path / "q.safetensors", *options), hook)
    assert set(codes.values()) == {2}, (codes, printed)
    assert [message in line for line in printed.splitlines() if "error: " in line] == [True], printed
    assert "Traceback" not in printed
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("q.")] == (
        ["q.safetensors.partial"] if KEPT in message else []
    )


def test_a_fault_of_our_own_shows_its_trace_once(launch, command, tmp_path):
    codes, printed = launch(3, command(tmp_path / "q.safetensors"), "at_layer(2, 1, lambda: 1 / 0)")
    assert set(codes.values()) == {1}
    assert printed.count("Traceback") == 1
    assert [line for line in printed.splitlines() if line.startswith("error")] == [
        f"error: rank 1 ended: ZeroDivisionError: division by zero; {KEPT}"
    ]


def test_a_hessian_without_factor_is_rounded_on_all_ranks(launch, command, tmp_path):
    hook = "hessian._cholesky_backwards = lambda H: None"
    codes, printed = launch(2, command(tmp_path / "q.safetensors", "--report", tmp_path / "r.json"), hook)
    assert codes == {} and printed.count("cannot be factorized") == 4 * LAYERS + 1  # the head's
    rows = json.loads((tmp_path / "r.json").read_text())["linears"]
    assert {row["percdamp_used"] for row in rows} == {"none: rounded to nearest"}


# --- single operations -----------------------------------------------------------------------------------------

OPERATIONS = """
mine = ranks.Ranks.join()
assert (mine.rank, mine.size) == (int(os.environ["RANK"]), 3)
for count in (0, 1, 2, 3, 7):
    whole = torch.arange(5.0 * count).view(count, 5)
    share = torch.zeros(1, 5) if count == 0 else whole[mine.rows(count)]
    assert len(share) >= 1
    given = quant.Quantized(share.to(torch.uint8), share[:, 0])
    gathered = mine.gather_rows(given, count)
    assert torch.equal(gathered.codes, whole.to(torch.uint8)) and torch.equal(gathered.loss, whole[:, 0])
    grid = mine.gather_rows(quant.Grid(share.view(-1, 1, 5), quant.Affine(share[:, :1], share[:, :1].to(torch.uint8))), count)
    assert torch.equal(grid.levels, whole.view(count, 1, 5)) and torch.equal(grid.affine.zero, whole[:, :1].to(torch.uint8))
assert mine.gather_rows(quant.Grid(share, None), 7).affine is None
tensors = [torch.full((3, 2), mine.rank + 1.0), None, torch.tensor([mine.rank])]
mine.sum_(*tensors)
assert tensors[0].unique().tolist() == [6] and tensors[2].tolist() == [3]
assert mine.each(10 * mine.rank) == [0, 10, 20]
numbers = torch.full((4,), mine.rank == 0)
mine.copy_first_(numbers)
assert numbers.all()
asked = []
assert mine.from_first(lambda: asked.append(1) or {"a": [1, None, 0.1]}) == {"a": [1, None, 0.1]}
assert len(asked) == (mine.rank == 0)
assert mine.from_first(lambda: None) is None
mine.part()
print("rank", mine.rank, "is done")
sys.exit(mine.leave(ranks.Ending(0)))
"""


def test_operations_of_three(launch):
    codes, printed = launch(3, (), OPERATIONS)
    assert codes == {}, printed
    assert printed.count("is done") == 3


def test_a_process_alone_does_nothing():
    mine, tensor = Ranks(), torch.ones(3)
    mine.sum_(tensor, None)
    mine.copy_first_(tensor)
    mine.part()
    assert tensor.tolist() == [1, 1, 1]
    assert mine.rows(5) == slice(0, 5) and mine.total(4) == 4 and mine.from_first(lambda: (1,)) == (1,)
    assert mine.gather_rows(tensor, 3) is tensor
    assert mine.device(torch.device("cuda", 3)) == torch.device("cuda", 3)


class Never:
    """A collective that does not end, and a store in which `ended` is set or not."""

    def __init__(self, ended: bool = False):
        self.ended = ended

    def is_completed(self) -> bool:
        return False

    def check(self, keys: list[str]) -> bool:
        assert keys == ["ended"]
        return self.ended


def test_nobody_waits_for_ever(monkeypatch):
    with pytest.raises(RankLost, match="another rank has ended"):
        Ranks(0, 2, store=Never(ended=True))._meet(Never)
    monkeypatch.setattr(ranks, "TIMEOUT", timedelta(seconds=0.3))
    with pytest.raises(RankLost, match="have not come within 0:00:00.3"):
        Ranks(0, 2, store=Never())._meet(Never)


def test_another_launchers_environment_is_not_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert Ranks.join() == Ranks()


def test_shares_are_even_and_cover_everything():
    for size in (1, 2, 3, 8):
        for count in (8, 9, 100):
            slices = [Ranks(rank, size).rows(count) for rank in range(size)]
            assert [row for rows in slices for row in range(count)[rows]] == [*range(count)]
            assert max(rows.stop - rows.start for rows in slices) - min(rows.stop - rows.start for rows in slices) <= 1


@pytest.mark.parametrize("rank", [Ranks(0, 1), Ranks(1, 2, 1, 2), Ranks(3, 4, 1, 2)], ids=["alone", "2", "2-machines"])
def test_gpus_are_not_shared(monkeypatch, rank):
    """On a machine with 4 GPUs: each rank's own one, and a second one for wide Hessians that no rank has."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = rank.device(torch.device("cuda"))
    if rank.size == 1:
        assert device == torch.device("cuda") and rank.second_device(device) == torch.device("cuda", 1)
        assert rank.second_device(torch.device("cuda", 1)) == torch.device("cuda", 0)
        return
    assert device == torch.device("cuda", 1) and chosen == [device]
    assert rank.second_device(device) == torch.device("cuda", 3)
    with pytest.raises(InputError, match="cuda:1 is one GPU"):
        rank.device(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert rank.second_device(device) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--nproc_per_node=1"):
        rank.device(torch.device("cuda"))


class Others(Ranks):
    """Stands for rank 1 of 2 whose rank 0 says what it is told to."""

    def from_first(self, compute):
        return [{"a": 1}]


def test_a_folder_that_rank_0_does_not_share_is_refused(tmp_path):
    (tmp_path / "journal.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    journal.Journal(tmp_path, {"a": 1}, Others(1, 2))
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(InputError, match="several machines need one folder"):
        journal.Journal(tmp_path, {"a": 1}, Others(1, 2))


def test_a_lone_process_says_why_it_ends(capsys):
    assert Ranks().leave(Ending(2, "it is wrong", True), "; kept") == 2
    assert Ranks().leave(Ending(130, "interrupted"), "; kept") == 130
    assert capsys.readouterr().err == "error: it is wrong; kept\ninterrupted; kept\n"
    assert ranks.GRACE < 30, "torchrun kills what has not ended then"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(model, text_file, tmp_path):
    """NCCL: as one GPU does, and the same bytes again."""
    settings = [*SETTINGS[:-1], "cuda", "--dtype", "float32", *GRIDS["nonuniform"], "--eval", "none"]
    arguments = [model, text_file, *settings, "--save_path"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "llama.py")]
    assert llama.main([str(word) for word in (*arguments, tmp_path / "one.safetensors")]) == 0
    for name in ("two", "again"):
        words = [*start, *arguments, tmp_path / f"{name}.safetensors"]
        done = subprocess.run([str(word) for word in words], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert equal_codes(tmp_path / "two.safetensors", tmp_path / "one.safetensors", [0]) >= 0.99
