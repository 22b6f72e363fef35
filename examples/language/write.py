r"""Writes with a sparse network that a run has saved: a line of text in, a line out.

    echo "Open the file" | python -m examples.language.write results/networks/RUN-0.75.safetensors

For a dialogue the line is the history, with the tags of training and no spaces around them:
"<user>I want to eat.<enduser><agent>Where?<endagent><user>In Oslo.<enduser>".
RUN.model, the tokens, lies beside the networks of a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

import sparsereg_jax as sj

from . import experiment, text
from .experiment import Settings


def write(path: Path, lines: Sequence[str]) -> list[str]:
    """What the network of a file makes of each line, by beam search as in its run.

    Raises:
      OSError: the network or its tokens cannot be read.
      SparseFileError: (a ValueError) the file is none that :func:`sparsereg_jax.save_sparse` wrote.
    """
    params, metadata = sj.load_sparse(path)
    settings = Settings(**metadata["settings"])
    model = path.with_name(path.name.rsplit("-", 1)[0] + ".model").read_bytes()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    search = experiment.search(settings, experiment.network(settings, tokenizer.vocab_size()))
    sources = experiment.encoded(settings, tokenizer, lines, metadata["dialogue"])
    batch = min(100, len(sources))
    rows = text.generate(search, params, sources, batch, settings.source_length)
    return text.decode(tokenizer, rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", type=Path, help="OUT/networks/RUN-LEVEL.safetensors")
    path = parser.parse_args(arguments).network
    # Not splitlines(), which also cuts at separators within a text.
    lines = [line.rstrip("\n") for line in sys.stdin]
    if lines:
        print(*write(path, lines), sep="\n")


if __name__ == "__main__":
    main()
