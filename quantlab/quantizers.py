"""What transformers finds instead of its own quantizers for `fp8` and `compressed-tensors` checkpoints.

The tensors in the files decide, not the skip list: a weight that comes with a scale is quantized, everything else is
not. Readers of the list disagree (`model.layers.1` also means layers 10 to 19 to some), tensors do not. Each class
takes what our kernels compute exactly and hands everything else to the class it extends, saying so once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils import is_compressed_tensors_available, logging
from transformers.utils import quantization_config as stock
from transformers.utils.quantization_config import QuantizationMethod

from quantlab import attention, decoding, scaled_inputs
from quantlab.architecture import counterpart, load_targets, one_by_one
from quantlab.checkpoint import (
    ACTIVATION_SCALES,
    KV_SCALES,
    ORDER,
    STACK_SCALE,
    has_kv_scales,
    is_transformed,
    module_of,
)
from quantlab.conversions import with_scales, with_turned_scales
from quantlab.errors import UsageError, VerificationError
from quantlab.experts import Fp8BlockExperts, Fp8RowExperts, unsupported
from quantlab.fusion import fuse
from quantlab.int4_experts import Int4Experts, Int4Fp8Experts
from quantlab.int4_linear import Int4Fp8Linear, Int4Linear
from quantlab.linear import Fp8BlockLinear, Fp8RowLinear, MovesWithoutCasting
from quantlab.locate import side_file
from quantlab.placement import device_of
from quantlab.routing import fuse_routers
from quantlab.scaled_inputs import stand_in
from quantlab.shared_experts import fuse_shared

logger = logging.get_logger(__name__)

SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E8M0": torch.float8_e8m0fnu}
WEIGHTS = (".weight", ".weight_packed")
CODES = ("F8_E4M3", "F8_E5M2")
Layers = tuple[type, type]  # of a linear layer, of experts


class _Verbatim:
    """A quantization config that is saved as it was read: transformers' own drop and rename fields."""

    _read: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().from_dict(config_dict, *args, **kwargs)  # type: ignore[misc]
        config = result[0] if isinstance(result, tuple) else result
        config._read = deepcopy(config_dict)
        return result

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self._read) if hasattr(self, "_read") else super().to_dict()  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


# The two classes below keep the names of those they extend: the loader compares class names before it lets a config
# that is passed to `from_pretrained` (say, with dequantize=True) touch the one in the checkpoint.


class FineGrainedFP8Config(_Verbatim, stock.FineGrainedFP8Config):
    pass


