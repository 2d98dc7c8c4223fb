"""Settings of a training run: a typed dataclass, set by config files and --key=value arguments."""

import runpy
import sys
from collections.abc import Sequence
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
eval_interval eval_blocks final_eval_blocks checkpoint_interval log_interval""".split()
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
    """All settings of a training run, and the model's architecture. A later config file overrides an earlier one; then
    come the values of --recipe, then the other --key=value arguments."""

    GROUPS: ClassVar[dict[str, str]] = {  # groups of --help, and the first key of each
        "run": "out_dir",
        "data": "dataset",
        "pause": "pause_rate",
        "finetuning": "task",
        "model": "vocab_size",
        "optimization": "max_steps",
        "logging": "eval_interval",
        "hardware": "device",
    }
    given: ClassVar[frozenset[str]] = frozenset()  # the keys on the command line, without those of config files

    vocab_size: tyro.conf.Suppress[int] = 0  # set to the tokenizer's

    out_dir: str = ""
    """Folder for checkpoints, metrics.jsonl and loss.png. Empty: out/ and the task, or the names of the config files,
    or "default"."""
    init_from: str = ""
    """Start from these weights: the folder of a run, a transformers folder, a GGUF file or a hub id. They determine the
    model's architecture and the tokenizer; block_size may be smaller, 0 for the model's own. Empty: random weights."""
    resume: bool = False
    """Continue the run in out_dir from its newest undamaged checkpoint. If there is none, a run without a terminal
    starts at step 0, so that a job's command can always contain --resume; at a terminal an empty out_dir is an
    error."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data, and the places of random pauses."""

    dataset: str = "pydocs"
    """Corpus to pretrain on: a folder in data/ that one of its scripts has written, or an absolute path."""
    tokenizer: str = "bytes"
    """"bytes", "gpt2", a transformers folder or a hub id. The corpus must be prepared with the same tokenizer."""

    pause_rate: float = 0.0
    """Pretraining: pauses inserted at random, per token of text. The sequence is then cut back to its length, so
    rate/(1+rate) of its tokens are pauses. 0: no pauses."""
    pauses: int = 0
    """Number of pauses per example of a task; with placement=between, after each token of the corpus."""
    placement: str = ""
    """Where the pauses are. Pretraining: random (with pause_rate) or between (`pauses` pauses between neighbouring
    tokens). Task: appd (after the prefix), dit (before the `pauses` least likely tokens of the target), ran (before
    random tokens of the target), aaw (after the words of the target), sft (no pauses). Empty: random, or appd for a
    task."""
    hints: str = ""
    """Extra training targets at positions that otherwise have none. Task: the name of its intermediate results, such as
    count for parity_16. Corpus: next_token, the next text token at every pause and at the token before it. Empty: no
    extra targets."""
    consecutive: int = 1
    """Consecutive pauses at each place of dit, ran and aaw."""
    pause_loss: bool = False
    """Also train the model to predict the pauses of dit, ran and aaw. An ablation that makes results worse."""
    pause_position: Literal["append", "prepend"] = "append"
    """Pauses of appd after the prefix, or before it (an ablation)."""

    task: str = ""
    """Train on a task instead of a corpus: gsm8k, squad, coqa, csqa, piqa, hellaswag, lambada, webq, nq, aqua or mbpp;
    or one that is generated and needs no data: parity_16, mod3_16 (any number of bits) or match3_6. Empty: the
    corpus."""
    recipe: str = ""
    """Values of task, learning_rate, warmup_steps, max_steps and batch_size from a paper, such as gsm8k_1b, squad_130m
    or aqua_dit; nanopause/recipes.py lists all. Empty: none."""
    data_dir: str = ""
    """Folder with the task's files, such as gsm8k_train.jsonl.gz. Empty: download them from the hub."""
    limit: int | None = None
    """Number of training examples to use. None: all."""
    focal: float = 0.0
    """Exponent γ of the focal loss (1 − p)^γ · −log p. 0: cross-entropy."""
    attention: Literal["causal", "prefix"] = "causal"
    """"prefix": the tokens and pauses of a prefix attend to each other in both directions. The target is always
    causal."""
    cut: Literal["left", "right"] = "left"
    """Side on which a prefix is cut if the example is longer than block_size."""
    trainable: Literal["all", "pause", "embeddings"] = "all"
    """Weights to train: all, the embedding of the pause, or the token and position embeddings."""

    max_steps: int = 1100
    """Number of optimizer steps."""
    batch_size: int = 8
    """Sequences of a corpus, or examples of a task, per step, over all processes."""
    micro_batch_size: int | None = None
    """Maximum sequences or examples per forward pass of a process; gradients are accumulated over several passes. None:
    no limit."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """"adamw" for all weights, or "muon" for the matrices of the blocks and AdamW for the rest."""
    learning_rate: float = 0.03
    """Peak learning rate of AdamW."""
    matrix_learning_rate: float = 0.03
    """Peak learning rate of Muon."""
    momentum: float = 0.85
    """Momentum of Muon."""
    warmup_steps: int = 20
    """Steps in which the learning rate increases linearly to its peak."""
    decay: Literal["cosine", "linear", "wsd"] = "linear"
    """Learning rate after the warmup: cosine or linear to the last step; "wsd": constant, then linear."""
    wsd_share: float = 0.2
    """Fraction of max_steps over which "wsd" decays."""
    min_lr_ratio: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the parameters with two dimensions."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    grad_clip: float = 1.0
    """Maximum gradient norm. 0: no clipping."""

    eval_interval: int = 300
    """Steps between validations."""
    eval_blocks: int = 64
    """Blocks of the corpus per validation, evenly spaced, or examples of the task; always the same ones."""
    final_eval_blocks: int = 2048
    """Maximum blocks of the corpus in the validation after the last step. A task uses eval_blocks."""
    checkpoint_interval: int = 100
    """Steps between checkpoints."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
    """Also send the metrics to this tracker."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", …; "auto": a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; the weights are always float32. "auto": bfloat16 on a GPU, float32 on a CPU."""
    compile: bool | None = None
    """Compile the model with torch.compile. None: only on a GPU, as on a CPU compiling takes longer than it saves."""

    def __post_init__(self):
        for key, (low, high) in LIMITS.items():
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise UserError(f"{key}={value} must be " + (f"{low} to {high}" if high < BIG else f"at least {low}"))
        if self.block_size == 0 and not (self.init_from or self.resume):
            raise UserError(
                "this config starts from a trained model (block_size=0 is its context length): add "
                "--init_from=out/pause, say"
            )
        self.placement = self.placement or ("appd" if self.task else "random")
        check_placement(self.placement, of_task=bool(self.task))
        if self.pauses and not self.task and self.placement == "random":
            raise UserError(f"pauses={self.pauses} are inserted after the prefix of a task: add --task=gsm8k, for "
                            f"example, or use --pause_rate for pretraining")  # fmt: skip
        if not self.task and self.placement != "random":
            if not self.pauses or self.pause_rate or 0 < self.block_size <= self.pauses:
                raise UserError(f"placement={self.placement} is for pretraining with 1 or more pauses and no "
                                f"pause_rate: add --pauses=1 and leave out --pause_rate")  # fmt: skip
        if (self.pause_loss or self.consecutive > 1) and self.placement in ("appd", "sft"):
            raise UserError(f"pause_loss and consecutive apply to pauses in a target, and placement={self.placement} "
                            f"has none: use --placement=dit, ran or aaw")  # fmt: skip
        if self.hints and self.task and self.pause_position == "prepend":
            raise UserError(f"hints={self.hints} are targets at pauses after the prefix: use --pause_position=append")
        if self.hints and self.task and self.placement not in ("appd", "sft"):
            raise UserError(f"hints={self.hints} is for the prefix of a task and its pauses: use --placement=appd")
        if self.hints and not self.task and (self.hints != "next_token" or not self.pausing):
            raise UserError(f"hints={self.hints} needs a task: add --task=parity_16; a corpus has --hints=next_token, "
                            f"with --pause_rate or --placement=between")  # fmt: skip
        if self.trainable == "pause" and not self.pausing:
            raise UserError("trainable=pause trains the pause's embedding, and there are no pauses: add --pauses=10")
        if self.focal and not self.task:
            raise UserError(f"focal={self.focal} is for finetuning: add a task such as --task=gsm8k")
        if self.pause_rate and self.task:
            raise UserError(f"pause_rate={self.pause_rate} is for pretraining: use --pauses with task={self.task}")
        super().__post_init__()
        self.out_dir = self.out_dir or str(Path("out", self.task or "default"))
        self.micro_batch_size = self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def prefix_pauses(self) -> int:
        """Number of pauses in the prompt of an example, in training and at inference."""
        return self.pauses if self.placement == "appd" else 0

    @property
    def insertion(self) -> Insertion:
        """How pauses are inserted into the blocks of a corpus."""
        if self.task or not self.pausing:
            return Insertion()
        return Insertion(self.placement, self.pauses, self.pause_rate, self.block_size + 1, self.hints == "next_token")

    @property
    def text_length(self) -> int:
        """Text tokens per block of a corpus. With placement=between, block_size counts the pauses between them too."""
        return self.block_size // (1 + self.pauses) if self.placement == "between" else self.block_size

    @property
    def pausing(self) -> bool:
        """Whether the training data contain pauses."""
        return bool(self.pause_rate or (self.pauses and self.placement != "sft"))

    def gpt(self, vocab_size: int) -> GPTConfig:
        """The model's architecture, with the tokenizer's vocabulary."""
        shape = {field.name: getattr(self, field.name) for field in fields(GPTConfig)}
        return GPTConfig(**shape | {"vocab_size": vocab_size})

    def shaped(self, model: GPTConfig, tokenizer: Tokenizer) -> "Config":
        """This config with the architecture and the tokenizer of an existing model, which override those of config
        files. Raises UserError if the command line contradicts them, or block_size is longer than the model's: only
        RoPE can be extended, and only by the command line."""
        is_extended = model.position == "rope" and "block_size" in self.given
        if self.block_size > model.block_size and not is_extended:
            raise UserError(f"block_size={self.block_size} is more than the {model.block_size} tokens of "
                            f"{self.init_from}: lower --block_size")  # fmt: skip
        theirs = asdict(model) | {"tokenizer": tokenizer.name}
        for key in sorted(self.given & set(theirs) - {"block_size"}):
            value = getattr(self, key)
            is_same_tokenizer = key == "tokenizer" and load_tokenizer(value).sha256 == tokenizer.sha256
            if value != theirs[key] and not is_same_tokenizer:
                raise UserError(f"{key}={value} is not what {self.init_from} has, {theirs[key]}: leave out --{key}")
        return replace(self, **theirs | {"vocab_size": 0, "block_size": self.block_size or model.block_size})


