"""Converters of transformer operators, against ONNX Runtime or the ONNX reference."""

from __future__ import annotations

import numpy as np
import pytest
from converter_check import MS, array_model, check, run_imported, run_ort, run_reference
from onnx import helper

from icd_tvm._tvm import apply_pass, relax, tvm
from icd_tvm.errors import UnsupportedOpError
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.fuse_attention import FuseAttention
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.tir_schedules.target import host_target

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# -- norms


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_skip_layer_normalization(beta, bias):
    names = ["x", "s", "g", "b" if beta else "", "c" if bias else ""]
    node = helper.make_node("SkipLayerNormalization", names, ["y"], domain=MS, epsilon=1e-3)
    weights = {"g": normal(16), "b": normal(16), "c": normal(16)}
    check(node, {"x": normal(2, 5, 16), "s": normal(2, 5, 16)}, weights=_used(weights, names))


def _used(weights, names):
    return {name: array for name, array in weights.items() if name in names}


@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_skip_simplified_layer_normalization_returns_the_sum(shape, bias):
    names = ["x", "s", "g", *(["c"] if bias else [])]
    node = helper.make_node(
        "SkipSimplifiedLayerNormalization", names, ["y", "", "", "total"], domain=MS
    )
    weights = _used({"g": normal(16), "c": normal(16)}, names)
    check(node, {"x": normal(*shape), "s": normal(*shape)}, ["y", "total"], weights)


@pytest.mark.parametrize("axis", [-1, 1])
def test_simplified_layer_normalization_without_a_domain(axis):
    shape = (2, 5, 16)
    node = helper.make_node(
        "SimplifiedLayerNormalization", ["x", "g"], ["y"], axis=axis, epsilon=1e-4, name="norm"
    )
    imported = check(node, {"x": normal(*shape)}, weights={"g": normal(*shape[axis:])})
    assert next(b.var.name for b in imported.mod["main"].body.blocks[0].bindings) == "norm"


# -- rotary embedding


def angles(positions: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    table = np.arange(positions)[:, None] / 50.0 ** (np.arange(half) / half)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("layout", ["rows", "heads"])
@pytest.mark.parametrize("offset", [False, True])
def test_contrib_rotary_embedding(interleaved, layout, offset):
    batch, heads, length, size = 2, 3, 4, 8
    shape = (batch, heads, length, size) if layout == "heads" else (batch, length, heads * size)
    positions = np.array([2]) if offset else RNG.integers(0, 10, (batch, length))
    cos, sin = angles(10, size // 2)
    node = helper.make_node(
        "RotaryEmbedding", ["x", "p", "c", "s"], ["y"], domain=MS, interleaved=interleaved
    )
    check(node, {"x": normal(*shape), "p": positions}, weights={"c": cos, "s": sin})


@pytest.mark.parametrize("interleaved", [0, 1])
def test_partial_contrib_rotary_embedding(interleaved):
    cos, sin = angles(10, 2)
    node = helper.make_node(
        "RotaryEmbedding",
        ["x", "p", "c", "s"],
        ["y"],
        domain=MS,
        interleaved=interleaved,
        num_heads=3,
        rotary_embedding_dim=4,
    )
    feeds = {"x": normal(2, 4, 24), "p": RNG.integers(0, 10, (2, 4))}
    check(node, feeds, weights={"c": cos, "s": sin})


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("width", [0, 4])
def test_standard_rotary_embedding(interleaved, indexed, width):
    cos, sin = angles(10, (width or 8) // 2)
    positions = RNG.integers(0, 10, (2, 5))
    feeds = {"x": normal(2, 5, 24)}
    weights = {"c": cos, "s": sin} if indexed else {"c": cos[positions], "s": sin[positions]}
    if indexed:
        feeds["p"] = positions
    node = helper.make_node(
        "RotaryEmbedding",
        ["x", "c", "s", *(["p"] if indexed else [])],
        ["y"],
        interleaved=interleaved,
        num_heads=3,
        rotary_embedding_dim=width,
    )
    check(node, feeds, weights=weights, opset=23, run=run_reference)


def test_rotary_pairs_stay_together():
    cos, sin = angles(10, 4)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="query"),
        helper.make_node("RotaryEmbedding", ["q", "p", "c", "s"], ["r"], domain=MS, num_heads=2),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="out"),
    ]
    feeds = {"x": normal(1, 3, 6), "p": np.arange(3)[None, :]}
    weights = {"w": normal(6, 16), "v": normal(16, 6), "c": cos, "s": sin}
    imported = check(nodes, feeds, weights=weights)
    groups = find_axis_groups(imported.mod["main"])
    [pair] = [g for g in groups.atomic if g.free and g.size == 4]
    axes = {g.id: g.constraint for g in groups.composites if pair.id in g.factors}
    assert axes == {"w:1": "pairs"}


