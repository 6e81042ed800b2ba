"""How good each recipe is: measured, with the source named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from canopyq.checkpoint.files import as_path
from canopyq.disk import write_atomic
from canopyq.errors import CanopyError, shown, wrapped
from canopyq.evaluate.quality import Comparison
from canopyq.evaluate.stats import Share
from canopyq.tensor.scheme import Recipe

RECORDED = Path(__file__).with_name("measurements.json")
ORIGINAL = "bf16"  # how the model that is not quantized is called


@dataclass(frozen=True)
class Measurement:
    """One recipe, examined beside the original.

    Attributes:
        recipe: its name with the cache, such as ``"w4a16-g128+kv8"``; ``"bf16"`` is the original in 16-bit arithmetic.
        kl: mean KL divergence from the original, nats per token.
        right, n: answers that were right, of how many; None where no questions were asked.
        method: how the weights were rounded; ``"rtn"`` to the nearest.
        source: what was measured, where and when.
        perplexity: on a text, if that was measured.
        model: the only model that it says something of, as `advise` calls it: ``"tutor"``. None: of whichever model
            it is given for.
    """

    recipe: str
    kl: float
    right: int | None = None
    n: int | None = None
    method: str = "rtn"
    source: str = "your own measurement"
    perplexity: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if (self.right is None) != (self.n is None):
            raise CanopyError(f"right={self.right} and n={self.n} of {self.recipe} go together; give both or neither")
        self.accuracy  # noqa: B018 - a share that is none is refused at once
        if not 0 <= self.kl < float("inf"):
            raise CanopyError(f"a KL of {self.kl} for {self.recipe} is no divergence; measure it with cq.compare")
        self.parts  # noqa: B018

    @classmethod
    def of(cls, recipe: str, result: Comparison, *, method: str = "rtn", source: str = "your own measurement"):
        """What ``cq.compare`` found for a recipe."""
        right = result.model.accuracy
        return cls(recipe, result.kl, right.right, right.n, method, source)

    @property
    def accuracy(self) -> Share | None:
        return None if self.right is None else Share(self.right, self.n)

    def __str__(self) -> str:
        """The quality alone."""
        words = [f"KL {self.kl:.2g} nats per token"]
        words += [] if self.perplexity is None else [f"perplexity {self.perplexity:.4g}"]
        words += [] if self.accuracy is None else [f"{self.accuracy} right of {self.n}"]
        return ", ".join(words)

    @property
    def parts(self) -> tuple[Recipe | None, str | None]:
        """The recipe of the weights, None for the original, and the cache, None for one of 16 bits."""
        return split(self.recipe)


@cache
def split(name: str) -> tuple[Recipe | None, str | None]:
    """The recipe of the weights and the cache that a name such as ``w4a16-g128+kv8`` stands for.

    Raises:
        CanopyError: for a name that does not exist.
    """
    words = name.lower().split("+")
    caches = [word for word in words[1:] if word.startswith("kv")]
    if len(caches) > 1:
        raise CanopyError(f"{shown(name)} names {len(caches)} caches; a model has one")
    base = "+".join(word for word in words if word not in caches)
    return None if base == ORIGINAL else Recipe.parse(base), caches[0] if caches else None


def recorded() -> list[Measurement]:
    """The measurements that ship with canopyq: the tutor model, by benchmarks/advice.py."""
    return read(RECORDED)


def read(path: str | Path) -> list[Measurement]:
    """Measurements from a JSON file: ``{"source": …, "rows": [{"recipe": …, "kl": …, "right": …, "n": …}, …]}``; with
    ``"model": "tutor"`` they are of that model alone.

    Raises:
        CanopyError: for a file that does not hold them.
    """
    path = as_path(path)
    wanted = '{"source": …, "rows": [{"recipe": …, "kl": …, "right": …, "n": …}]}'
    with wrapped(f"{path} does not hold measurements", f"name a file of {wanted}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        shared = {key: content[key] for key in ("source", "model") if key in content}
        return [Measurement(**(shared | row)) for row in content["rows"]]


def write(path: str | Path, measurements: Iterable[Measurement], **about: object) -> None:
    """Write measurements of one source as `read` reads them; ``about`` adds what else is to be known of them."""
    rows = [{name: value for name, value in asdict(m).items() if value is not None} for m in measurements]
    shared = {key: {row.pop(key, None) for row in rows} for key in ("source", "model")}
    for key, values in shared.items():
        if len(values) != 1:
            raise CanopyError(f"a file of measurements has one {key}, these have {len(values)}; write them apart")
    content = {key: value for key, (value,) in shared.items() if value is not None} | {**about, "rows": rows}
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