def _keys(arguments: list[str]) -> frozenset[str]:
    """The keys of --key=value arguments."""
    return frozenset(argument[2:].partition("=")[0].replace("-", "_") for argument in arguments)


def _arguments(file: str) -> list[str]:
    """The assignments of a config file as --key=value."""
    path = Path(file)
    if not path.is_file():  # without a clone, config/ is in the installed package
        path = Path(find_spec("nanopause.scripts").origin).parent / file
    if not path.is_file():
        raise UserError(f"config file {file} does not exist; settings are written --key=value")
    try:
        values = runpy.run_path(str(path))
    except Exception as error:
        raise UserError(f"config file {file} does not run: {type(error).__name__}: {error}") from error
    return [f"--{key}={value}" for key, value in values.items() if not (key.startswith("_") or ismodule(value))]


def load_config(args: Sequence[str], description: str | None = None) -> Config:
    """A Config from config files and --key=value, as on train.py's command line: `["config/pause.py", "--seed=1"]`.

    --recipe is applied after the files and before the other keys. A boolean key without a value is True. description:
    shown above --help. Raises UserError, or SystemExit if an argument is invalid.
    """

    def parsed(arguments: list[str]) -> Config:
        return parse(Config, arguments, "python train.py [config/a.py config/b.py …]", description)

    files = [arg for arg in args if not arg.startswith("-")]
    settings = [arg for arg in args if arg.startswith("-")]
    from_files = []
    for file in files:
        arguments = _arguments(file)
        from_files += arguments
        try:
            parsed(arguments)
        except UserError:
            pass  # keys and types are valid; the values are checked below, for all files together
        except SystemExit:
            print(f"error: this is in {file}", file=sys.stderr)
            raise
    recipes = [arg.removeprefix("--recipe=") for arg in from_files + settings if arg.startswith("--recipe=")]
    from_recipe = get_recipe(recipes[-1]).arguments() if recipes and recipes[-1] else []
    arguments = from_files + from_recipe + settings
    config = parsed(arguments)
    config.given = _keys(settings)
    if files and not config.task and "out_dir" not in _keys(arguments):
        config.out_dir = str(Path("out", "-".join(Path(file).stem for file in files)))
    return config
