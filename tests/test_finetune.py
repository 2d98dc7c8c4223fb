"""Finetuning: encoding, packing, epochs and ranks, frozen parameters, checkpoints, train.py on real files."""

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from conftest import ROOT
from safetensors.numpy import load_file
from test_train import TORCHRUN, losses_differ, rows, sentence, weights

from nanopause import checkpoint, hub
from nanopause.config import Config, load_config
from nanopause.data import evenly
from nanopause.engine import Engine
from nanopause.errors import UserError
from nanopause.finetune import (
    Pair,
    TaskBatches,
    continuation,
    encode,
    load_pairs,
    n_generated,
    pack,
    task_validation_batches,
)
from nanopause.model import GPT, GPTConfig
from nanopause.optimizer import make_optimizers, set_learning_rates, set_trainable
from nanopause.pauses import IGNORE
from nanopause.tasks import Example, get_task
from nanopause.tokenizer import PretrainedTokenizer, Tokenizer, load_tokenizer

REAL = Path(os.environ.get("NANOPAUSE_DATA", ROOT.parent / "shared/data")) / "tasks"
BYTES = load_tokenizer("bytes")
P, E = BYTES.pause_id, BYTES.eot_id
CPU = torch.device("cpu")
SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=128", "--batch_size=4", "--eval_interval=5",
         "--eval_blocks=8", "--log_interval=1", "--device=cpu", "--optimizer=adamw", "--learning_rate=0.003",
         "--warmup_steps=0"]  # fmt: skip
SMALL_GPT = GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=64, zero_init=False)


def example(prefix, target):
    return Example(prefix, target, (target,))


def sums(n, seed=0):
    """n distinct examples such as "3+4=" and " 7"."""
    rng = np.random.default_rng(seed)
    return [example(f"{a}+{b}=", f" {a + b}") for a, b in (divmod(int(i), 97) for i in rng.permutation(97 * 97)[:n])]


def pairs_of(examples, pauses=0, position="append", block_size=64):
    return [encode(example, BYTES, block_size, pauses, position) for example in examples]


# Encoding and packing


I = IGNORE  # noqa: E741
# The pairs "abc", " d" and "e", " f" by hand: inputs, targets and hi by variant.
a, b, c, d, e, f, s = b"abcdef "
VARIANTS = {
    ("append", 0, "causal"): (
        [a, b, c, s, d, e, s, f],
        [I, I, s, d, E, s, f, E],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ),
    ("append", 0, "prefix"): (
        [a, b, c, s, d, e, s, f],
        [I, I, s, d, E, s, f, E],
        [3, 3, 3, 4, 5, 6, 7, 8],
    ),
    ("append", 2, "causal"): (
        [a, b, c, P, P, s, d, e, P, P, s, f],
        [I, I, I, I, s, d, E, I, I, s, f, E],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    ),
    ("append", 2, "prefix"): (
        [a, b, c, P, P, s, d, e, P, P, s, f],
        [I, I, I, I, s, d, E, I, I, s, f, E],
        [5, 5, 5, 5, 5, 6, 7, 10, 10, 10, 11, 12],
    ),
    ("prepend", 2, "causal"): (
        [P, P, a, b, c, s, d, P, P, e, s, f],
        [I, I, I, I, s, d, E, I, I, s, f, E],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    ),
    ("prepend", 2, "prefix"): (
        [P, P, a, b, c, s, d, P, P, e, s, f],
        [I, I, I, I, s, d, E, I, I, s, f, E],
        [5, 5, 5, 5, 5, 6, 7, 10, 10, 10, 11, 12],
    ),
}
VARIANTS |= {("prepend", 0, attention): VARIANTS["append", 0, attention] for attention in ("causal", "prefix")}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_pairs_by_hand(variant):
    position, pauses, attention = variant
    inputs, targets, hi = VARIANTS[variant]
    first = 5 + pauses
    batch = pack(pairs_of([example("abc", " d"), example("e", " f")], pauses, position), P, attention)
    assert batch.inputs.tolist() == [inputs] and batch.targets.tolist() == [targets]
    assert batch.layout["positions"].tolist() == [[*range(first), *range(3 + pauses)]]
    assert batch.layout["lo"].tolist() == [[0] * first + [first] * (3 + pauses)]
    assert batch.layout["hi"].tolist() == [hi]
    assert batch.layout["lo"].dtype == batch.layout["hi"].dtype == torch.int32
    assert (batch.n_live, batch.n_pauses, batch.ends) == (6, 2 * pauses, (first, len(inputs)))
    assert batch.lengths.tolist() == [first, 3 + pauses]


