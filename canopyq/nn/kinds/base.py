"""What has to be known of a kind of module that holds weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from canopyq.nn.linear import QuantizedLinear


class Kind:
    """How one kind of module holds weights (out_features, in_features).

    Attributes:
        is_linear: a call of the module is x · Wᵀ + b, with one weight.
        multiplies: what goes in are activations, and not token ids.
        transposed: the module, and the files, have the weight as (in_features, out_features).
        unwatched: why what goes in cannot be told, "" if it can.
        config_class: what a ``quantization_config`` calls layers of this kind.
    """

    is_linear = True
    multiplies = True
    transposed = False
    unwatched = ""
    config_class = "Linear"

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        raise NotImplementedError

    def split(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Part -> the tensor in which it lies, and its weight (out_features, in_features), a view of that tensor.

        Args:
            tensors: the module's own, by name.
        """
        return {"": ("weight", tensors["weight"])}

    def biases(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Part -> its bias (out_features,), of those that have one."""
        return {"": tensors["bias"]} if tensors.get("bias") is not None else {}

    def parted(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Tensor -> in how many parts `split` divides it along each of its dimensions."""
        return {"weight": (1, 1)}

    def inputs(
        self, module: nn.Module, given: list, parts: Collection[str]
    ) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
        """What goes into each of the module's weights in a call: parts, rows (…, in_features), and the index (rows,) of
        the token that each row belongs to; None where rows are tokens.

        Args:
            given: the arguments of the call.
            parts: those that somebody wants to know of.
        """
        yield [""], given[0], None

    def tokens(self, module: nn.Module, given: list) -> int:
        """How many tokens a call is about."""
        return given[0].numel() // given[0].shape[-1]

    def layer(self, module: nn.Module, *packed) -> QuantizedLinear:
        """A quantized layer for one weight. ``packed``: the arguments of `QuantizedLinear`."""
        return QuantizedLinear(*packed)

    def replacement(self, module: nn.Module, layers: list[nn.Module]) -> nn.Module:
        """What takes the module's place, of its quantized layers in the order of `split`."""
        (layer,) = layers
        return layer


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights that a module holds itself, by name; a frozen one may be a buffer."""
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own and module._buffers.get("weight") is not None:
        own["weight"] = module._buffers["weight"]
    return own
