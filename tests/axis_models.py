"""Named miniature Relax models for the axis analysis, each with the groups it must have."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icd_tvm._tvm import named_const, relax, tvm, tvm_ffi
from icd_tvm.relax_passes.axis_groups import AxisGroups, find_axis_groups
from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term
from icd_tvm.tir_schedules.cpu.selective_scan import selective_scan

op, nn = relax.op, relax.op.nn

# LLVM's vectoriser miscompiles some tiny odd shapes ("Instruction does not dominate all uses").
TARGET = tvm.target.Target({"kind": "llvm", "opt-level": 1})

# Hypothesis examples a property; the nightly profile sets more.
EXAMPLES = int(os.environ.get("ICD_TEST_EXAMPLES", "200"))
Expected = list[tuple[int, str]]


@dataclass
class MiniModel:
    """A module, its inputs, and the (size, constraint) of every free group."""

    mod: Any
    inputs: list[np.ndarray]
    expected: Expected
    opaque_states: tuple[tuple[str, str], ...] = ()

    def groups(self) -> AxisGroups:
        return find_axis_groups(self.mod["main"], opaque_states=self.opaque_states)


@dataclass
class Net:
    """A BlockBuilder with named weights and remembered inputs."""

    seed: int = 0
    inputs: list[Any] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)
    steps: list[tuple[Any, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.builder = relax.BlockBuilder()
        self.frames: list[Any] = []

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32", high: int = 0) -> Any:
        var = relax.Var(name, relax.TensorType(shape, dtype))
        array = (
            self.rng.integers(0, high, shape) if high else self.rng.standard_normal(shape)
        ).astype(dtype)
        self.inputs.append(var)
        self.arrays.append(array)
        return var

    def weight(self, name: str, *shape: int) -> Any:
        scale = 1.0 / np.sqrt(shape[0])
        return self.const(name, self.rng.standard_normal(shape) * scale)

    def const(self, name: str, array: Any, dtype: str = "float32") -> Any:
        return named_const(np.asarray(array, dtype=dtype, order="C"), name)

    def start(self) -> None:
        for frame in (self.builder.function("main", self.inputs), self.builder.dataflow()):
            frame.__enter__()
            self.frames.append(frame)

    def __call__(self, expr: Any, name: str = "") -> Any:
        if not self.frames:
            self.start()
        return self.builder.emit(expr, name_hint=name)

    def linear(self, x: Any, name: str, k: int, n: int, bias: bool = True) -> Any:
        y = self(op.matmul(x, self.weight(f"{name}.w", k, n)), name)
        return self(op.add(y, self.weight(f"{name}.b", n)), f"{name}_bias") if bias else y

    def build(self, *outputs: Any) -> Any:
        result = outputs[0] if len(outputs) == 1 else relax.Tuple(list(outputs))
        out = self.builder.emit_output(result, "out")
        self.frames[1].__exit__(None, None, None)
        self.builder.emit_func_output(out)
        self.frames[0].__exit__(None, None, None)
        return self.builder.get()

    def done(self, outputs: Any, expected: Expected, **options: Any) -> MiniModel:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return MiniModel(self.build(*outputs), self.arrays, expected, **options)


MODELS: dict[str, Callable[[], MiniModel]] = {}


def model(function: Callable[[], MiniModel]) -> Callable[[], MiniModel]:
    MODELS[function.__name__] = function
    return function


@model
def mlp() -> MiniModel:
    net = Net()
    x = net.input("x", (4, 8))
    h = net(nn.relu(net.linear(x, "up", 8, 16)), "act")
    return net.done(net.linear(h, "down", 16, 8), [(16, "free")])


@model
def fork() -> MiniModel:
    """Two consumers of one hidden axis."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.tanh(net.linear(x, "up", 8, 16)))
    y = net(op.add(net.linear(h, "a", 16, 8), net.linear(h, "b", 16, 8)))
    return net.done(y, [(16, "free")])


