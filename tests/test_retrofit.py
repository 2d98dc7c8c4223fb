"""experiments/retrofit.py from a tiny model to its table."""

import json

import pytest
import scripts

from experiments import four_variants, retrofit
from nanopause import checkpoint
from nanopause.errors import UserError


@pytest.fixture
def here(grid, monkeypatch):
    """Runs retrofit.py with its scripts forked or in this process."""

    def run(script, *arguments):
        if script == "train.py":
            ended = scripts.run(script, *arguments)
            if ended.returncode:
                raise UserError(ended.stderr.strip().splitlines()[-1])
        else:
            grid(four_variants, *arguments)

    def retrofitted(*arguments):
        monkeypatch.setattr(retrofit, "run", run)
        monkeypatch.setattr("sys.argv", ["retrofit.py", *arguments])
        retrofit.main()

    return retrofitted


def test_from_a_model_without_pauses_to_the_table(here, train, tiny_corpus, tmp_path):
    train(tmp_path / "source", "--block_size=96", "--max_steps=2")
    for split in ("train", "val"):
        rows = [{"question": f"{split} {i}?", "choices": list("abcde"), "label": i % 5} for i in range(60)]
        (tmp_path / f"csqa_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = "--max_steps=2 --batch_size=2 --micro_batch_size=2 --eval_blocks=2"
    out = tmp_path / "out"
    here(
        f"--init_from={tmp_path / 'source'}", f"--out_dir={out}",
        f"--pretraining={small} --block_size=96 --dataset={tiny_corpus}",
        f"--variants=--tasks=csqa --seeds=1 --limit=4 --data_dir={tmp_path} --train='{small}'",
    )  # fmt: skip
    states = {kind: checkpoint.load(out / kind, "cpu")[2] for kind in ("standard", "pause")}
    assert {kind: state["knows_pauses"] for kind, state in states.items()} == {"standard": False, "pause": True}
    table = (out / "variants/table.md").read_text()
    cells = json.loads((out / "variants/results.json").read_text())["cells"]
    assert "csqa" in table and {(cell["pretraining"], cell["m_ft"]) for cell in cells} == {
        ("Std", 0), ("Std", 10), ("Pause", 0), ("Pause", 10),
    }  # fmt: skip


def test_no_model_is_one_sentence(here):
    with pytest.raises(UserError, match="--init_from=HuggingFaceTB"):
        here("--out_dir=nowhere")