def test_a_cache_of_the_wrong_width_is_refused():
    cos, sin = angles(10, 3)
    node = helper.make_node(
        "RotaryEmbedding", ["x", "c", "s", "p"], ["y"], name="rope", rotary_embedding_dim=4
    )
    feeds = {"x": normal(2, 3, 5, 8), "p": np.zeros((2, 5), np.int64)}
    model = array_model([node], feeds, ["y"], {"c": cos, "s": sin}, opset=23)
    with pytest.raises(UnsupportedOpError, match=r"rope.*cache of 3 angles"):
        import_onnx(model)


# -- gated activations


@pytest.mark.parametrize("alpha", [None, 1.0, 1.5])
def test_swish_and_swiglu(alpha):
    attrs = {} if alpha is None else {"alpha": alpha}
    node = helper.make_node("Swish", ["a"], ["y"], **attrs)
    check(node, {"a": normal(2, 3, 8)}, opset=24, run=run_reference)
    node = helper.make_node("SwiGLU", ["a", "b"], ["y"], **attrs)
    check(node, {"a": normal(2, 8), "b": normal(2, 8)}, opset=28, run=run_reference)


@pytest.mark.parametrize(("op", "bias"), [("FastGelu", 0), ("FastGelu", 1), ("BiasGelu", 1)])
def test_contrib_gelus(op, bias):
    node = helper.make_node(op, ["x", *["b"] * bias], ["y"], domain=MS)
    check(node, {"x": normal(2, 3, 8)}, weights=_used({"b": normal(8)}, node.input))


@pytest.mark.parametrize("attrs", [{}, {"alpha": 1.0}])
def test_quick_gelu(attrs):
    check(helper.make_node("QuickGelu", ["x"], ["y"], domain=MS, **attrs), {"x": normal(3, 8)})


# -- attention of the standard domain

Q_HEADS, KV_HEADS, SIZE = 4, 2, 8


def standard_attention(names, outputs=("y",), **attrs):
    return helper.make_node("Attention", names, list(outputs), name="attn", **attrs)


def qkv(queries=5, keys=7, rows=False, kv_heads=KV_HEADS):
    if rows:
        heads = {"q_num_heads": Q_HEADS, "kv_num_heads": kv_heads}
        shapes = [(2, queries, Q_HEADS * SIZE), *[(2, keys, kv_heads * SIZE)] * 2]
    else:
        heads = {}
        shapes = [(2, Q_HEADS, queries, SIZE), *[(2, kv_heads, keys, SIZE)] * 2]
    return {n: normal(*shape) for n, shape in zip("qkv", shapes, strict=True)}, heads


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [0, 1])
def test_attention(rows, kv_heads, is_causal):
    feeds, heads = qkv(rows=rows, kv_heads=kv_heads)
    node = standard_attention(["q", "k", "v"], is_causal=is_causal, **heads)
    check(node, feeds, opset=23, run=run_reference)


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 1, 7), (2, 4, 5, 7), (1, 1, 5, 7)])
@pytest.mark.parametrize("dtype", ["bool", "float32"])
@pytest.mark.parametrize("is_causal", [0, 1])
def test_attention_masks(shape, dtype, is_causal):
    feeds, heads = qkv(rows=True)
    allowed = RNG.random(shape) > 0.4
    allowed[..., -1, :] = False
    feeds["m"] = allowed if dtype == "bool" else np.where(allowed, normal(*shape), -np.inf)
    feeds["m"] = feeds["m"].astype(dtype)
    node = standard_attention(["q", "k", "v", "m"], is_causal=is_causal, **heads)
    check(node, feeds, opset=24, run=run_reference)