@model
def join() -> MiniModel:
    """Two producers of one hidden axis."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.multiply(net.linear(x, "a", 8, 16), net.linear(x, "b", 8, 16)))
    return net.done(net.linear(h, "down", 16, 8), [(16, "free")])


@model
def residual() -> MiniModel:
    """A residual stream between two projections is one group over all blocks."""
    net = Net()
    x = net.input("x", (4, 8))
    stream = net.linear(x, "in", 8, 12)
    for block, width in enumerate((20, 24)):
        scale = (net.weight(f"g{block}", 12), net.weight(f"b{block}", 12))
        h = net(nn.layer_norm(stream, *scale, axes=[-1]))
        h = net(nn.gelu(net.linear(h, f"up{block}", 12, width)))
        stream = net(op.add(stream, net.linear(h, f"down{block}", width, 12)))
    return net.done(net.linear(stream, "out", 12, 8), [(12, "free"), (20, "free"), (24, "free")])


@model
def residual_to_output() -> MiniModel:
    """The same stream as graph output is pinned; the hidden axis stays free."""
    net = Net()
    x = net.input("x", (4, 12))
    h = net(nn.silu(net.linear(x, "up", 12, 20)))
    return net.done(net(op.add(x, net.linear(h, "down", 20, 12))), [(20, "free")])


def _heads(net: Net, x: Any, heads: int, width: int, order: Sequence[int]) -> Any:
    split = net(op.reshape(x, (1, -1, heads, width)))
    return net(op.permute_dims(split, list(order)))


def _attend(net: Net, q: Any, k: Any, v: Any, sequence: int, width: int) -> Any:
    scores = net(op.matmul(q, k), "scores")
    weights = net(nn.softmax(scores, axis=-1))
    mixed = net(op.matmul(weights, v), "mixed")
    merged = net(op.permute_dims(mixed, [0, 2, 1, 3]))
    return net(op.reshape(merged, (1, sequence, width)))


@model
def heads() -> MiniModel:
    net = Net()
    x = net.input("x", (1, 5, 8))
    q, k, v = (net.linear(x, name, 8, 12) for name in "qkv")
    q, v = (_heads(net, t, 3, 4, (0, 2, 1, 3)) for t in (q, v))
    y = _attend(net, q, _heads(net, k, 3, 4, (0, 2, 3, 1)), v, 5, 12)
    expected = [(3, "factored"), (4, "factored"), (4, "factored")]
    return net.done(net.linear(y, "o", 12, 8), expected)


@model
def fused_qkv_split() -> MiniModel:
    """One projection cut into q, k and v before the heads: segments of products."""
    net = Net()
    x = net.input("x", (1, 5, 8))
    parts = net(op.split(net.linear(x, "qkv", 8, 36), 3, axis=-1))
    q, k, v = (net(relax.TupleGetItem(parts, i)) for i in range(3))
    q, v = (_heads(net, t, 3, 4, (0, 2, 1, 3)) for t in (q, v))
    y = _attend(net, q, _heads(net, k, 3, 4, (0, 2, 3, 1)), v, 5, 12)
    expected = [(3, "pairs"), (4, "pairs"), (4, "factored")]
    return net.done(net.linear(y, "o", 12, 8), expected)


@model
def fused_qkv_reshape() -> MiniModel:
    """One reshape to (3, heads, width) makes q, k and v share both orders."""
    net = Net()
    x = net.input("x", (1, 5, 8))
    fused = net(op.reshape(net.linear(x, "qkv", 8, 36), (1, 5, 3, 3, 4)))
    fused = net(op.permute_dims(fused, [2, 0, 3, 1, 4]))
    index = [net.const(f"i{i}", i, "int64") for i in range(3)]
    q, k, v = (net(op.take(fused, i, axis=0)) for i in index)
    y = _attend(net, q, net(op.permute_dims(k, [0, 1, 3, 2])), v, 5, 12)
    expected = [(3, "factored"), (4, "factored"), (3, "factored")]
    return net.done(net.linear(y, "o", 12, 8), expected)


@model
def grouped_query() -> MiniModel:
    """Four query heads on two KV heads, widened by expand and reshape."""
    net = Net()
    x = net.input("x", (1, 5, 8))
    q = _heads(net, net.linear(x, "q", 8, 16), 4, 4, (0, 2, 1, 3))
    k = _heads(net, net.linear(x, "k", 8, 8), 2, 4, (0, 2, 3, 1))
    v = _heads(net, net.linear(x, "v", 8, 8), 2, 4, (0, 2, 1, 3))
    wide = net(op.expand_dims(k, 2))
    k = net(op.reshape(net(op.broadcast_to(wide, (1, 2, 2, 4, 5))), (1, 4, 4, 5)))
    v = net(op.repeat(v, 2, axis=1))
    y = _attend(net, q, k, v, 5, 16)
    expected = [(2, "factored"), (2, "factored"), (4, "factored"), (4, "factored")]
    return net.done(net.linear(y, "o", 16, 8), expected)


def _rotate_half(net: Net, x: Any, cos: Any, sin: Any, half: int) -> Any:
    first = net(op.strided_slice(x, [3], [0], [half]))
    second = net(op.strided_slice(x, [3], [half], [2 * half]))
    turned = net(op.concat([net(op.negative(second)), first], axis=3))
    return net(op.add(net(op.multiply(x, cos)), net(op.multiply(turned, sin))))


@model
def rope_halves() -> MiniModel:
    """Rotary positions by halves: i and i + half move together, tables included."""
    net = Net()
    x = net.input("x", (1, 5, 8))
    angle = np.outer(np.arange(5), 0.5 ** np.arange(4))
    table = np.concatenate([angle, angle], axis=1)
    cos, sin = net.const("cos", np.cos(table)), net.const("sin", np.sin(table))
    q, k, v = (_heads(net, net.linear(x, n, 8, 16), 2, 8, (0, 2, 1, 3)) for n in "qkv")
    q, k = (_rotate_half(net, t, cos, sin, 4) for t in (q, k))
    y = _attend(net, q, net(op.permute_dims(k, [0, 1, 3, 2])), v, 5, 16)
    expected = [(2, "factored"), (4, "pairs"), (8, "factored")]
    return net.done(net.linear(y, "o", 16, 8), expected)


@model
def rope_interleaved() -> MiniModel:
    """Rotary positions by even and odd channels: the pair itself keeps its order."""
    net = Net()
    x = net.input("x", (1, 5, 8))
    angle = np.outer(np.arange(5), 0.5 ** np.arange(4))
    cos, sin = net.const("cos", np.cos(angle)), net.const("sin", np.sin(angle))
    q = _heads(net, net.linear(x, "q", 8, 16), 2, 8, (0, 2, 1, 3))
    even, odd = (net(op.strided_slice(q, [3], [i], [8], [2])) for i in (0, 1))
    real = net(op.subtract(net(op.multiply(even, cos)), net(op.multiply(odd, sin))))
    imag = net(op.add(net(op.multiply(even, sin)), net(op.multiply(odd, cos))))
    pair = net(op.concat([net(op.expand_dims(t, 4)) for t in (real, imag)], axis=4))
    merged = net(op.reshape(net(op.permute_dims(pair, [0, 2, 1, 3, 4])), (1, 5, 16)))
    return net.done(net.linear(merged, "o", 16, 8), [(2, "factored"), (4, "free")])


@model
def swiglu() -> MiniModel:
    net = Net()
    x = net.input("x", (4, 8))
    gate = net(nn.silu(net.linear(x, "gate", 8, 16, bias=False)))
    h = net(op.multiply(gate, net.linear(x, "up", 8, 16, bias=False)))
    return net.done(net.linear(h, "down", 16, 8), [(16, "free")])


@model
def swiglu_fused() -> MiniModel:
    """Gate and up projection in one weight: both halves move together."""
    net = Net()
    x = net.input("x", (4, 8))
    parts = net(op.split(net.linear(x, "gate_up", 8, 32), 2, axis=1))
    gate, up = (net(relax.TupleGetItem(parts, i)) for i in range(2))
    h = net(op.multiply(net(nn.silu(gate)), up))
    return net.done(net.linear(h, "down", 16, 8), [(16, "free")])


@model
def concat_branches() -> MiniModel:
    """Segments of different producers move on their own."""
    net = Net()
    x = net.input("x", (4, 8))
    a, b = net(nn.relu(net.linear(x, "a", 8, 6))), net.linear(x, "b", 8, 10)
    h = net(op.concat([a, b, x], axis=1))
    return net.done(net.linear(h, "down", 24, 8), [(6, "free"), (10, "free")])


@model
def slice_and_pad() -> MiniModel:
    """A slice cuts the axis of one weight into segments; zero padding adds two more."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.strided_slice(net.linear(x, "up", 8, 16), [1], [4], [14]))
    padded = net(nn.pad(h, [0, 0, 3, 2]))
    y = net.linear(padded, "down", 15, 8)
    expected = [(4, "segments"), (10, "segments"), (2, "segments"), (3, "segments")]
    return net.done(y, [*expected, (2, "segments")])


