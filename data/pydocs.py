"""The default corpus: Python's own documentation. It needs no network and raises no licensing question.

python data/pydocs.py --tokenizer=bytes          # writes data/pydocs/bytes/
"""

import ast
import importlib
import inspect
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import tyro

from nanopause.errors import run
from nanopause.prepare import prepare
from nanopause.scripts.data import DATA

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Not documentation, or modules with side effects on import: antigravity opens a browser, readline writes to stdout.
SKIP = {"antigravity", "encodings", "idlelib", "lib2to3", "pydoc_data", "readline", "test", "tests", "turtledemo"}
WINDOW = 8  # words

Entry = tuple[str, str]  # a heading such as "choice(seq)" and the text under it


def documents() -> Iterator[str]:
    """The topics of `help()`, then each module of the standard library with its docstrings in source order.

    A paragraph that mostly repeats earlier ones is left out, so that validation text has no copy in the training text:
    topics contain one another, and modules written in both C and Python have every docstring twice.
    """
    seen: set[tuple[str, ...]] = set()
    for entries in [*_topics(), *_modules()]:
        kept = []
        for heading, text in entries:
            text = _unseen_paragraphs(text, seen)
            if text or not kept:
                kept.append(f"{heading}\n{text}".rstrip())
        document = "\n\n\n".join(kept)
        if len(document) >= 200:
            yield document + "\n"


def _unseen_paragraphs(text: str, seen: set[tuple[str, ...]]) -> str:
    """The paragraphs with at most half of their windows of eight words in `seen`. Adds all windows to `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = re.findall(r"\w+", paragraph.lower())
        windows = {tuple(words[i : i + WINDOW]) for i in range(max(1, len(words) - WINDOW + 1))}
        if len(windows & seen) <= len(windows) / 2:
            kept.append(paragraph.rstrip())
        seen |= windows
    return "\n\n".join(kept)


def _topics() -> Iterator[list[Entry]]:
    for text in sorted(topics.values(), key=len, reverse=True):  # a topic before the shorter ones that it contains
        heading, _, rest = text.strip().partition("\n")
        yield [(heading, re.sub(r"\A\*+\s*", "", rest))]  # without the line of stars under the heading


def _modules() -> Iterator[list[Entry]]:
    for name in sorted(sys.stdlib_module_names - SKIP):
        paths = sorted([*STDLIB.glob(f"{name}.py"), *(STDLIB / name).rglob("*.py")])
        for path in paths:
            parts = path.relative_to(STDLIB).with_suffix("").parts
            if not SKIP.intersection(parts):
                yield list(_from_source(".".join(parts).removesuffix(".__init__"), path))
        if not paths:
            yield list(_from_extension(name))


def _from_source(name: str, path: Path) -> Iterator[Entry]:
    def members(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield f"class {prefix}{child.name}", ast.get_docstring(child) or ""
                yield from members(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}({ast.unparse(child.args)})", ast.get_docstring(child) or ""

    with tokenize.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        module = ast.parse(file.read())
    yield f"module {name}", ast.get_docstring(module) or ""
    yield from members(module, "")


def _from_extension(name: str) -> Iterator[Entry]:
    """Entries of a module without Python source. It is imported, as its docstrings exist only at run time."""

    def members(parent: object, prefix: str) -> Iterator[Entry]:
        for name, child in sorted(vars(parent).items()):
            if inspect.isclass(child):
                yield f"class {prefix}{name}", inspect.getdoc(child) or ""
                yield from members(child, f"{prefix}{name}.")
            elif inspect.isroutine(child) or inspect.isdatadescriptor(child):
                signature = getattr(child, "__text_signature__", None) or ""
                yield f"{prefix}{name}" + re.sub(r"\$\w+(, /)?(, )?", "", signature), inspect.getdoc(child) or ""

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated modules
            module = importlib.import_module(name)
    except ImportError:  # not built, or for another operating system
        return
    yield f"module {name}", inspect.getdoc(module) or ""
    yield from members(module, "")


def prepare_pydocs(tokenizer: str = "bytes", data_dir: str = str(DATA)) -> Path:
    """Write this Python's documentation to data_dir/pydocs/tokenizer/, and return that folder.

    Args:
        tokenizer: bytes or gpt2.
        data_dir: the folder of all corpora.
    """
    source = f"Python {platform.python_version()}"
    return prepare("pydocs", [source], lambda _: documents(), data_dir, tokenizer, val_fraction=0.05, workers=1)


if __name__ == "__main__":
    run(lambda: tyro.cli(prepare_pydocs, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
