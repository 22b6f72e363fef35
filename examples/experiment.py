"""An experiment: a data set, a network, and what all its methods share."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import augment, batch_last, checkpoints, data, models, trainer


class Settings(NamedTuple):
    """What all methods of an experiment share."""

    network: Annotated[str, '"lenet300", "lenet5" or "resnet32"']
    dataset: Annotated[str, '"digits", or a tensorflow-datasets name']
    bound: Annotated[
        float | None, "accuracy on validation images; None: 0.5 % below the dense network's"
    ]
    dense_epochs: Annotated[int, "epochs of the dense network"]
    epochs: Annotated[int, "epochs in all: dense, loop and tuning"]
    interval: Annotated[int, "steps between two checks"] = 250
    fraction: Annotated[
        float, "of what is left, pruned at a check (our recipe: 1.25 x; none: --strength)"
    ] = 0.04
    batch: Annotated[int, "images a step"] = 100
    learning_rate: float = 1e-3
    bfloat16: Annotated[bool, "compute in bfloat16; parameters stay in float32"] = False
    train_images: Annotated[int | None, "training images; None: all that are not held out"] = None
    validation: Annotated[int | None, "images held out; None: 5,000, of digits 600"] = None


EXPERIMENTS = {
    "lenet300-digits": Settings(
        "lenet300", "digits", bound=0.97, dense_epochs=40, epochs=1500, interval=55, fraction=0.1
    ),
    "lenet300-mnist": Settings("lenet300", "mnist", bound=0.979, dense_epochs=20, epochs=260),
    "lenet5-mnist": Settings(
        "lenet5", "mnist", bound=0.99, dense_epochs=8, epochs=50, fraction=0.08
    ),
    "lenet5-fashion_mnist": Settings(
        "lenet5", "fashion_mnist", bound=0.905, dense_epochs=8, epochs=50, fraction=0.1
    ),
    "resnet32-cifar10": Settings(
        "resnet32",
        "cifar10",
        bound=0.82,
        dense_epochs=60,
        epochs=120,
        interval=351,
        fraction=0.1,
        batch=128,
    ),
}


# Sparsities at which networks on the way are tuned and measured; see :mod:`.sparsify`.
LEVELS: dict[str, tuple[float, ...]] = {"resnet32-cifar10": (0.0, 0.8, 0.85, 0.9, 0.95)}

# The data set whose settings others of the same network take.
USUAL = {"lenet300": "mnist", "lenet5": "mnist", "resnet32": "cifar10"}


class Network(NamedTuple):
    """A model in the forms that the trainer asks for."""

    model: Any  # the Linen module
    forward: trainer.Forward
    scan: bool  # whether an interval of training is one scan
    augment: Callable[..., Any] | None


class Experiment(NamedTuple):
    """The data on the device and the network: what its runs share."""

    settings: Settings
    splits: data.Splits
    network: Network
    epoch: int  # steps
    validation: Callable[[Any], Any]  # accuracy of params, or of variables
    test: Callable[[Any], Any]

    def trainer(
        self, tx: optax.GradientTransformation, steps: int, smoothing: float = 0.0
    ) -> Callable[[trainer.Record], trainer.Record]:
        """A function from a record to the record so many steps later."""
        return trainer.trainer(
            self.network.forward,
            tx,
            self.splits.train,
            self.settings.batch,
            steps,
            smoothing,
            self.network.augment,
            scan=self.network.scan,
        )


class Dense(NamedTuple):
    """A network before it is sparse, at three times; the records have no optimizer state."""

    initial: trainer.Record
    early: trainer.Record  # after the first epoch
    trained: trainer.Record
    seconds: float  # of training it


def load(settings: Settings, data_dir: str | Path | None = None) -> Experiment:
    """Reads the data and makes the network, in the form that is fastest on this device."""
    splits = data.load(settings.dataset, data_dir, settings.validation)
    if settings.train_images is not None:
        few = data.Images(*(part[: settings.train_images] for part in splits.train))
        splits = splits._replace(train=few)
    if settings.batch > len(splits.train.labels):
        raise ValueError(
            f"batch: {settings.batch} is more than the {len(splits.train.labels)} training images."
        )
    network = _network(settings, splits.classes)
    return Experiment(
        settings,
        splits,
        network,
        len(splits.train.images) // settings.batch,
        trainer.accuracy(network.model.apply, splits.validation, _part(splits.validation)),
        trainer.accuracy(network.model.apply, splits.test, _part(splits.test)),
    )


def settings(network: str, dataset: str) -> Settings:
    """The settings of an experiment; for another data set, those of the network's first one."""
    name = f"{network}-{dataset}"
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    return EXPERIMENTS[f"{network}-{USUAL[network]}"]._replace(dataset=dataset, bound=None)


