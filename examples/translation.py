r"""Machine translation, a Transformer made sparse: on pairs that come with pip, or your own.

pip install -e ".[language]"
python -m examples.translation --quick                     # two minutes, JupyterLab's texts
python -m examples.translation --tsv PAIRS.tsv --method paper l2 none --seed 0 1 2
python -m examples.translation --tsv PAIRS.tsv --bfloat16  # for a CPU with AMX, a GPU or a TPU
python -m examples.translation --dataset ted_hrlr_translate/pt_to_en --data-dir DIR
python -m examples.translation --tsv PAIRS.tsv --width 128 --hidden 256 --heads 4 --dense-only
"""

import argparse
from pathlib import Path
from typing import Any

from .language import corpora
from .language.command import QUICK
from .language.command import main as run
from .language.corpora import Corpus
from .language.experiment import Settings

USUAL = Settings(
    vocabulary=2000,
    width=256,  # 64 and 128 are 21 and 9 validation BLEU behind, 24 and 11 on the test pairs
    hidden=512,
    heads=8,
    layers=2,
    dropout=0.2,
    source_length=48,
    target_length=48,
    row=64,
    batch=16,
    dense_epochs=40,
    loop_epochs=40,
    tune_epochs=4,
    interval=95,  # half an epoch
    share=0.85,
    smoothing=0.1,
)


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="a tensorflow-datasets set with a pair of languages")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--source", help="the set's language to translate from")
    parser.add_argument("--tsv", type=Path, help="a file with a tab-separated pair a line")


def _corpus(options: argparse.Namespace) -> Corpus:
    if options.tsv is not None and options.dataset is not None:
        raise ValueError("--tsv and --dataset: give one of them.")
    if options.tsv is not None:
        return corpora.tsv(options.tsv)
    if options.dataset is not None:
        return corpora.translation(options.dataset, options.data_dir, options.source)
    return corpora.jupyterlab()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """The command line."""
    return run(__doc__, USUAL, {"quick": QUICK}, _corpus, _flags, arguments)


if __name__ == "__main__":
    main()
