"""How a GGUF file says that positions are scaled, as the `rope_parameters` of a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from layerpack.convert.gguf.stated import Stated
from layerpack.formats.errors import UnsupportedError

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
POSITION_TENSORS = frozenset({FREQUENCIES, LONG, SHORT})
_DEFAULT_THETA = 10_000.0
_HIGH = 4.0  # of Llama 3.1 to 3.3
_NEAR = 1e-4  # of factors that went through float32


def rope_parameters(
    stated: Stated,
    tensors: Mapping[str, Any],
    *,
    head_dim: int,
    partly: bool,
    max_tokens: int,
    where: str,
) -> dict[str, Any]:
    """The fields of config.json about rotary embeddings. Raises UnsupportedError.

    `partly`: models whose heads may be rotated in part. `max_tokens` is the model's context.
    """
    theta = float(stated.take("rope.freq_base", _DEFAULT_THETA))
    rotated = int(stated.take("rope.dimension_count", head_dim))
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if partly:
        base["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise UnsupportedError(f"{where}: rotates {rotated} of {head_dim} dimensions of a head")
    original = stated.take("rope.scaling.original_context_length")
    attention_factor = stated.take("rope.scaling.attn_factor")
    if LONG in tensors or SHORT in tensors:
        return _long(base, tensors, original, attention_factor, max_tokens, where)
    if FREQUENCIES in tensors:
        base |= _llama3(tensors[FREQUENCIES], theta, where)
    else:
        base |= _scaling(stated, original, attention_factor, where)
    if stated.architecture == "gemma3":
        # llama.cpp knows the local layers' frequencies where no key states them.
        local = float(stated.take("rope.freq_base_swa", _DEFAULT_THETA))
        sliding = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": base, "sliding_attention": sliding}}
    return {"rope_parameters": base}


def _scaling(stated: Stated, original: Any, attention_factor: Any, where: str) -> dict[str, Any]:
    """Linear scaling, YaRN (https://arxiv.org/abs/2309.00071), or none."""
    factor = float(stated.take("rope.scaling.factor", stated.take("rope.scale_linear", 0.0)))
    # A factor alone is linear, as files have it that are older than the key of the kind.
    kind = str(stated.take("rope.scaling.type", "linear" if factor > 1 else "none"))
    if kind == "none" or (kind == "linear" and not factor):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(f"{where}: scales positions by {kind!r}, which is not supported")
    more = {
        "original_max_position_embeddings": original and int(original),
        "attention_factor": attention_factor,
        "beta_fast": stated.take("rope.scaling.yarn_beta_fast"),
        "beta_slow": stated.take("rope.scaling.yarn_beta_slow"),
    }
    known = {key: value for key, value in more.items() if value is not None}
    return {"rope_type": "yarn", "factor": factor, **known}


def _long(
    base: dict[str, Any],
    tensors: Mapping[str, Any],
    original: Any,
    attention_factor: Any,
    max_tokens: int,
    where: str,
) -> dict[str, Any]:
    """LongRoPE's two sets of factors are tensors; https://arxiv.org/abs/2402.13753."""
    if LONG not in tensors or SHORT not in tensors or original is None:
        raise UnsupportedError(f"{where}: states LongRoPE without its factors or first context")
    base |= {
        "rope_type": "longrope",
        "long_factor": tensors[LONG].astype(float).tolist(),
        "short_factor": tensors[SHORT].astype(float).tolist(),
        "original_max_position_embeddings": int(original),
    }
    times = max_tokens / int(original)
    usual = math.sqrt(1 + math.log(times) / math.log(int(original))) if times > 1 else 1.0
    if attention_factor is not None and not math.isclose(attention_factor, usual, rel_tol=_NEAR):
        base["attention_factor"] = float(attention_factor)
    return {"rope_parameters": base, "original_max_position_embeddings": int(original)}


def _llama3(factors: np.ndarray[Any, Any], theta: float, where: str) -> dict[str, Any]:
    """Llama 3.1's four numbers, out of the divisors of frequencies that they were turned into.

    Between a part that is left alone and one that is divided by the factor, 1 / divisor goes along
    a straight line over the frequency; the line tells both ends of that part.
    """
    if np.all(factors == 1):
        return {}
    count = len(factors)
    frequencies = theta ** (-np.arange(count) / count) / (2 * math.pi)
    factor = float(factors.max())
    between = (factors > 1) & (factors < factor)
    smooth = (1 / factors[between].astype(float) - 1 / factor) / (1 - 1 / factor)
    ends = []
    if len(smooth) > 1:
        slope, start = np.polyfit(frequencies[between], smooth, 1)
        ends.append((-slope / start, 1 - 1 / start))
    elif len(smooth) == 1:  # one place tells one end: the other as all known models have it
        ends.append((float((1 + smooth[0] * (_HIGH - 1)) / frequencies[between][0]), _HIGH))
    else:
        ends.append((1 / frequencies[factors == factor].max(), _HIGH))
    ends += [(float(round(original)), round(high, 3)) for original, high in ends]
    for original, high in reversed(ends):
        found = {
            "rope_type": "llama3",
            "factor": round(factor, 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(high),
            "original_max_position_embeddings": int(original) if original % 1 == 0 else original,
        }
        if np.allclose(_divisors(frequencies, found), factors, rtol=_NEAR):
            return found
    raise UnsupportedError(
        f"{where}: its {FREQUENCIES} are not those of Llama 3.1's way to scale positions; convert "
        "the 16-bit checkpoint instead"
    )


def _divisors(frequencies: np.ndarray[Any, Any], how: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter makes of the four numbers."""
    low, high = how["low_freq_factor"], how["high_freq_factor"]
    turns = how["original_max_position_embeddings"] * frequencies
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: np.ndarray[Any, Any] = 1 / ((1 - smooth) / how["factor"] + smooth)
    return divisors