def test_cut_prefix_keeps_its_bos():
    class WithBos(type(BYTES)):
        bos_id = 7

    tokenizer = WithBos("bytes", r"[\s\S]", {bytes([i]): i for i in range(256)})
    long = example("0123456789", " ab")
    # 1 + 10 + 2 + 3 + 1 tokens, of which 14 fit
    for cut, kept in (("left", b"3456789"), ("right", b"0123456")):
        pair = encode(long, tokenizer, 14, 2, "append", cut)
        assert pair.tokens.tolist() == [7, *kept, P, P, *b" ab", E]
        assert (pair.n_prefix, pair.n_cut, len(pair.tokens)) == (10, 3, 14)
        assert pair.prompt == [7, *kept, P, P]
        assert encode(long, tokenizer, 14, 2, "prepend", cut).prompt == [7, P, P, *kept]
    assert encode(long, tokenizer, 17, 2).n_cut == 0 and encode(long, tokenizer, 16, 2).n_cut == 1
    assert encode(long, tokenizer, 8, 2).prompt == [7, *b"9", P, P]
    assert encode(long, tokenizer, 7, 2) is None


def test_batch_splits_between_pairs_and_padding_is_masked():
    pairs = pairs_of(sums(7), 2)
    whole = pack(pairs, P, "prefix")
    parts = list(whole.split(3))
    assert [len(part.ends) for part in parts] == [3, 3, 1]
    for part, own in zip(parts, (pairs[:3], pairs[3:6], pairs[6:])):
        alone = pack(own, P, "prefix")
        assert torch.equal(part.inputs, alone.inputs) and torch.equal(part.targets, alone.targets)
        assert part.ends == alone.ends and all(torch.equal(part.layout[k], alone.layout[k]) for k in alone.layout)
    n, padded = whole.inputs.shape[1], whole.padded(64)
    assert padded.inputs.shape[1] % 64 == 0 and padded.targets[:, n:].eq(IGNORE).all()
    assert padded.layout["lo"][:, n:].eq(n).all() and padded.layout["hi"][:, n:].eq(n).all()
    model = GPT(SMALL_GPT).double()
    losses = [model(batch.inputs, batch.targets, **batch.layout).item() for batch in (whole, padded)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_accuracy_equals_greedy_decoding(attention):
    """Targets that the engine generates are counted; targets that differ in one token are not."""
    torch.manual_seed(0)
    model = GPT(SMALL_GPT).eval()
    prompts = [pair.prompt for pair in pairs_of(sums(6), 3)]
    texts = Engine(model, BYTES, max_batch=6).generate(prompts, max_new_tokens=4, temperature=0, attention=attention)
    targets = [[token.id for token in text.tokens] for text in texts]
    for i in (1, 4):
        targets[i][-1 if i == 1 else 0] ^= 1
    pairs = [Pair(np.array(prompt + target), len(prompt)) for prompt, target in zip(prompts, targets)]
    batch = pack(pairs, P, attention)
    for variant in (batch, batch.padded(64)):
        x = model.hidden(variant.inputs, **variant.layout).flatten(0, 1)
        assert n_generated(model.head, x, variant.targets.flatten(), variant.ends) == 4


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_packed_batch_equals_separate_examples(attention, position):
    """Loss and gradients in float64."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL_GPT, position=position)).double()
    pairs = pairs_of([*sums(5), example("a longer question, asked at length", " and answered")], 3)
    batch = pack(pairs, P, attention)

    def gradients(parts):
        model.zero_grad()
        loss = sum(model(*part, reduction="sum", **layout) for *part, layout in parts) / batch.n_live
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    alone = []
    for pair in pairs:
        tokens = torch.from_numpy(pair.tokens)[None]
        targets = tokens[:, 1:].clone()
        targets[:, : pair.n_prefix - 1] = IGNORE
        hi = torch.arange(1, tokens.shape[1])
        hi = hi.clamp(min=pair.n_prefix) if attention == "prefix" else hi
        alone.append((tokens[:, :-1], targets, {"lo": torch.zeros_like(hi)[None].int(), "hi": hi[None].int()}))
    loss, expected = gradients(alone)
    packed_loss, got = gradients([(batch.inputs, batch.targets, batch.layout)])
    assert packed_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


def test_targets_are_tokenized_with_their_prefix():
    """With a tokenizer that prepends a space to every text, as Llama's does."""
    pytest.importorskip("transformers")
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "▁", "▁q", ":", "▁a", "b"])}
    made = Tokenizer(models.BPE(words, [("▁", "q"), ("▁", "a")], unk_token="<unk>", ignore_merges=True)
                     if False else models.Unigram([(word, -1.0) for word in words], unk_id=2))  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    tokenizer = PretrainedTokenizer("words", transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))  # fmt: skip
    assert tokenizer.encode(" ab") == [words["▁"], words["▁a"], words["b"]]
    pair = encode(example("q:", " ab"), tokenizer, 64)
    assert pair.tokens.tolist() == [words[word] for word in ("▁q", ":", "▁a", "b", "</s>")]


