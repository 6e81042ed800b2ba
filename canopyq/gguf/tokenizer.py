"""A tokenizer as GGUF keeps it: its tokens, how they merge, and by name how llama.cpp cuts text into words first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from canopyq.errors import CanopyError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MODERN = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# How llama.cpp cuts text by each name, as regular expressions applied one after the other (llama-vocab.cpp).
CUTS = {
    "llama-bpe": (_MODERN % r"\p{N}{1,3}",),
    "qwen2": (_MODERN % r"\p{N}",),
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
}
PROBE = (
    "Hello, world! It's 12345.67 o'clock; they'LL say \"no\" -- (maybe)...\n\n  Two spaces,\ttabs \r\n and\n   more.  ",
    "Ünïcödé, 漢字かな交じり文, Привет, мир! नमस्ते, 한국어, العربية १२३ ½ ² 3,14 €5 🙂🙂",
    "def f(x: int) -> dict[str, float]:\n    return {'a_b': x**2 // 3, \"C\": 0x1F, 'e': 1e-5}  # camelCase HTTP\n",
)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write a fast tokenizer of transformers.

    Args:
        vocab_size: rows of the embedding; those beyond the tokenizer's are written as unused.

    Raises:
        CanopyError: for a tokenizer of a kind that is not known here.
    """
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CanopyError(f"{type(tokenizer).__name__} is no fast tokenizer; use base= with a GGUF of the model")
    spec = json.loads(backend.to_str())
    model, added = spec["model"], {token["id"]: token for token in spec["added_tokens"]}
    words = {index: word for word, index in model["vocab"].items()} if isinstance(model.get("vocab"), dict) else {}
    words |= {index: token["content"] for index, token in added.items()}
    if model["type"] != "BPE" or not words:
        raise CanopyError(
            f"a tokenizer of type {model['type']} is not written here; use base= with a GGUF of the model"
        )
    if max(words) >= vocab_size:
        raise CanopyError(
            f"the tokenizer has token {max(words)}, and the model {vocab_size} rows; load the one it came with"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    kinds = [_kind(index, words, added, bool(model.get("byte_fallback"))) for index in range(vocab_size)]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([rank.get(words.get(i, ""), -1e9) for i in range(vocab_size)])
        writer.add_add_space_prefix(_prepends_space(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut_of(tokenizer))
        writer.add_token_merges(merges)
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([gguf.TokenType[kind] for kind in kinds])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    plain = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(plain) and plain[0] == tokenizer.bos_token_id)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def cut_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text into words, found by trying each on
    texts of several scripts, with digits, spaces and code.

    Raises:
        CanopyError: if none gives the tokenizer's own tokens on every text.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    wanted = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in PROBE]
    twin = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for name, patterns in CUTS.items():
        cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
        twin.pre_tokenizer = Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
        if all(twin.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(PROBE, wanted, strict=True)):
            return name
    raise CanopyError(
        f"llama.cpp's ways to cut text ({', '.join(CUTS)}) give other tokens than {type(tokenizer).__name__}; use "
        "base= with a GGUF of the model"
    )


def _kind(index: int, words: dict[int, str], added: dict[int, dict[str, Any]], byte_fallback: bool) -> str:
    """The GGUF type of a token, by name."""
    word = words.get(index)
    if word is None:
        return "UNUSED"
    if index in added:
        return "CONTROL" if added[index]["special"] else "USER_DEFINED"
    return "BYTE" if byte_fallback and len(word) == 6 and word.startswith("<0x") else "NORMAL"


def _prepends_space(spec: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text."""
    parts = [spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}]
    parts += [part for outer in parts for part in outer.get("normalizers", outer.get("pretokenizers", []))]
    metaspace = any(part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)
    return metaspace or any(part.get("type") == "Prepend" for part in parts)
