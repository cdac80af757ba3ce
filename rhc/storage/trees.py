"""Trees of values and tensors, to JSON and safetensors and back, without pickle.

What JSON lacks (tuples, bytes, infinities, …) becomes an object whose one key is its kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rhc.errors import InputError


def parted(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors and arrays go into `tensors`. InputError for other objects."""
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = bytearray(value.tobytes()) or bytearray(1)
        tensors[name] = torch.frombuffer(data, dtype=torch.uint8)
        return {"array": [name, value.dtype.str, list(value.shape)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {k: parted(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, (Mapping, list, tuple, set)):
        inside = map(list, value.items()) if isinstance(value, Mapping) else value
        parts = [parted(v, f"{name}.{i}", tensors) for i, v in enumerate(inside)]
        if isinstance(value, list):
            return parts
        if isinstance(value, Mapping):
            return {"items": parts}
        return {"tuple" if isinstance(value, tuple) else "set": parts}
    raise InputError(
        f"{name} is a {type(value).__name__}, which no checkpoint can hold, since nothing is "
        "pickled; let state_dict give numbers, strings, tensors, arrays, lists and dicts of them"
    )


def joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `parted`; other values pass unchanged."""
    if isinstance(value, list):
        return [joined(v, tensors) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "array":
            name, dtype, shape = content
            data = tensors[name].cpu().numpy().tobytes()
            count = math.prod(shape)
            return np.frombuffer(data, np.dtype(dtype), count).reshape(shape).copy()[()]
        case "bytes":
            return bytes.fromhex(content)
        case "complex":
            return complex(*content)
        case "dict":
            return {k: joined(v, tensors) for k, v in content.items()}
        case "items":
            return dict(joined(content, tensors))
        case "tuple":
            return tuple(joined(content, tensors))
        case "set":
            return set(joined(content, tensors))
    return value


def spelled(value: Any) -> Any:
    """`value` with non-finite numbers replaced by {"float": "inf"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if isinstance(value, Mapping):
        return {k: spelled(v) for k, v in value.items()}
    return [spelled(v) for v in value] if isinstance(value, (list, tuple)) else value


def unspelled(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        return {k: unspelled(v) for k, v in value.items()}
    return [unspelled(v) for v in value] if isinstance(value, list) else value