def test_a_token_across_the_end_of_the_prefix_takes_nothing_of_the_target():
    longer = [b"ye", b"yes", b": ", b": yes", b"]\n"]
    ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(longer)}
    tokenizer = Tokenizer("merges", r"[\s\S]+", ranks)
    for prefix, target in (("A:", " yes"), ("[BEGIN]", "\ndef f"), ("A:", "yes")):
        assert tokenizer.decode(continuation(tokenizer, prefix, target)) == target
        pair = encode(example(prefix, target), tokenizer, 64)
        assert tokenizer.decode(pair.tokens[:-1].tolist()) == prefix + target
        assert tokenizer.decode(pair.prompt) == prefix


# Batches


def test_epoch_has_every_example_once_and_ranks_split_a_step():
    pairs = pairs_of(sums(30), 1)

    def made(rank=0, n_ranks=1, seed=5):
        return TaskBatches(pairs, 8, P, "causal", seed, rank, n_ranks)

    def documents(batch):
        return [row.tolist() for row in torch.tensor_split(batch.inputs[0], batch.ends[:-1])]

    seen = [document for step in range(15) for document in documents(made()[step])]
    every = sorted(pair.tokens[:-1].tolist() for pair in pairs)
    epochs = [seen[i * 30 : (i + 1) * 30] for i in range(4)]
    assert all(sorted(epoch) == every for epoch in epochs) and epochs[0] != epochs[1]
    for step in (3, 0, 11):
        shares = [documents(made(rank, 4)[step]) for rank in range(4)]
        assert sum(shares, []) == documents(made()[step]) and [len(share) for share in shares] == 4 * [2]
        assert documents(made(seed=6)[step]) != documents(made()[step])


def test_validation_is_spread_evenly_and_split_by_rank():
    pairs = pairs_of(sums(30), 1)
    assert evenly(4, 10) == [0, 2, 5, 7] and evenly(10, 4) == [0, 1, 2, 3]
    whole = list(task_validation_batches(pairs, 10, 4, P, "causal", 0, 1))
    assert [len(batch.ends) for batch in whole] == [4, 4, 2]
    shares = [batch for rank in range(3) for batch in task_validation_batches(pairs, 10, 4, P, "causal", rank, 3)]
    assert sum(batch.n_live for batch in shares) == sum(batch.n_live for batch in whole)


def write(folder, n=40, split="train", text=lambda i: (f"what is {i} and {2 * i}", f"it is\n#### {3 * i}")):
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / f"gsm8k_{split}.jsonl.gz", "wt") as file:
        for i in range(n):
            file.write(json.dumps(dict(zip(("question", "answer"), text(i)))) + "\n")
    return folder


def test_cut_and_excluded_examples_are_reported(tmp_path):
    def text(i):
        return ("q" * (500 if i % 10 == 0 else 20) + str(i), ("why " * (100 if i % 10 == 1 else 1)) + f"#### {i}")

    config = Config(task="gsm8k", data_dir=str(write(tmp_path, 100, text=text)), block_size=128, pauses=3)
    pairs, description = load_pairs(config, "train", BYTES)
    n_cut = sum(pair.n_cut > 0 for pair in pairs)
    assert max(len(pair.tokens) for pair in pairs) == 128 and 5 <= n_cut <= 10
    assert f"; {n_cut} prefixes are cut from the left to fit into 128 tokens; " in description
    assert "examples are left out because the target alone is too long" in description
    assert f"WARNING: only {len(pairs) - n_cut} of 95 examples are whole: raise --block_size" in description
    assert "WARNING" not in load_pairs(replace(config, block_size=1024), "train", BYTES)[1]
    with pytest.raises(UserError, match="fit into block_size=8 tokens: raise --block_size or lower --pauses"):
        load_pairs(replace(config, block_size=8), "train", BYTES)


