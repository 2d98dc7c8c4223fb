"""Every setting of a training run: one typed dataclass, flat config files, and --key=value."""

import runpy
import sys
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from inspect import ismodule
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from nanopause.cli import parse
from nanopause.data import Insertion
from nanopause.errors import UserError
from nanopause.model import GPTConfig
from nanopause.placement import check_placement
from nanopause.recipes import get_recipe
from nanopause.tokenizer import Tokenizer, load_tokenizer

BIG = 2**62
COUNTS = """n_layer limit consecutive n_head n_kv_head n_embd head_dim n_mlp batch_size micro_batch_size max_steps
eval_interval eval_blocks checkpoint_interval log_interval""".split()
LIMITS = {
    **dict.fromkeys(COUNTS, (1, BIG)),
    **dict.fromkeys(("focal", "block_size", "pauses", "warmup_steps", "seed", "weight_decay", "grad_clip"), (0, BIG)),
    **dict.fromkeys(("learning_rate", "matrix_learning_rate"), (0, 3.4e38)),
    **dict.fromkeys(("momentum", "beta1", "beta2"), (0, 0.99999)),
    **dict.fromkeys(("pause_rate", "wsd_share", "min_lr_ratio"), (0, 1)),
    "rope_theta": (1, BIG),
    "norm_eps": (0, 1),
}


