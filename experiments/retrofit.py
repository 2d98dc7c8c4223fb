"""Can a model that was pretrained without pauses learn to use them?

    python data/openwebtext.py --tokenizer=HuggingFaceTB/SmolLM2-135M
    python experiments/retrofit.py --init_from=HuggingFaceTB/SmolLM2-135M

Continues the model's pretraining with and without pauses (config/continue.py), then finetunes and evaluates the four
variants [Goyal et al. 2023] on SQuAD, CommonsenseQA and GSM8K with 0 and 10 pauses and five seeds
(experiments/four_variants.py). For GPUs. The same command continues after an interruption. A trial on a CPU:

    python experiments/retrofit.py --init_from=... --pretraining="--max_steps=2 --batch_size=2 --block_size=128" \\
        --variants="--seeds=1 --limit=2 --train='--max_steps=2 --eval_blocks=2'"

    out/retrofit/standard/, pause/      runs of train.py
    out/retrofit/variants/              table.md, results.json and figures of four_variants.py
"""

import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanopause import cli, errors  # noqa: E402
from nanopause.errors import UserError  # noqa: E402


@dataclass
class Settings:
    init_from: str = ""
    """The model: a hub id, a transformers folder or a GGUF file."""
    pretraining: str = ""
    """Additional arguments of train.py in continued pretraining, as one string."""
    variants: str = ""
    """Additional arguments of experiments/four_variants.py, as one string."""
    out_dir: str = "out/retrofit"
    """Folder of runs and results."""


def run(script: str, *arguments: str) -> None:
    """Run a script of the project in a subprocess and forward SIGTERM to it. Raises UserError if it fails."""
    with subprocess.Popen([sys.executable, str(ROOT / script), *arguments]) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    if process.returncode:
        raise UserError(f"{script} ended with exit code {process.returncode}: see its message above")


def main() -> None:
    settings = cli.parse(Settings, sys.argv[1:], "python experiments/retrofit.py", __doc__)
    if not settings.init_from:
        raise UserError("no model: name one by --init_from=HuggingFaceTB/SmolLM2-135M")
    out_dir = Path(settings.out_dir)
    for kind in ("standard", "pause"):
        configs = str(ROOT / f"config/{kind}.py"), str(ROOT / "config/continue.py")
        run("train.py", *configs, f"--init_from={settings.init_from}", f"--out_dir={out_dir / kind}", "--resume",
            *shlex.split(settings.pretraining))  # fmt: skip
    run("experiments/four_variants.py", f"--pretrained_std={out_dir / 'standard'}", "--tasks=squad,csqa,gsm8k",
        f"--pretrained_pause={out_dir / 'pause'}", "--pauses=10", f"--out_dir={out_dir / 'variants'}",
        *shlex.split(settings.variants))  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
