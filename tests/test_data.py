"""The batch of a step is a pure function of (seed, step, rank); an epoch shows every block once."""

import json
import shutil

import numpy as np
import pytest
import torch

from nanopause.data import Batch, Corpus, Insertion, TrainingBatches, prefetch, validation_batches
from nanopause.errors import UserError
from nanopause.pauses import IGNORE
from nanopause.prepare import prepare
from nanopause.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
T = 32


@pytest.fixture(scope="module")
def corpus(tiny_corpus):
    return Corpus(tiny_corpus / "bytes", "train", BYTES, T)


def batches(corpus, batch_size=8, pause_rate=0.0, seed=1, rank=0, n_ranks=1):
    return TrainingBatches(corpus, batch_size, Insertion("random", rate=pause_rate), seed, rank, n_ranks)


def test_blocks_cover_the_shards(corpus):
    assert len(corpus.shards) > 1
    at = 0
    for shard in corpus.shards:
        for start in range(0, len(shard) - T, T):
            np.testing.assert_array_equal(corpus[at], shard[start : start + T + 1])
            at += 1
    assert at == len(corpus)


def test_hash_is_of_both_splits(corpus, tiny_corpus, tmp_path):
    def prepared(name, n):
        documents = [f"{i} " * 50 for i in range(n)]
        folder = prepare(name, ["s"], lambda _: documents, tmp_path, "bytes", val_fraction=0.1, workers=1)
        hashes = {Corpus(folder, split, BYTES, T).sha256 for split in ("train", "val")}
        assert len(hashes) == 1
        return hashes

    assert prepared("a", 60) == prepared("b", 60) != prepared("c", 61)