@dataclass
class Config(GPTConfig):
    """A training run: the model's shape and everything else. Config files come first and compose, a later one wins;
    then the recipe, then --key=value."""

    vocab_size: tyro.conf.Suppress[int] = 0  # the tokenizer's
    given: ClassVar[frozenset[str]] = frozenset()  # keys of the command line, without the config files'

    out_dir: str = ""
    """Folder of checkpoints, metrics.jsonl and loss.png. Empty: out/ and the task, or the names of the config files."""
    init_from: str = ""
    """Weights to start from: the folder of a run, a transformers folder, a GGUF file or a hub id. The model's shape and
    the tokenizer are then theirs, and block_size is the length trained on, 0 for all that they read. Empty: random
    weights."""
    resume: bool = False
    """Continue the run in out_dir from its newest intact checkpoint."""

    dataset: str = "pydocs"
    """Corpus: a folder in data/ that one of its scripts prepared, or an absolute path."""
    tokenizer: str = "bytes"
    """"bytes", "gpt2", a transformers folder or a hub id; the corpus must have been prepared with it."""
    batch_size: int = 8
    """Sequences, or examples of a task, a step, over all processes."""
    micro_batch_size: int | None = None
    """Most sequences or examples in one pass of a process: gradients of several passes add up. None: its whole share at
    once."""

    pause_rate: float = 0.0
    """Pauses inserted at random into a sequence, per token of it. The sequence is then trimmed back to its length, so
    that a share of rate/(1+rate) of its positions are pauses. 0: standard pretraining."""

    recipe: str = ""
    """Task, learning_rate, warmup_steps, max_steps and batch_size of a paper, such as gsm8k_1b, squad_130m or aqua_dit;
    nanopause/recipes.py has all. Other --key=value arguments win. Empty: none."""
    task: str = ""
    """Train on it, instead of a corpus: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq, aqua or mbpp;
    parity_16, mod3_16 (any number of bits) and match3_6 are computed and need no data."""
    data_dir: str = ""
    """Folder with the task's files, such as gsm8k_train.jsonl.gz. Empty: the hub."""
    limit: int | None = None
    """Only the first so many examples of the task's training split. None: all."""
    pauses: int = 0
    """Pauses of an example; with placement=between those after each token of a corpus."""
    placement: str = ""
    """Where the pauses go; nanopause/placement.py has all. Of a corpus: random (pause_rate), or between: `pauses` of
    them between neighbouring tokens. Of a task: appd, after the prefix; dit, before the `pauses` least likely tokens of
    the target; ran, before random ones; aaw, after its words; sft, nowhere. Empty: random, or appd."""
    hints: str = ""
    """Targets of positions that have none otherwise, in training alone. Of a task: its intermediate results, such as
    count of parity_16. Of a corpus: next_token gives the next text token to every token and pause before it. Empty:
    none."""
    consecutive: int = 1
    """Pauses in a row at each place of dit, ran and aaw."""
    pause_loss: bool = False
    """Learn to say the pauses of dit, ran and aaw, an ablation that harms."""
    focal: float = 0.0
    """γ of the focal loss (1 − p)^γ · −log p of a task's targets; 0: cross-entropy."""
    pause_position: Literal["append", "prepend"] = "append"
    """"append" the pauses to the prefix, or "prepend" them to it, which is an ablation."""
    attention: Literal["causal", "prefix"] = "causal"
    """"prefix" lets a prefix, pauses included, read itself in both directions; the target is causal either way."""
    cut: Literal["left", "right"] = "left"
    """Side from which a prefix is cut that is too long for block_size, with its pauses and target."""
    trainable: Literal["all", "pause", "embeddings"] = "all"
    """What learns: everything, the pause's row of the token embedding, or token and position embeddings."""

    max_steps: int = 1100
    """Optimizer steps."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """"adamw" for everything, or "muon" for the matrices of the blocks and AdamW for the rest."""
    learning_rate: float = 0.03
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.03
    """Peak learning rate of Muon."""
    momentum: float = 0.85
    """Muon's."""
    warmup_steps: int = 20
    """Steps of linear warmup."""
    decay: Literal["cosine", "linear", "wsd"] = "linear"
    """Learning rate after the warmup: cosine or linear to the last step, or "wsd": constant, then linear."""
    wsd_share: float = 0.2
    """Share of max_steps in which "wsd" decays."""
    min_lr_ratio: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on parameters of two dimensions."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    eval_interval: int = 300
    """Steps between validations."""
    eval_blocks: int = 64
    """Blocks that a validation reads, evenly spread over the split; the validation after the last step reads all. Of a
    task: examples, always the same, as the checkpoint of the lowest loss is kept."""
    checkpoint_interval: int = 100
    """Steps between checkpoints."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Where metrics go besides metrics.jsonl."""

    seed: int = 1337
    """Of the weights, the order of the blocks or examples, and the places of random pauses."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"…; "auto": a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights stay float32. "auto": bfloat16 by autocast on a GPU, float32 on a CPU."""
    compile: bool | None = None
    """torch.compile the model. None: on a GPU only, as on a CPU compiling takes longer than it saves."""

    def __post_init__(self):
        for key, (low, high) in LIMITS.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise UserError(f"{key}={value} must be " + (f"{low} to {high}" if high < BIG else f"at least {low}"))
        if self.block_size == 0 and not (self.init_from or self.resume):
            raise UserError("block_size=0 is all that the model of init_from reads: name one with --init_from")
        self.placement = self.placement or ("appd" if self.task else "random")
        check_placement(self.placement, of_task=bool(self.task))
        if self.pauses and not self.task and self.placement == "random":
            raise UserError(f"pauses={self.pauses} stand between the prefix and the target of a task: add "
                            f"--task=gsm8k, say, or use pause_rate for pretraining")  # fmt: skip
        if not self.task and self.placement != "random":
            if not self.pauses or self.pause_rate or 0 < self.block_size <= self.pauses:
                raise UserError(f"placement={self.placement} is for pretraining with 1 or more pauses and no "
                                f"pause_rate: add --pauses=1 and leave out --pause_rate")  # fmt: skip
        if (self.pause_loss or self.consecutive > 1) and self.placement in ("appd", "sft"):
            raise UserError(f"pause_loss and consecutive are of pauses in a target, and placement={self.placement} has "
                            f"none: use --placement=dit, ran or aaw")  # fmt: skip
        if self.hints and self.task and self.pause_position == "prepend":
            raise UserError(f"hints={self.hints} are results at pauses after the prefix: use --pause_position=append")
        if self.hints and self.task and self.placement not in ("appd", "sft"):
            raise UserError(f"hints={self.hints} is for the prefix of a task and its pauses: use --placement=appd")
        if self.hints and not self.task and (self.hints != "next_token" or not self.pausing):
            raise UserError(f"hints={self.hints} needs a task: add --task=parity_16; a corpus has --hints=next_token, "
                            f"with --pause_rate or --placement=between")  # fmt: skip
        if self.trainable == "pause" and not self.pausing:
            raise UserError("trainable=pause and no pause: nothing would learn; add --pauses=10, say")
        if self.focal and not self.task:
            raise UserError(f"focal={self.focal} is for finetuning: add --task=gsm8k, say")
        if self.pause_rate and self.task:
            raise UserError(f"pause_rate={self.pause_rate} is for pretraining: use pauses with task={self.task}")
        super().__post_init__()
        self.micro_batch_size = self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def prefix_pauses(self) -> int:
        """Pauses of an example that are in its prompt, and at inference too."""
        return self.pauses if self.placement == "appd" else 0

    @property
    def insertion(self) -> Insertion:
        """How the blocks of a corpus get their pauses."""
        if self.task or not self.pausing:
            return Insertion()
        return Insertion(self.placement, self.pauses, self.pause_rate, self.block_size + 1, self.hints == "next_token")

    @property
    def text_length(self) -> int:
        """Tokens of text in a block of a corpus, which fill block_size together with the pauses between them."""
        return self.block_size // (1 + self.pauses) if self.placement == "between" else self.block_size

    @property
    def pausing(self) -> bool:
        """Whether any pause is trained with."""
        return bool(self.pause_rate or (self.pauses and self.placement != "sft"))

    def gpt(self, vocab_size: int) -> GPTConfig:
        """The model's part, with the tokenizer's vocabulary."""
        shape = {field.name: getattr(self, field.name) for field in fields(GPTConfig)}
        return GPTConfig(**shape | {"vocab_size": vocab_size})

    def shaped(self, model: GPTConfig, tokenizer: Tokenizer) -> "Config":
        """This run for an existing model and tokenizer; what config files set of either is ignored. Raises UserError if
        the command line sets it otherwise, or block_size is longer than the model's: only RoPE can be extended, and
        only by the command line."""
        is_extended = model.position == "rope" and "block_size" in self.given
        if self.block_size > model.block_size and not is_extended:
            raise UserError(f"block_size={self.block_size} is more than the {model.block_size} tokens that "
                            f"{self.init_from} reads: lower --block_size")  # fmt: skip
        theirs = asdict(model) | {"tokenizer": tokenizer.name}
        for key in sorted(self.given & set(theirs) - {"block_size"}):
            mine, same = getattr(self, key), getattr(self, key) == theirs[key]
            if not same and not (key == "tokenizer" and load_tokenizer(mine).sha256 == tokenizer.sha256):
                raise UserError(f"{key}={mine} is not what {self.init_from} has, {theirs[key]}: leave out --{key}")
        return replace(self, **theirs | {"vocab_size": 0, "block_size": self.block_size or model.block_size})