def levels(settings: Settings) -> tuple[float, ...]:
    """The sparsities of :data:`LEVELS` for an experiment; none for most."""
    return LEVELS.get(f"{settings.network}-{settings.dataset}", ())


def folder(out: Path, bench: Experiment) -> Path:
    """The folder for checkpoints of all runs that start from the same dense networks."""
    settings = bench.settings
    shared = settings._replace(bound=0.0, epochs=0, interval=0, fraction=0.0)
    digest = hashlib.sha256(repr((shared, bench.splits.title)).encode()).hexdigest()[:8]
    return out / "checkpoints" / f"{settings.network}-{settings.dataset}-{digest}"


def dense(
    experiment: Experiment,
    seed: int,
    folder: Path | None = None,
    overdue: Callable[[], bool] = lambda: False,
) -> Dense:
    """Trains the dense network of a seed: Adam, its learning rate falling as a cosine.

    Args:
      experiment: the data and the network.
      seed: of the initial weights and of the order of the images.
      folder: for checkpoints; a training that was cut off, or one that is done, is taken up there.
      overdue: asked after each epoch whether to save a checkpoint and stop.

    Returns:
      The network at three times, and how long it took.

    Raises:
      OutOfTime: ``overdue`` said so.
    """
    settings, images = experiment.settings, experiment.splits.train.images
    variables = experiment.network.model.init(jax.random.key(seed), jnp.asarray(images[:1]))
    params = {"params": variables["params"]}
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    epochs = settings.dense_epochs
    tx = optax.adam(
        optax.cosine_decay_schedule(settings.learning_rate, max(1, epochs * experiment.epoch))
    )
    initial = trainer.start(params, tx, len(images), seed, model_state)
    train = experiment.trainer(tx, experiment.epoch)

    def one_epoch(records, epoch):
        record, early = records
        record = train(jax.tree.map(jnp.copy, record))
        return record, record if epoch == 1 else early

    (record, early), seconds = checkpoints.epochs(
        one_epoch, (initial, initial), epochs, folder, overdue
    )
    initial, early, record = (each._replace(opt_state=()) for each in (initial, early, record))
    return Dense(initial, early, record, seconds)


def _network(settings: Settings, classes: int) -> Network:
    cpu = jax.default_backend() == "cpu"
    model: Any
    if settings.network == "lenet300":
        model = models.LeNet300(classes)
        network = Network(model, trainer.stateless(model.apply), True, None)
    elif settings.network == "lenet5":
        model = models.LeNet5(classes)
        apply = batch_last.lenet5 if cpu else model.apply
        network = Network(model, trainer.stateless(apply), True, None)
    elif settings.network == "resnet32":
        model = models.ResNet32(classes)
        forward = trainer.with_batch_stats(model.apply)
        network = Network(model, forward, not cpu, augment.crop_and_flip)
    else:
        raise ValueError(
            f"network: {settings.network!r} is none of 'lenet300', 'lenet5', 'resnet32'."
        )
    if settings.bfloat16:
        network = network._replace(forward=trainer.in_bfloat16(network.forward))
    return network


def _part(images: data.Images) -> int:
    """So many images are classified at once: all temporaries of 10,000 would not fit a cache."""
    return 500 if len(images.images) % 500 == 0 else len(images.images)