@model
def conv_depthwise() -> MiniModel:
    """Pointwise, depthwise and pointwise convolution with batch norm."""
    net = Net()
    x = net.input("x", (1, 4, 9))
    h = net(nn.conv1d(x, net.weight("expand", 12, 4, 1)), "expand")
    h = _batch_norm(net, h, "bn1", 12)
    h = net(nn.relu(h))
    h = net(nn.conv1d(h, net.weight("depth.w", 12, 1, 3), groups=12, padding=1), "depth")
    h = net(nn.silu(_batch_norm(net, h, "bn2", 12)))
    return net.done(net(nn.conv1d(h, net.weight("project", 4, 12, 1))), [(12, "free")])


def _batch_norm(net: Net, x: Any, name: str, channels: int) -> Any:
    vectors = [net.weight(f"{name}.{i}", channels) for i in "gbm"]
    spread = net.const(f"{name}.v", np.abs(net.rng.standard_normal(channels)) + 1)
    call = nn.batch_norm(x, *vectors, spread, axis=1, training=False)
    return net(relax.TupleGetItem(net(call), 0))


@model
def conv_grouped() -> MiniModel:
    """Three groups: whole groups move, and channels inside all groups alike."""
    net = Net()
    x = net.input("x", (1, 4, 6, 6))
    h = net(nn.conv2d(x, net.weight("a", 12, 4, 3, 3), padding=1), "a")
    h = net(nn.conv2d(h, net.weight("b", 6, 4, 3, 3), groups=3, padding=1), "b")
    y = net(nn.conv2d(h, net.weight("c", 4, 6, 1, 1)), "c")
    # Inside a group the input channels are the kernel's own second axis.
    return net.done(y, [(3, "factored"), (4, "free"), (2, "factored")])


