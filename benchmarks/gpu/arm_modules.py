"""The arms of a case as Relax modules (design: dense, identity, random, linear, iterative)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.cases import MAMBA, MAMBA_SIZES, PART, VECTORS, Case
from benchmarks.gpu.lift import coded, matrices
from icd_tvm._tvm import apply_pass, relax
from icd_tvm.adapters.quant import parse_quant
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import ConfigError
from icd_tvm.models.__main__ import save_model
from icd_tvm.models.bert import BERT_BASE, BERT_MINI, BertConfig, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.mamba import (
    MAMBA_2_8B,
    MAMBA_MINI,
    MambaConfig,
    build_mamba_step,
    mamba_states,
    random_mamba_weights,
)
from icd_tvm.models.weights import ShapedWeights
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.decide_permutation import DecidePermutation
from icd_tvm.relax_passes.layer_rules import parse_request
from icd_tvm.relax_passes.replace_constants import replace_constants, rewrite_constants
from icd_tvm.relax_passes.rewrite_layout import RewriteLayout
from icd_tvm.runtime.arms import DENSE, IDENTITY, LINEAR, RANDOM, Arm, linear_arm, ordered_arms
from icd_tvm.tir_schedules.cuda.gemm import LIVE_COLUMNS, SLAB
from icd_tvm.tir_schedules.target import cuda_target

Perms = dict[str, npt.NDArray[Any]]
# What follows `` + `` in a sparsity, and what it adds to the request.
HEADS = {"": "", "heads": "; *attention*=unit:0.5"}
# Of a step's products weights alone. Elsewhere activations too, while the model runs: the host
# draws other weights than those that are here.
WEIGHTS, BOTH = "int8; min-size=0", "int8:w8a8-dynamic; min-size=0"
BERT_TEST = replace(BERT_MINI, hidden=128, ffn=512)
MAMBA_TEST = replace(MAMBA_MINI, hidden=64, state=16, dt_rank=8)
_LAYERS, _WORDS = MAMBA_SIZES[PART]
# The first layer, one for all between, and the last: 64 layers of float32 weights are 11 GB.
BASE_LAYERS = 3
MODELS: Mapping[str, BertConfig | MambaConfig] = {
    "bert-base": BERT_BASE,
    MAMBA: replace(MAMBA_2_8B, layers=BASE_LAYERS),
    PART: replace(MAMBA_2_8B, layers=_LAYERS, vocab=_WORDS),
    "bert-base test": BERT_TEST,
    "mamba-2.8b test": MAMBA_TEST,
    "mamba-2.8b deep test": replace(
        MAMBA_TEST, layers=BASE_LAYERS, hidden=128, vocab=160, dt_rank=16
    ),
}
# Models whose middle layer is called many times, and how many layers they have then.
DEPTHS = {MAMBA: MAMBA_SIZES[MAMBA][0], "mamba-2.8b deep test": 6}
# Words of such a model's twin. Orders are decided there: they depend on none, and a large table
# takes minutes. Words keep their order.
FEW_WORDS = 96
WHEN = ("before", "after")
# Projections whose hidden axis the scattered groups of vectors lie on: columns of the first, rows
# of the second.
HIDDEN = (
    (".intermediate.dense.weight", "layer.{}.output.dense.weight"),
    (".in_proj.weight", "layers.{}.mixer.out_proj.weight"),
)


class Orders:
    """Orders decided for a device's kernels, by model and transform: shapes share them."""

    def __init__(self, solver_s: float, arch: str = "sm_90") -> None:
        self.solver_s, self.target = solver_s, cuda_target(arch)
        self._known: dict[tuple[str, str, str], Perms] = {}

    def of(self, case: Case, when: str, mod: Any) -> Perms:
        """Return the permutations that improve on the order of a module."""
        key = (case.model, case.sparsity if when == "after" else "", when)
        if key not in self._known:
            self._known[key] = self._decided(mod)
        return self._known[key]

    def _decided(self, mod: Any) -> Perms:
        """Decide, unless no weight has a zero.

        Then all are touched alike: no order can gain anything, and large weights take minutes to
        look at.
        """
        if all(np.all(const.value.numpy()) for const in matrices(mod).values()):
            return {}
        decide = DecidePermutation(time_budget_s=self.solver_s)
        apply_pass(decide, apply_pass(BuildAccessGraph(self.target), mod))
        return {d.group: d.perm for d in decide.decisions if d.improved}


class Drawn(ShapedWeights):
    """The weights of a module that the host draws, copied when they are asked for.

    Attributes
    ----------
    shapes : dict of str to tuple of int
    """

    def __init__(self, mod: Any) -> None:
        self._consts = matrices(mod)
        super().__init__({n: tuple(map(int, c.value.shape)) for n, c in self._consts.items()})

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(self._consts[name].value.numpy())

    def forget(self) -> None:
        """Keep names and shapes only."""
        self._consts = {}