class CompressedTensorsConfig(_Verbatim, stock.CompressedTensorsConfig):
    """Schemes of ours need no compressed-tensors package; for all others transformers asks for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if is_compressed_tensors_available() or compressed_tensors_layers(kwargs)[1] is not None:
            super().__init__(*args, **kwargs)
            return
        self.quantization_config = None
        self.dequantize = False
        self.use_optimized_inference = False
        self.quant_method = QuantizationMethod.COMPRESSED_TENSORS


class KeepsQuantized(HfQuantizer):
    """Swaps in the layers that compute with what is on disk. A subclass names the layout; `reason`, once set, says why
    transformers' own way is taken instead."""

    scale_name: str
    tensors: tuple[str, ...]  # last parts of the names of what lies beside a weight or in its place
    reason: str | None = None
    attention: Any = None  # that `from_pretrained` was asked for

    def layers(self, module: str) -> Layers:
        """The classes for a module of the checkpoint: of a linear layer, of experts."""
        raise NotImplementedError

    def _hand_over(self, reason: str) -> None:
        """Let the class we extend do it. The reason is for people, so it is logged."""
        self.reason = reason
        method = getattr(self.quantization_config.quant_method, "value", self.quantization_config.quant_method)
        logger.warning_once(f"quantlab leaves this {method} checkpoint to transformers: {reason}")

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self._environment = args, kwargs
        if self.reason is not None:
            super().validate_environment(*args, **kwargs)

    def update_attn_implementation(self, config: Any) -> Any:
        """Sees the config before the model is built, which then names an attention whether one was asked for or not."""
        self.attention = config._attn_implementation
        return super().update_attn_implementation(config)

    def update_tp_plan(self, config: Any) -> Any:
        """The same: what older versions of transformers call then."""
        self.attention = config._attn_implementation
        return super().update_tp_plan(config)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self.reason is not None and super().param_needs_quantization(model, param_name, **kwargs)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.reason is None:
            files = kwargs.get("checkpoint_files") or []
            reason = self._swap(model, files, kwargs.get("dtype"))
            if reason is None:
                return model
            self._hand_over(reason)
            self._begin_stock()
            self._convert_model_for_quantization(model)
        if getattr(self.quantization_config, "dequantize", False):
            refuse_stacks(kwargs.get("checkpoint_files") or [])
        return super()._process_model_before_weight_loading(model, **kwargs)

    def _convert_model_for_quantization(self, model: Any) -> None:
        """transformers' own takes experts of some models apart."""
        if self.reason is not None:
            super()._convert_model_for_quantization(model)

    def _begin_stock(self) -> None:
        """What the class we extend would have done by now."""
        args, kwargs = self._environment
        super().validate_environment(*args, **kwargs)

    def _swap(self, model: Any, files: list[str], dtype: torch.dtype | None) -> str | None:
        """Replace every module whose weight has a scale; a reason, and no change, where one cannot be.

        Raises VerificationError for FP8 codes without a scale.
        """
        names = tensor_dtypes(files)
        if not names:
            return "it is not in safetensors files"
        for name, tag in names.items():
            if name.endswith(ORDER):
                return f"{name}: our kernels take columns in order"
            if tag in CODES and self._scale_of(name) not in names:  # any reader would take them for weights
                raise VerificationError(
                    f"{name}: holds codes, but there is no scale of it; check the folder with `quantlab verify`"
                )
        weights = [name.removesuffix("_packed") for name in names if name.endswith(WEIGHTS)]
        stacks = [name for name in names if not name.endswith(WEIGHTS) and self._scale_of(name) in names]
        found = load_targets(model, [*weights, *stacks])
        apart = load_targets(model, [name for name in weights if name not in found], one_by_one())
        found |= apart
        targets = {name: target for name, target in found.items() if self._scale_of(name) in names}
        parts = Counter(target.parameter for target in targets.values())
        modules = dict(model.named_modules(remove_duplicate=False))
        swaps: dict[nn.Module, nn.Module] = {}
        for name, target in found.items():
            if name not in targets and target.parameter in parts:
                return f"{name}: has no scale, others of the same parameter do"
        for name, target in targets.items():
            module = modules[target.parameter.rpartition(".")[0]]
            whole = stand_in(module)
            scale_dtype = SCALE_DTYPES.get(names[self._scale_of(name)])
            reason = self._refusal(whole, target.rearranged, scale_dtype)
            if reason is not None:
                return f"{name}: {reason}"
            if module not in swaps:
                layers = self.layers(name.removesuffix(".weight"))
                swaps[module] = self._replacement(whole, layers, parts[target.parameter], scale_dtype, dtype)
        for path, module in modules.items():
            if module in swaps:
                model.set_submodule(path, swaps[module])
                scaled_inputs.bind(model.get_submodule(path.rpartition(".")[0]))
        self._hold_kv_scales(model, names, found)
        self.dtypes = {name: t.dtype for name, t in chain(model.named_parameters(), model.named_buffers())}
        self.added = one_by_one() if apart.keys() & targets else []
        self.converted = {p for name, target in targets.items() if name not in stacks for p in target.patterns}
        one_of = {pattern: name for name in stacks if name in targets for pattern in targets[name].patterns}
        self.turned = {
            pattern: shape_of(files, name) != tuple(model.get_parameter(targets[name].parameter).shape)
            for pattern, name in one_of.items()  # headers are opened for one layer: a pattern is that of all
        }
        self.folder = Path(files[0]).parent
        self.paths = {name.removesuffix(".weight"): t.parameter.rpartition(".")[0] for name, t in targets.items()}
        return None

    def _hold_kv_scales(self, model: Any, names: Iterable[str], found: dict[str, Any]) -> None:
        """Parameters for the scales of an FP8 cache of engines: nothing here reads them, saving writes them again."""
        places = [(module_of(name), target.parameter.rpartition(".")[0]) for name, target in found.items()]
        for name in names:
            path = counterpart(module_of(name), places) if name.endswith(KV_SCALES) else None
            if path is not None:
                scale = nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
                model.get_submodule(path).register_parameter(name.rpartition(".")[2], scale)

    def _scale_of(self, weight: str) -> str:
        return weight + self.scale_name.removeprefix("weight")

    def _refusal(self, module: nn.Module, rearranged: bool, scale_dtype: torch.dtype | None) -> str | None:
        if scale_dtype is None:
            return "the dtype of its scale is not known"
        if type(module) is nn.Linear:
            return "transformers rearranges its rows or columns" if rearranged else None
        if isinstance(module, nn.Linear):
            return f"a {type(module).__name__} is not a plain linear layer"
        return unsupported(module)

    def _replacement(
        self, module: nn.Module, layers: Layers, parts: int, scale_dtype: Any, dtype: torch.dtype | None
    ) -> nn.Module:
        """The layer for a module whose weight is so many tensors of the checkpoint."""
        linear, experts = layers
        options: dict[str, Any] = {"scale_name": self.scale_name, "scale_dtype": scale_dtype}
        with torch.device("meta"):
            if not isinstance(module, nn.Linear):
                return experts(module, **options)
            if issubclass(linear, Int4Linear):
                options["parts"] = parts
            return linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype, **options)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        if self.reason is not None:
            return super().update_weight_conversions(weight_conversions, *model)
        updated: list[Any] = []
        for conversion in (*weight_conversions, *self.added):
            patterns = set(conversion.source_patterns) if isinstance(conversion, WeightConverter) else set()
            if self.converted & patterns:
                updated += with_scales(conversion, self.tensors)
            elif turned := self.turned.keys() & patterns:
                updated += with_turned_scales(conversion) if self.turned[turned.pop()] else []
            else:
                updated.append(conversion)
        return updated

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.reason is not None:
            return super()._process_model_after_weight_loading(model, **kwargs)
        for module in model.modules():
            if isinstance(module, MovesWithoutCasting):
                for name, parameter in module.named_parameters(recurse=False):
                    if module._quantized(name):
                        parameter.requires_grad_(False)  # the loader sets it on every floating-point tensor
                module.finish_loading()
        self._cast_the_rest(model)
        self._static_activations(model)
        if self.attention is not None:
            attention.keep(model)
        fuse(model)
        fuse_routers(model)
        fuse_shared(model)
        decoding.stop_late(model)
        return model

    def _cast_the_rest(self, model: Any) -> None:
        """Give what is not quantized the dtype that the model was built with, or 32 bits where its class insists:
        transformers 5.17 keeps the one on disk wherever it renames a tensor."""
        ours = (module for module in model.modules() if isinstance(module, MovesWithoutCasting))
        quantized = {id(p) for m in ours for name, p in m.named_parameters(recurse=False) if m._quantized(name)}
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            wanted = self.dtypes.get(name, tensor.dtype)
            if id(tensor) not in quantized and _matches(name, model._keep_in_fp32_modules_strict):
                wanted = torch.float32
            high = tensor.dtype == torch.float32 and _matches(name, model._keep_in_fp32_modules)
            if tensor.dtype != wanted and not high:
                tensor.data = tensor.data.to(wanted)

    def _static_activations(self, model: Any) -> None:
        """Calibrated activation scales, where the side file says that they are meant to be used."""
        used = any(isinstance(module, Fp8BlockLinear) for module in model.modules())  # else the hub need not be asked
        path = side_file(self.folder, ACTIVATION_SCALES) if used else None
        if path is None:
            return
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("activations") != "static":
                return
            for name in file.keys():  # noqa: SIM118 - not a mapping
                module = model.get_submodule(self.paths[name]) if name in self.paths else None
                if isinstance(module, Fp8BlockLinear):
                    module.activation_scale = file.get_tensor(name).to(device_of(module))


