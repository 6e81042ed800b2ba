"""Another GGUF of the same model: its metadata as it is, its tensors wherever the model did not change them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from canopyq.checkpoint.files import as_path
from canopyq.errors import CanopyError, wrapped
from canopyq.gguf.tensors import FileTensor, library
from canopyq.nn.linear import QuantizedLinear

if TYPE_CHECKING:
    import gguf

ALIKE = 0.7  # cosine: codes of 2 bits are at .9 from their weight, rows or columns in another order near 0


def read(path: str | Path) -> gguf.GGUFReader:
    """A GGUF file's metadata and tensors, mapped from the disk. Never reads beyond the file's end.

    Raises:
        CanopyError: if it is no whole GGUF file.
    """
    gguf = library()

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> np.ndarray:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, *order, **options)

    path = as_path(path)
    if not path.is_file():
        raise CanopyError(f"{path} is no file; name a GGUF file")
    with wrapped(f"{path} is no whole GGUF file", "copy or download it again"):
        reader = Reader(path)
        for name, found in reader.fields.items():
            if found.contents() is None:
                raise ValueError(f"{name} has no value")
        if not isinstance(reader.fields["general.architecture"].contents(), str):
            raise ValueError("it names no architecture")
        return reader


def copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """The base's metadata, but for what the writer says itself and what described the base's own types."""
    gguf = library()
    left = {"general.architecture", "general.file_type", "general.quantization_version"}
    for name, found in reader.fields.items():
        if name in left or name.startswith("GGUF."):
            continue
        inner = found.types[-1] if found.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, found.contents(), found.types[0], inner)


def over(reader: gguf.GGUFReader, tensors: list[FileTensor], *, known: bool) -> list[FileTensor]:
    """The base's tensors, with the model's in their places; what did not change stays as the base has it.

    Args:
        known: whether how the family writes its tensors is known. Where it is not, each of the model's is held to the
            base's, so that rows in another order are found out.

    Raises:
        CanopyError: if the base is of another model, or writes a tensor in a way that is not known.
    """
    ours, found = {tensor.name: tensor for tensor in tensors}, []
    if missing := sorted(ours.keys() - {theirs.name for theirs in reader.tensors} - {"output.weight"}):
        raise CanopyError(f"the base has no {missing[0]}; give a GGUF of the model that this one was made from")
    scales = {
        f"{name.removesuffix('weight')}scale" for name, own in ours.items() if isinstance(own.source, QuantizedLinear)
    }
    for theirs in reader.tensors:
        if theirs.name in scales:  # of NVFP4 codes that are not taken over
            continue
        own = ours.pop(theirs.name, None)
        if own is None:
            found.append(FileTensor(theirs.name, None, base=theirs))
            continue
        shape = tuple(reversed(theirs.shape.tolist()))
        if shape != own.shape:
            raise CanopyError(
                f"{own.name} is {shape} in the base and {own.shape} in the model; give a GGUF of the same model"
            )
        found.append(_known(own, theirs) if known else _alike(own, theirs))
    return found + list(ours.values())


def _known(own: FileTensor, theirs: Any) -> FileTensor:
    """The model's tensor, or the base's if that holds the very same values."""
    unchanged = not isinstance(own.source, QuantizedLinear) and np.array_equal(own.values(), _values(theirs))
    return replace(own, base=theirs) if unchanged else own


def _alike(own: FileTensor, theirs: Any) -> FileTensor:
    """The same where nothing is known of the family: a weight's rows in whichever order fits the base's, and everything
    that is not quantized as the base has it, provided that the model has it still."""
    values = _values(theirs)
    if isinstance(own.source, QuantizedLinear):
        for rows in (None, own.rows):
            if _cosine(replace(own, rows=rows).values(), values) >= ALIKE:
                return replace(own, rows=rows)
    elif any(
        _same(replace(own, rows=rows).values() + shift, values, theirs.tensor_type.name)
        for rows in (None, own.rows)
        for shift in _shifts(own)
    ):
        return replace(own, base=theirs)
    raise CanopyError(
        f"{own.name} is not what the base has: the method changed it, or the family writes it in a way that is not "
        "known; use rtn, clip, gptq or hqq on the very model of the base"
    )


def _shifts(own: FileTensor) -> Iterator[float]:
    """Some families compute norms with 1 + weight, and files hold that."""
    yield 0.0
    if len(own.shape) == 1:
        yield 1.0


def _same(own: np.ndarray, theirs: np.ndarray, kind: str) -> bool:
    """Whether values are those of the base, up to the rounding of its type."""
    if kind in ("F32", "F16", "BF16"):
        return bool(np.allclose(own, theirs, rtol=2**-7, atol=1e-6))
    return _cosine(own, theirs) >= ALIKE


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


def _values(theirs: Any) -> np.ndarray:
    """Float32 values of a base's tensor."""
    gguf = library()
    try:
        values = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    except NotImplementedError:
        raise CanopyError(
            f"the gguf package does not read {theirs.tensor_type.name}, in which the base holds {theirs.name}; give a "
            "base in F16, BF16 or Q8_0"
        ) from None
    return values.reshape(tuple(reversed(theirs.shape.tolist())))