class Arms:
    """One model with its transform, in all orders.

    Attributes
    ----------
    dense : IRModule
    drawn : Drawn
        Its weights that the host draws.
    coded : dict of str to tuple of int
        Their shapes in what `codes` returns.
    dtype : str
        Of the case.
    depth : int
        Layers that it has once its middle one is repeated; 0: those that it has.
    counts : dict
        How many orders were found before and after the transform.
    """

    def __init__(self, case: Case, orders: Orders) -> None:
        self._case, self.dtype, self.depth = case, case.dtype, DEPTHS.get(case.model, 0)
        self._twin = _modules(case, FEW_WORDS if self.depth else 0)
        before, after = (
            orders.of(case, when, mod) for when, mod in zip(WHEN, self._twin, strict=True)
        )
        self.dense, self._transformed = self._twin
        if self.depth:
            self.dense, self._transformed = map(_sharing, _modules(case), self._twin)
        self.drawn, self.coded = Drawn(self.dense), Drawn(self._twin[0]).shapes
        self._orders = (before, after)
        self.counts = {"before": len(before), "after": len(after)}

    def make(self, name: str) -> tuple[Any, str]:
        """Return an arm's module, in floats, and the arm that it equals, if one."""
        if name in (DENSE, IDENTITY):
            return (self.dense if name == DENSE else self._transformed), ""
        made = self._ordered(name, self._transformed)
        return made.mod, made.same_as

    def codes(self, name: str) -> Any:
        """Return an arm's module with each drawn weight replaced by its elements' positions.

        A deep model has few words there.
        """
        codes = coded(self._twin[name != DENSE], self.drawn)
        return codes if name in (DENSE, IDENTITY) else self._ordered(name, codes).mod

    def forget_dense(self) -> None:
        """Free what the dense arm alone needs."""
        self.dense, self._twin = None, (None, self._twin[1])
        self.drawn.forget()

    def narrowed(self, mod: Any) -> Any:
        """Return an arm's module with its products as the case wants them: of floats or int8.

        A scale belongs to a column, so that the codes of an arm are those of the others in its
        order (`benchmarks.gpu.recipes.quantised`).
        """
        if self.dtype != "int8":
            return mod
        request = WEIGHTS if self._case.tokens == 1 else BOTH
        return apply_pass(ApplyQuant(parse_request(request, parse_quant)), mod)

    def _ordered(self, name: str, mod: Any) -> Arm:
        """Return one arm; `ordered_arms` makes all, and large models fit once."""
        before, after = self._orders
        if name == RANDOM:
            return ordered_arms(mod, {}, None, seed=0)[RANDOM]
        if name == LINEAR:
            return linear_arm(mod, before)
        rewrite = RewriteLayout(after, lanes=LIVE_COLUMNS)
        made = apply_pass(rewrite, mod)
        return Arm(name, made) if after or rewrite.removed else Arm(name, mod, same_as=IDENTITY)

    def inputs(self) -> dict[str, str]:
        """Return what to feed the inputs that are not zeros: ``ids:LIMIT`` or ``ones``."""
        config = MODELS[self._case.model]
        return {"input_ids": f"ids:{config.vocab}", "attention_mask": "ones"}


def _modules(case: Case, words: int = 0) -> tuple[Any, Any]:
    """Return the dense module and the transformed one, for a number of words if it is given."""
    config = MODELS[case.model]
    mod, states = _model(case, replace(config, vocab=words) if words else config)
    dense = apply_pass(AttachLayoutTags(states), mod)
    return dense, _transform(dense, case.sparsity)


def _sharing(mod: Any, twin: Any) -> Any:
    """Return a module that reads the weights of its twin where they are the same."""
    known, own = matrices(twin), matrices(mod)
    new = {own[n]: known[n] for n in own if own[n].value.shape == known[n].value.shape}
    mod = mod.clone()
    mod["main"] = rewrite_constants(mod["main"], lambda const, var, path: new.get(const, const))
    return relax.transform.Normalize()(mod)


def _model(case: Case, config: BertConfig | MambaConfig) -> tuple[Any, tuple[Any, ...]]:
    if isinstance(config, BertConfig):
        weights = random_bert_weights(config)
        return import_onnx(build_bert(config, weights, case.seq, case.batch)).mod, ()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        weights = random_mamba_weights(config)
        save_model(build_mamba_step(config, weights, data=path.with_suffix(".data")), path)
        return import_onnx(path).mod, mamba_states(config)


def _transform(mod: Any, sparsity: str) -> Any:
    if sparsity == VECTORS:
        return scattered_vectors(mod)
    request, _, more = sparsity.partition(" + ")
    if more not in HEADS:
        raise ConfigError(f"no transform {sparsity!r} here")
    rules = parse_request(f"{request}{HEADS[more]}; min-size=0", parse_sparsity)
    return apply_pass(ApplySparsity(rules), mod)


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