class Fp8Quantizer(KeepsQuantized, FineGrainedFP8HfQuantizer):
    """`quant_method: fp8` with 128x128 blocks and dynamic activations."""

    scale_name = "weight_scale_inv"
    tensors = ("weight_scale_inv",)

    def layers(self, module: str) -> Layers:
        return Fp8BlockLinear, Fp8BlockExperts

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        reason = "it is quantized while loading" if not self.pre_quantized else fp8_reason(quantization_config)
        if reason is not None:
            self._hand_over(reason)


class CompressedTensorsQuantizer(KeepsQuantized, CompressedTensorsHfQuantizer):
    """FP8 weights per row or per 128x128 block with dynamic activations to match, INT4 weights in groups of 128."""

    scale_name = "weight_scale"
    tensors = ("weight_scale", "weight_packed", "weight_shape")

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        HfQuantizer.__init__(self, quantization_config, **kwargs)
        self.known, reason = compressed_tensors_layers(quantization_config.to_dict())
        if quantization_config.dequantize:
            reason = "dequantize=True"
        if reason is not None:
            self._hand_over(reason)
            CompressedTensorsHfQuantizer.__init__(self, quantization_config, **kwargs)

    def layers(self, module: str) -> Layers:
        return self.known.get(module) or self.known["Linear"]

    def _begin_stock(self) -> None:
        CompressedTensorsHfQuantizer.__init__(self, self.quantization_config, pre_quantized=self.pre_quantized)
        super()._begin_stock()

    @property
    def is_trainable(self) -> bool:
        return self.reason is None or super().is_trainable