def test_an_epoch_shows_every_block_once_in_another_order_each_time(corpus):
    B = 8
    n = len(corpus)
    made = batches(corpus, B)
    rows = [tuple(row.tolist()) for step in range(3 * n // B + 1) for row in made[step].inputs]
    blocks = sorted(tuple(corpus[i][:-1].tolist()) for i in range(n))
    epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == blocks for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != blocks


@pytest.mark.parametrize("pause_rate", [0.0, 0.1])
def test_a_step_is_a_pure_function_of_seed_step_and_rank(corpus, pause_rate):
    one, again = batches(corpus, 8, pause_rate), batches(corpus, 8, pause_rate)
    for step in (5, 0, 1000, 5):
        shares = [batches(corpus, 8, pause_rate, rank=rank, n_ranks=4)[step] for rank in range(4)]
        for key in ("inputs", "targets"):
            assert torch.equal(getattr(one[step], key), getattr(again[step], key))
            assert torch.equal(getattr(one[step], key), torch.cat([getattr(share, key) for share in shares]))
        assert one[step].n_live == sum(share.n_live for share in shares)
    assert not torch.equal(one[0].inputs, one[1].inputs)
    assert not torch.equal(one[0].inputs, batches(corpus, 8, pause_rate, seed=2)[0].inputs)


def test_targets_are_the_next_tokens(corpus):
    batch = batches(corpus)[3]
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.n_live == batch.targets.numel() and batch.n_pauses == 0


def test_pauses_are_inserted_trimmed_and_never_a_target(corpus):
    with_pauses, without = batches(corpus, 8, 0.25)[3], batches(corpus, 8)[3]
    text = torch.cat((without.inputs, without.targets[:, -1:]), 1)
    for row, targets, original in zip(with_pauses.inputs, with_pauses.targets, text):
        kept = row[row != BYTES.pause_id]
        assert torch.equal(kept, original[: len(kept)]) and len(row) == T
        following = torch.cat((row[1:], torch.full((1,), -1)))
        assert torch.equal(targets[:-1] == IGNORE, following[:-1] == BYTES.pause_id)
        assert torch.equal(targets[:-1][targets[:-1] != IGNORE], following[:-1][targets[:-1] != IGNORE])
        assert BYTES.pause_id not in targets
    assert with_pauses.n_live == (with_pauses.targets != IGNORE).sum()
    assert with_pauses.n_pauses == (with_pauses.inputs == BYTES.pause_id).sum() > 0


def test_pauses_fall_elsewhere_in_every_row_and_epoch(corpus):
    made = batches(corpus, len(corpus), 0.3)
    places = [tuple((row == BYTES.pause_id).nonzero()[:, 0].tolist()) for step in (0, 1) for row in made[step].inputs]
    assert len(set(places)) > 0.95 * len(places)


def test_validation_is_always_the_same_and_shared_out(tiny_corpus):
    held_out = Corpus(tiny_corpus / "bytes", "val", BYTES, T)
    whole = list(validation_batches(held_out, 10, 4, Insertion("random", rate=0.1), 1, 0, 1))
    assert [len(batch.inputs) for batch in whole] == [4, 4, 2]
    of_rank = [validation_batches(held_out, 10, 4, Insertion("random", rate=0.1), 1, rank, 3) for rank in range(3)]
    shares = [torch.cat([batch.inputs for batch in batches]) for batches in of_rank]
    rows = lambda x: sorted(map(tuple, x.tolist()))  # noqa: E731
    assert rows(torch.cat([b.inputs for b in whole])) == rows(torch.cat(shares))
    assert sum(len(b.inputs) for b in validation_batches(held_out, 10**6, 4, Insertion(), 1, 0, 1)) == len(held_out)


def test_prefetch_is_the_same_batches_and_passes_errors_on(corpus):
    made = batches(corpus)
    for step, batch in zip(range(3, 7), prefetch(made, 3, 7, torch.device("cpu"))):
        assert torch.equal(batch.inputs, made[step].inputs)
    assert list(prefetch(made, 3, 3, torch.device("cpu"))) == []
    broken = batches(corpus, rank=0)
    broken.corpus = None
    with pytest.raises(TypeError):
        next(prefetch(broken, 0, 2, torch.device("cpu")))


def damaged(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus / "bytes", tmp_path / "bytes")
    return tmp_path / "bytes"


def test_a_truncated_shard_is_named(tiny_corpus, tmp_path):
    folder = damaged(tiny_corpus, tmp_path)
    with open(folder / "train_000001.bin", "r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(UserError, match=r"train_000001.bin is truncated .* prepare it again"):
        Corpus(folder, "train", BYTES, T)


@pytest.mark.parametrize("text", ["[]", "{", '{"tokenizer": "bytes"}'])
def test_a_damaged_meta_json_is_named(tiny_corpus, tmp_path, text):
    folder = damaged(tiny_corpus, tmp_path)
    (folder / "meta.json").write_text(text)
    with pytest.raises(UserError, match="meta.json is damaged: delete"):
        Corpus(folder, "train", BYTES, T)


def test_a_missing_corpus_and_another_tokenizer_are_named(tiny_corpus, tmp_path):
    with pytest.raises(UserError, match="has no meta.json: prepare"):
        Corpus(tmp_path, "train", BYTES, T)
    with pytest.raises(UserError, match="prepared with the tokenizer 'gpt2', not 'bytes'"):
        Corpus(tiny_corpus / "gpt2", "train", BYTES, T)
    with pytest.raises(UserError, match="shorter than one block of 100000 tokens: lower --block_size"):
        Corpus(tiny_corpus / "bytes", "train", BYTES, 100_000)


def test_a_shard_of_another_tokenizer_is_found_by_its_ids(tiny_corpus, tmp_path):
    folder = damaged(tiny_corpus, tmp_path)
    meta = json.loads((tiny_corpus / "gpt2" / "meta.json").read_text())
    for shard in meta["splits"]["train"]["shards"]:
        shutil.copy(tiny_corpus / "gpt2" / shard["file"], folder)
    del meta["tokenizer_sha256"]  # as in those prepared before there was one
    (folder / "meta.json").write_text(json.dumps(meta | {"tokenizer": "bytes"}))
    with pytest.raises(UserError, match="which the tokenizer 'bytes' does not have: prepare it again"):
        batches(Corpus(folder, "train", BYTES, T))[0]


def test_micro_batches_have_their_rows_of_every_field():
    batch = Batch(*(torch.arange(12).view(4, 3) + k for k in (0, 1)), n_live=12, n_pauses=0,
                  layout={"lo": torch.arange(12).view(4, 3).int()})  # fmt: skip
    for i, part in enumerate(batch.split(3)):
        for x in (part.inputs, part.targets - 1, part.layout["lo"]):
            assert x.tolist() == batch.inputs[3 * i : 3 * i + 3].tolist()
