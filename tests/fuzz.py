"""Mutated real files of every format that is read: the result is right, or one sentence.

    python tests/fuzz.py                       # all formats, half a minute each
    python tests/fuzz.py parquet gguf --n=2000

A fault is any exception but UserError and OSError, more than 10 seconds, more than 2 GB, a dead process, or a file that
is changed. Faulty mutants are kept in out/fuzz/, to become tests.
"""

import argparse
import contextlib
import gzip
import io
import json
import lzma
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from nanopause import checkpoint, hub  # noqa: E402
from nanopause.config import Config, load_config  # noqa: E402
from nanopause.data import Corpus  # noqa: E402
from nanopause.errors import UserError  # noqa: E402
from nanopause.model import GPT  # noqa: E402
from nanopause.prepare import prepare  # noqa: E402
from nanopause.scripts.data import text as texts  # noqa: E402
from nanopause.tasks import get_task, load  # noqa: E402
from nanopause.tokenizer import load_tokenizer  # noqa: E402

SECONDS, BYTES = 10, 2 << 30
WORDS = "a pause gives the model room to think before it has to emit the next word of its answer, 42 × naïve".split()
EXTREMES = [b"-1", b"0", b"2147483648", b"9223372036854775808", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"true"]


class Format(NamedTuple):
    """make: writes real files to a folder and returns the one to mutate. read: reads the folder's files."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def documents(n: int = 30) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def config_file(folder: Path) -> Path:
    return Path(shutil.copy(ROOT / "config/pause_130m.py", folder / "config.py"))


def corpus(name: str) -> Format:
    def make(folder: Path) -> Path:
        with contextlib.redirect_stdout(io.StringIO()):
            made = prepare("tiny", [""], lambda _: documents(), folder, "bytes", val_fraction=0.3, workers=1)
        return next(made.glob(name))

    def read(folder: Path) -> None:
        tokenizer = load_tokenizer("bytes")
        for split in ("train", "val"):
            blocks = Corpus(folder / "tiny/bytes", split, tokenizer, 32)
            for i in range(len(blocks)):
                blocks[i]

    return Format(make, read)


def text(name: str, encode: Callable[[bytes], bytes]) -> Format:
    def make(folder: Path) -> Path:
        rows = "\n<|endoftext|>\n".join(documents())
        if "jsonl" in name:
            rows = "\n".join(json.dumps({"text": document}) for document in documents())
        (folder / name).write_bytes(encode(rows.encode()))
        return folder / name

    return Format(make, lambda folder: list(texts.read(texts.find(str(folder / name))[0])))


def parquet_file(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": documents(), "id": list(range(30))})
    pq.write_table(table, folder / "rows.parquet", row_group_size=10)
    return folder / "rows.parquet"


def task_file(folder: Path) -> Path:
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(20)]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "gsm8k_test.jsonl"


def run_file(name: str) -> Format:
    def make(folder: Path) -> Path:
        config = Config(n_layer=1, n_head=1, n_embd=16, block_size=16)
        model = GPT(config.gpt(load_tokenizer("bytes").vocab_size))
        checkpoint.save(folder, 3, model, [], config, knows_pauses=True)
        return next(folder.glob(f"step_*/{name}"))

    return Format(make, lambda folder: checkpoint.load(folder, torch.device("cpu")))


def exported(name: str) -> Format:
    """A transformers folder, of the byte tokenizer of a run."""

    def make(folder: Path) -> Path:
        run_file("model.safetensors").make(folder / "run")
        with contextlib.redirect_stdout(io.StringIO()):
            hub.export(folder / "run", folder / "exported")
        shutil.rmtree(folder / "run")
        return folder / "exported" / name

    return Format(make, lambda folder: hub.load_pretrained(folder / "exported"))


def gguf_file(folder: Path) -> Path:
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(32), writer.add_embedding_length(32), writer.add_block_count(1)
    writer.add_feed_forward_length(64), writer.add_head_count(2), writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(16), writer.add_vocab_size(300)
    tokens = [chr(0x100 + i) for i in range(300)]
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(tokens), writer.add_token_types([1] * 300)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"]), writer.add_eos_token_id(1), writer.add_bos_token_id(2)
    shapes = {"token_embd": (300, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
              "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
              "blk.0.attn_output": (32, 32),
              "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return folder / "model.gguf"


def yaml_file(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i}?", "a": str(i)}) + "\n" for i in range(3)))
    (folder / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder}/rows.jsonl\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ngeneration_kwargs:\n  until: ['\\n']\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder / "mine.yaml"


def read_yaml(folder: Path) -> object:
    from nanopause.evaluation import harness_tasks

    return harness_tasks(["mine"], str(folder))


FORMATS = {
    "config": Format(config_file, lambda folder: load_config([str(folder / "config.py")])),
    "meta": corpus("meta.json"),
    "shard": corpus("train_*.bin"),
    "txt": text("mine.txt", bytes),
    "txt.xz": text("mine.txt.xz", lzma.compress),
    "jsonl": text("mine.jsonl", bytes),
    "jsonl.gz": text("mine.jsonl.gz", gzip.compress),
    "parquet": Format(parquet_file, lambda folder: list(texts.read(str(folder / "rows.parquet")))),
    "task": Format(task_file, lambda folder: load(get_task("gsm8k"), "test", str(folder))),
    "checkpoint": run_file("checkpoint.json"),
    "safetensors": run_file("model.safetensors"),
    "transformers config": exported("config.json"),
    "transformers weights": exported("model.safetensors"),
    "tokenizer": exported("tokenizer.json"),
    "gguf": Format(gguf_file, lambda folder: hub.load_pretrained(folder / "model.gguf")),
    "harness": Format(yaml_file, read_yaml),
}


# ---------------------------------------------------------------------------------------------------------------------
# Mutation


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits, spans, lengths, numbers, or words that trade places. Half of them near the beginning,
    where headers are."""
    for _ in range(rng.randint(1, 3)):
        size = len(data)
        i = rng.randrange(min(size, 256) if rng.random() < 0.5 else size) if size else 0
        j = min(size, i + rng.choice([1, 2, 8, 64, 1024]))
        words = [match.span() for match in re.finditer(rb'-?\d+|\w+|"[^"]*"', data[:4096])]
        kind = rng.randrange(8)
        if kind == 0 and size:
            data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
        elif kind == 1:
            data = data[:i] + data[j:]
        elif kind == 2:
            data = data[:i] + data[i:j] * rng.choice([2, 3, 100]) + data[j:]
        elif kind == 3:
            data = data[:i] + rng.randbytes(rng.choice([1, 4, 8])) + data[j:]
        elif kind == 4:
            data = data[:i]
        elif kind == 5 and words:
            start, stop = rng.choice(words)
            data = data[:start] + rng.choice(EXTREMES) + data[stop:]
        elif kind == 6 and words:
            (start, stop), (other, end) = rng.choice(words), rng.choice(words)
            data = data[:start] + data[other:end] + data[stop:]
        else:
            data = data[:i] + rng.choice([b"\0", b"\xff" * 8, b"\n", b"\xef\xbb\xbf", b"\xed\xa0\x80"]) + data[i:]
    return data


