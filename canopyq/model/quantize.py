"""Quantize a model in place by a recipe, and report what was done to every layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.calibration.calibrate import Calibration, calibrate
from canopyq.calibration.data import read_batches
from canopyq.calibration.output_error import output_errors
from canopyq.calibration.static_range import LOUD, is_loud, static_scale
from canopyq.checkpoint.groups import cache_note, check_recipe
from canopyq.errors import CanopyError, prefixed
from canopyq.memory import bytes_of, meta_ties
from canopyq.methods.pipeline import RoundingResult, round_weights
from canopyq.methods.registry import Method
from canopyq.methods.rotation import block_of, needs_online, rotate_
from canopyq.methods.transaction import Transaction
from canopyq.model.report import LayerReport, Plan, Report
from canopyq.nn.explanation import require_fast
from canopyq.nn.hadamard import OnlineHadamard, online_hadamard
from canopyq.nn.linear import QuantizedLinear
from canopyq.nn.offload import Replacing, carry_over, is_away, lies, runs_on
from canopyq.nn.outlier_linear import OutlierLinear
from canopyq.nn.sites import adapter_parts, put_layers
from canopyq.nn.targets import FEW, Target, few, find_targets
from canopyq.tensor.quantized_tensor import quantized_bytes
from canopyq.tensor.scheme import Recipe

HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip


def plan(model: nn.Module, recipe: str | Recipe) -> Plan:
    """What `quantize_` would do to ``model``, without doing it: works on the meta device too.

    Raises:
        CanopyError: as `quantize_` does, except for what only the values show.
    """
    recipe = _parse(model, recipe)
    targets, kept, share = find_targets(model, recipe)
    layers = {}
    for target in targets:
        shape = tuple(target.weight.shape)
        with prefixed(f"{target.name}: "):
            after = quantized_bytes(target.weight.shape, target.scheme, target.weight.dtype)
        layers[target.name] = (shape, target.weight.numel() * target.weight.element_size(), after)
    before = bytes_of(model)
    removed = sum(layers[name][1] for name in _not_tied_to_what_stays(targets, model))
    added = sum(after for _, _, after in layers.values())
    if recipe.static:  # a scale, and perhaps a zero point, for what goes into each layer
        own = 4 if recipe.activations.format.has_global_scale else 2 if recipe.activations.symmetric else 3
        added += own * sum(target.kind.multiplies for target in targets)
    notes = tuple(_of_files(model, recipe, Method.parse("rtn")))
    return Plan(recipe.name, layers, kept, before, before - removed + added, before + added, notes,
                share)  # fmt: skip


@torch.no_grad()
def quantize_(
    model: nn.Module,
    recipe: str | Recipe,
    *,
    method: str = "rtn",
    calibration: Any = None,
    tokenizer=None,
    strict: bool = False,
) -> Report:
    """Replace the linear layers of ``model`` by quantized ones, in place.

    Weights are rounded by ``method`` and kept packed. Every layer is quantized before the first is replaced, so that an
    error leaves the model as it was. A layer that the model uses in several places is quantized once and stays
    shared. Each layer stays on its device and keeps the hooks that were put on it; one that accelerate keeps on disk or
    in RAM (``device_map``) is read from there, and its packed weight goes there. The output head and the embedding stay
    as they are, unless the recipe's name has ``+head`` or ``+embed``; a head that shared its weight with the embedding
    then has one of its own.

    Args:
        model: any torch module; GPT-2's Conv1D and transformers' fused experts are known beside nn.Linear.
        recipe: a name such as ``"w4a16-g128"``, or a `Recipe`.
        method: how weights are rounded, and what is done to the model before: ``"rtn"`` (round to nearest), ``"clip"``,
            ``"gptq"``, ``"awq"``, ``"hqq"``, ``"smoothquant"``, ``"rotation"``, or several such as
            ``"rotation+gptq"``; see `methods.registry.Method`.
        calibration: data for methods that look at inputs, from which static activations take their ranges, and on which
            each layer's output error is measured for the report: batches of token ids (B, T), what a tokenizer returns,
            or texts (see `data.read_batches`). For static activations also the `Calibration` that `calibrate` made
            of such data; then no error is measured.
        tokenizer: of the model, for texts.
        strict: refuse a layer that would have to run on the slow reference, and any matrix that would be kept for its
            type or because the recipe's groups do not fit it, instead of only saying so.

    Raises:
        CanopyError: for an unknown recipe, a model without linear layers to quantize or that is quantized already, a
            layer of its exceptions that does not fit, NaN or infinite weights, data that does not fit the model, a
            method that does not go with the recipe or the architecture, a method or static activations without data,
            static activations of a layer that no token reached, and what ``strict`` refuses. The message names the
            layer.
    """
    recipe, how = _parse(model, recipe), Method.parse(method)
    checks.flag("strict", strict)
    how.check(recipe)
    targets, kept, share = find_targets(model, recipe, strict=strict)
    seen = calibration if isinstance(calibration, Calibration) else None
    batches = None if calibration is None or seen is not None else read_batches(calibration, model, tokenizer)
    if share < FEW:
        warnings.warn(f"{recipe.name} quantizes{few(share)}; the report names the others", stacklevel=3)
    _require_at_hand(how, targets)
    _require_no_adapter(how, model)
    bytes_before, notes = bytes_of(model), []
    with Transaction() as transaction:
        if "rotation" in how.transforms:
            notes = rotate_(model, transaction, online=needs_online(recipe), block=block_of(recipe))
            targets, kept, share = find_targets(model, recipe, strict=strict)  # the head has its own weight now
        done = round_weights(model, recipe, how, targets, batches, transaction)
        inputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        if recipe.static:
            watched = [target for target in targets if target.kind.multiplies]
            if batches is not None:
                seen = calibrate(model, batches, layers=[target.name for target in watched])
            inputs = {target.name: _input_scale(target, seen, recipe) for target in watched}
            notes += seen.notes() + _warn_of_loud([t.name for t in watched], seen, recipe, how)
        layers = {
            target.name: _layer(target, done[target.name], recipe, inputs.get(target.name, (None, None)))
            for target in targets
        }
        if strict:
            for target in targets:
                require_fast(target.name, layers[target.name], runs_on(target.module))
        unmeasured = not how.transforms and all(rounded.output_error is None for rounded in done.values())
        errors = output_errors(model, targets, layers, batches) if unmeasured and batches is not None else {}
        reports = [_report(target, done[target.name], errors.get(target.name)) for target in targets]
    _replace(model, targets, layers)
    if any(hasattr(module, "save_pretrained") for module in model.modules()):
        from canopyq.checkpoint.pretrained import teach_transformers  # it needs transformers, as such a model does

        teach_transformers(model)
    if recipe.cache is not None and hasattr(model, "config"):
        model.config.canopyq_cache = recipe.cache  # config.json will have it, and who loads that again
    notes += _of_files(model, recipe, how)
    return Report(recipe.name, tuple(reports), kept, bytes_before, bytes_of(model), how.name, tuple(notes), share)


def _require_at_hand(how: Method, targets: list[Target]) -> None:
    """Methods that change the model's weights as they go need all of them in memory."""
    away = next((target for target in targets if is_away(target.module)), None)
    if away is not None and (how.needs_data or how.transforms):
        raise CanopyError(
            f"method {how.name} changes weights as it goes, and {away.name} lies {lies(away.module)}; load the model "
            "without offloading, or use method='rtn' or 'hqq'"
        )


