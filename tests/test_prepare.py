"""Preparing corpora: real files, real kills, real tokenizers."""

import gzip
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from nanopause import files
from nanopause.data import Corpus
from nanopause.errors import UserError, run
from nanopause.prepare import Shards, n_cores, prepare, split_of
from nanopause.scripts.data import pydocs, text
from nanopause.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = [
    "a",
    "the",
    "of",
    "cat",
    "pause",
    "thinks",
    "before",
    "it",
    "speaks",
    "naïve",
    "東京",
    "and\n",
    "then\n\n",
    "42",
]
WORDS += ["<|pause|>", "<|endoftext|>"]
SETTINGS = {"val_fraction": 0.1, "shard_tokens": 100_000}


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Many commits in little text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanopause.prepare.BATCH_CHARACTERS", 1 << 15)
        patch.setattr("nanopause.prepare.COMMIT_SECONDS", 0.0)
        yield


def write_parquet(path, texts, column="text"):
    table = pa.table({"url": [f"http://{i}" for i in range(len(texts))], column: texts})
    parquet.write_table(table, path, row_group_size=50)


def write_text(path, texts):
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write("\n<|endoftext|>\n".join(texts) + "\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(pattern of the files, documents): 1.3 MB in two Parquet files and a .txt.xz, with blanks and copies."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 800))).strip("\n") for _ in range(600)]
    texts[10] = texts[300] = ""
    texts[20] = " \n\t"
    texts[250] = texts[30]
    texts[550] = texts[30].upper()
    write_parquet(folder / "a.parquet", texts[:200])
    write_parquet(folder / "b.parquet", texts[200:400])
    write_text(folder / "c.txt.xz", texts[400:])
    return f"{folder}/*", [text for text in texts if text.strip()]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The folder that one process writes without a break, tokenizer `bytes`."""
    return prepare_files(corpus, tmp_path_factory.mktemp("reference"), workers=1)


def prepare_files(corpus, data_dir, tokenizer="bytes", **settings):
    sources = text.find(corpus[0])
    return prepare("mix", sources, text.read, data_dir, tokenizer, **{**SETTINGS, **settings})


def start(corpus, data_dir, workers=1, before="pass"):
    """The same as `prepare_files` in a process of its own, the leader of a process group."""
    code = f"""
import nanopause.prepare
from nanopause.scripts.data import text
from nanopause.errors import run
nanopause.prepare.BATCH_CHARACTERS, nanopause.prepare.COMMIT_SECONDS = 1 << 15, 0.0
if __name__ == "__main__":
    {before}
    sources = text.find({corpus[0]!r})
    settings = dict({SETTINGS!r}, workers={workers})
    run(lambda: nanopause.prepare.prepare("mix", sources, text.read, {str(data_dir)!r}, "bytes", **settings))
