r"""The authors' recipe in PyTorch and here, side by side: an interval of training, and a whole run.

    pip install -e ".[torch]"            # from PyPI a CUDA build of some GB; PyTorch's own index
                                         # has one for CPUs
    python -m benchmarks.torch_recipe    # a quarter of an hour on two cores

Images of MNIST's shape, of noise; batches of 100, Adam, selective shrinkage with its decay, masks
held; 250 steps an interval, then 5,000 images are classified and 4 % of what is left is pruned.
Three forms in PyTorch, each with the weights multiplied by their masks after every step:

- two backward passes, as the authors do: the gradients are measured, the penalty is added to the
  loss, and the sum is differentiated;
- one backward pass: the penalty's gradient, known in closed form, is added to the loss's;
- the same with PyTorch's fused Adam.

Both sides run on the CPU, are given the same threads and flush subnormal numbers to zero, as XLA
does anyway: on noise little is left to learn, moments decay into them, and some processors then
take several times as long. The ratio of an interval is the median of interleaved rounds, that of a
whole run, all compilation included, a single timing. The rates beside them say what limits:
floating-point operations of the network's products in a second, as trained, and as its largest
product reaches alone.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import sparsereg_jax as sj
from examples import batch_last, data, models, trainer
from examples.hardware import hardware

from .timing import Candidate, interleave, repeated

GAMMA, RATE, BATCH, INTERVAL, FRACTION = 1e-3, 1e-3, 100, 250, 0.04
FORMS = ("two backward passes", "one backward pass", "one backward pass, fused Adam")
# Multiplications of an image: the first layer's, whose input needs no gradient, and the others'.
PRODUCTS = {
    "LeNet-300-100": (784 * 300, 300 * 100 + 100 * 10),
    "LeNet-5": (24**2 * 25 * 20, 8**2 * 500 * 50 + 800 * 500 + 500 * 10),
}
# The largest product of a step as rows, inner, columns.
LARGEST = {"LeNet-300-100": (100, 784, 300), "LeNet-5": (50, 500, 6400)}


class Lenet5(torch.nn.Module):
    """LeNet-5 with Caffe's widths."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(1, 20, 5), torch.nn.Conv2d(20, 50, 5)
        self.hidden, self.out = torch.nn.Linear(800, 500), torch.nn.Linear(500, 10)

    def forward(self, images):
        """From images, shape=[batch, 1, 28, 28], to logits."""
        # The maximum first, as ours: the same function, and a quarter of the entries.
        x = torch.relu(torch.nn.functional.max_pool2d(self.first(images), 2))
        x = torch.relu(torch.nn.functional.max_pool2d(self.second(x), 2))
        return self.out(torch.relu(self.hidden(x.flatten(1))))


def lenet300() -> torch.nn.Module:
    """LeNet-300-100."""
    layers = torch.nn
    return layers.Sequential(
        layers.Flatten(),
        layers.Linear(784, 300),
        layers.ReLU(),
        layers.Linear(300, 100),
        layers.ReLU(),
        layers.Linear(100, 10),
    )


