# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A sparse network in ten minutes
#
# LeNet-300-100 is trained, pruned step by step within an accuracy bound, made really smaller,
# exported, and written to a small file with a report on it. It runs on a TPU, a GPU or a CPU; with
# several devices each batch is divided among them.
#
# Set `SOURCE` first: the address of the library's git repository, or a folder with a checkout.

# %% tags=["parameters"]
SOURCE = "."  # the checkout's folder, or the git repository's address: "https://..."
DATASET = "mnist"  # a tensorflow-datasets name, or "digits", which needs no download
DATA_DIR = None  # where tensorflow-datasets keeps its data; None: its own place
OUT = "sparse-lenet"  # the folder for what is written
DEVICES = None  # over how many devices a batch is divided; None: all
BATCH = 128
DENSE_EPOCHS = 10  # of training before the first weight goes
INTERVAL = 250  # steps of training between two checks
FRACTION = 0.15  # of the weights left, pruned at a check that meets the bound
BOUND = 0.975  # of the accuracy on the validation images
CHECKS = 80  # at most

# %% [markdown]
# ## Install
#
# The machine's jax fits its accelerator, so it stays: should pip want to replace it, nothing is
# installed and the cell says so.

# %% tags=["install"]
import subprocess
import sys
from pathlib import Path

if "://" in SOURCE:
    checkout = Path("checkout")
    if not checkout.exists():
        subprocess.run(["git", "clone", "--depth", "1", SOURCE, checkout], check=True)
else:
    folders = [Path(SOURCE), Path(SOURCE) / ".."]  # a notebook's folder may be examples/
    found = [folder for folder in folders if (folder / "examples" / "install.py").exists()]
    if not found:
        raise FileNotFoundError(
            f"SOURCE: no checkout of sparsereg_jax in {Path(SOURCE).resolve()}. Set it, above, to"
            " the address of the git repository or to the folder of a checkout."
        )
    checkout = found[0]

sys.path.insert(0, str(checkout.resolve()))
from examples.install import install

import importlib.util

# TensorFlow prepares data sets, once; a TPU's runtime may come without it.
missing = importlib.util.find_spec("tensorflow") is None
prepares = DATASET != "digits" and DATA_DIR is None and missing
install(checkout, also=["tensorflow-cpu"] if prepares else [])

# %% [markdown]
# ## The devices

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import sparsereg_jax as sj
from examples import data, trainer
from examples.models import LeNet300

devices = jax.devices()[:DEVICES]
print(f"jax {jax.__version__} on {len(devices)} x {devices[0].device_kind}")
for device in devices:
    print(" ", device)

mesh = jax.sharding.Mesh(np.array(devices), ("batch",))
divided = NamedSharding(mesh, PartitionSpec("batch"))  # each batch: a part on each device
everywhere = NamedSharding(mesh, PartitionSpec())  # the network: whole on each device
batch = -(-BATCH // len(devices)) * len(devices)  # so that the parts are equal

# %% [markdown]
# ## The dense network

# %%
splits = data.load(DATASET, DATA_DIR)
model = LeNet300(splits.classes)
first = jnp.asarray(splits.train.images[:1])
params = jax.device_put(model.init(jax.random.key(0), first), everywhere)
accuracy = trainer.accuracy(model.apply, splits.validation)
test_accuracy = trainer.accuracy(model.apply, splits.test)

epoch = len(splits.train.images) // batch
tx = optax.adam(optax.cosine_decay_schedule(1e-3, DENSE_EPOCHS * epoch))
forward = trainer.stateless(model.apply)
train = trainer.trainer(forward, tx, splits.train, batch, epoch, sharding=divided)
record = trainer.start(params, tx, len(splits.train.images), seed=0)
record = jax.device_put(record, everywhere)
for _ in range(DENSE_EPOCHS):
    record = train(record)
dense = record.params
print(f"accuracy on the validation images: {accuracy(dense):.2%}")

# %% [markdown]
# ## Sparse, within the bound
#
# The regularizer shrinks the weights that the loss hardly depends on. Whenever the accuracy meets
# the bound, the smallest weights go; `hold_zeros` keeps them at zero while the others recover.

# %%
tx = sj.hold_zeros(sj.selective_adam(1e-3, strength=sj.paper_strength(1e-3, epoch)))
train = trainer.trainer(forward, tx, splits.train, batch, INTERVAL, sharding=divided)
pruning = sj.iterative_pruning(
    tx,
    train,
    accuracy,
    sj.fraction_step(FRACTION),
    BOUND,
    max_checks=CHECKS,
    steps_per_check=INTERVAL,
    mask=sj.every_parameter,
)
start = record._replace(opt_state=jax.device_put(tx.init(dense), everywhere))
state, history = sj.run_pruning(pruning, pruning.init(start))
sparse = state.good.params
mask = sj.held_mask(sparse, state.good.opt_state)
print(f"{sj.sparsity(mask):.2%} of the weights are zero")
print(f"test accuracy: dense {test_accuracy(dense):.2%}, sparse {test_accuracy(sparse):.2%}")

# %% [markdown]
# ## The trade-off curve
#
# The accuracy on the validation images at each check, over how many times fewer weights there are.

# %%
import sys

from sparsereg_jax import report_pictures


def show(picture):
    """Shows a picture in a notebook; a plain script says where it is."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(picture)
    else:
        ipython.display.display(ipython.display.Image(filename=str(picture)))


out = Path(OUT)
out.mkdir(parents=True, exist_ok=True)
report_pictures.curve(history, BOUND).savefig(out / "curve.png")
show(out / "curve.png")

# %% [markdown]
# ## Smaller: without dead units

# %%
small = sj.compact(model.apply, sparse, first)
print(sj.compaction_table(small.plan))
images = jnp.asarray(splits.test.images)
difference = jnp.abs(small.fn(small.params, images) - model.apply(sparse, images)).max()
print(f"largest difference of the outputs: {difference:.1e}")

# %% [markdown]
# ## To other machines
#
# The smaller network as one file that jax runs without this library, for any number of images.

# %%
from jax import export

(count,) = export.symbolic_shape("count")
exported = export.export(jax.jit(small.fn), platforms=("cpu", "cuda", "tpu"))(
    jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), small.params),
    jax.ShapeDtypeStruct((count, *first.shape[1:]), first.dtype),
)
(out / "lenet.jax").write_bytes(exported.serialize())

loaded = export.deserialize(bytearray((out / "lenet.jax").read_bytes()))
weights = jax.device_get(small.params)
guessed = loaded.call(weights, splits.test.images).argmax(-1)
print(f"test accuracy of the exported network: {np.mean(guessed == splits.test.labels):.2%}")

# %% [markdown]
# ## A small file, and a report

# %%
from sparsereg_jax.__main__ import main

sj.save_sparse(out / "lenet.safetensors", sparse, metadata={"data": DATASET, "bound": BOUND})
main(["inspect", str(out / "lenet.safetensors")])

# %%
title = f"LeNet-300-100 on {DATASET}"
page = sj.write_report(
    out,
    sparse,
    mask,
    title=title,
    dense=dense,
    fn=model.apply,
    inputs=[first],
    history=history,
    bound=BOUND,
    compacted=small,
)
print(sj.report_text(sparse, mask, title=title, history=history))
print(f"\nThe page is {page}; open it in a browser.")