"""
    script = data_dir / "run.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, script], env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_documents(folder, split):
    """The texts of a split, from the shards that meta.json lists."""
    meta = json.loads((folder / "meta.json").read_text())
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    tokens = np.concatenate([np.fromfile(folder / s["file"], dtype) for s in meta["splits"][split]["shards"]])
    ends = np.flatnonzero(tokens == meta["eot_id"])
    assert ends[-1] == len(tokens) - 1
    tokenizer = load_tokenizer(meta["tokenizer"])
    return [tokenizer.decode(part[part != meta["eot_id"]].tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def committed(data_dir):
    for path in (data_dir / "mix/bytes.partial/meta.json", data_dir / "mix/bytes/meta.json"):
        try:
            return sum(split["tokens"] for split in json.loads(path.read_text())["splits"].values())
        except (FileNotFoundError, NotADirectoryError):
            pass
    return 0


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def group_is_gone(process):
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_killed_and_resumed_is_byte_identical(corpus, reference, tmp_path, workers=2):
    """To what one process writes without a break, so that neither kills nor workers change a byte."""
    rng, kills = random.Random(workers), 0
    while not (tmp_path / "mix/bytes").exists() and kills < 2:
        process, before = start(corpus, tmp_path, workers), committed(tmp_path)
        wait_for(lambda b=before, p=process: committed(tmp_path) > b or p.poll() is not None)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        wait_for(lambda p=process: group_is_gone(p))  # workers do not outlive it
        process.stderr.close()
    assert kills >= 2 / workers
    if not (tmp_path / "mix/bytes").exists():
        assert start(corpus, tmp_path, workers).wait() == 0
    assert contents(tmp_path / "mix/bytes") == contents(reference)
    assert not (tmp_path / "mix/bytes.partial").exists()


def test_full_disk_ends_in_a_sentence_and_resumes(corpus, reference, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, -1))"  # of a shard's 200,000 bytes
    process = start(corpus, tmp_path, before=limit)
    message = process.communicate()[1]
    assert process.returncode == 1
    assert "File too large" in message and "run it again" in message and "Traceback" not in message
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 150_000
    assert contents(prepare_files(corpus, tmp_path)) == contents(reference)


def test_two_at_once_make_one_folder(corpus, reference, tmp_path):
    process = start(corpus, tmp_path)
    wait_for(lambda: committed(tmp_path) > 0)
    assert contents(prepare_files(corpus, tmp_path)) == contents(reference)
    assert process.wait() == 0
    process.stderr.close()
    assert [path.name for path in (tmp_path / "mix").iterdir()] == ["bytes"]


def test_a_dead_worker_is_told(tmp_path):
    def read(source):
        for i in range(3000):
            if i == 1500:
                multiprocessing.active_children()[0].kill()
            yield f"document {i} " * 20

    with pytest.raises(UserError, match="a worker died"):
        prepare("dies", ["x"], read, tmp_path, "bytes", val_fraction=0.1, workers=2)


def test_resume_opens_only_what_is_left(tmp_path):
    opened, sources = [], ["s1", "s2", "s3"]

    def read(source, cut=False):
        opened.append(source)
        for i in range(40):
            if cut and source == "s2" and i == 20:
                raise KeyboardInterrupt
            yield f"{source} {i} " * 700

    settings = {**SETTINGS, "workers": 1, "limit": 100}
    with pytest.raises(KeyboardInterrupt):
        prepare("cut", sources, lambda source: read(source, cut=True), tmp_path, "bytes", **settings)
    opened.clear()
    folder = prepare("cut", sources, read, tmp_path, "bytes", **settings)
    assert opened == ["s2", "s3"]
    assert contents(folder) == contents(prepare("cut", sources, read, tmp_path / "whole", "bytes", **settings))
    assert len(read_documents(folder, "train") + read_documents(folder, "val")) == 100


def test_tokens_decode_to_the_documents(corpus, tmp_path):
    folder = prepare_files(corpus, tmp_path, "gpt2", workers=1)
    meta, train, val = (
        json.loads((folder / "meta.json").read_text()),
        *(read_documents(folder, s) for s in ("train", "val")),
    )
    assert (meta["dtype"], meta["vocab_size"], meta["eot_id"]) == ("uint16", 50304, 50256)
    assert any("<|pause|>" in text and "<|endoftext|>" in text for text in train)
    assert Counter(train + val) == Counter(corpus[1])
    assert train == [text for text in corpus[1] if split_of(text, 0.1) == "train"]
    assert not {" ".join(text.lower().split()) for text in train} & {" ".join(text.lower().split()) for text in val}
    for texts, counts in ((train, meta["splits"]["train"]), (val, meta["splits"]["val"])):
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["tokens"] == sum(shard["tokens"] for shard in counts["shards"])
        for shard in counts["shards"]:
            data = (folder / shard["file"]).read_bytes()
            assert (len(data) // 2, hashlib.sha256(data).hexdigest()) == (shard["tokens"], shard["sha256"])
        assert [shard["tokens"] for shard in counts["shards"][:-1]] == [100_000] * (len(counts["shards"]) - 1)
    assert len(meta["splits"]["train"]["shards"]) > 1
    listed = {shard["file"] for counts in meta["splits"].values() for shard in counts["shards"]}
    assert set(contents(folder)) == listed | {"meta.json"}


def test_wide_vocabulary_is_uint32(tmp_path):
    shards = Shards(tmp_path, {"dtype": "uint32", "shard_tokens": 4})
    for tokens in ([70_000, 1], [2, 3, 4, 5, 6, 7, 151_643]):
        shards.append("train", np.array(tokens), documents=1, size=9)
    parts = [np.fromfile(tmp_path / f"train_{i:06d}.bin", "<u4").tolist() for i in range(3)]
    assert parts == [[70_000, 1, 2, 3], [4, 5, 6, 7], [151_643]]


def test_limit_takes_the_first_documents_of_each_file(corpus, tmp_path):
    folder = prepare_files(corpus, tmp_path, limit=250, workers=1)
    found = [documents for source in text.find(corpus[0]) for documents in islice(text.read(source), 84)]
    found = Counter(document for document in found if document.strip())
    read = Counter(read_documents(folder, "train") + read_documents(folder, "val"))
    assert read <= found and found.total() - read.total() == 2  # 83, 83 and 84 of 84 each


def test_too_few_documents_are_split_by_tokens(tmp_path, capsys):
    """One document, whichever split its hash is of, an interrupted division included."""
    for word in ("train", "val"):
        novel = next(t for i in range(999) if split_of(t := f"{i} was a dark night\n" * 3000, 0.1) == word)
        settings = {"val_fraction": 0.1, "workers": 1, "shard_tokens": 7000}
        folder = prepare(word, ["s"], lambda _, novel=novel: [novel, " "], tmp_path, "bytes", **settings)
        meta = json.loads((folder / "meta.json").read_text())
        parts = []
        for split in ("train", "val"):
            shards = meta["splits"][split]["shards"]
            parts.append(
                b"".join(np.fromfile(folder / s["file"], "<u2").clip(max=255).astype("u1").tobytes() for s in shards)
            )
            assert sum(s["tokens"] for s in shards) == meta["splits"][split]["tokens"] == len(parts[-1])
        assert b"".join(parts) == novel.encode() + b"\xff" and len(parts[1]) == math.ceil(0.1 * (len(novel) + 1))
        assert sum(counts["bytes"] for counts in meta["splits"].values()) == len(novel.encode())
        assert set(contents(folder)) == {s["file"] for c in meta["splits"].values() for s in c["shards"]} | {
            "meta.json"
        }
        said = capsys.readouterr()
        assert "number of documents: 1 (" in said.out and f"the last {len(parts[1]):,} tokens become" in said.out
        assert f"warning: the val split has only {len(parts[1]):,} tokens" in said.err and "train" not in said.err
        truncate, n_val = Shards._truncate, len(parts[1])

        def interrupted(shards, n=n_val, truncate=truncate):
            if shards.counts["val"]["tokens"] == n:
                raise KeyboardInterrupt
            truncate(shards)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Shards, "_truncate", interrupted)
            prepare("cut", ["s"], lambda _, novel=novel: [novel], tmp_path, "bytes", **settings)
        again = prepare("cut", ["s"], lambda _, novel=novel: [novel], tmp_path, "bytes", **settings)
        files = contents(again)
        assert files.pop("meta.json") and files == {k: v for k, v in contents(folder).items() if k != "meta.json"}
        shutil.rmtree(again)
        capsys.readouterr()


def test_split_is_a_function_of_the_text():
    texts = [f"document number {i}" for i in range(20_000)]
    held_out = sum(split_of(text, 0.05) == "val" for text in texts)
    assert 850 < held_out < 1150
    assert all(split_of(text, 0.05) == split_of(f"  {text.upper()}\n\n", 0.05) for text in texts[:500])
    assert split_of("lone \ud800 surrogate", 0.5) in ("train", "val")


def command(capsys, *, data_dir, **keys):
    """What `python data/text.py` writes to stderr, which must be one line with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: text.prepare_text(data_dir=str(data_dir), **{"name": "x", "workers": 1, **keys}))
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.startswith("error: ") and message.count("\n") == 1
    return message


