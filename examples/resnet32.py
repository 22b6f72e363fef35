r"""ResNet-32 (464,154 weights) goes sparse on CIFAR-10: the full comparison needs a GPU.

python -m examples.resnet32 --data-dir DIR --train-images 5000 ...   # a CPU
python -m examples.resnet32 --data-dir cifar10.npz --bfloat16 --minutes 8 --resume  # a GPU
"""

import sys

from . import command


def main(arguments=None):
    """The command line."""
    return command.main("resnet32", "cifar10", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