def outcome(read: Callable[[Path], object], folder: Path) -> str:
    """ "read", "refused", or the fault."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(folder)
        return "read"
    except TimeoutError as error:
        return str(error)
    except (UserError, OSError, SystemExit):
        return "refused"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if str(ROOT / "nanopause") in frame.filename] or where
        return f"{type(error).__name__}: {str(error)[:100]!r} in {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    finally:
        signal.alarm(0)


def work(name: str, first: int, last: int, connection) -> None:
    """Send (i, outcome) for mutants first … last − 1, in a process that may die."""
    form, names = FORMATS[name], lambda folder: {str(p): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target = form.make(folder)
        data = target.read_bytes()
        form.read(folder)  # imports, before memory is limited
        used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        for i in range(first, last):
            target.write_bytes(mutate(data, random.Random(f"{name}-{i}")))
            before = names(folder)
            result = outcome(form.read, folder)
            if names(folder) != before:
                result = "files have changed"
            connection.send((i, result))
            if result not in ("read", "refused"):
                kept = ROOT / "out/fuzz" / name / f"{i}_{target.name}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(target, kept)


def fuzz(name: str, n: int, seconds: float) -> dict[str, list[int]]:
    """Mutants by outcome, until n are tried or the time is over."""
    outcomes, i, end = {}, 0, time.monotonic() + seconds
    while i < n and time.monotonic() < end:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=work, args=(name, i, min(n, i + 200), theirs))
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while True:
                i, result = ours.recv()
                outcomes.setdefault(result, []).append(i)
                i += 1
        process.join()
        if process.exitcode:
            outcomes.setdefault(f"the process died ({process.exitcode})", []).append(i)
            i += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=list(FORMATS), help=", ".join(FORMATS))
    parser.add_argument("--n", type=int, default=10**9, help="mutants of each format")
    parser.add_argument("--seconds", type=float, help="for each format; default: 30, or as long as --n takes")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (30 if arguments.n == 10**9 else 1e9)
    n_faults = 0
    for name in arguments.formats:
        outcomes = fuzz(name, arguments.n, seconds)
        counts = {key: len(mutants) for key, mutants in outcomes.items()}
        n_read, n_refused = counts.pop("read", 0), counts.pop("refused", 0)
        n_faults += sum(counts.values())
        print(f"{name}: {n_read + n_refused + sum(counts.values())} mutants, {n_read} read, {n_refused} refused, "
              f"{sum(counts.values())} faults", flush=True)  # fmt: skip
        for fault, count in counts.items():
            print(f"    {count} × {fault}, first: {outcomes[fault][0]}", flush=True)
    sys.exit(n_faults > 0)


if __name__ == "__main__":
    main()