@model
def conv_group_norm() -> MiniModel:
    net = Net()
    x = net.input("x", (2, 4, 5))
    h = net(nn.conv1d(x, net.weight("a", 8, 4, 3), padding=1), "a")
    scale = (net.weight("g", 8), net.weight("b", 8))
    h = net(nn.group_norm(h, *scale, num_groups=2, channel_axis=1, axes=[2]))
    y = net(nn.conv1d(h, net.weight("c", 4, 8, 1)))
    return net.done(y, [(2, "factored"), (4, "factored")])


@model
def conv_to_classifier() -> MiniModel:
    """Global pooling, flatten and a linear layer; flatten makes (channel x position)."""
    net = Net()
    x = net.input("x", (1, 3, 4, 4))
    h = net(nn.relu(net(nn.conv2d(x, net.weight("a", 6, 3, 3, 3), padding=1), "a")))
    h = net(nn.max_pool2d(h, (2, 2), strides=(2, 2)), "pool")
    wide = net(op.reshape(h, (1, 24)))
    pooled = net(op.reshape(net(nn.adaptive_avg_pool2d(h, 1)), (1, 6)))
    y = net(op.add(net.linear(wide, "f", 24, 5), net.linear(pooled, "g", 6, 5)))
    return net.done(y, [(6, "free")])


