"""How one tensor is quantized (`Scheme`), how a model is (`Recipe`), and the names that stand for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from canopyq import checks
from canopyq.errors import CanopyError, shown, unknown
from canopyq.tensor import affine
from canopyq.tensor.formats import CACHE_FORMATS, FloatFormat, Format, IntFormat, get_format
from canopyq.tensor.granularity import Granularity

OBSERVERS = ("minmax", "percentile", "mse", "entropy")  # see `observers`
SAMPLE_OBSERVERS = ("average",)  # for static activations: they need to know which sample a value comes from

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Scheme:
    """Everything that decides how one tensor becomes codes, and that arithmetic.

    Rows (R, n), each with one scale, become codes in two steps: `scale_and_zero_point` of each row's range, then
    `quantize_rows`; `dequantize_rows` is the way back. Nothing else needs to know a scheme's fields for it.

    Args:
        format: a name such as ``"int4"``, ``"fp8"``, ``"nf4"``, or a `Format`.
        granularity: ``"tensor"``, ``"channel"``, ``"token"``, ``"g128"``. None takes the format's own: blocks of 32
            (MXFP4) or 16 (NVFP4), 64 for NF4, the whole tensor otherwise.
        symmetric: scale only, or scale and zero point (integers only).
        restricted: symmetric integers without their lowest code (±127 for INT8).
        observer: ``"minmax"``, ``"percentile"``, ``"mse"`` or ``"entropy"``; for static activations ``"average"`` too.
        scale_dtype: dtype in which scales are kept. None takes the tensor's own if that is 16 or 32 bits wide, else
            float32. MXFP4 and NVFP4 bring their own, and a plain cast has no scales.

    Raises:
        CanopyError: for names that do not exist and combinations that make no sense, with the reason.
    """

    format: Format | str = "int8"
    granularity: Granularity | str | None = None
    symmetric: bool = True
    restricted: bool = False
    observer: str = "minmax"
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        granularity = fmt.default_granularity if self.granularity is None else self.granularity
        object.__setattr__(self, "format", fmt)
        object.__setattr__(self, "granularity", Granularity.parse(granularity))
        if self.scale_dtype is not None:
            object.__setattr__(self, "scale_dtype", checks.dtype("scale_dtype", self.scale_dtype, SCALE_DTYPES))
        self._check()

    def _check(self) -> None:
        fmt = self.format
        checks.flag("symmetric", self.symmetric), checks.flag("restricted", self.restricted)
        if not isinstance(self.observer, str) or self.observer not in OBSERVERS + SAMPLE_OBSERVERS:
            raise unknown("observer", self.observer, OBSERVERS)
        has_block_scales = fmt.scale_dtype is not None
        if self.restricted and not (isinstance(fmt, IntFormat) and self.symmetric):
            raise CanopyError(f"restricted range is a choice of symmetric integers; {self} has none to make")
        if not self.symmetric and not isinstance(fmt, IntFormat):
            raise CanopyError(f"{fmt.name} is a signed grid around zero and has no zero point; use symmetric=True")
        if has_block_scales and self.granularity != Granularity("group", fmt.block_size):
            raise CanopyError(f"{fmt.name} fixes its blocks at {fmt.block_size} values; leave granularity out")
        if has_block_scales and self.observer != "minmax":
            raise CanopyError(f"{fmt.name} derives its scales from each block's absmax; use observer='minmax'")
        if self.is_plain_cast and (self.granularity.kind != "tensor" or self.observer != "minmax"):
            raise CanopyError(f"{fmt.name} needs no scale: it is a plain cast; leave granularity and observer out")
        if self.scale_dtype is not None and (self.is_plain_cast or has_block_scales):
            raise CanopyError(f"{fmt.name} leaves no choice of scales; leave scale_dtype out")

    @property
    def is_plain_cast(self) -> bool:
        """FP32, FP16 and BF16 have range enough to hold values as they are, without a scale."""
        return isinstance(self.format, FloatFormat) and self.format.bits >= 16

    def stored_scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the scales of a tensor of ``dtype`` are kept."""
        narrow = dtype in (torch.float16, torch.bfloat16)
        return self.format.scale_dtype or self.scale_dtype or (dtype if narrow else torch.float32)

    def scale_and_zero_point(
        self, lo: Tensor, hi: Tensor, global_scale: Tensor | None = None, *, check: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The scale, as it is stored, and the zero point that lay each row's range over the codes.

        Args:
            lo, hi: ends of the ranges, any equal shape, float32 or float64. Symmetric schemes reach as far as the
                farther end, on either side.
            global_scale: of the whole tensor (1,), for a format that has one.
            check: see `affine.scale_and_zero_point`.

        Returns:
            The scale in ``scale_dtype`` (float32 if it is None), or as `BlockFormat.block_scale` gives it;
            zero_point int8, or None when symmetric; both in the shape of ``lo``.

        Raises:
            CanopyError: as `affine.scale_and_zero_point`.
        """
        if self.format.scale_dtype is not None:
            return self.format.block_scale(torch.maximum(-lo, hi), global_scale), None
        return affine.scale_and_zero_point(
            lo, hi, self.format,
            symmetric=self.symmetric, restricted=self.restricted, scale_dtype=self.scale_dtype or torch.float32,
            check=check,
        )  # fmt: skip

    def quantize_rows(
        self, rows: Tensor, scale: Tensor, zero_point: Tensor | None = None, global_scale: Tensor | None = None
    ) -> Tensor:
        """The codes of ``rows`` (R, n) on stored scales and zero points (R, 1): int8 for integers, the format's own
        dtype for 8-bit floats, uint8 for 4-bit floats and tables."""
        scale = self.format.float_scale(scale, global_scale)
        return affine.quantize(rows, scale, zero_point, self.format, restricted=self.restricted)

    def dequantize_rows(
        self,
        codes: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None = None,
        global_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The real values that ``codes`` (R, n) stand for, in ``dtype``; scales and zero points (R, 1) as stored, no
        scale for a plain cast."""
        if scale is None:
            scale = torch.ones((), device=codes.device)
        else:
            scale = self.format.float_scale(scale, global_scale)
        return affine.dequantize(codes, scale, zero_point, self.format, dtype)

    def fake_quantize_rows(self, rows: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """``rows`` (R, n) after a trip through their codes and back, in their dtype."""
        return self.dequantize_rows(self.quantize_rows(rows, scale, zero_point), scale, zero_point, dtype=rows.dtype)

    def __str__(self) -> str:
        words = [self.format.name]
        if not self.is_plain_cast:
            words.append(str(self.granularity))
        if isinstance(self.format, IntFormat):
            words.append("asymmetric" if not self.symmetric else "restricted" if self.restricted else "symmetric")
        if self.observer != "minmax":
            words.append(self.observer)
        return " ".join(words)


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized: a scheme for the weights of its linear layers, and what is left as it is.

    Args:
        name: what reports call it.
        weights: the scheme of every linear weight (out_features, in_features); None for a recipe of the cache alone.
        embeddings: whether embeddings are quantized too, in the scheme of the weights.
        activations: the scheme of what goes into those layers (…, in_features), or None to leave it as it is. Ranges
            are taken from each input as it comes (dynamic), unless ``static``.
        static: the activations' ranges are fixed beforehand, from calibration data, by the observer of their scheme:
            one for all tokens. Of NVFP4 it is the global scale that is fixed, and each block has a range of its own.
        cache: the KV cache that belongs to it, such as ``"kv4"``, or None. The weights do not depend on it.
        exceptions: (module, scheme) pairs for weights that are quantized otherwise; modules are named as in ``ignore``,
            and the first that fits counts.
        ignore: modules that stay as they are, by name or by any dotted part of it: ``"lm_head"``, ``"layers.0"``,
            ``"mlp.down_proj"``. The output head does by default: it is the most sensitive layer, and often shares its
            weight with the embedding. An entry that fits nothing in a model is refused there, but for this default,
            since a model may have no head; so is an exception that counts for no weight.

    Raises:
        CanopyError: if ``weights`` is no `Scheme`, for ``static`` without activations that have one scale in all, for
            NVFP4 activations without it, or for an unknown cache.
    """

    name: str
    weights: Scheme | None
    ignore: tuple[str, ...] = ("lm_head",)
    embeddings: bool = False
    activations: Scheme | None = None
    static: bool = False
    cache: str | None = None
    exceptions: tuple[tuple[str, Scheme], ...] = ()

    def __post_init__(self) -> None:
        checks.text("name", self.name), checks.flag("embeddings", self.embeddings), checks.flag("static", self.static)
        if self.cache is not None:
            checks.choice("KV cache", self.cache, CACHE_FORMATS)
        if self.weights is not None or self.cache is None:
            checks.instance(
                "weights", self.weights, Scheme, "a recipe's weights are a Scheme, such as Scheme('int4', 'g128')"
            )
        if self.activations is not None:
            checks.instance("activations", self.activations, Scheme, "use a Scheme, such as Scheme('int8', 'token')")
        has_global_scale = self.activations is not None and self.activations.format.has_global_scale
        if has_global_scale and not self.static:
            raise CanopyError(f"{self.activations} activations have a global scale, fixed beforehand; use static=True")
        granularity = None if self.activations is None else str(self.activations.granularity)
        if self.static and granularity != "tensor" and not has_global_scale:
            raise CanopyError(
                f"static activations have one scale for all tokens; {self.activations or 'no activations'} have not"
            )
        ignore = [self.ignore] if isinstance(self.ignore, str) else checks.sequence("ignore", self.ignore)
        object.__setattr__(self, "ignore", tuple(checks.text("ignore", part) for part in ignore))
        exceptions = tuple(checks.sequence("exceptions", self.exceptions))
        for pair in exceptions:
            if not isinstance(pair, tuple) or [type(part) for part in pair] != [str, Scheme]:
                raise CanopyError(f"exceptions has {shown(pair)}; give pairs of a module's name and a Scheme")
        object.__setattr__(self, "exceptions", exceptions)

    def ignores(self, *names: str) -> bool:
        """Whether a module stays as it is; a shared one has several names."""
        return any(is_part(part, name) for part in self.ignore for name in names)

    def scheme_of(self, *names: str) -> Scheme:
        """How the weight of a module is quantized; a shared one has several names."""
        number = self.exception_of(*names)
        return self.weights if number is None else self.exceptions[number][1]

    def exception_of(self, *names: str) -> int | None:
        """Which of the exceptions counts for a module; None if none does."""
        fits = (any(is_part(part, name) for name in names) for part, _ in self.exceptions)
        return next((number for number, fit in enumerate(fits) if fit), None)

    @classmethod
    def parse(cls, spec: str | Recipe) -> Recipe:
        """The recipe that a name stands for.

        Names read as the field writes them: ``w4a16-g128`` is 4-bit integer weights with a scale per 128 of them and
        16-bit activations. Weights may have 2 to 8 bits; then ``-tensor``, ``-channel`` or ``-g<size>`` (``w8a16``
        alone is per channel, ``w4a16`` alone g128), and ``-asym`` for a zero point. ``nf4``, ``mxfp4``, ``nvfp4`` stand
        for weights in those formats, ``mxfp4-w4a4`` and ``nvfp4-w4a4`` for inputs in them too. Scales are kept in
        bfloat16, except where a format brings its own. ``+head`` and ``+embed`` quantize the output head and the
        embedding too.

        ``w8a8`` quantizes the inputs as well: to as many bits as follow the ``a`` (2 to 8), each token by its own
        range, or with ``-static`` all by one that is calibrated. Here ``-asym`` gives the
        inputs the zero point, and the weights have none. ``fp8`` and ``fp8-static`` are the same with both in E4M3.

        ``+kv8``, ``+kv4``, ``+kv2`` and ``+kv-fp8`` say which KV cache belongs to the recipe; without the plus they are
        recipes of the cache alone.

        Raises:
            CanopyError: for a name that does not exist, with the nearest ones that do.
        """
        if isinstance(spec, Recipe):
            return spec
        text, *extras = (spec.lower() if isinstance(spec, str) else "").split("+")
        activations = None
        if match := re.fullmatch(r"w([2-8])a16(?:-(tensor|channel|g[1-9][0-9]{0,8}))?(-asym)?", text):
            bits, granularity, asym = match.groups()
            granularity = granularity or ("channel" if bits == "8" else "g128")
            scheme = Scheme(f"int{bits}", granularity, symmetric=not asym, scale_dtype=torch.bfloat16)
        elif text in ("mxfp4-w4a4", "nvfp4-w4a4"):
            scheme = activations = Scheme(text.removesuffix("-w4a4"))
        elif text in ("nf4", "mxfp4", "nvfp4"):
            scheme = Scheme(text, scale_dtype=torch.bfloat16 if text == "nf4" else None)
        elif match := re.fullmatch(r"w([2-8])a([2-8])(?:-(tensor|channel|g[1-9][0-9]{0,8}))?(-static)?(-asym)?", text):
            bits, input_bits, granularity, static, asym = match.groups()
            granularity = granularity or ("channel" if bits == "8" else "g128")
            scheme = Scheme(f"int{bits}", granularity, scale_dtype=torch.bfloat16)
            activations = _inputs(f"int{input_bits}", static=bool(static), symmetric=not asym)
        elif text in ("fp8", "fp8-static"):
            scheme = Scheme("fp8", "channel", scale_dtype=torch.bfloat16)
            activations = _inputs("fp8", static=text == "fp8-static")
        elif text in CACHE_FORMATS:
            scheme, extras = None, [text, *extras]
        else:
            raise unknown("recipe", spec, (*RECIPES, *CACHE_FORMATS), more=", any w2…w8a16 or w2…w8a2…a8 with -tensor, "
                          "-channel or -g<size>, -static for calibrated inputs, and -asym")  # fmt: skip
        known = ("head", "embed", *CACHE_FORMATS) if scheme else (text,)
        for extra in extras:
            if extra not in known:
                raise unknown(f"addition to {text}", f"+{extra}", [f"+{name}" for name in known])
        extras = list(dict.fromkeys(extras))
        caches = [extra for extra in extras if extra in CACHE_FORMATS]
        if len(caches) > 1:
            raise CanopyError(f"{spec} names {len(caches)} caches; a model has one: keep +{caches[0]}")
        ignore = () if "head" in extras else ("lm_head",)
        name = "+".join([text, *extras] if scheme else extras)
        cache = caches[0] if caches else None
        static = "-static" in text or (activations is not None and activations.format.has_global_scale)
        return cls(name, scheme, ignore, "embed" in extras, activations, static, cache)

    @classmethod
    def of_weights(cls, spec: str | Recipe) -> Recipe:
        """`parse`, for what only quantizes weights: refuses a recipe of the cache alone."""
        recipe = cls.parse(spec)
        if recipe.weights is None:
            raise CanopyError(
                f"{recipe.name} leaves the weights as they are: give "
                f"cq.QuantizedCache(model.config, {recipe.cache!r}) to model.generate as past_key_values (cache from "
                "transformers 5.24 on)"
            )
        return recipe


def _inputs(format: str, *, static: bool, symmetric: bool = True) -> Scheme:
    """A scheme for activations. A static scale is stored, so it is rounded as those of weights are. Its range leaves
    the farthest values out, but for floats, whose step near zero hardly depends on how far the range reaches."""
    if not static:
        return Scheme(format, "token", symmetric)
    observer = "minmax" if format == "fp8" else "percentile"
    return Scheme(format, "tensor", symmetric, observer=observer, scale_dtype=torch.bfloat16)


def is_part(part: str, module: str) -> bool:
    """Whether a dotted name is, or is within, another: ``mlp.up_proj`` of ``layers.0.mlp.up_proj``."""
    return f".{part}." in f".{module}."


RECIPES = ("w8a16", "w8a16-g128", "w4a16-channel", "w4a16-g128", "w4a16-g128-asym", "w4a16-g64", "w4a16-g32",
           "w3a16-g128", "w2a16-g32", "nf4", "mxfp4", "nvfp4", "mxfp4-w4a4", "nvfp4-w4a4", "w8a8", "w8a8-static",
           "w8a8-asym", "w4a8-g128", "w4a4-g128", "fp8", "fp8-static")  # fmt: skip
