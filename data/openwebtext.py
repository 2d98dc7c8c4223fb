"""OpenWebText: 8 million documents, 9 billion GPT-2 tokens. The keys of data/text.py are accepted too.

python data/openwebtext.py                  # writes data/openwebtext/gpt2/
"""

import sys

from nanopause.errors import run
from nanopause.scripts.data import text

# The branch in which the hub keeps every dataset as Parquet, whatever the format of its main branch.
FILES = "hf://datasets/Skylion007/openwebtext@refs%2Fconvert%2Fparquet/**/*.parquet"
VAL_FRACTION = 0.0005  # nanoGPT's


def main() -> None:
    text.main([f"--files={FILES}", "--name=openwebtext", f"--val_fraction={VAL_FRACTION}", *sys.argv[1:]])


if __name__ == "__main__":
    run(main)
