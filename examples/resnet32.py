r"""ResNet-32 (464,154 weights) goes sparse on CIFAR-10; the full comparison needs a GPU.

On a CPU, the whole loop on 5,000 images (a JPEG copy of CIFAR-10), 35 minutes of one core for both
methods, which end at 49 % (paper) and 46 % (none) test error (dense 44 %; results/images.md):

    python -m examples.resnet32 --data-dir DIR --train-images 5000 --batch 100 --dense-epochs 8 \
        --epochs 14 --interval 25 --fraction 0.08 --bound 0.35 --method paper none \
        --out results/resnet32-5000

On a GPU, in slices that go on where the last one stopped (repeat the command until it no longer
says that the time is up); ``cifar10.npz`` is one file of 18 MiB for a machine without network:

    python -m examples.pack cifar10 --data-dir DIR cifar10.npz
    python -m examples.resnet32 --data-dir cifar10.npz --method paper none --resume --minutes 8

An interval is then one program over data on the device, convolutions in TF32 (--bfloat16 for
bfloat16): 21,000 steps for the dense network, 21,000 a method in the loop. The loop is at the full
learning rate and its bound, 82 % of the validation images, a low one; so the dense network and, for
each of 80, 85, 90 and 95 % of zeros, the first one that met the bound are tuned for 7 epochs and
measured, and ``python -m examples.tables`` shows those. A checkpoint has 11 MB at most, those of a
run together up to 30. Methods of one seed run side by side only once its dense network is
there and tuned.
"""

import sys

from . import command


def main(arguments=None):
    """The command line."""
    return command.main("resnet32", "cifar10", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