def fp8_reason(config: Any) -> str | None:
    """Why an `fp8` config is not ours, or None."""
    if config.dequantize:
        return "dequantize=True"
    if config.weight_block_size is None or tuple(config.weight_block_size) != (128, 128):
        return f"weight_block_size = {config.weight_block_size}, our kernels take [128, 128]"
    if config.activation_scheme != "dynamic":
        return f"activation_scheme = {config.activation_scheme!r}, our kernels take 'dynamic'"
    if getattr(config, "modules_to_convert", None):
        return "modules_to_convert names embeddings"
    if getattr(config, "expert_dtype", "fp8") != "fp8":
        return f"expert_dtype = {config.expert_dtype!r}, our kernels take 'fp8'"
    return None


def compressed_tensors_layers(config: dict[str, Any]) -> tuple[dict[str, Layers], str | None]:
    """Layer classes by the name of a module, "Linear" for all that have no name here, of a compressed-tensors config;
    and the reason why it is not ours."""
    groups = [_plain(group) for group in (config.get("config_groups") or {}).values()]
    if _plain(config.get("quantization_status", "compressed")) != "compressed" or not groups:
        return {}, "its weights are not stored compressed"
    if config.get("kv_cache_scheme") and not has_kv_scales({"kv_cache_scheme": _plain(config["kv_cache_scheme"])}):
        return {}, "its kv_cache_scheme is not FP8 per tensor"
    if is_transformed({"transform_config": _plain(config.get("transform_config"))}):
        return {}, "its transform_config rotates activations on the way"
    known: dict[str, Layers] = {}
    for group in groups:
        layers = _group_layers(group, group.get("format") or config.get("format"))
        if layers is None:
            return {}, "our kernels take FP8 weights per channel or 128x128 block and symmetric INT4 in groups of 128"
        known |= dict.fromkeys(group.get("targets") or ["Linear"], layers)
    if len(groups) == 1:
        known = {"Linear": next(iter(known.values()))}
    if "Linear" not in known or any(name.startswith("re:") for name in known):
        return {}, "its config groups name modules by patterns"
    return known, None


def _group_layers(group: dict[str, Any], layout: str | None) -> Layers | None:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if group.get("output_activations") or weights.get("dynamic"):
        return None
    if inputs and not (_is_number(inputs, "float", 8) and inputs.get("dynamic")):
        return None
    strategies = weights.get("strategy"), (inputs or {}).get("strategy")
    if layout == "pack-quantized" and _is_number(weights, "int", 4) and not weights.get("actorder"):
        fits = strategies[0] == "group" and weights.get("group_size") == 128 and strategies[1] in (None, "token")
        return (Int4Fp8Linear, Int4Fp8Experts) if fits and inputs else (Int4Linear, Int4Experts) if fits else None
    if not inputs or not _is_number(weights, "float", 8):
        return None
    if strategies == ("channel", "token"):
        return Fp8RowLinear, Fp8RowExperts
    blocks = list(weights.get("block_structure") or []), inputs.get("group_size")
    if strategies == ("block", "group") and blocks == ([128, 128], 128):
        return Fp8BlockLinear, Fp8BlockExperts
    return None


def _is_number(args: dict[str, Any], kind: str, bits: int) -> bool:
    return (args.get("type"), args.get("num_bits"), args.get("symmetric", True)) == (kind, bits, True)


def _plain(value: Any) -> Any:
    """Enums and pydantic models as the strings and dicts that they are on disk."""
    value = getattr(value, "value", value)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def tensor_dtypes(files: Iterable[str]) -> dict[str, str]:
    """Tensor names in safetensors files with their dtype tags."""
    found: dict[str, str] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            return {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found[name] = file.get_slice(name).get_dtype()
    return found


def refuse_stacks(files: Iterable[str]) -> None:
    """Raise UsageError for experts in one quantized tensor: transformers multiplies out what is called `weight`, and
    would take their codes for weights."""
    names = tensor_dtypes(files)
    for name in names:
        if not name.endswith(WEIGHTS) and name + STACK_SCALE in names:
            raise UsageError(
                f"{name}: holds all experts, which transformers does not multiply out; "
                "write the checkpoint back with `quantlab convert --to bf16`"
            )


def shape_of(files: Iterable[str], name: str) -> tuple[int, ...]:
    """The shape of a tensor in safetensors files."""
    for path in files:
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                return tuple(file.get_slice(name).get_shape())
    raise KeyError(name)
