"""``explore.words``: which bits of a 32-bit word belong to which weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ipywidgets import IntSlider, Widget
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from canopyq.tensor.packing import pack
from canopyq.tensor.quantized_tensor import quantize

from ..canvas import INK, new_figure, styled
from ..html import box, buttons
from .explorer import Explorer

SHADES = ("#cfe5f7", "#ffe3a8")
BITS = {"4 bits": 4, "8 bits": 8, "2 bits": 2}


@dataclass(frozen=True)
class Word:
    """One packed word: the codes in it, in order, its 32 bits as a number, and its bytes as a file has them."""

    codes: list[int]
    number: int
    bytes: bytes


class Words(Explorer):
    """The first row of a matrix, packed: which bits belong to which weight, in the word and in the file."""

    name = "words"
    title = "What is in a word?"

    def __init__(self, x: torch.Tensor) -> None:
        x = x.detach().float()
        self.x = x.reshape(-1, x.shape[-1])[:1] if x.dim() else x.reshape(1, 1)
        self.last = -(-self.x.shape[1] * 2 // 32) - 1  # a word that there is at every width

    def make_controls(self) -> dict[str, Widget]:
        return {"word": IntSlider(0, 0, self.last, description="word"), "bits": buttons(BITS)}

    def word(self, place: int, bits: int) -> Word:
        codes = quantize(self.x, f"int{bits}", "channel").codes
        number = pack(codes, bits)[0, place].item() & 0xFFFFFFFF
        many = 32 // bits
        return Word(codes[0, place * many : (place + 1) * many].tolist(), number, number.to_bytes(4, "little"))

    def draw(self, figure: Figure, word: int, bits: int) -> str:
        here = self.word(word, bits)
        self._picture(figure, here, bits)
        first = word * 32 // bits
        unsigned = [code + 2 ** (bits - 1) for code in here.codes]
        return box(
            "info",
            f"<b>Word {word}</b> holds weights {first} to {first + len(here.codes) - 1}: codes {_shown(here.codes)}. "
            f"With {2 ** (bits - 1)} added they are {_shown(unsigned)}. As a number the word is "
            f"{here.number:08X} in hexadecimal; in the file its bytes are {here.bytes.hex(' ')}.",
        )

    @styled
    def _picture(self, figure: Figure, word: Word, bits: int) -> Figure:
        fig = new_figure(2.2, figure)
        ax = fig.subplots()
        text = f"{word.number:032b}"  # the highest bit first
        by_byte = "".join(f"{byte:08b}" for byte in word.bytes)
        owner = [(31 - i) // bits for i in range(32)]
        by_byte_owner = [(8 * (i // 8) + 7 - i % 8) // bits for i in range(32)]
        self._row(ax, 1, text, owner, word.codes)
        self._row(ax, 0, by_byte, by_byte_owner, word.codes)
        for edge in (8, 16, 24):
            ax.plot([edge, edge], [-0.02, 0.42], color=INK, linewidth=2)
        ax.set_yticks([1.2, 0.2], ["the word,\nhighest bit first", "in the file,\nbyte after byte"])
        ax.set_xlim(-0.1, 32.1)
        ax.set_ylim(-0.1, 1.85)
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
        return fig

    def _row(self, ax, y: float, text: str, owner: list[int], codes: list[int]) -> None:
        """32 boxes; those of one weight have one shade, and its code stands above them."""
        places: dict[int, list[int]] = {}
        for i, (bit, weight) in enumerate(zip(text, owner, strict=True)):
            ax.add_patch(Rectangle((i, y), 1, 0.4, facecolor=SHADES[weight % 2], edgecolor="white"))
            ax.text(i + 0.5, y + 0.19, bit, ha="center", va="center", fontsize=10, family="monospace")
            places.setdefault(weight, []).append(i)
        for weight, own in places.items():
            if weight < len(codes):
                middle = (own[0] + own[-1] + 1) / 2
                ax.text(middle, y + 0.54, codes[weight], ha="center", va="center", fontsize=10, fontweight="bold")

    def rows(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        for bits in BITS.values():
            word = self.word(0, bits)
            codes = word.codes if len(word.codes) <= 8 else [*word.codes[:8], "…"]
            lines.append([str(bits), str(32 // bits), _shown(codes), f"{word.number:08X}", word.bytes.hex(" ")])
        return ["bits", "codes in a word", "codes of the first word", "as a number", "bytes in the file"], lines


def _shown(codes: list) -> str:
    return ", ".join(str(code).replace("-", "−") for code in codes)
