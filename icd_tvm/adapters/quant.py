"""Quantise one weight: array in, codes and metadata out."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm.adapters.arrays import Array, Bool, Float64, as_matrix
from icd_tvm.adapters.calibration import Calibration, as_calibration, output_energy
from icd_tvm.adapters.quant_activations import (
    Histogram,
    activation_scale,
    fold_scales,
    migrate_scales,
    observe,
)
from icd_tvm.adapters.quant_compensate import Coder
from icd_tvm.adapters.quant_scales import FORMATS
from icd_tvm.adapters.quant_spec import QuantSpec, make_quant_spec, parse_quant
from icd_tvm.adapters.quant_tensor import (
    QuantizedTensor,
    column_blocks,
    pack_int4,
    unpack_int4,
)
from icd_tvm.errors import ConfigError

__all__ = [
    "Histogram",
    "QuantSpec",
    "QuantizedTensor",
    "activation_scale",
    "apply_quant",
    "fold_scales",
    "migrate_scales",
    "observe",
    "pack_int4",
    "parse_quant",
    "quantize",
    "unpack_int4",
]


def apply_quant(
    tensor: Array,
    dtype: str = "int8",
    method: str = "ptq-minmax",
    *,
    granularity: str | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    mixed: str | None = None,
    calibration: Array | Calibration | None = None,
    compensate: bool = False,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Quantise a weight of ``y = x @ W``.

    Parameters
    ----------
    tensor : array, shape [K, N], real
        The weight; not modified.
    dtype : str
        ``int8``, ``int4``, ``fp8_e4m3``, ``fp8_e5m2``, ``bf16`` or ``none``; or a whole request
        such as ``int4:group128:compensate`` (:func:`parse_quant`), to which the other
        parameters add.
    method : {"ptq-minmax", "ptq-kld", "ptq-mse"}
        How the range is chosen; see :func:`icd_tvm.adapters.quant_scales.block_scales`.
    granularity : str, optional
        ``tensor``, ``channel`` (one scale a column) or ``group:G`` (one a column and G rows; the
        last group may be shorter). When not given, ``group:128`` for int4, else ``channel``.
    symmetric : bool
        Whether zero points are 0.
    act_order : bool
        Cut groups from the rows by falling input energy, and compensate in that order (needs
        ``calibration``). The row order that makes the groups contiguous is returned, so that a
        layout pass can absorb it in the producer.
    mixed : str, optional
        ``salient:R`` keeps the share R of the rows, those that carry most output energy, in
        floating point.
    calibration : array or Calibration, optional
        X [tokens, K], column norms [K], or Gram matrix [K, K].
    compensate : bool
        Let later rows absorb the rounding error of earlier ones (needs X or a Gram matrix).

    Returns
    -------
    quantized : QuantizedTensor
    meta : dict
        JSON-serialisable: ``kind, dtype, method, granularity, symmetric, spec, shape, params,
        loss, bytes_before, bytes_after, format, groups, delta_layout, delta_packing, skipped,
        why``. ``delta_layout`` says whether the transform changed what a re-ordering can exploit,
        ``delta_packing`` whether the size of an element changed. A weight that cannot be
        quantised stays as it is, with a warning and the reason in ``why``; compensation that
        fails or does not help falls back to plain rounding, with a warning and the reason in
        ``params``.

    Raises
    ------
    ConfigError
        An unknown name, a number out of range, parts that exclude each other, or missing
        calibration.
    ShapeError
        Not a matrix, or calibration of another length.
    NonFiniteError
        NaN or infinity inside.

    Notes
    -----
    Frantar et al., "GPTQ", 2022 (compensation, act-order); Dettmers et al., "LLM.int8()", 2022
    (salient rows). fp8 is rounded with ml_dtypes: to nearest, ties to even.
    """
    spec = make_quant_spec(dtype, method, granularity, symmetric, act_order, mixed, compensate)
    return quantize(tensor, spec, calibration)


