"""Placements: every one keeps the text and adds pauses alone; where each puts them."""

import numpy as np
import pytest

from nanopause.config import load_config
from nanopause.data import Insertion
from nanopause.errors import UserError
from nanopause.finetune import described
from nanopause.placement import CORPUS, TASK, Row
from nanopause.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
P = BYTES.pause_id
TEXT = "one two, three"


def row_of(n_prefix=0, **options):
    tokens = np.array([*BYTES.encode(TEXT), BYTES.eot_id])
    return Row(tokens, BYTES, np.random.default_rng(0), n_prefix, **options)


def shown(tokens):
    return "".join("|" if i == P else BYTES.decode([i]) for i in tokens if i != BYTES.eot_id)


@pytest.mark.parametrize("name, placements, text", [
    ("between", CORPUS, "o|n|e| |t|w|o|,| |t|h|r|e|e|"), ("sft", TASK, TEXT), ("appd", TASK, TEXT), ("dit", TASK, TEXT),
    ("aaw", TASK, "one two,| three|"),
])  # fmt: skip
def test_where_pauses_go(name, placements, text):
    assert shown(placements[name](row_of(n_prefix=4 * (placements is TASK), n=1))) == text


@pytest.mark.parametrize("name, placements", [*((n, CORPUS) for n in CORPUS), *((n, TASK) for n in TASK)])
def test_a_placement_adds_nothing_but_pauses(name, placements):
    """random is the exception that cuts the row back; prefixes stay as they are."""
    row = row_of(n_prefix=4 * (placements is TASK), n=3, rate=0.2, consecutive=2)
    longer = placements[name](row)
    kept = longer[longer != P]
    assert kept.tolist() == row.tokens[: len(kept)].tolist() and (len(kept) == len(row.tokens) or name == "random")
    assert longer[: row.n_prefix].tolist() == row.tokens[: row.n_prefix].tolist()
    assert placements[name].__doc__ and longer.dtype == row.tokens.dtype


def test_random_places_of_a_target_depend_on_the_generator_alone():
    places = {shown(TASK["ran"](row_of()._replace(n=2, rng=np.random.default_rng(seed)))) for seed in (1, 1, 2)}
    assert len(places) == 2 and all(text.count("|") == 2 for text in places)


def test_a_block_with_pauses_is_cut_to_its_length():
    block = np.array(BYTES.encode(TEXT))
    assert shown(Insertion("between", n=1)(block, BYTES, (0,))) == "o|n|e| |t|w|o|"
    assert shown(Insertion("between", n=1, length=5)(block, BYTES, (0,))) == "o|n|e"
    assert Insertion()(block, BYTES, (0,)) is block and str(Insertion()) == "no pauses"


@pytest.mark.parametrize("arguments, text", [
    (["--placement=betwen", "--pauses=1"], "placement=betwen (near: between) is not a placement of a corpus: choose"),
    (["--placement=aaw"], "is not a placement of a corpus: choose random, between"),
    (["--task=gsm8k", "--placement=between", "--pauses=1"], "is not a placement of a task: choose appd, sft, ran"),
    (["--placement=between"], "with 1 or more pauses and no pause_rate: add --pauses=1"),
])  # fmt: skip
def test_placements_that_do_not_fit_are_refused(arguments, text):
    with pytest.raises(UserError) as error:
        load_config(arguments)
    assert text in str(error.value)


def test_a_log_describes_the_placement():
    assert "before the least likely tokens" in described(load_config(["--task=gsm8k", "--placement=dit", "--pauses=5"]))
    assert "random places" in str(load_config(["--pause_rate=0.1"]).insertion)