def test_files_of_any_origin_are_read(tmp_path):
    """Byte order marks, line ends, separators, types of Parquet, names, empty files, packed JSON lines."""
    mark, texts = b"\xef\xbb\xbf", ["first", "second\nline", "naïve"]
    (tmp_path / "a.txt").write_bytes(mark + b"first\r\n<|endoftext|> \r\nsecond\r\nline\r\n")
    with open(tmp_path / "a.txt", "ab") as file:
        file.write("<|endoftext|>\t\r\nnaïve\n<|endoftext|>".encode())
    rows = "".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) + "\n" for t in texts).encode()
    (tmp_path / "b.jsonl").write_bytes(mark + rows)
    (tmp_path / "c.JSONL.gz").write_bytes(gzip.compress(mark + rows))
    for i, kind in enumerate(
        (pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string()))
    ):
        column = pa.array(texts, pa.string()).cast(kind)
        parquet.write_table(pa.table({"text": column}), tmp_path / f"d{i}", store_schema=kind != pa.binary())
    sources = text.find(f"{tmp_path}/*")
    assert len(sources) == 7 and all(list(text.read(source)) == texts for source in sources)
    (tmp_path / "folder").mkdir()
    for i, kind in enumerate((pa.string(), pa.null())):
        parquet.write_table(pa.table({"text": pa.array([], kind)}), tmp_path / f"empty{i}.parquet")
    assert [t for source in text.find(f"{tmp_path}/*") for t in text.read(source)] == 7 * texts


