"""Windows of the published corpora equal plain transcriptions of the published sampling; local files; every bad input.

The corpora are small stand-ins with the hub's layout and columns, in the working directory: datasets.load_dataset
takes a local folder of the repository's name before it asks the hub.
"""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import datautils
from conftest import make_text
from leanquant.errors import InputError

WIKITEXT_CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: train, path: wikitext-2-raw-v1/train-*.parquet}
  - {split: test, path: wikitext-2-raw-v1/test-*.parquet}
- config_name: wikitext-103-raw-v1
  data_files:
  - {split: train, path: wikitext-103-raw-v1/train-*.parquet}
---
"""


def write_parquet(path: Path, column: str, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: documents}), path)


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": document, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"} for document in documents]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def documents_of(lengths, seed: int) -> list[str]:
    """One document a length, all different."""
    text, start, documents = make_text(sum(lengths), seed), 0, []
    for length in lengths:
        documents.append(text[start : start + length])
        start += length
    return documents


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with the three repositories, and the documents of each split used."""
    root, rng = tmp_path_factory.mktemp("hub"), random.Random(7)
    documents = {
        "wikitext/train": ["", *documents_of([rng.randint(5, 300) for _ in range(20)], 1), ""],
        "wikitext/test": ["", *documents_of([rng.randint(5, 300) for _ in range(8)], 2)],
        "ptb/train": documents_of([rng.randint(5, 80) for _ in range(40)], 3),
        "ptb/validation": documents_of([rng.randint(5, 80) for _ in range(12)], 4),
        "ptb/test": documents_of([rng.randint(5, 80) for _ in range(15)], 5),
        "c4/train": documents_of([rng.randint(4, 160) for _ in range(60)], 6),
        # More than 1100 documents, so that the limit shows; the later ones are longer.
        "c4/validation": documents_of([rng.randint(4, 20) for _ in range(1100)] + [rng.randint(30, 200) for _ in range(100)], 7),
    }
    wikitext, ptb, c4 = root / "Salesforce/wikitext", root / "ptb-text-only/ptb_text_only", root / "allenai/c4/en"
    for split in ("train", "test"):
        write_parquet(wikitext / f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", "text", documents[f"wikitext/{split}"])
    write_parquet(wikitext / "wikitext-103-raw-v1/train-00000-of-00001.parquet", "text", ["another text"])
    (wikitext / "README.md").write_text(WIKITEXT_CARD)
    for split in ("train", "validation", "test"):  # as the hub's parquet branch: a folder per configuration, no card
        write_parquet(ptb / f"penn_treebank/{split}/0000.parquet", "sentence", documents[f"ptb/{split}"])
    write_jsonl(c4 / "c4-train.00000-of-01024.json.gz", documents["c4/train"])
    write_jsonl(c4 / "c4-validation.00000-of-00008.json.gz", documents["c4/validation"])
    write_jsonl(c4 / "c4-train.00001-of-01024.json.gz", ["another shard"] * 9)
    return root, documents


@pytest.fixture
def corpora(hub, offline, monkeypatch) -> dict[str, list[str]]:
    """The documents of the stand-in repositories, which lie in the working directory."""
    monkeypatch.chdir(hub[0])
    return hub[1]


# --- the published sampling, written down plainly --------------------------------------------------------------


def published_random_windows(tokenizer, text, nsamples, seqlen, seed):
    random.seed(seed)
    ids = tokenizer(text).input_ids
    starts = [random.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return [ids[i : i + seqlen] for i in starts]


def published_c4_windows(tokenizer, documents, nsamples, seqlen, seed):
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i]).input_ids
            if len(ids) > seqlen:  # the published code has >=, and then crashes on equality
                break
            assert len(ids) != seqlen, "the stand-in must avoid the published code's crash"
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows


def published_permutation_windows(tokenizer, documents, nsamples, seqlen, seed):
    np.random.seed(seed)
    windows = []
    for i in np.random.permutation(len(documents)):
        ids = tokenizer(documents[int(i)]).input_ids
        if len(ids) >= seqlen:
            windows.append(ids[:seqlen])
        if len(windows) == nsamples:
            break
    return windows


