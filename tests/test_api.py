"""nanopause.load: every kind of source, prompt and pauses."""

import json

import gguf
import pytest
from test_hub import byte_tokenizer, original
from test_sample import save_run

import nanopause
from nanopause.errors import UserError
from nanopause.hub import export
from nanopause.policy import BelowConfidence

SHORT = dict(max_new_tokens=5, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformers folder whose model knows nothing of pauses."""
    folder = tmp_path_factory.mktemp("theirs")
    original("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """A run that was finetuned with 3 pauses."""
    run = tmp_path_factory.mktemp("finetuned")
    save_run(run, "--task=parity_4", "--pauses=3", "--attention=causal")
    return run


def write_gguf(path, theirs):
    """A llama in a GGUF file, as llama.cpp's converter writes it."""
    config, tokenizer = theirs.config, byte_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_scores([0.0] * config.vocab_size)  # transformers reads merges, or else makes them of scores
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in theirs.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs rotary entries differently
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_source_is_loaded(folder, finetuned, tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "model.gguf", original("llama"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    (tmp_path / "run").symlink_to(finetuned)
    texts = {}
    for source in (folder, str(folder), "user/model", tmp_path / "model.gguf"):
        texts[str(source)] = nanopause.load(source, device="cpu").generate("Return a", **SHORT).text
    assert len(set(texts.values())) == 1, texts
    assert "model.gguf: transformers reads GGUF slowly" in capsys.readouterr().err
    runs = [nanopause.load(source).generate("a", **SHORT) for source in (finetuned, finetuned / "step_00000001",
                                                                         str(finetuned))]  # fmt: skip
    assert len({one.text for one in runs}) == 1 and all(one.pauses == 3 for one in runs)
    with pytest.raises(UserError, match="nowhere holds no checkpoint"):
        nanopause.load(tmp_path / "nowhere")


def test_prompts_and_pauses(finetuned, capsys):
    model = nanopause.load(finetuned)
    one = model.generate("ab", **SHORT)
    assert f"{one}" == one.text and len(one.text) == 5
    assert one.pauses == one.tokens[0].pauses == 3 and one.logprobs == [token.logprob for token in one.tokens]
    ids = list(b"ab")
    for prompts in (["ab", "ab"], [ids, "ab"], ("ab", ids)):
        assert [each.ids for each in model.generate(prompts, **SHORT)] == [one.ids, one.ids]
    assert model.generate(ids, **SHORT).ids == one.ids and model.generate([], **SHORT) == []
    assert model.generate("ab", pauses=0, **SHORT).pauses == 0
    assert [token.pauses for token in model.generate("ab", BelowConfidence(1.0, 2), **SHORT).tokens] == [2] * 5
    assert model.generate(["ab"] * 3, until=["zz"], batch_size=2, **SHORT)[2].ids == one.ids
    assert capsys.readouterr().err == ""
    for options, text in (
        (dict(pauses=-1), "pauses=-1"),
        (dict(max_new_tokens="5"), "max_new_tokens='5' must be a whole number"),
        (dict(batch_size=0), "batch_size=0 must be 1"),
        (dict(prompts=5), "prompts=5 must be a text, token ids or a list of them"),
        (dict(prompts=["a", None]), "prompt 1 is neither a text nor a list of token ids: None"),
    ):
        with pytest.raises(UserError, match=text):
            model.generate(**dict(prompts="ab") | options)


def test_a_model_that_does_not_know_pauses_warns(folder, tmp_path, capsys):
    model = nanopause.load(folder)
    assert not model.knows_pauses and model.generate("a", **SHORT).pauses == 0 and not capsys.readouterr().err
    for _ in range(2):
        model.generate("a", pauses=3, **SHORT)
    assert capsys.readouterr().err.count(f"warning: {folder} was never trained with pauses") == 1
    assert not nanopause.load(export(folder, tmp_path / "out")).knows_pauses, "its tokenizer has a pause since"


def test_an_export_keeps_what_is_known_of_pauses(finetuned, tmp_path):
    exported = nanopause.load(export(finetuned, tmp_path / "out"))
    assert exported.knows_pauses and exported.pauses == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["knows_pauses"], config["pauses"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    exported = nanopause.load(tmp_path / "out")
    assert exported.knows_pauses and exported.pauses == 0, "a model whose tokenizer has a pause is trusted"