def test_bad_files_end_in_a_sentence(capsys, tmp_path):
    good = [f"document {i} of many, with some words in it" for i in range(3000)]
    write_parquet(tmp_path / "good.parquet", good)
    write_parquet(tmp_path / "column.parquet", good[:9], column="body")
    write_parquet(tmp_path / "lists.parquet", [["not", "text"]] * 9)
    write_text(tmp_path / "good.txt.xz", good)
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "short.parquet").write_bytes(data[:-100])
    (tmp_path / "flipped.parquet").write_bytes(data[:2000] + bytes(500) + data[2500:])
    xz = (tmp_path / "good.txt.xz").read_bytes()
    (tmp_path / "short.txt.xz").write_bytes(xz[: len(xz) // 2])
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "field.jsonl").write_text('{"text": "good"}\n\n{"body": "bad"}\n')
    (tmp_path / "table.csv").write_text("a,b")
    for file, said in {
        "missing*.parquet": "no file matches",
        "column.parquet": r"has no column text of strings, only url \(string\), body",
        "lists.parquet": "has no column text of strings",
        "short.parquet": "cannot read .*short.parquet",
        "flipped.parquet": "cannot read .*flipped.parquet",
        "short.txt.xz": "cannot read .*short.txt.xz",
        "latin.txt": "latin.txt is not UTF-8 text",
        "wide.txt": "wide.txt is not UTF-8 text .*: convert it, for example by iconv",
        "field.jsonl": "field.jsonl, line 3 is not a JSON object with text in the field `text`",
        "table.csv": "table.csv is none of .txt, .md, .jsonl",
    }.items():
        keys = {"name": f"from {file}", "files": str(tmp_path / file), "tokenizer": "bytes"}
        assert re.search(said, command(capsys, data_dir=tmp_path, **keys)), file
    assert not list(tmp_path.glob("from*/bytes"))


def test_a_platform_without_locks_and_affinities(tmp_path, monkeypatch):
    """macOS has no sched_getaffinity, Windows has no fcntl and cannot open a folder."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "sync", lambda path: None)
    monkeypatch.setattr("nanopause.prepare._map", lambda function, batches, workers: (
        (position, function(texts)) for position, texts in batches if workers >= 1
    ))  # fmt: skip
    folder = prepare("words", ["a"], lambda _: [f"text {i}" for i in range(50)], tmp_path, "bytes", val_fraction=0.3)
    assert (folder / "meta.json").exists()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert n_cores() == 1


def test_bad_settings_end_in_a_sentence(capsys, tmp_path, monkeypatch):
    write_parquet(tmp_path / "one.parquet", ["only one document"])
    keys = {"data_dir": tmp_path, "files": str(tmp_path / "one.parquet"), "tokenizer": "bytes"}
    assert "tokenizer 'gpt5' is not known" in command(capsys, **{**keys, "tokenizer": "gpt5"})
    assert "limit=0 must be at least 1" in command(capsys, **keys, limit=0)
    assert "val_fraction=1.5 must lie" in command(capsys, **keys, val_fraction=1.5)
    write_parquet(tmp_path / "blank.parquet", [" \n"])
    assert "hold nothing but white space" in command(capsys, **{**keys, "files": f"{tmp_path}/blank.parquet"})
    assert not any((tmp_path / "x").iterdir())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -e '.[data]'" in command(capsys, **keys)


def test_unfinished_folder_is_protected(corpus, tmp_path):
    def read(source):
        yield from (f"{i} " * 20_000 for i in range(20))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("u", ["s"], read, tmp_path, "bytes", workers=1, **SETTINGS)
    before = contents(tmp_path / "u/bytes.partial")
    for change in ({"val_fraction": 0.2}, {"limit": 5}, {"shard_tokens": 7}):
        with pytest.raises(UserError, match=f"begun with another {next(iter(change))}"):
            prepare("u", ["s"], read, tmp_path, "bytes", workers=1, **{**SETTINGS, **change})
    with pytest.raises(UserError, match="begun with another sources"):
        prepare("u", ["t"], read, tmp_path, "bytes", workers=1, **SETTINGS)
    assert contents(tmp_path / "u/bytes.partial") == before
    os.truncate(tmp_path / "u/bytes.partial/train_000000.bin", 100)
    with pytest.raises(UserError, match="shorter than when it was written"):
        prepare("u", ["s"], read, tmp_path, "bytes", workers=1, **SETTINGS)


def test_command_line(corpus, reference, tmp_path):
    """As a person runs it: a prepared folder is left alone, and a hub out of reach is told, with no traceback."""

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments, f"--data_dir={tmp_path}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
        )

    arguments = f"--files={corpus[0]}", "--name=mix", "--val_fraction=0.1", "--tokenizer=bytes", "--workers=1"
    assert python(ROOT / "data/text.py", *arguments).returncode == 0
    before = contents(tmp_path / "mix/bytes")
    again, typo = (python("-m", "nanopause", "prepare", *more) for more in (arguments, ["--limits=3"]))
    offline = python(ROOT / "data/openwebtext.py")
    assert contents(tmp_path / "mix/bytes") == before
    assert "is already prepared" in again.stderr and "cannot reach hf://datasets/Skylion007" in offline.stderr
    assert "limit" in typo.stderr
    for result in (again, offline, typo):
        assert result.returncode != 0 and "Traceback" not in result.stderr


def test_pydocs_hold_out_nothing_that_is_trained_on(tmp_path, monkeypatch):
    def no_network(*_):
        raise AssertionError("pydocs reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    folder = pydocs.prepare_pydocs("bytes", str(tmp_path))
    assert folder == tmp_path / "pydocs/bytes"
    train, val = ("\n\n".join(read_documents(folder, split)) for split in ("train", "val"))
    assert len(train) > 1_500_000 and 40_000 < len(val) < 0.2 * len(train)

    def paragraphs(text):
        normal = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        return {paragraph for paragraph in normal if len(paragraph) >= 40}

    def shingles(text):
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]

    assert not paragraphs(train) & paragraphs(val)
    known = set(shingles(train))
    repeated = np.mean([shingle in known for shingle in shingles(val)])
    assert repeated < 0.02  # without leaving paragraphs out: 0.12


def test_two_tokenizers_of_one_name_share_no_corpus(corpus, tmp_path):
    """Neither to be read nor to go on from; a folder named as one of ours has another name."""
    folders = [tmp_path / name / "mine" for name in "ab"]
    for folder in folders:
        load_tokenizer("bytes").of_transformers().save_pretrained(folder)
    file = folders[1] / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": 97,', '"a": 98,').replace('"b": 98,', '"b": 97,'))
    ids = [load_tokenizer(str(folder)) for folder in folders]
    assert ids[0].encode("ab") == ids[1].encode("ba") and ids[0].name == ids[1].name == "mine"
    made = prepare_files(corpus, tmp_path, str(folders[0]), workers=2)
    assert contents(made) == contents(prepare_files(corpus, tmp_path / "alone", str(folders[0]), workers=1))
    Corpus(made, "train", ids[0], 32)
    with pytest.raises(UserError, match="with another tokenizer of the name 'mine': delete it and prepare it again"):
        Corpus(made, "train", ids[1], 32)
    made.rename(made.with_name("mine.partial"))
    with pytest.raises(UserError, match="begun with another tokenizer_sha256"):
        prepare_files(corpus, tmp_path, str(folders[1]))
    for name in ("bytes", "gpt2"):
        load_tokenizer(name).of_transformers().save_pretrained(tmp_path / name)
        assert load_tokenizer(str(tmp_path / name)).name == f"{name}-pretrained"


def test_a_tokenizer_that_changes_on_disk_is_read_again(tmp_path):
    for name in ("bytes", "gpt2"):
        load_tokenizer(name).of_transformers().save_pretrained(tmp_path / "mine")
        assert load_tokenizer(str(tmp_path / "mine")).pause_id == load_tokenizer(name).pause_id