def _arguments(file: str) -> list[str]:
    """A config file's assignments as --key=value."""
    path = Path(file)
    if not path.is_file():  # outside a clone, config/ is where nanopause is installed
        path = Path(find_spec("nanopause.scripts").origin).parent / file
    if not path.is_file():
        raise UserError(f"config file {file} does not exist; settings are written --key=value")
    try:
        values = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"config file {file} does not run: {type(error).__name__}: {error}") from error
    return [f"--{key}={value}" for key, value in values.items() if not (key.startswith("_") or ismodule(value))]


def _parse(args: list[str]) -> Config:
    return parse(Config, args, "python train.py [config/a.py config/b.py …]")


def load_config(args: list[str]) -> Config:
    """A Config from config files and --key=value, as on train.py's command line: `["config/pause.py", "--seed=1"]`.

    --recipe is applied after the files and before the other keys. A boolean key alone means True. Raises UserError, or
    SystemExit where an argument is not understood.
    """
    files = [arg for arg in args if not arg.startswith("-")]
    settings = [arg for arg in args if arg.startswith("-")]
    from_files = []
    for file in files:
        arguments = _arguments(file)
        from_files += arguments
        try:
            _parse(arguments)
        except UserError:
            pass  # keys and types are right; whether the values fit is asked of all files together
        except SystemExit:
            print(f"error: this is in {file}", file=sys.stderr)
            raise
    recipes = [arg.removeprefix("--recipe=") for arg in from_files + settings if arg.startswith("--recipe=")]
    from_recipe = get_recipe(recipes[-1]).arguments() if recipes and recipes[-1] else []
    config = _parse(from_files + from_recipe + settings)
    config.given = frozenset(setting[2:].partition("=")[0].replace("-", "_") for setting in settings)
    name = config.task or "-".join(Path(file).stem for file in files) or "default"
    config.out_dir = config.out_dir or str(Path("out", name))
    return config
