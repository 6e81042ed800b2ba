"""``explore.context``: how long a chat must be for its cache to outgrow the weights."""

from __future__ import annotations

from ipywidgets import SelectionSlider, Widget
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from canopyq.memory import MODEL_SHAPES, cache_bytes, human, model_bytes
from canopyq.tensor.scheme import Recipe

from ..canvas import BLUE, INK, ORANGE, new_figure, styled
from ..html import box, buttons
from .explorer import Explorer

MODELS = ("tutor", "llama-2-7b", "llama-3.1-8b", "llama-3.1-70b")
CONTEXTS = {f"{2**k // 1024}k" if k < 20 else "1M": 2**k for k in range(10, 21)}
WEIGHTS = {"weights, BF16": None, "weights, INT4 g128": "w4a16-g128"}
CACHES = {"cache, BF16": None, "cache, kv8": "kv8", "cache, kv4": "kv4", "cache, kv2": "kv2"}


class Context(Explorer):
    """The length and number of chats, from 1k to 1M tokens: bytes of weights and cache in several precisions."""

    name = "context"
    title = "When does the cache outgrow the weights?"

    def make_controls(self) -> dict[str, Widget]:
        return {
            "model": buttons(MODELS, "llama-3.1-8b"),
            "context": SelectionSlider(options=list(CONTEXTS), value="32k", description="context"),
            "chats": SelectionSlider(options=[1, 4, 16, 64], value=1, description="chats at once"),
        }

    def sizes(self, model: str, context: str, chats: int) -> dict[str, int]:
        """Bytes of the weights in two precisions and of the cache in four."""
        shape, tokens = MODEL_SHAPES[model], CONTEXTS[context]
        sizes = {
            name: model_bytes(shape, None if recipe is None else Recipe.parse(recipe)).total
            for name, recipe in WEIGHTS.items()
        }
        return sizes | {name: cache_bytes(shape, tokens, chats, format) for name, format in CACHES.items()}

    def draw(self, figure: Figure, model: str, context: str, chats: int) -> str:
        sizes = self.sizes(model, context, chats)
        self._picture(figure, sizes)
        weights, cache = sizes["weights, INT4 g128"], sizes["cache, BF16"]
        many = "one chat" if chats == 1 else f"{chats} chats"
        return box(
            "info",
            f"<b>{model}, {many} of {CONTEXTS[context]:,} tokens</b>: the cache takes {human(cache)} in BF16, "
            f"{_times(cache / weights)} times the INT4 weights; with kv4 {human(sizes['cache, kv4'])}, "
            f"{_times(sizes['cache, kv4'] / weights)} times.",
        )

    @styled
    def _picture(self, figure: Figure, sizes: dict[str, int]) -> Figure:
        fig = new_figure(2.5, figure)
        ax = fig.subplots()
        unit, divisor = ("GB", 1e9) if max(sizes.values()) >= 1e9 else ("MB", 1e6)
        colours = [BLUE if name.startswith("weights") else ORANGE for name in sizes]
        drawn = ax.barh(list(sizes), [size / divisor for size in sizes.values()], color=colours, height=0.62)
        ax.bar_label(drawn, [human(size) for size in sizes.values()], padding=4, fontsize=10, color=INK)
        ax.set_xlim(0, 1.15 * max(sizes.values()) / divisor)
        ax.invert_yaxis()
        ax.set_xlabel(unit)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(8))
        return fig

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for model in MODELS:
            for context in ("4k", "32k", "128k"):
                sizes = self.sizes(model, context, 1)
                names = ("weights, INT4 g128", *CACHES)
                lines.append([model, context, *(human(sizes[name]) for name in names)])
        return ["model", "one chat of", "weights, INT4 g128", *CACHES], lines


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:,.0f}"
