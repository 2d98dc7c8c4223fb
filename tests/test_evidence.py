"""docs/evidence.md has the numbers of experiments/results."""

import json
import re

from conftest import ROOT

from experiments import counting
from experiments.runs import shown

TEXT = (ROOT / "docs/evidence.md").read_text()


def test_the_table_of_counting():
    arms = json.loads((ROOT / "experiments/results/counting.json").read_text())["arms"]
    for arm in arms:
        arm["accuracy"] = {int(m): figures for m, figures in arm["accuracy"].items()}
    for row in counting.table(arms, False):
        assert f"| {' | '.join(row)} |" in TEXT


def test_the_table_of_match():
    arms = json.loads((ROOT / "experiments/results/match.json").read_text())["arms"]
    for arm in (arm for arm in arms if arm["name"] != "counts"):
        assert f"| {arm['label']} | " in TEXT and shown(arm["accuracy"], 3) in TEXT


def test_the_table_of_real_text():
    arms = json.loads((ROOT / "experiments/results/real_text.json").read_text())["arms"]
    for arm in arms:
        assert f"| {arm['label']} | {shown(arm['bpb'], 4)} | " in TEXT
        assert not arm["difference"] or shown(arm["difference"], 4, "+") in TEXT


def test_every_claim_has_a_verdict():
    section = TEXT.partition("## Claim by claim")[2].partition("## ")[0]
    verdicts = [line.split(" | ")[-1].removesuffix(" |") for line in section.splitlines() if line.startswith("| ")]
    known = {"reproduced", "reproduced in small", "not seen at this size", "refuted here", "needs a GPU"}
    assert len(verdicts) > 10 and set(verdicts) - {"verdict", "---"} <= known


def test_the_files_that_it_names_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name
    for name in re.findall(r"(?:python |`)((?:experiments|config|data)/\w+\.py|train\.py)", TEXT):
        assert (ROOT / name).exists(), name