@model
def channel_shuffle() -> MiniModel:
    """Reshape, transpose, reshape: (2 x 6) becomes (6 x 2)."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.reshape(net.linear(x, "up", 8, 12), (4, 2, 6)))
    h = net(op.reshape(net(op.permute_dims(h, [0, 2, 1])), (4, 12)))
    return net.done(net.linear(h, "down", 12, 8), [(2, "factored"), (6, "factored")])


@model
def embedding() -> MiniModel:
    """The table's rows are indexed by data; its width is a free stream."""
    net = Net()
    tokens = net.input("tokens", (1, 5), "int64", high=20)
    x = net(op.take(net.weight("table", 20, 12), tokens, axis=0), "embed")
    x = net(nn.rms_norm(x, net.weight("g", 12), axes=[-1]), "norm")
    return net.done(net.linear(x, "head", 12, 20), [(12, "free")])


@model
def tied_embedding() -> MiniModel:
    """One table read by rows and, transposed, as output weight: uses are split."""
    net = Net()
    tokens = net.input("tokens", (1, 5), "int64", high=20)
    table = net.weight("table", 20, 12)
    x = net(op.take(table, tokens, axis=0), "embed")
    h = net(op.tanh(net.linear(x, "mix", 12, 12)))
    y = net(op.matmul(h, net(op.permute_dims(table))), "logits")
    return net.done(y, [(12, "free"), (12, "free")])


@model
def gather_constant() -> MiniModel:
    """Constant indices: the table's axis and the index's own axis are both free."""
    net = Net()
    x = net.input("x", (4, 8))
    index = net.const("index", [7, 0, 3, 3, 11], "int64")
    h = net(op.take(net.linear(x, "up", 8, 12), index, axis=1), "pick")
    return net.done(net.linear(h, "down", 5, 8), [(12, "free"), (5, "free")])


@model
def quantised_linear() -> MiniModel:
    """int8 weight with one scale and zero point per output channel."""
    net = Net()
    x = net.input("x", (4, 8))
    weight = net.const("up.q", net.rng.integers(-100, 100, (8, 16)), "int8")
    scale = net.const("up.s", np.abs(net.rng.standard_normal(16)) * 0.01 + 0.001)
    zero = net.const("up.z", net.rng.integers(-5, 5, 16), "int8")
    dense = net(op.dequantize(weight, scale, zero, axis=1), "dequantize")
    h = net(nn.relu(net(op.matmul(x, dense), "up")))
    return net.done(net.linear(h, "down", 16, 8), [(16, "free")])


@model
def reductions() -> MiniModel:
    """Sums and means over a hidden axis do not see its order; argmax does."""
    net = Net()
    x = net.input("x", (4, 8))
    a, b, c = (net.linear(x, name, 8, width) for name, width in zip("abc", (6, 7, 9), strict=True))
    total = net(op.sum(a, axis=[1], keepdims=True))
    spread = net(op.variance(b, axis=[1], keepdims=True))
    best = net(op.astype(net(op.argmax(c, axis=1, keepdims=True)), "float32"))
    y = net(op.add(net(op.add(total, spread)), best))
    return net.done(y, [(6, "free"), (7, "free")])


@model
def cumsum() -> MiniModel:
    """A scan pins its axis and lets the others pass."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.cumsum(net.linear(x, "up", 8, 16), axis=0), "over_rows")
    h = net(op.cumsum(net.linear(h, "mid", 16, 12), axis=1), "over_hidden")
    return net.done(net.linear(h, "down", 12, 8), [(16, "free")])


@model
def softmax_gate() -> MiniModel:
    """Softmax, comparison and where keep the order free."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net.linear(x, "up", 8, 16)
    gate = net(nn.softmax(h, axis=1))
    chosen = net(op.where(net(op.greater(h, net.weight("limit", 16))), gate, h))
    return net.done(net.linear(chosen, "down", 16, 8), [(16, "free")])