def test_attention_with_a_short_mask():
    feeds, heads = qkv()
    feeds["m"] = RNG.random((5, 6)) > 0.3
    check(standard_attention(["q", "k", "v", "m"], **heads), feeds, opset=24, run=run_reference)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_attention_stages(mode):
    feeds, heads = qkv()
    feeds["m"] = normal(5, 7)
    outputs = ["y", "", "", "stage"]
    # The reference caps the raw scores of mode 0 too, against the text of the specification.
    attrs = {"qk_matmul_output_mode": mode, "softcap": 2.0 if mode else 0.0, "scale": 0.3}
    node = standard_attention(["q", "k", "v", "m"], outputs, **attrs, **heads)
    check(node, feeds, ["y", "stage"], opset=24, run=run_reference)


@pytest.mark.parametrize("is_causal", [0, 1])
def test_attention_with_a_cache(is_causal):
    feeds, heads = qkv(queries=3, keys=3, rows=True)
    feeds |= {"pk": normal(2, KV_HEADS, 4, SIZE), "pv": normal(2, KV_HEADS, 4, SIZE)}
    names = ["q", "k", "v", "", "pk", "pv"]
    outputs = ["y", "nk", "nv"]
    node = standard_attention(names, outputs, is_causal=is_causal, **heads)
    check(node, feeds, outputs, opset=24, run=run_reference)


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"is_causal": 1},
        {"left_window_size": 2},
        {"left_window_size": 2, "right_window_size": 1},
    ],
)
@pytest.mark.parametrize("lengths", [False, True])
def test_attention_windows_and_lengths(attrs, lengths):
    feeds, heads = qkv()
    names = ["q", "k", "v"]
    if lengths:
        feeds["n"] = np.array([6, 3], np.int64)
        names += ["", "", "", "n"]
    check(standard_attention(names, **attrs, **heads), feeds, opset=25, run=run_reference)


def test_attention_equals_onnx_runtime_and_is_fused():
    feeds, heads = qkv(queries=8, keys=8, rows=True, kv_heads=Q_HEADS)
    imported = check(standard_attention(["q", "k", "v"], scale=0.5, **heads), feeds, opset=23)
    fuse = FuseAttention(host_target())
    apply_pass(fuse, imported.mod)
    assert fuse.fused


def test_half_precision_attention_sums_in_single():
    feeds, heads = qkv()
    feeds = {name: array.astype(np.float16) for name, array in feeds.items()}
    node = standard_attention(["q", "k", "v"], **heads)
    check(node, feeds, opset=23, dtypes={"y": "float16"}, run=run_reference, rel=2e-3)


# -- contrib attention


def contrib_attention(names, outputs=("y",), **attrs):
    return helper.make_node(
        "Attention", names, list(outputs), domain=MS, name="attn", num_heads=4, **attrs
    )


@pytest.mark.parametrize("mask", ["none", "rows", "lengths", "square"])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_contrib_attention(mask, unidirectional):
    batch, length, width = 2, 6, 32
    feeds = {"x": normal(batch, length, 16)}
    names = ["x", "w", "b"]
    if mask != "none":
        rows = np.array([[1] * 6, [1, 1, 1, 1, 0, 0]], np.int32)
        square = np.repeat(rows[:, None, :], length, axis=1)
        lengths = np.array([6, 4], np.int32)
        feeds["m"] = {"rows": rows, "lengths": lengths, "square": square}[mask]
        names.append("m")
    weights = {"w": normal(16, 3 * width), "b": normal(3 * width)}
    node = contrib_attention(names, unidirectional=unidirectional)
    check(node, feeds, weights=weights)


def test_contrib_attention_with_uneven_sizes_bias_and_scale():
    node = contrib_attention(["x", "w", "b", "", "", "e"], qkv_hidden_sizes=[32, 32, 48], scale=0.2)
    weights = {"w": normal(16, 112), "b": normal(112)}
    check(node, {"x": normal(2, 6, 16), "e": normal(1, 4, 6, 6)}, weights=weights)


@pytest.mark.parametrize("unidirectional", [0, 1])
def test_contrib_attention_with_a_cache(unidirectional):
    node = contrib_attention(
        ["x", "w", "b", "", "p"], ["y", "present"], unidirectional=unidirectional
    )
    weights = {"w": normal(16, 96), "b": normal(96)}
    feeds = {"x": normal(2, 3, 16), "p": normal(2, 2, 4, 5, 8)}
    check(node, feeds, ["y", "present"], weights)


