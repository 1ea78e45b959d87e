"""What a measurement is filed under: named fields, so that a miss can say which of them differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any

DIRECTIONS = ("forward", "backward")
Scalar = bool | int | float | str | None


def bucket(length: int) -> int:
    """`length` rounded up to a power of two: 1, 2, 4, 8, ...

    Raises:
        ValueError: length is below 1.
    """
    if length < 1:
        raise ValueError(f"autotune: length is {length}, expected at least 1")
    return 1 << (length - 1).bit_length()


@dataclass(frozen=True)
class Key:
    """One problem as the tables see it.

    device: a fingerprint. dtype: "float32", or "float32+bfloat16" where arguments differ. sizes: the op's axes by
    name, without the length. options: whatever else the kernels branch on, by name. length: a bucket.
    sizes and options are kept sorted by name, so that equal problems are equal keys.

    Raises:
        ValueError: a direction, a length or a name that cannot be.
    """

    op: str
    direction: str
    device: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, Scalar], ...]
    length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes, key=itemgetter(0))))
        object.__setattr__(self, "options", tuple(sorted(self.options, key=itemgetter(0))))
        if self.direction not in DIRECTIONS:
            raise ValueError(f"autotune: direction is {self.direction!r}, expected 'forward' or 'backward'")
        if self.length < 1 or self.length & (self.length - 1):
            raise ValueError(f"autotune: length is {self.length}, expected a power of two; bucket() rounds up to one")
        for field in ("sizes", "options"):
            pairs = getattr(self, field)
            if len(dict(pairs)) != len(pairs):
                raise ValueError(f"autotune: {field} names something twice: {pairs}")

    @classmethod
    def of(
        cls,
        op: str,
        direction: str,
        device: str,
        dtype: str,
        sizes: Mapping[str, int],
        options: Mapping[str, Scalar],
        length: int,
    ) -> Key:
        """The key of a problem of any length >= 1."""
        return cls(op, direction, device, dtype, tuple(sizes.items()), tuple(options.items()), bucket(length))

    @property
    def family(self) -> tuple[Any, ...]:
        """Everything but the length."""
        return (self.op, self.direction, self.device, self.dtype, self.sizes, self.options)

    def difference(self, other: Key) -> list[str]:
        """What differs, one entry a field: `sizes.D is 512 here, 1024 there`. Empty for equal keys."""
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("sizes", "options"):
                if mine != theirs:
                    found.append(f"{field.name} is {mine} here, {theirs} there")
                continue
            here, there = dict(mine), dict(theirs)
            for name in sorted({*here, *there}):
                if name not in here or name not in there or here[name] != there[name]:
                    a, b = here.get(name, "absent"), there.get(name, "absent")
                    found.append(f"{field.name}.{name} is {a} here, {b} there")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for one JSON object; `from_json` gives an equal key back."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "sizes": dict(self.sizes), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Any) -> Key:
        """The key that `to_json` wrote; fields that this version does not know are ignored.

        Raises:
            ValueError: a field is missing or of the wrong type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"key is {type(data).__name__}, expected an object")
        op, direction, device, dtype = (data.get(name) for name in ("op", "direction", "device", "dtype"))
        sizes, options, length = data.get("sizes"), data.get("options"), data.get("length")
        if not (isinstance(op, str) and isinstance(direction, str) and isinstance(device, str)):
            raise ValueError("key lacks op, direction or device")
        if not isinstance(dtype, str) or type(length) is not int:
            raise ValueError("key lacks dtype or length")
        if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
            raise ValueError("key.sizes is not an object of integers")
        if not isinstance(options, dict) or not all(isinstance(v, Scalar) for v in options.values()):
            raise ValueError("key.options is not an object of plain values")
        return cls(op, direction, device, dtype, tuple(sizes.items()), tuple(options.items()), length)