def test_choice_tasks_train_on_the_correct_choice(tmp_path):
    row = {"goal": "open it", "sol1": "push the lid", "sol2": "eat it", "label": 1}
    (found,) = get_task("piqa").examples(row)
    pair = encode(found, BYTES, 128, 1)
    assert BYTES.decode(pair.tokens.tolist()).endswith("Answer:<|pause|> eat it<|endoftext|>")


# Frozen parameters and checkpoints


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trainable", ["pause", "embeddings"])
def test_frozen_parameters_do_not_change(trainable, tied):
    torch.manual_seed(0)
    model = GPT(replace(SMALL_GPT, tied=tied, position="learned"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"task": "gsm8k", "pauses": 2, "weight_decay": 0.1, "learning_rate": 0.01}
    config = Config(optimizer="adamw", trainable=trainable, **options)
    set_trainable(model, trainable, P)
    optimizers = make_optimizers(model, config)
    batch = pack(pairs_of(sums(8), 2), P, "causal")
    for _ in range(3):
        model(batch.inputs, batch.targets, **batch.layout).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if trainable == "pause":
        assert changed == {"token_embedding.weight"}
        rows = (model.token_embedding.weight != before["token_embedding.weight"]).any(1).nonzero()[:, 0]
        assert rows.tolist() == [P]
    else:
        assert changed == {"token_embedding.weight", "position_embedding.weight"}


def test_best_checkpoint_is_kept_and_loaded(tmp_path):
    model, config = GPT(SMALL_GPT), Config(n_layer=2, n_embd=32, n_head=2, block_size=64, zero_init=False)
    optimizers = make_optimizers(model, config)
    for step in range(1, 6):
        with torch.no_grad():
            model.norm.weight.fill_(step)
        checkpoint.save(tmp_path, step, model, optimizers, config, best=step == 2)
    assert sorted(path.name[-1] for path in tmp_path.glob("step_*")) == ["2", "4", "5"]
    for path, step in (("", 5), ("best", 2), ("latest", 5), ("step_00000004", 4)):
        loaded, tokenizer, state = hub.load(tmp_path / path)
        assert state["step"] == loaded.norm.weight[0] == step and tokenizer.name == "bytes"
    (tmp_path / "step_00000002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="step_00000002 is damaged .*: use another of"):
        hub.load(tmp_path / "best")
    (tmp_path / "best").unlink()
    with pytest.raises(UserError, match="has no best checkpoint, as only finetuning marks one"):
        hub.load(tmp_path / "best")


@pytest.mark.parametrize(
    "args, text",
    [
        (["--pauses=10"], "add --task=gsm8k"),
        (["--task=gsm8k", "--pause_rate=0.1"], "pause_rate=0.1 is for pretraining"),
        (["--block_size=0"], "add --init_from=out/pause"),
        (["--task=gsm8k", "--pauses=-1"], "pauses=-1 must be at least 0"),
        (["--task=gsm8k", "--trainable=pause"], "there are no pauses: add --pauses=10"),
    ],
)
def test_inconsistent_settings_are_refused(args, text):
    with pytest.raises(UserError, match=text):
        load_config(args)


def test_only_rope_is_extended_and_only_on_request():
    config = load_config(["--init_from=x", "--block_size=512"])
    assert config.shaped(GPTConfig(), BYTES).block_size == 512
    with pytest.raises(UserError, match="block_size=512 is more than the 256 tokens of x"):
        config.shaped(GPTConfig(position="learned"), BYTES)
    config.given = frozenset()  # by a config file
    with pytest.raises(UserError, match="block_size=512 is more than the 256 tokens of x"):
        config.shaped(GPTConfig(), BYTES)
    model, tokens = GPT(SMALL_GPT), torch.arange(100)[None]
    expected = model(tokens[:, :64])
    model.extend(100)
    assert torch.equal(model(tokens)[:, :64], expected)


# train.py


def finetune(train, out, *args, **options):
    return train(out, *SMALL, "--task=gsm8k", *args, **options)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tasks"))


def one_in_two_processes_and_in_parts(train, folder, *args):
    """Check that one process, two processes and micro-batches give the same run; returns the folder of the first."""
    finetune(train, folder / "one", *args)
    finetune(train, folder / "two", *args, launcher=TORCHRUN)
    finetune(train, folder / "parts", *args, "--micro_batch_size=3")
    for other in ("two", "parts"):
        assert losses_differ(folder / "one", folder / other) <= 1e-5
        for expected, row in zip(rows(folder / "one"), rows(folder / other)):
            assert all(row[key] == expected[key] for key in ("tokens", "pause_share"))
    return folder / "one"


def go_back(out):
    """Delete a run's last checkpoint, as if it was killed before, and return the step of the now newest one."""
    *_, before, last = sorted(out.glob("step_*"))
    shutil.rmtree(last)
    for name in ("latest", "best"):
        (out / name).write_text(before.name)
    return int(before.name[5:])


def test_two_processes_or_micro_batches_give_the_losses_of_one(train, data_dir, tmp_path):
    one_in_two_processes_and_in_parts(train, tmp_path, f"--data_dir={data_dir}", "--pauses=2", "--attention=prefix",
                                      "--max_steps=12")  # fmt: skip


def test_resume_is_bitwise_and_keeps_the_best(train, data_dir, tmp_path):
    args = (f"--data_dir={data_dir}", "--pauses=2", "--eval_interval=3", "--checkpoint_interval=4")
    finetune(train, tmp_path / "whole", *args, "--max_steps=20")
    finetune(train, tmp_path / "stopped", *args, "--max_steps=20", "--learning_rate=0.003", "--decay=linear")
    out = tmp_path / "stopped"
    step = go_back(out)
    ended = finetune(train, out, *args, "--max_steps=20", "--resume")
    assert f"from step {step}" in ended.stdout
    assert weights(out) == weights(tmp_path / "whole")
    same = lambda row: {key: row[key] for key in row if key not in ("tokens_per_second", "mfu")}  # noqa: E731
    assert list(map(same, rows(out))) == list(map(same, rows(tmp_path / "whole")))
    lowest = min((row for row in rows(out) if "val_loss" in row), key=lambda row: row["val_loss"])
    for run in ("whole", "stopped"):
        assert (tmp_path / run / "best").read_text() == f"step_{lowest['step']:08d}"
        assert hub.load(tmp_path / run / "best")[2]["step"] == lowest["step"]
    sentence(finetune(train, out, *args, "--pauses=3", "--resume", check=False), "was made with pauses=2, not 3")
    args = (f"--data_dir={write(tmp_path / 'other', 39)}", *args[1:])
    sentence(
        finetune(train, out, *args, "--max_steps=20", "--resume", check=False), "another version of the data of gsm8k"
    )


def test_new_pause_embedding_is_the_mean(train, data_dir, tmp_path):
    def pause_rows(folder):
        tensors = load_file(next((tmp_path / folder).glob("step_*")) / "model.safetensors")
        return {key: tensors[f"{key}.weight"] for key in ("token_embedding", "head")}

    train(tmp_path / "std", "--block_size=128", "--max_steps=3")
    train(tmp_path / "pre", "config/pause.py", "--block_size=128", "--max_steps=3")
    args = (f"--data_dir={data_dir}", "--max_steps=1", "--learning_rate=0", "--block_size=0")
    message = "was trained without pauses: the pause's embedding starts as the mean embedding"
    for folder, init, pauses, is_new in [
        ("std-pause", "std", 2, True),
        ("pre-std", "pre", 0, False),
        ("pre-std-pause", "pre-std", 2, False),
    ]:
        ended = finetune(train, tmp_path / folder, *args, f"--init_from={tmp_path / init}", f"--pauses={pauses}")
        assert (message in ended.stdout) == is_new, folder
        for name, table in pause_rows(folder).items():
            expected = table[:P].astype(np.float64).mean(0) if is_new else pause_rows(init)[name][P]
            np.testing.assert_allclose(table[P], expected, atol=1e-7)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_finetuning_on_a_task_file(train, data_dir, tmp_path, attention):
    out = tmp_path / "run"
    args = (f"--data_dir={data_dir}", "--pauses=10", f"--attention={attention}", "--trainable=all")
    ended = finetune(train, out, *args, "--max_steps=10", "--eval_interval=5")
    assert "gsm8k, train: " in ended.stdout and "data: gsm8k, validation: " in ended.stdout
    assert "appended to the prefix [Goyal et al. 2023, Algorithm 2]: 10 (pause_position append)" in ended.stdout
    assert f"attention {attention}" in ended.stdout
    last = rows(out)[-1]
    assert last["loss"] < rows(out)[0]["loss"] and last["tokens"] == sum_of_tokens(data_dir, 10, 10)
    assert 0.1 < last["pause_share"] < 0.3 and (out / "loss.png").exists() and (out / "best").exists()


def sum_of_tokens(data_dir, pauses, steps):
    config = Config(task="gsm8k", data_dir=str(data_dir), pauses=pauses, block_size=128)
    pairs, _ = load_pairs(config, "train", BYTES)
    batches = TaskBatches(pairs, 4, P, "causal", 1337, 0, 1)
    return sum(batches[step].inputs.numel() for step in range(steps))


@pytest.mark.parametrize(
    "line, args, text",
    [
        ('{"question": "how"}', [], "gsm8k_train.jsonl, line 1: the field 'answer' is missing; fix"),
        ("{", [], "gsm8k_train.jsonl, line 1: not JSON"),
        ("", [], "has no example for train"),
        ('{"question": "how", "answer": "so #### 1"}', ["--task=gsm9k"], "task 'gsm9k' is not known: did you mean"),
        ('{"question": "how", "answer": "so #### 1"}', ["--data_dir=nowhere"], "data_dir nowhere is not a folder"),
        ('{"question": "how", "answer": "so #### 1"}', ["--task=piqa"], "has no piqa_train.jsonl"),
    ],
)
def test_invalid_data_is_one_sentence(train, tmp_path, line, args, text):
    (tmp_path / "gsm8k_train.jsonl").write_text(line + "\n")
    ended = finetune(train, tmp_path / "run", f"--data_dir={tmp_path}", *args, check=False)
    sentence(ended, text)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}; NANOPAUSE_DATA names another folder")
@pytest.mark.parametrize("task", ["gsm8k", "squad", "hellaswag"])
def test_finetuning_and_evaluation_on_real_files(train, task, tmp_path):
    """Tasks with numbers, spans and choices: a few steps, the best checkpoint, scores. test_tasks.py reads the files of
    all tasks."""
    args = (f"--task={task}", f"--data_dir={REAL}", "--limit=64", "--pauses=10", "--attention=prefix")
    train(tmp_path / "run", *SMALL, *args, "--block_size=512", "--max_steps=4", "--eval_interval=2")
    args = (f"--tasks={task}", f"--data_dir={REAL}", "--limit=3", "--pauses=0,10", f"--results={tmp_path / 'results'}")
    ended = scripts.run("evaluate.py", f"--out_dir={tmp_path / 'run' / 'best'}", *args)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert [(row["task"], row["pauses"], row["n"]) for row in results] == [(task, 0, 3), (task, 10, 3)]
    for row in results:
        assert all(0 <= figure["value"] <= 1 for figure in row["metrics"].values())
        assert row["flops_per_example"] > 0 and row["seconds_per_example"] > 0


# Memorisation


@pytest.mark.parametrize("pauses, attention", [(10, "causal"), (10, "prefix")])
def test_memorised_examples_are_generated(pauses, attention):
    """32 examples in the form of CommonsenseQA, decoded greedily by the engine, which inserts the pauses."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    words = "river lamp paper stone bread cloud spoon field".split()
    examples = []
    for i in range(32):
        choices = rng.permutation(words)[:5].tolist()
        row = {"question": f"which {i}?", "choices": choices, "label": int(rng.integers(5))}
        examples += get_task("csqa").examples(row)
    pairs = [encode(example, BYTES, 128, pauses) for example in examples]
    model = GPT(GPTConfig(n_layer=2, n_embd=64, n_head=4, block_size=128))
    config = Config(learning_rate=0.01, max_steps=50, warmup_steps=0)
    optimizers = make_optimizers(model, config)
    batches = TaskBatches(pairs, 32, P, attention, 0, 0, 1)
    engine_options = {"max_new_tokens": 16, "temperature": 0.0, "attention": attention}
    for step in range(config.max_steps):
        set_learning_rates(optimizers, step, config)
        batch = batches[step]
        loss = model(batch.inputs, batch.targets, **batch.layout)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    engine = Engine(model.eval(), BYTES, max_batch=8)
    answers = engine.generate([example.prefix for example in examples], pauses, **engine_options)
    right = sum(answer.text == example.target for answer, example in zip(answers, examples))
    assert right == len(examples), f"{right} of {len(examples)}, loss {loss.item():.3f}"
    assert all(answer.end == "eot" for answer in answers)
