"""The arms of a case as Relax modules (design: dense, identity, random, linear, iterative)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.cases import MAMBA_PART, VECTORS, Case
from benchmarks.gpu.lift import coded, matrices
from icd_tvm._tvm import apply_pass
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import ConfigError
from icd_tvm.models.__main__ import save_model
from icd_tvm.models.bert import BERT_BASE, BERT_MINI, BertConfig, build_bert, random_bert_weights
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.mamba import (
    MAMBA_2_8B,
    MAMBA_MINI,
    MambaConfig,
    build_mamba_step,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.decide_permutation import DecidePermutation
from icd_tvm.relax_passes.layer_rules import parse_request
from icd_tvm.relax_passes.replace_constants import replace_constants
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout
from icd_tvm.runtime.arms import DENSE, IDENTITY, LINEAR, RANDOM, Arm, linear_arm, ordered_arms
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, SLAB
from icd_tvm.tir_schedules.target import host_target

Perms = dict[str, npt.NDArray[Any]]
# What follows `` + `` in a sparsity, and what it adds to the request.
HEADS = {"": "", "heads": "; *attention*=unit:0.5"}
# Of activations, while the model runs: the host draws other weights than those that are here.
INT8 = "int8:w8a8-dynamic; min-size=0"
BERT_TEST = replace(BERT_MINI, hidden=128, ffn=512)
MAMBA_TEST = replace(MAMBA_MINI, hidden=64, state=16, dt_rank=8)
_PART = replace(
    MAMBA_2_8B,
    layers=MAMBA_2_8B.layers // MAMBA_PART,
    vocab=-(-MAMBA_2_8B.vocab // MAMBA_PART // 8) * 8,
)
MODELS: Mapping[str, BertConfig | MambaConfig] = {
    "bert-base": BERT_BASE,
    "mamba-2.8b": _PART,
    "bert-base test": BERT_TEST,
    "mamba-2.8b test": MAMBA_TEST,
}
# Projections whose hidden axis the scattered groups of vectors lie on: columns of the first, rows
# of the second.
HIDDEN = (
    (".intermediate.dense.weight", "layer.{}.output.dense.weight"),
    (".in_proj.weight", "layers.{}.mixer.out_proj.weight"),
)


class Orders:
    """Orders that were decided, by model and transform: shapes share them."""

    def __init__(self, solver_s: float) -> None:
        self.solver_s = solver_s
        self._known: dict[tuple[str, str, str], Perms] = {}

    def of(self, case: Case, when: str, mod: Any) -> Perms:
        """Return the permutations that improve on the order of a module.

        Weights without a zero are all touched alike: no order can gain anything, and large ones
        take minutes to look at.
        """
        if all(np.all(const.value.numpy()) for const in matrices(mod).values()):
            return {}
        key = (case.model, case.sparsity if when == "after" else "", when)
        if key not in self._known:
            decide = DecidePermutation(time_budget_s=self.solver_s)
            apply_pass(decide, apply_pass(BuildAccessGraph(host_target(1)), mod))
            self._known[key] = {d.group: d.perm for d in decide.decisions if d.improved}
        return self._known[key]


class Arms:
    """One model with its transform, in all orders.

    Attributes
    ----------
    dense : IRModule
    drawn : dict of str to ndarray
        Its weights that the host draws.
    counts : dict
        How many orders were found before and after the transform.
    """

    def __init__(self, case: Case, orders: Orders) -> None:
        self._case = case
        imported, states = _model(case)
        # Not the model itself: it holds every weight once more.
        self._inputs = [spec.name for spec in imported.inputs]
        self.dense = apply_pass(AttachLayoutTags(states), imported.mod)
        self.drawn = {name: c.value.numpy() for name, c in matrices(self.dense).items()}
        self._transformed = _transform(self.dense, case.sparsity)
        before = orders.of(case, "before", self.dense)
        after = orders.of(case, "after", self._transformed)
        self._orders = (before, after)
        self.counts = {"before": len(before), "after": len(after)}

    def make(self, name: str) -> tuple[Any, Any, str]:
        """Return an arm's module, the same with codes for weights, and the arm it equals."""
        if name == DENSE:
            return self.dense, coded(self.dense, self.drawn), ""
        plain, codes = self._transformed, coded(self._transformed, self.drawn)
        if name == IDENTITY:
            return plain, codes, ""
        made = self._ordered(name, plain)
        if made.same_as:
            return made.mod, None, made.same_as
        return made.mod, self._ordered(name, codes).mod, ""

    def _ordered(self, name: str, mod: Any) -> Arm:
        """Return one arm; `ordered_arms` makes all, and large models fit once."""
        before, after = self._orders
        if name == RANDOM:
            return ordered_arms(mod, {}, None, seed=0)[RANDOM]
        if name == LINEAR:
            return linear_arm(mod, before)
        rewrite = RewriteLayout(after)
        made = apply_pass(rewrite, mod)
        return Arm(name, made) if after or rewrite.removed else Arm(name, mod, same_as=IDENTITY)

    def inputs(self) -> dict[str, str]:
        """Return what to feed each input: ``ids:LIMIT``, ``ones`` or ``zeros``."""
        config = MODELS[self._case.model]
        fills = {"input_ids": f"ids:{config.vocab}", "attention_mask": "ones"}
        return {name: fills.get(name, "zeros") for name in self._inputs}