@model
def gemm_transposed() -> MiniModel:
    """Weights stored [N, K], as ONNX Gemm with transB has them."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.matmul(x, net(op.permute_dims(net.weight("up.w", 16, 8)))), "up")
    y = net(op.matmul(net(nn.relu(h)), net(op.permute_dims(net.weight("down.w", 8, 16)))))
    return net.done(y, [(16, "free")])


@model
def einsum() -> MiniModel:
    net = Net()
    x = net.input("x", (4, 8))
    h = net(op.einsum([x, net.weight("w", 3, 8, 10)], "bk,hkd->bhd"))
    y = net(op.einsum([h, net.weight("v", 3, 10, 8)], "bhd,hdo->bo"))
    return net.done(y, [(3, "free"), (10, "free")])


@model
def batched_experts() -> MiniModel:
    """Batched matmul with a weight per expert; experts move as well."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(nn.relu(net(op.matmul(x, net.weight("up", 3, 8, 10)), "up")))
    y = net(op.sum(net(op.matmul(h, net.weight("down", 3, 10, 8)), "down"), axis=[0]))
    return net.done(y, [(3, "free"), (10, "free")])


@model
def unknown_op() -> MiniModel:
    """An op without a rule pins what it touches and nothing else."""
    net = Net()
    x = net.input("x", (4, 8))
    h = net(nn.relu(net.linear(x, "up", 8, 16)))
    h = net(op.collapse_sum_to(net.linear(h, "mid", 16, 12), (1, 12)), "odd")
    return net.done(net.linear(h, "down", 12, 8), [(16, "free")])


@model
def shared_weight() -> MiniModel:
    """One constant used by two layers with different free axes."""
    net = Net()
    x = net.input("x", (4, 12))
    shared = net.weight("shared", 12, 12)
    h = net(op.tanh(net(op.matmul(x, shared), "first")))
    h = net(op.tanh(net(op.matmul(h, shared), "second")))
    return net.done(net.linear(h, "out", 12, 8), [(12, "free"), (12, "free")])


@model
def recurrent_state() -> MiniModel:
    """A hidden state that the same module feeds back."""
    net = Net()
    x, h = net.input("x", (1, 8)), net.input("h", (1, 16))
    mixed = net(op.add(net.linear(x, "in", 8, 16), net.linear(h, "back", 16, 16)))
    new = net(op.tanh(mixed), "h_new")
    states = (("h", "1"),)
    return net.done((net.linear(new, "out", 16, 8), new), [(16, "free")], opaque_states=states)


@model
def mamba_step() -> MiniModel:
    """Split input projection, convolution window and scan state of one Mamba step."""
    net = Net()
    x, conv, ssm = net.input("x", (1, 8)), net.input("conv", (1, 12, 4)), None
    ssm = net.input("ssm", (1, 12, 5))
    parts = net(op.split(net.linear(x, "in", 8, 24, bias=False), 2, axis=1))
    a, z = (net(relax.TupleGetItem(parts, i)) for i in range(2))
    tail = net(op.strided_slice(conv, [2], [1], [4]))
    window = net(op.concat([tail, net(op.expand_dims(a, 2))], axis=2), "conv_new")
    a = net(op.sum(net(op.multiply(window, net.weight("conv_w", 12, 4))), axis=[2]))
    a = net(nn.silu(net(op.add(a, net.weight("conv_b", 12)))))
    dbc = net(op.split(net.linear(a, "x_proj", 12, 13, bias=False), [3, 8], axis=1))
    dt, b, c = (net(relax.TupleGetItem(dbc, i)) for i in range(3))
    dt = net(op.expand_dims(net(nn.softplus(net.linear(dt, "dt_proj", 3, 12))), 2))
    decay = net(op.exp(net(op.multiply(dt, net.const("A", -np.abs(net.rng.random((12, 5))))))))
    drive = net(op.multiply(net(op.multiply(dt, net(op.expand_dims(b, 1)))),
                            net(op.expand_dims(a, 2))))  # fmt: skip
    state = net(op.add(net(op.multiply(ssm, decay)), drive), "ssm_new")
    y = net(op.squeeze(net(op.matmul(state, net(op.expand_dims(c, 2)))), [2]))
    y = net(op.add(y, net(op.multiply(a, net.weight("D", 12)))))
    y = net.linear(net(op.multiply(y, net(nn.silu(z)))), "out", 12, 8)
    states = (("conv", "1"), ("ssm", "2"))
    expected = [(12, "free"), (5, "free"), (3, "free")]
    return net.done((y, window, state), expected, opaque_states=states)