class TorchRecipe:
    """The recipe in PyTorch, in one of the forms."""

    def __init__(self, model: torch.nn.Module, form: str, images: data.Images, held: data.Images):
        self.model, self.form = model, form
        self.params = list(model.parameters())
        self.masks = [torch.ones_like(param) for param in self.params]
        self.adam = torch.optim.Adam(self.params, RATE, fused="fused" in form or None)
        self.images, self.labels, self.held, self.held_labels = (
            torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1) if x.ndim == 4 else x))
            for x in (*images, *held)
        )
        self.labels, self.held_labels = self.labels.long(), self.held_labels.long()
        self.epoch = len(self.labels) // BATCH
        self.order, self.step, self.since = torch.randperm(len(self.labels)), 0, 0

    def train(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            position = self.step % self.epoch
            if position == 0:
                self.order = torch.randperm(len(self.labels))
            rows = self.order[position * BATCH : (position + 1) * BATCH]
            self.since += 1
            gamma = GAMMA * max(0.0, 1 - self.since / self.epoch)
            logits = self.model(self.images[rows])
            loss = torch.nn.functional.cross_entropy(logits, self.labels[rows])
            if self.form == FORMS[0]:
                self.adam.zero_grad()
                measured = torch.autograd.grad(loss, self.params, retain_graph=True)
                penalty = sum(
                    (param**2 * torch.exp(-gradient.abs())).sum()
                    for param, gradient in zip(self.params, measured, strict=True)
                )
                (loss + gamma * penalty).backward()
            else:
                gradients = torch.autograd.grad(loss, self.params)
                with torch.no_grad():
                    for param, gradient in zip(self.params, gradients, strict=True):
                        irrelevance = (-gradient.abs()).exp_()
                        param.grad = gradient.addcmul_(param, irrelevance, value=2 * gamma)
            self.adam.step()
            with torch.no_grad():
                for param, mask in zip(self.params, self.masks, strict=True):
                    param.mul_(mask)
            self.step += 1

    def check(self) -> float:
        """Measures, and prunes a share of what is left."""
        with torch.no_grad():
            found = torch.cat([self.model(part).argmax(1) for part in self.held.split(500)])
            right = (found == self.held_labels).float().mean().item()
            kept = torch.cat([p[m > 0].abs() for p, m in zip(self.params, self.masks, strict=True)])
            threshold = kept.kthvalue(max(1, round(FRACTION * len(kept)))).values
            for param, mask in zip(self.params, self.masks, strict=True):
                mask.mul_(param.abs() > threshold)
                param.mul_(mask)
        self.since = 0
        return right


def noise(number: int, seed: int) -> data.Images:
    """Images of MNIST's shape."""
    random = np.random.default_rng(seed)
    return data.Images(
        random.standard_normal((number, 28, 28, 1), dtype=np.float32),
        random.integers(0, 10, number, dtype=np.int32),
    )


def ours(name: str, images: data.Images, held: data.Images) -> tuple[Any, Any, Any, Any]:
    """Our transformation, an interval of training, the evaluation, and a first record."""
    model = models.LeNet300() if name == "LeNet-300-100" else models.LeNet5()
    fast = model.apply if name == "LeNet-300-100" else batch_last.lenet5
    epoch = len(images.labels) // BATCH
    tx = sj.hold_zeros(sj.selective_adam(RATE, strength=sj.paper_strength(GAMMA, epoch)))
    params = model.init(jax.random.key(0), jnp.asarray(images.images[:1]))
    train = trainer.trainer(trainer.stateless(fast), tx, images, BATCH, INTERVAL)
    evaluate = trainer.accuracy(model.apply, held, 500)
    return tx, train, evaluate, trainer.start(params, tx, len(images.labels), seed=0)


def our_run(name: str, images: data.Images, held: data.Images, checks: int) -> None:
    """Everything from compilation to the last check."""
    jax.clear_caches()
    tx, train, evaluate, record = ours(name, images, held)
    pruning = sj.iterative_pruning(
        tx,
        train,
        evaluate,
        sj.fraction_step(FRACTION, floor=0),
        0.0,
        max_checks=checks,
        mask=sj.every_parameter,
    )
    sj.run_pruning(pruning, pruning.init(record))


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(name: str, images: int, rounds: int, checks: int) -> dict[str, Any]:
    """All rows of one network."""
    train_images, held = noise(images, 0), noise(5000, 1)
    make = lenet300 if name == "LeNet-300-100" else Lenet5

    def torch_interval(form):
        recipe = TorchRecipe(make(), form, train_images, held)
        recipe.train(1)
        recipe.check()  # so that masks are real
        return Candidate(lambda _: recipe.train(INTERVAL), None)

    _, train, _, record = ours(name, train_images, held)
    candidates = {form: torch_interval(form) for form in FORMS}
    candidates["ours"] = Candidate(train, record)
    seconds, _ = interleave(candidates, rounds)

    def torch_run(form):
        recipe = TorchRecipe(make(), form, train_images, held)
        for _ in range(checks):
            recipe.train(INTERVAL)
            recipe.check()

    whole = {form: seconds_of(functools.partial(torch_run, form)) for form in FORMS}
    whole["ours"] = seconds_of(functools.partial(our_run, name, train_images, held, checks))
    rows, inner, columns = LARGEST[name]
    product = repeated(jnp.matmul, jnp.ones((rows, inner)), jnp.ones((inner, columns)))
    alone, _ = interleave({"product": product}, 15)
    rate = 2e-9 * rows * inner * columns / float(np.median(alone["product"]))
    step = float(np.median(seconds["ours"])) / INTERVAL
    first, others = PRODUCTS[name]
    return {
        "network": name,
        "interval": {form: float(np.median(seconds[form] / seconds["ours"])) for form in FORMS},
        "quartiles": {
            form: np.quantile(seconds[form] / seconds["ours"], (0.25, 0.75)).tolist()
            for form in FORMS
        },
        "run": {form: whole[form] / whole["ours"] for form in FORMS},
        "checks": checks,
        "achieved_gflops": 2e-9 * (2 * first + 3 * others) * BATCH / step,
        "product_gflops": rate,
        "rounds": len(seconds["ours"]),
    }


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=55_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checks", type=int, nargs=2, default=[160, 24])
    parser.add_argument("--out", type=Path, default=Path("results/torch-recipe-cpu.json"))
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    record = hardware()
    # Before there are threads, which take it over.
    record["subnormals_flushed"] = torch.set_flush_denormal(True)
    torch.set_num_threads(record["cores"])
    record["versions"]["torch"] = torch.__version__
    record["rows"] = [
        measure(name, options.images, options.rounds, checks)
        for name, checks in zip(PRODUCTS, options.checks, strict=True)
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(title=f"How many times faster than PyTorch; {record['cores']} threads")
    for column in ("network", "against", "an interval", "quartiles", "a whole run"):
        table.add_column(column)
    for row in record["rows"]:
        for form in FORMS:
            low, high = row["quartiles"][form]
            table.add_row(
                row["network"],
                form,
                f"{row['interval'][form]:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{row['run'][form]:.2f}",
            )
    console = Console(width=120)
    console.print(table)
    for row in record["rows"]:
        console.print(
            f"{row['network']}: {row['achieved_gflops']:.0f} GFLOP/s in training;"
            f" its largest product alone {row['product_gflops']:.0f}"
        )
    return record["rows"]


if __name__ == "__main__":
    main()