def _model(case: Case) -> tuple[ImportedModel, tuple[tuple[str, str], ...]]:
    config = MODELS[case.model]
    if isinstance(config, BertConfig):
        weights = random_bert_weights(config)
        return import_onnx(build_bert(config, weights, case.seq, case.batch)), ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        weights = random_mamba_weights(config)
        save_model(build_mamba_step(config, weights, data=path.with_suffix(".data")), path)
        return import_onnx(path), mamba_states(config)


def _transform(mod: Any, sparsity: str) -> Any:
    if sparsity == VECTORS:
        return scattered_vectors(mod)
    request, _, more = sparsity.partition(" + ")
    if more not in HEADS:
        raise ConfigError(f"no transform {sparsity!r} here")
    rules = parse_request(f"{request}{HEADS[more]}; min-size=0", parse_sparsity)
    return apply_pass(ApplySparsity(rules), mod)


def narrowed(mod: Any, dtype: str) -> Any:
    """Return an arm with codes for the operands of its products where ``dtype`` is int8.

    Scales are those of columns, whatever order the rows are in: arms that are quantised last are
    those that were put in order last.
    """
    return apply_pass(ApplyQuant(parse_request(INT8, parse_quant)), mod) if dtype == "int8" else mod


def scattered_vectors(mod: Any, seed: int = 0) -> Any:
    """Prune half of each hidden projection in groups of units that are scattered over their axis.

    A group of 64 units shares which blocks of 16 inputs live; for each 64 outputs of the next
    projection half of the groups live. Once a group's units lie together, both are blocks that a
    kernel can skip; in the incoming order almost no block is dead.
    """
    known = matrices(mod)
    new = {}
    for name, const in known.items():
        for first, second in HIDDEN:
            if not name.endswith(first):
                continue
            number = next(part for part in name.split(".") if part.isdigit())
            after = next(n for n in known if n.endswith(second.format(number)))
            masks = _masks(const.value.shape, known[after].value.shape, seed + int(number))
            for item, mask in zip((const, known[after]), masks, strict=True):
                new[item] = item.value.numpy() * mask
    return replace_constants(mod, new)


def _masks(first: Any, second: Any, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the masks of [K, parts * hidden] and of [hidden, N]."""
    (inputs, columns), (hidden, outputs) = (tuple(map(int, s)) for s in (first, second))
    rng = np.random.default_rng(seed)
    group_of = np.empty(hidden, np.int64)
    group_of[rng.permutation(hidden)] = np.arange(hidden) // LIVE_COLUMNS
    groups, parts = int(group_of.max()) + 1, columns // hidden
    halves = [_half(rng, groups, inputs // SLAB)[group_of] for _ in range(parts)]
    before = np.repeat(np.concatenate(halves), SLAB, axis=1).T
    after = np.repeat(_half(rng, outputs // LIVE_COLUMNS, groups).T[group_of], LIVE_COLUMNS, axis=1)
    return before.astype(np.float32), after.astype(np.float32)


def _half(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[Any]:
    """Return bool[rows, columns] with half of every row true."""
    order: Callable[[int], Any] = rng.permutation
    return np.stack([order(columns) < columns // 2 for _ in range(rows)])