def scan_kernel(net: Net, time: int, channels: int, states: int) -> Any:
    """``h = a h + b x``, ``y = c h``: operands a (not scanned), b, x and c."""
    a, b, x, c = (Term("operand", place=i) for i in range(4))
    axes = ((True, True), (False, True), (True, False), (False, True))
    program = ScanProgram(
        (channels, states),
        [Operand(None if i == 0 else i, own) for i, own in enumerate(axes)],
        Term("Add", (Term("Mul", (a, Term("old"))), Term("Mul", (b, x)))),
        [],
        [Term("Mul", (c, Term("new")))],
        [(Term("late"), (channels,), False)],
    )
    func = selective_scan(program, time, (False,) * 4, (False,))
    return net.builder.add_func(func, "selective_scan")


def scan_over(net: Net, x: Any, width: int, name: str, channels: int, states: int) -> Any:
    """A selective scan along the rows of x [4, width] with a gate, back to the same width."""
    u = net.linear(x, f"{name}.in", width, channels)
    gate = net(nn.silu(net.linear(x, f"{name}.z", width, channels)))
    b, c = (net.linear(x, f"{name}.{part}", width, states) for part in "bc")
    decay = net.const(f"{name}.A", net.rng.random((1, channels, states)))
    start = net.const(f"{name}.h", net.rng.random((1, channels, states)))
    shaped = [net(op.reshape(t, s)) for t, s in
              ((b, (4, 1, states)), (u, (4, channels, 1)), (c, (4, 1, states)))]  # fmt: skip
    sizes = ((4, channels, 1), (1, channels, states))
    types = [relax.TensorType(size, "float32") for size in sizes]
    kernel = scan_kernel(net, 4, channels, states)
    both = net(relax.call_tir(kernel, relax.Tuple([start, decay, *shaped]), types), f"{name}.scan")
    y = net(op.reshape(net(relax.TupleGetItem(both, 0)), (4, channels)))
    return net.linear(net(op.multiply(y, gate)), f"{name}.out", channels, width)


@model
def selective_scan_kernel() -> MiniModel:
    """Channels and states of a scan move, and leave, together with the kernel's shape."""
    net = Net()
    x = net.input("x", (4, 8))
    net.start()
    return net.done(scan_over(net, x, 8, "scan", 6, 5), [(6, "free"), (5, "free")])


@model
def attention_op() -> MiniModel:
    """The fused attention op on [batch, sequence, head, channel]."""
    net = Net()
    x = net.input("x", (1, 5, 8))
    q, k, v = (net(op.reshape(net.linear(x, n, 8, 12), (1, 5, 3, 4))) for n in "qkv")
    y = net(op.reshape(net(nn.attention(q, k, v)), (1, 5, 12)))
    expected = [(3, "factored"), (4, "factored"), (4, "factored")]
    return net.done(net.linear(y, "o", 12, 8), expected)


Execute = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def compiled(mod: Any) -> Execute:
    """Compile ``main`` for LLVM; the result maps input arrays to output arrays."""
    machine = relax.VirtualMachine(tvm.compile(mod, target=TARGET), tvm.cpu())

    def execute(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in inputs]
        out = machine["main"](*tensors)
        return [item.numpy() for item in (out if isinstance(out, tvm_ffi.Array) else [out])]

    return execute


def run(mod: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compile and execute ``main`` once."""
    return compiled(mod)(inputs)