def published_evaluation(tokenizer, text, seqlen, limit=None):
    ids = tokenizer(text).input_ids
    if limit:
        ids = ids[: limit * seqlen]
    return [ids[i * seqlen : (i + 1) * seqlen] for i in range(len(ids) // seqlen)]


def assert_windows(found: torch.Tensor, expected: list[list[int]]) -> None:
    assert found.dtype == torch.int64
    assert found.tolist() == expected


# --- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, split, joiner", [("wikitext2", "wikitext/train", "\n\n"), ("ptb", "ptb/train", "\n\n"), ("ptb-new", "ptb/train", " ")]
)
@pytest.mark.parametrize("seed", [0, 42])
def test_calibration_on_joined_text_is_the_published_sampling(corpora, tokenizer, source, split, joiner, seed):
    expected = published_random_windows(tokenizer, joiner.join(corpora[split]), 16, 32, seed)
    assert_windows(datautils.calibration_windows(source, tokenizer, 16, 32, seed), expected)


@pytest.mark.parametrize("source", ["c4", "c4-new"])
@pytest.mark.parametrize("seed", [0, 42])
def test_calibration_on_documents_is_the_published_sampling(corpora, tokenizer, source, seed):
    seqlen = unused_length(tokenizer, corpora["c4/train"], 100)
    expected = published_c4_windows(tokenizer, corpora["c4/train"], 16, seqlen, seed)
    assert_windows(datautils.calibration_windows(source, tokenizer, 16, seqlen, seed), expected)


def test_documents_that_are_rare_are_found_and_that_there_are_none_is_said_once_it_is_known(corpora, tokenizer, monkeypatch):
    monkeypatch.setattr(datautils, "DRAWS", 2)
    longest = max(len(tokenizer(document).input_ids) for document in corpora["c4/train"])
    expected = published_c4_windows(tokenizer, corpora["c4/train"], 3, longest - 1, 1)
    assert_windows(datautils.calibration_windows("c4", tokenizer, 3, longest - 1, 1), expected)
    with pytest.raises(InputError, match=rf"no document of c4 has {longest + 1} tokens \(the longest has {longest}\): give a smaller"):
        datautils.calibration_windows("c4", tokenizer, 3, longest + 1, 1)


@pytest.mark.parametrize("seed", [0, 42])
def test_calibration_on_the_permuted_shard_is_the_published_sampling(corpora, tokenizer, seed):
    expected = published_permutation_windows(tokenizer, corpora["c4/train"], 16, 64, seed)
    assert len(expected) == 16
    assert_windows(datautils.calibration_windows("c4-full", tokenizer, 16, 64, seed), expected)


def unused_length(tokenizer, documents: list[str], start: int) -> int:
    """The first length from `start` on that no document has: on equality the published code crashes."""
    lengths = {len(tokenizer(document).input_ids) for document in documents}
    return next(n for n in range(start, 2 * start) if n not in lengths)


@pytest.mark.parametrize("source", sorted(datautils.CORPORA))
def test_the_seed_decides_the_calibration_windows(corpora, tokenizer, source):
    first, again, other = (datautils.calibration_windows(source, tokenizer, 8, 48, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_leaves_the_global_generators_alone(corpora, tokenizer):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for source in datautils.CORPORA:
        datautils.calibration_windows(source, tokenizer, 4, 32, 0)
    assert (random.random(), np.random.random(), torch.rand(1)) == expected


# --- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, split, joiner", [("wikitext2", "wikitext/test", "\n\n"), ("ptb", "ptb/validation", "\n\n"), ("ptb-new", "ptb/test", " ")]
)
def test_evaluation_on_joined_text_is_every_whole_window(corpora, tokenizer, source, split, joiner):
    expected = published_evaluation(tokenizer, joiner.join(corpora[split]), 32)
    assert_windows(datautils.evaluation_windows(source, tokenizer, 32), expected)


@pytest.mark.parametrize("source", ["c4-new", "c4-full"])
@pytest.mark.parametrize("seqlen, windows", [(8, 256), (64, None)])
def test_evaluation_uses_1100_documents_and_256_windows(corpora, tokenizer, source, seqlen, windows):
    expected = published_evaluation(tokenizer, " ".join(corpora["c4/validation"][:1100]), seqlen, 256)
    assert (len(expected) == windows) if windows else (len(expected) < 256)  # one limit each time
    assert_windows(datautils.evaluation_windows(source, tokenizer, seqlen), expected)


def test_evaluation_on_c4_is_256_random_windows_of_seed_0(corpora, tokenizer):
    seqlen = unused_length(tokenizer, corpora["c4/validation"], 22)
    expected = published_c4_windows(tokenizer, corpora["c4/validation"], 256, seqlen, 0)
    assert_windows(datautils.evaluation_windows("c4", tokenizer, seqlen), expected)


# --- local files -----------------------------------------------------------------------------------------------

DOCUMENTS = ["Größe, naïve: 雪 falls on a quiet town at night.", "A second text,\nwith two lines.", "The third, and last, of them all."]


def local_file(folder: Path, suffix: str) -> Path:
    path = folder / f"text{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    elif suffix == ".jsonl":
        lines = [json.dumps({"text": document, "id": i}, ensure_ascii=i == 0) for i, document in enumerate(DOCUMENTS)]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": DOCUMENTS}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_local_files_of_every_kind_give_the_same_windows(tmp_path, tokenizer, suffix):
    source, text = str(local_file(tmp_path, suffix)), "\n\n".join(DOCUMENTS)
    assert_windows(datautils.calibration_windows(source, tokenizer, 9, 16, 3), published_random_windows(tokenizer, text, 9, 16, 3))
    assert_windows(datautils.evaluation_windows(source, tokenizer, 16), published_evaluation(tokenizer, text, 16))


def test_windows_start_with_the_tokenizers_bos(tmp_path, tokenizer):
    windows = datautils.evaluation_windows(str(local_file(tmp_path, ".txt")), tokenizer, 16)
    assert windows[0, 0] == tokenizer.bos_token_id
    assert (windows[1:, 0] != tokenizer.bos_token_id).all()


def test_the_last_possible_window_is_left_out_as_in_the_published_code(tmp_path, tokenizer):
    path, text = tmp_path / "short.txt", "one two three four"  # 19 tokens: starts 0, 1 and 2 are drawn, 3 never is
    path.write_text(text)
    expected = published_random_windows(tokenizer, text, 60, 16, 0)
    assert len({tuple(window) for window in expected}) == 3
    assert_windows(datautils.calibration_windows(str(path), tokenizer, 60, 16, 0), expected)


def test_text_of_exactly_one_window_is_enough(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("seven c")  # and the BOS
    expected = tokenizer("seven c").input_ids
    assert datautils.calibration_windows(str(path), tokenizer, 3, 8, 0).tolist() == [expected] * 3
    assert datautils.evaluation_windows(str(path), tokenizer, 8).tolist() == [expected]


# --- bad input -------------------------------------------------------------------------------------------------


def refusal(function, *args) -> str:
    """The message of the InputError that `function` must raise: one line, and nothing chained behind it."""
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    return message


def both_refusals(source, tokenizer) -> str:
    """The message, which must be the same for calibration and evaluation."""
    message = refusal(datautils.calibration_windows, str(source), tokenizer, 4, 16, 0)
    assert message == refusal(datautils.evaluation_windows, str(source), tokenizer, 16)
    return message


def test_unknown_name_lists_the_known_ones(tokenizer):
    message = both_refusals("wikitext3", tokenizer)
    assert "wikitext3" in message
    assert all(name in message for name in (*datautils.CORPORA, ".txt", ".jsonl", ".parquet"))


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.parquet", "folder.txt"])
def test_missing_file_is_named(tmp_path, tokenizer, name):
    (tmp_path / "folder.txt").mkdir()
    assert str(tmp_path / name) in both_refusals(tmp_path / name, tokenizer)


def test_too_short_text_says_how_many_tokens_there_are_and_are_needed(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("ten tokens")  # 10 bytes and a BOS
    message = both_refusals(path, tokenizer)
    assert "11 tokens" in message and "16" in message


@pytest.mark.parametrize("source", ["c4", "c4-new", "c4-full"])
def test_no_document_long_enough_says_the_longest(corpora, tokenizer, source):
    longest = max(len(tokenizer(document).input_ids) for document in corpora["c4/train"])
    message = refusal(datautils.calibration_windows, source, tokenizer, 4, 1000, 0)
    assert "1000 tokens" in message and f"has {longest})" in message


def test_too_few_long_documents_for_the_permutation_says_how_many(corpora, tokenizer):
    long = sum(len(tokenizer(document).input_ids) >= 64 for document in corpora["c4/train"])
    message = refusal(datautils.calibration_windows, "c4-full", tokenizer, 60, 64, 0)
    assert f"{long} documents" in message and "60" in message


@pytest.mark.parametrize("line", ["not json", '{"content": "no text field"}', "[1, 2]", '"text"', '{"text": "cut', '{"text": null}'])
def test_bad_jsonl_line_is_named_with_its_number(tmp_path, tokenizer, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a good line of text"}\n\n' + line + '\n{"text": "and another"}\n')
    message = both_refusals(path, tokenizer)
    assert str(path) in message and "line 3" in message


def test_parquet_without_text_column_is_refused(tmp_path, tokenizer):
    path = tmp_path / "other.parquet"
    write_parquet(path, "content", DOCUMENTS)
    message = both_refusals(path, tokenizer)
    assert str(path) in message and "text column" in message


def test_a_missing_value_of_a_parquet_file_is_not_the_word_none(tmp_path, tokenizer):
    path = tmp_path / "holes.parquet"
    write_parquet(path, "text", [DOCUMENTS[0], None, DOCUMENTS[2]])
    try:
        windows = datautils.evaluation_windows(str(path), tokenizer, 16)
    except InputError:
        return
    assert "None" not in tokenizer.decode(windows.flatten())


def test_file_that_is_not_parquet_is_refused(tmp_path, tokenizer):
    path = tmp_path / "text.parquet"
    path.write_text("plain text")
    assert str(path) in both_refusals(path, tokenizer)


@pytest.mark.parametrize(
    "name, content", [("empty.txt", ""), ("blank.txt", " \n\n "), ("empty.jsonl", ""), ("blank.jsonl", '{"text": " "}')]
)
def test_file_without_text_is_refused(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    message = both_refusals(tmp_path / name, tokenizer)
    assert name in message and "no text" in message


def test_empty_parquet_file_is_refused(tmp_path, tokenizer):
    path = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "no text" in both_refusals(path, tokenizer)


@pytest.mark.parametrize(
    "name, content", [("latin.txt", "Größe".encode("latin-1")), ("latin.jsonl", '{"text": "Größe"}'.encode("latin-1"))]
)
def test_text_that_is_not_utf8_is_refused(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_bytes(content)
    message = both_refusals(tmp_path / name, tokenizer)
    assert name in message and "UTF-8" in message


@pytest.mark.parametrize("source", sorted(datautils.CORPORA))
def test_without_network_one_sentence_says_what_to_do(tmp_path, tokenizer, offline, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    message = both_refusals(source, tokenizer)
    assert datautils.CORPORA[source].repository in message and "network" in message and "local" in message


def test_a_folder_in_the_hubs_place_is_not_the_hub(corpora, hub, tokenizer, tmp_path, monkeypatch, cache):
    """Its windows are not taken for the hub's, nor for those of another folder."""
    windows = datautils.evaluation_windows("wikitext2", tokenizer, 32)
    assert torch.equal(datautils.evaluation_windows("wikitext2", tokenizer, 32), windows)
    monkeypatch.setattr(datautils, "_hub_documents", lambda *_: pytest.fail("not from the cache"))
    assert torch.equal(datautils.evaluation_windows("wikitext2", tokenizer, 32), windows)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.fail.Exception):
        datautils.evaluation_windows("wikitext2", tokenizer, 32)