def _require_no_adapter(how: Method, model: nn.Module) -> None:
    """What goes into a layer goes into the adapter beside it, too, and an adapter stays as it is."""
    if how.transforms and adapter_parts(model):
        raise CanopyError(
            f"method {how.name} changes what goes into layers, and so into the adapters beside them, which stay as they"
            f" are; merge them first, by merge_and_unload(), or use method {how.rounding}"
        )


def _parse(model: nn.Module, recipe: str | Recipe) -> Recipe:
    recipe = Recipe.of_weights(recipe)
    checks.module("model", model)
    return recipe


def _of_files(model: nn.Module, recipe: Recipe, how: Method) -> list[str]:
    """What to know before such a model is saved, in lines: said before the work."""
    if not hasattr(model, "save_pretrained"):
        return []
    said = []
    try:
        check_recipe(recipe, how)
    except CanopyError as error:
        said.append(f"cq.save will refuse it: {error}")
    if recipe.cache is not None:
        said.append(cache_note(recipe.cache))
    return said


def _input_scale(target: Target, seen: Calibration | None, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """The fixed scale and zero point of what goes into a layer."""
    if seen is None:
        raise CanopyError(
            f"{recipe.name} fixes the range of activations beforehand and needs calibration data for it: texts with a "
            "tokenizer, or batches of token ids such as cq.tutor.calibration(tokenizer)"
        )
    if target.name not in seen:
        reason = seen.unseen.get(target.name, "it was not calibrated")
        raise CanopyError(
            f"{target.name} has no input range: {reason}; give more data, keep it by the recipe's ignore "
            "list (--ignore), or use dynamic activations"
        )
    if len(seen[target.name].lo) != target.weight.shape[1]:
        raise CanopyError(
            f"{target.name} takes {target.weight.shape[1]} features and was calibrated with {len(seen[target.name].lo)}"
            "; calibrate this model"
        )
    with prefixed(f"{target.name}: "):
        scale, zero_point = static_scale(seen[target.name], recipe.activations)
    device = torch.device("cpu") if target.weight.is_meta else target.weight.device
    return scale.to(device), None if zero_point is None else zero_point.to(device)


def _warn_of_loud(names: list[str], seen: Calibration, recipe: Recipe, how: Method) -> list[str]:
    """Warn of layers for which no single range is right; the warning is a line of the report too."""
    loud = [name for name in names if is_loud(seen[name], recipe.activations)]
    if not loud:
        return []
    told = ", ".join(loud[:3]) + (f" and {len(loud) - 3} more" if len(loud) > 3 else "")
    smooth = "" if "smoothquant" in how.transforms else "use method smoothquant, or "
    line = (
        f"inputs of {told} reach {LOUD:.0f} times as far as 99.99 % of their values, and no fixed range suits both: "
        f"{smooth}take {recipe.name.replace('-static', '')}, a range for each token, or keep them by the recipe's "
        "ignore list (--ignore)"
    )
    warnings.warn(line, stacklevel=4)
    return [line]


def _layer(
    target: Target, rounded: RoundingResult, recipe: Recipe, inputs: tuple[Tensor | None, Tensor | None]
) -> QuantizedLinear | OutlierLinear:
    layer = target.kind.layer(target.module, rounded.weight, target.bias(), recipe.activations, *inputs)
    layer.train(target.module.training)
    if rounded.outliers is not None:
        layer = OutlierLinear(layer, *rounded.outliers).train(target.module.training)
    if (size := online_hadamard(target.module)) is not None:
        layer.register_forward_pre_hook(OnlineHadamard(size))
    return layer


def _report(target: Target, rounded: RoundingResult, measured: float | None) -> LayerReport:
    before, weight = target.weight.numel() * target.weight.element_size(), rounded.weight
    error = rounded.output_error if measured is None else measured
    after = weight.nbytes + sum(part.nbytes for part in rounded.outliers or ())
    return LayerReport(
        target.name, tuple(weight.shape), 8 * after / weight.shape.numel(), before, after, rounded.sqnr_db, error,
        rounded.notes,
    )  # fmt: skip


def _replace(model: nn.Module, targets: list[Target], layers: dict[str, QuantizedLinear]) -> None:
    """Put the new layers where the old ones are, in every place of a shared one."""
    with Replacing() as replacing:
        for target in targets:
            replacing.take(target.name, target.module, layers[target.name])
    new = put_layers(targets, layers)
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module in new]
    modules = {name: model.get_submodule(name) for name in places}
    _untie(model, new)
    for old, layer in new.items():
        carry_over(old, layer)
        for hooks in HOOKS:  # the dict itself, so that whoever added one can still remove it
            setattr(layer, hooks, getattr(old, hooks))
    for name in places:
        model.set_submodule(name, new[modules[name]])


def _untie(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Once the head or the embedding is quantized, transformers must not tie one to the other again."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(end in replaced for end in ends):
        config.tie_word_embeddings = False


def _not_tied_to_what_stays(targets: list[Target], model: nn.Module) -> list[str]:
    """The targets whose old storage goes away: each storage once, and none that something kept still uses."""
    parts, ties = {id(target.module) for target in targets}, meta_ties(model)

    def storage(weight: Tensor) -> int:
        key = weight.untyped_storage()._cdata
        return ties.get(key, key)

    stays = {
        storage(weight)
        for module in model.modules()
        if id(module) not in parts
        for weight in module.parameters(recurse=False)
    }
    found, seen = [], set(stays)
    for target in targets:
        key = (storage(target.weight), target.weight.storage_offset())
        if key[0] not in stays and key not in seen:
            seen.add(key)
            found.append(target.name)
    return found
