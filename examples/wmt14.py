r"""The paper's experiment on WMT14, English to German: for a GPU or TPU and the data.

    pip install -e ".[language]" tensorflow-cpu     # TensorFlow prepares the data, once
    python -m examples.wmt14 --data-dir DIR --resume
    python -m examples.wmt14 --data-dir DIR --resume --method none

Sizes, optimizer, gamma, fraction, accumulation and the interval of 35,000 batches are the authors'.
What their code leaves open is chosen so: batches of 50 pairs (6 packed rows), labels smoothed by
0.1, products of bfloat16, 10 epochs for the dense network with a warm-up over the first tenth.
Their bound, BLEU 27.2, is on pairs that they do not name: here it is 97 % of the dense network's
greedy BLEU on newstest2013 (--bound 27.2 for theirs). Each start reads and encodes all 4.5 million
pairs, and --minutes waits for the end of an interval. At the end the paper's curve is printed
beside the new one; this experiment was never run here.
"""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from .language import corpora
from .language.command import main as run
from .language.corpora import Corpus
from .language.experiment import Settings

USUAL = Settings(
    vocabulary=32_000,
    width=512,
    hidden=2048,
    heads=8,
    layers=6,
    dropout=0.1,
    source_length=255,
    target_length=255,
    row=256,
    batch=6,
    accumulate=3,
    smoothing=0.1,
    dense_epochs=10,
    loop_epochs=10,
    tune_epochs=4,
    interval=35_000,
    share=0.97,
    patience=10,
    validation_pairs=3000,
    bfloat16=True,
)

# By level, (sparsity, BLEU): the paper's, and of Gale et al. 2019 magnitude pruning's BLEU.
PAPER = {
    0.5: (0.535, 26.86, 26.33),
    0.6: (0.618, 26.60, 25.94),
    0.65: (0.683, 26.81, 25.21),
    0.7: (0.712, 26.53, 25.21),
    0.75: (0.760, 26.02, 24.63),
    0.8: (0.799, 25.56, 24.63),
}


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")


def _corpus(options: argparse.Namespace) -> Corpus:
    return corpora.translation("wmt14_translate/de-en", options.data_dir, "en")


def beside_the_paper(record: dict[str, Any]) -> Table:
    """A row a level: the paper's sparsity and BLEU, magnitude pruning's, and the record's."""
    table = Table(title="BLEU (intl) on newstest2014, beside the paper's")
    for column in ("level", "paper", "at", "magnitude", "here", "at"):
        table.add_column(column, justify="right")
    found = {point["level"]: point for point in record["points"]}
    for level, (sparsity, bleu, magnitude) in PAPER.items():
        point = found.get(level)  # of 0.65 none is saved
        here = (f"{point['bleu']:.2f}", f"{point['sparsity']:.3f}") if point else ("-", "-")
        table.add_row(f"{level:g}", f"{bleu:.2f}", f"{sparsity:.3f}", f"{magnitude:.2f}", *here)
    return table


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """The command line."""
    records = run(__doc__, USUAL, {}, _corpus, _flags, arguments)
    for record in records:
        Console().print(beside_the_paper(record))
    return records


if __name__ == "__main__":
    main()