def quantize(
    tensor: Array, spec: QuantSpec, calibration: Array | Calibration | None = None
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Quantise a weight as a parsed request says; see :func:`apply_quant`."""
    if spec.activations != "float":
        raise ConfigError(f"{spec} quantises activations too", "the pass ApplyQuant does that")
    weight = as_matrix(tensor)
    data = as_calibration(calibration, weight.shape[0])
    _check_calibration(spec, data)
    why = _why_not(spec, weight)
    if why:
        if spec.dtype != "none":
            warnings.warn(f"{spec} skipped: {why}", RuntimeWarning, stacklevel=3)
        kept = _unchanged(weight)
        return kept, _meta(spec, weight, kept, data, {}, why)
    dense = weight.astype(np.float64)
    salient = _salient(dense, spec, data)
    coder = _coder(dense, weight, spec, data, salient)
    params = _round(coder, spec, data)
    order = coder.order if spec.act_order and spec.granularity == "group" else None
    out = QuantizedTensor(
        dtype=spec.dtype,
        codes=coder.codes,
        scales=coder.scales,
        zero_points=coder.zeros,
        g_idx=coder.g_idx,
        source_dtype=weight.dtype,
        order=None if order is None else order.astype(np.int32),
        salient=salient if salient.any() else None,
        salient_values=coder.salient_rows(),
    )
    return out, _meta(spec, weight, out, data, params, "")


def _check_calibration(spec: QuantSpec, data: Calibration | None) -> None:
    if spec.compensate and (data is None or data.gram is None):
        raise ConfigError(
            "compensation needs a Gram matrix", "pass calibration X [tokens, K] or [K, K]"
        )
    if spec.act_order and data is None:
        raise ConfigError("act-order needs calibration", "pass X [tokens, K] or norms [K]")


def _why_not(spec: QuantSpec, weight: Array) -> str:
    if spec.dtype == "none":
        return "nothing was asked for"
    if weight.dtype.kind in "iu":
        return f"the weight is {weight.dtype}: integer codes already"
    if _largest(weight) > float(np.finfo(np.float32).max):
        return "the weight exceeds the range of float32 scales"
    return ""


def _largest(weight: Array) -> float:
    return max(float(weight.max()), -float(weight.min()))


def _salient(dense: Float64, spec: QuantSpec, data: Calibration | None) -> Bool:
    """Mark the rows that carry most output energy: by their input or by stretching the scales."""
    count = int(np.ceil(round(len(dense) * spec.salient, 6)))
    mask = np.zeros(len(dense), dtype=np.bool_)
    if not count:
        return mask
    carried = np.sum(dense**2, axis=1) * (1.0 if data is None else data.energy)
    mask[np.argsort(-carried, kind="stable")[:count]] = True
    return mask


def _coder(
    dense: Float64, weight: Array, spec: QuantSpec, data: Calibration | None, salient: Bool
) -> Coder:
    energy = None if data is None else data.energy
    return Coder(
        dense,
        FORMATS[spec.dtype],
        spec.method,
        spec.symmetric,
        spec.granularity,
        spec.group,
        _row_order(spec, energy, salient),
        energy,
        salient,
        _float_dtype(weight),
    )


def _row_order(spec: QuantSpec, energy: Float64 | None, salient: Bool) -> npt.NDArray[np.intp]:
    if not spec.act_order or energy is None:
        return np.arange(salient.size)
    # Salient rows go first: one run of floats, then the groups.
    return np.lexsort((-energy, ~salient))


def _float_dtype(weight: Array) -> np.dtype[Any]:
    if weight.dtype.itemsize == 2:
        return weight.dtype
    fits = _largest(weight) <= float(np.finfo(np.float16).max)
    return np.dtype(np.float16 if fits else np.float32)


def _round(coder: Coder, spec: QuantSpec, data: Calibration | None) -> dict[str, Any]:
    """Round in place; return what became of the compensation."""
    plain = coder.round_plain()
    if not spec.compensate or data is None or data.gram is None:
        return {"compensated": False}
    scales, zeros = coder.scales.copy(), coder.zeros.copy()
    codes, floats = coder.codes.copy(), coder.floats.copy()
    before = output_energy(data.gram, plain - coder.weight)
    try:
        after = output_energy(data.gram, coder.round_compensated(data.gram) - coder.weight)
        if after <= before:
            return {"compensated": True}
        why = f"compensation would raise the output error {(after / before) ** 0.5:.3f} times"
    except np.linalg.LinAlgError as error:
        why = f"the Gram matrix is not positive definite: {error}"
    warnings.warn(f"{spec} without compensation: {why}", RuntimeWarning, stacklevel=4)
    coder.scales, coder.zeros, coder.codes, coder.floats = scales, zeros, codes, floats
    return {"compensated": False, "compensation": why}


def _unchanged(weight: Array) -> QuantizedTensor:
    return QuantizedTensor(
        dtype="none",
        codes=weight.copy(),
        scales=np.ones((1, 1), np.float32),
        zero_points=np.zeros((1, 1), np.int8),
        g_idx=np.zeros(weight.shape[0], np.int32),
        source_dtype=weight.dtype,
    )


def _meta(
    spec: QuantSpec,
    weight: Array,
    out: QuantizedTensor,
    data: Calibration | None,
    params: dict[str, Any],
    skipped: str,
) -> dict[str, Any]:
    scattered = out.order is not None
    return {
        "kind": "quant",
        "dtype": out.dtype,
        "method": spec.method,
        "granularity": f"group:{spec.group}" if spec.group else spec.granularity,
        "symmetric": spec.symmetric,
        "spec": str(spec),
        "shape": list(weight.shape),
        "params": {"act_order": spec.act_order, "salient": spec.salient, **params},
        "loss": {"frobenius": 0.0, "output": None} if skipped else _loss(weight, out, data),
        "bytes_before": int(weight.nbytes),
        "bytes_after": out.nbytes,
        "format": _format(out),
        "groups": _groups(out),
        "delta_layout": scattered or out.salient is not None,
        "delta_packing": not skipped,
        "skipped": bool(skipped),
        "why": skipped or _layout_reason(out),
    }


def _loss(weight: Array, out: QuantizedTensor, data: Calibration | None) -> dict[str, float | None]:
    lost = total = 0.0
    for columns in column_blocks(*weight.shape):
        before = weight[:, columns].astype(np.float64)
        lost += float(np.sum((out.dequantize(np.float64, columns) - before) ** 2))
        total += float(np.sum(before**2))
    output = (
        data.output_error(weight.astype(np.float64), out.dequantize(np.float64)) if data else None
    )
    return {"frobenius": float(np.sqrt(lost / total)) if total else 0.0, "output": output}


def _format(out: QuantizedTensor) -> str:
    if out.dtype == "none":
        return "dense"
    parts = [f"{out.dtype} codes", *(["scales"] if FORMATS[out.dtype].is_scaled else [])]
    parts += ["zero points"] if out.zero_points.any() else []
    parts += ["row order"] if out.order is not None else []
    parts += ["salient rows"] if out.salient is not None else []
    return ", ".join(parts)


def _groups(out: QuantizedTensor) -> dict[str, Any]:
    found: dict[str, Any] = {"count": len(out.scales)}
    if out.order is not None:
        found["order"] = out.order.tolist()
    if out.salient is not None:
        found["salient_rows"] = np.flatnonzero(out.salient).tolist()
    return found


def _layout_reason(out: QuantizedTensor) -> str:
    if out.order is not None:
        return "rows of one scale group are scattered: an order makes them contiguous"
    if out.salient is not None:
        return "rows in floating point are scattered: an order makes them contiguous"
    return "every row is coded alike: no order helps, only the packing follows the dtype"
