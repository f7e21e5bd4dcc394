"""Train a BERT sentence classifier in jax: batches by length, two losses, Adam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError
from icd_tvm.models.bert import BertConfig
from icd_tvm.models.recipes._jax import jax, jnp
from icd_tvm.models.recipes.classifier import layer_outputs, logits
from icd_tvm.models.recipes.units import Weights

Ints = NDArray[np.int64]
Batch = tuple[Ints, Ints, Ints]

# Sentences are padded to a multiple of this, so that few shapes are compiled.
LENGTH_STEP = 16
# Batches whose sentences are sorted by length together.
POOL = 16
WARM_UP = 0.1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Sentences:
    """Tokenised sentences: ``ids`` and ``mask`` int64 [n, seq], ``labels`` int64 [n]."""

    ids: Ints
    mask: Ints
    labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Ints) -> Batch:
        """Return ids, mask and labels of some rows, cut to the length they need."""
        longest = int(self.mask[rows].sum(1).max())
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, self.ids.shape[1])
        return self.ids[rows, :length], self.mask[rows, :length], self.labels[rows]

    def shuffled(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield batches of one epoch, each of sentences alike in length; a short rest is left."""
        order, lengths = rng.permutation(len(self)), self.mask.sum(1)
        pools = np.split(order, range(POOL * size, len(self), POOL * size))
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
        starts = np.arange(0, len(self) - size + 1, size)
        for start in rng.permutation(starts):
            yield self.batch(order[start : start + size])

    def by_length(self, size: int) -> Iterator[tuple[Ints, Batch]]:
        """Yield rows and their batch, all rows once; the last rows stand twice in a short batch."""
        order = np.argsort(self.mask.sum(1), kind="stable")
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield rows, self.batch(np.resize(rows, size))


@dataclass(frozen=True)
class Training:
    """How long and how hard to train; ``rate`` is Adam's at its highest, after the warm-up."""

    epochs: int = 3
    rate: float = 1e-4
    batch: int = 32
    decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1:
            raise ConfigError(f"epochs {self.epochs} and batch {self.batch} must be at least 1")


def label_loss(config: BertConfig, params: Any, batch: Any) -> Any:
    """Cross-entropy with the labels."""
    ids, mask, labels = batch
    found = logits(params, layer_outputs(config, params, ids, mask)[0][-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(found), labels[:, None], 1).mean()


def distillation_loss(config: BertConfig, params: Any, teacher: Any, batch: Any) -> Any:
    """Distance from a teacher: of the class probabilities, and of every layer's output.

    Notes
    -----
    Hinton et al., "Distilling the knowledge in a neural network", 2015 (probabilities); Jiao et
    al., "TinyBERT", 2020 (layers).
    """
    ids, mask, _ = batch
    ours, theirs = (layer_outputs(config, weights, ids, mask)[0] for weights in (params, teacher))
    wanted = jax.nn.softmax(logits(teacher, theirs[-1]))
    found = jax.nn.log_softmax(logits(params, ours[-1]))
    gap = (wanted * (jnp.log(jnp.maximum(wanted, 1e-12)) - found)).sum(-1).mean()
    real = mask[:, :, None] / (mask.sum() * config.hidden)
    pairs = zip(ours, theirs, strict=True)
    return gap + sum((real * (one - other) ** 2).sum() for one, other in pairs)


def train(
    config: BertConfig,
    weights: Weights,
    data: Sentences,
    plan: Training,
    teacher: Weights | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Weights:
    """Train a classifier, all but its embeddings; by its labels, or to follow a teacher.

    Parameters
    ----------
    config : BertConfig
    weights : dict of str to float32 array
        An encoder's, ``pooler.dense`` and ``classifier``, dense weights [out, in].
    data : Sentences
    plan : Training
    teacher : dict, optional
        Weights of a classifier of the same hidden width and layers.
    progress : callable
        Is told a line now and then.

    Returns
    -------
    dict of str to float32 array
        New weights, of the same names and shapes. The same arguments give the same weights.

    Notes
    -----
    Adam with decoupled weight decay (Loshchilov, Hutter, 2019), its rate rising over the first
    tenth of the steps and then falling to 0, both linearly.
    """
    frozen = {name: value for name, value in weights.items() if name.startswith("embeddings.")}
    moving = {name: jnp.array(weights[name]) for name in weights.keys() - frozen.keys()}
    first, second = (jax.tree.map(jnp.zeros_like, moving) for _ in range(2))
    rng = np.random.default_rng(plan.seed)
    steps, count = plan.epochs * (len(data) // plan.batch), 0
    for epoch in range(plan.epochs):
        losses = []
        for batch in data.shuffled(plan.batch, rng):
            count += 1
            rate = plan.rate * min(count / (WARM_UP * steps), 1, (steps - count + 1) / steps)
            numbers = (rate, plan.decay, count)
            moving, first, second, loss = _step(
                config, moving, first, second, frozen, teacher, batch, numbers
            )
            losses.append(float(loss))
        progress(f"epoch {epoch + 1} of {plan.epochs}: loss {np.mean(losses):.4f}")
    return frozen | {name: np.array(value) for name, value in moving.items()}


def _loss(config: BertConfig, params: Any, teacher: Any, batch: Any) -> Any:
    if teacher is None:
        return label_loss(config, params, batch)
    return distillation_loss(config, params, teacher, batch)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def _step(
    config: BertConfig,
    moving: Any,
    first: Any,
    second: Any,
    frozen: Any,
    teacher: Any,
    batch: Any,
    numbers: Any,
) -> Any:
    """Take one step of Adam; the weights and moments that come in are given up."""
    rate, decay, count = numbers
    loss, slopes = jax.value_and_grad(
        lambda params: _loss(config, params | frozen, teacher, batch)
    )(moving)
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, slopes)
    second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, slopes)

    def moved(old: Any, mean: Any, square: Any) -> Any:
        root = jnp.sqrt(square / (1 - BETA2**count)) + EPS
        return old - rate * (mean / (1 - BETA1**count) / root + decay * old)

    return jax.tree.map(moved, moving, first, second), first, second, loss


def predict(
    config: BertConfig, weights: Weights, data: Sentences, batch: int = 32
) -> NDArray[np.float32]:
    """Return the logits of every sentence, float32 [n, classes]."""
    found = np.zeros((len(data), len(weights["classifier.bias"])), np.float32)
    for rows, (ids, mask, _) in data.by_length(batch):
        found[rows] = np.asarray(_logits(config, weights, ids, mask))[: len(rows)]
    return found


@partial(jax.jit, static_argnums=0)
def _logits(config: BertConfig, params: Any, ids: Any, mask: Any) -> Any:
    return logits(params, layer_outputs(config, params, ids, mask)[0][-1])