def multi_head(names, outputs=("y",), **attrs):
    return helper.make_node(
        "MultiHeadAttention", names, list(outputs), domain=MS, name="mha", num_heads=4, **attrs
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", ["none", "rows", "lengths", "square"])
def test_multi_head_attention(bias, mask):
    feeds = {"q": normal(2, 5, 32), "k": normal(2, 7, 32), "v": normal(2, 7, 48)}
    rows = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]], np.int32)
    masks = {
        "rows": rows,
        "lengths": np.array([7, 4], np.int32),
        "square": np.repeat(rows[:, None, :], 5, axis=1),
    }
    if mask != "none":
        feeds["m"] = masks[mask]
    names = ["q", "k", "v", "b" if bias else "", "m" if mask != "none" else ""]
    check(multi_head(names), feeds, weights=_used({"b": normal(112)}, names))


def test_multi_head_attention_packed():
    # ONNX Runtime's CPU kernel takes separate operands only.
    parts = [normal(2, 5, 4, 8) for _ in range(3)]
    rows = {n: part.reshape(2, 5, 32) for n, part in zip("qkv", parts, strict=True)}
    [wanted] = run_ort(array_model([multi_head(["q", "k", "v"])], rows, ["y"]), rows)
    for node, feeds in (
        (multi_head(["q"]), {"q": np.stack(parts, axis=3)}),
        (multi_head(["q", "kv"]), {"q": rows["q"], "kv": np.stack(parts[1:], axis=3)}),
    ):
        [found] = run_imported(import_onnx(array_model([node], feeds, ["y"])), feeds)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_multi_head_attention_with_cached_heads_of_an_encoder():
    feeds = {"q": normal(2, 5, 32), "k": normal(2, 4, 7, 8), "v": normal(2, 4, 7, 8)}
    check(multi_head(["q", "k", "v"], scale=0.3), feeds)


def test_multi_head_attention_with_past_and_bias():
    feeds = {
        **{name: normal(2, 3, 32) for name in "qkv"},
        "e": normal(1, 4, 3, 8),
        "pk": normal(2, 4, 5, 8),
        "pv": normal(2, 4, 5, 8),
    }
    names = ["q", "k", "v", "", "", "e", "pk", "pv"]
    outputs = ["y", "nk", "nv"]
    check(multi_head(names, outputs, unidirectional=1), feeds, outputs)


# -- grouped-query attention with a cache


def gqa(names, **attrs):
    return helper.make_node(
        "GroupQueryAttention",
        names,
        ["y", "nk", "nv"],
        name="gqa",
        domain=MS,
        num_heads=4,
        kv_num_heads=2,
        **attrs,
    )


GQA_NAMES = ["q", "k", "v", "pk", "pv", "n", "t"]


def gqa_case(batch, queries, past, lengths, total, size=8):
    """Feeds and weights; ``lengths`` counts all tokens of each sequence."""
    feeds = {
        "q": normal(batch, queries, 4 * size),
        "k": normal(batch, queries, 2 * size),
        "v": normal(batch, queries, 2 * size),
        "pk": normal(batch, 2, past, size),
        "pv": normal(batch, 2, past, size),
        "n": np.array(lengths, np.int32) - 1,
    }
    return feeds, {"t": np.array(total, np.int32)}


@pytest.mark.parametrize(
    ("batch", "queries", "past", "lengths", "total"),
    [
        (2, 1, 6, [7, 7], 7),
        (2, 1, 6, [7, 4], 7),
        (1, 1, 9, [6], 6),
        (1, 3, 4, [7], 7),
    ],
)
@pytest.mark.parametrize("window", [-1, 3])
def test_gqa_decoding(batch, queries, past, lengths, total, window):
    feeds, weights = gqa_case(batch, queries, past, lengths, total)
    node = gqa(GQA_NAMES, local_window_size=window, scale=0.4)
    check(node, feeds, ["y", "nk", "nv"], weights)


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gqa_prompt(window, softcap):
    feeds, weights = gqa_case(2, 5, 0, [5, 5], 5)
    node = gqa(["q", "k", "v", "", "", "n", "t"], local_window_size=window, softcap=softcap)
    feeds = {name: feeds[name] for name in ("q", "k", "v", "n")}
    check(node, feeds, ["y", "nk", "nv"], weights)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("prompt", [False, True])
