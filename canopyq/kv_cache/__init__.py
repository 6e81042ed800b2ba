"""Keys and values: `quantized_kv`, tokens as codes and what attention reads of a layer; `layers`, one layer; `cache`,
one that grows; `static`, one of fixed size; `attention`, which lets a model read codes."""

from canopyq.kv_cache.attention import fuse_attention
from canopyq.kv_cache.cache import QuantizedCache, as_argument, cache_nbytes, cache_of
from canopyq.kv_cache.static import StaticQuantizedCache

__all__ = ["QuantizedCache", "StaticQuantizedCache", "as_argument", "cache_nbytes", "cache_of", "fuse_attention"]