def test_gqa_rotates_packed_heads(interleaved, prompt):
    queries, past, total = (5, 0, 5) if prompt else (1, 6, 7)
    lengths = [5, 5] if prompt else [7, 4]
    feeds, weights = gqa_case(2, queries, past, lengths, total, size=16)
    feeds["q"] = normal(2, queries, 8 * 16)
    used = ["q", "n"] if prompt else ["q", "pk", "pv", "n"]
    feeds = {name: feeds[name] for name in used}
    cos, sin = angles(16, 8)
    weights |= {"c": cos, "s": sin}
    names = ["q", "", "", *(["", ""] if prompt else ["pk", "pv"]), "n", "t", "c", "s"]
    node = gqa(names, do_rotary=1, rotary_interleaved=interleaved)
    check(node, feeds, ["y", "nk", "nv"], weights)


def test_gqa_needs_a_constant_total():
    feeds, weights = gqa_case(1, 1, 4, [5], 5)
    model = array_model([gqa(GQA_NAMES)], {**feeds, **weights}, ["y", "nk", "nv"])
    with pytest.raises(UnsupportedOpError, match=r"'gqa'.*total sequence length"):
        import_onnx(model)
    imported = import_onnx(model, constants={"t": np.array(5, np.int32)})
    assert [spec.name for spec in imported.inputs] == list(feeds)


# -- together


def test_a_quantised_decoder_layer_is_lowered_like_any_other():
    width, hidden, length = 32, 64, 6
    cos, sin = angles(16, 8)
    weights = {f"g{i}": normal(width) for i in range(3)}
    weights |= {"t": np.array(length, np.int32), "c": cos, "s": sin}

    def project(source, target, k, n):
        blocks = k // 16
        weights[f"{target}.b"] = RNG.integers(0, 256, (n, blocks, 8)).astype(np.uint8)
        weights[f"{target}.s"] = (0.1 * RNG.random((n, blocks))).astype(np.float32)
        names = [source, f"{target}.b", f"{target}.s"]
        return helper.make_node(
            "MatMulNBits", names, [target], name=target, domain=MS, K=k, N=n, bits=4, block_size=16
        )

    def norm(names, outputs):
        return helper.make_node("SkipSimplifiedLayerNormalization", names, outputs, domain=MS)

    attention = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "", "", "n", "t", "c", "s"],
        ["mixed", "nk", "nv"],
        domain=MS,
        num_heads=4,
        kv_num_heads=2,
        do_rotary=1,
    )
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", "g0"], ["a"], axis=-1),
        project("a", "q", width, 64),
        project("a", "k", width, 32),
        project("a", "v", width, 32),
        attention,
        project("mixed", "o", 64, width),
        norm(["x", "o", "g1"], ["b", "", "", "sum"]),
        project("b", "gate", width, hidden),
        project("b", "up", width, hidden),
        helper.make_node("QuickGelu", ["gate"], ["open"], domain=MS, alpha=1.0),
        helper.make_node("Mul", ["open", "up"], ["h"]),
        project("h", "down", hidden, width),
        norm(["sum", "down", "g2"], ["y"]),
    ]
    feeds = {"x": normal(1, length, width), "n": np.array([length - 1], np.int32)}
    outputs = ["y", "nk", "nv"]
    model = array_model(nodes, feeds, outputs, weights)
    imported = import_onnx(model)
    machine = relax.VirtualMachine(build_cpu(imported.mod, host_target(1)), tvm.cpu())
    found = machine["main"](*[tvm.runtime.tensor(feeds[s.name]) for s in imported.inputs])
    for own, wanted in zip(found, run_ort(model, feeds), strict=True):
        np.testing.assert_allclose(own.numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    groups = find_axis_groups(imported.mod["main"])
    [units] = [g for g in groups.atomic if g.size == hidden and g.free]
    assert {"gate.b", "up.b", "down.b"} <= {use.name for use in units.consts}


@pytest.mark.parametrize("op", ["RotaryEmbedding", "MultiHeadAttention", "MatMulNBits"])
def test_namesakes_of_other_domains_are_refused(op):
    node = helper.make_node(op, ["x"], ["y"], name="n", domain="com.example")
    model = array_model([node], {"x": normal(2, 3, 8)}, ["y"])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(UnsupportedOpError, match=rf"{op} \(domain com.example"):
        import_onnx(model)


def test_half_precision_norms():
    feeds = {name: normal(2, 5, 16).astype(np.float16) for name in "xs"}
    node = helper.make_node("SkipSimplifiedLayerNormalization", ["x", "s", "g"], ["y"], domain=MS)
    weights = {"g": normal(16).astype(np.float16)}
    check(node, feeds, weights=weights, dtypes={"y": "float16"}, rel=2e-3)
