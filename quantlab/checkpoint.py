"""Names of files, tensors and config fields of checkpoints: the only file that knows them.

A checkpoint is a folder in the Hugging Face layout: `config.json`, safetensors files (one, or several with
`model.safetensors.index.json`) and side files. Quantized weights of a module `X`, all row-major:

    layout            tensors                                                   config.json: quantization_config
    fp8               X.weight            F8_E4M3 [N, K]                        quant_method fp8, weight_block_size
                      X.weight_scale_inv  F32 [ceil(N/128), ceil(K/128)]        [128, 128], modules_to_not_convert
    float-quantized   X.weight            F8_E4M3 [N, K]                        quant_method compressed-tensors,
                      X.weight_scale      BF16 [N, 1] (channel; F32 beside      one config group for all Linear, ignore
                                          weights that were not BF16) or
                                          F32 [ceil(N/128), ceil(K/128)] (block)
    pack-quantized    X.weight_packed     I32 [N, K/8], eight codes + 8 a word  the same, its weights INT4 in groups
                      X.weight_scale      BF16 (or F32, as above) [N, K/128]
                      X.weight_shape      I64 [2] = N, K

Experts that readers know in one tensor only stay one in the layout fp8 (`fused_experts.Stack`), in the orientation of
the source, codes and scales alike:

    fp8               X.gate_up_proj            F8_E4M3 [E, 2I, H] or [E, H, 2I]; X.down_proj likewise
                      X.gate_up_proj_scale_inv  F32 [E, 2I/128, H/128] or [E, H/128, 2I/128]

A checkpoint that mixes the latter two is `mixed-precision`: one config group for all Linear, one more for the names of
each kind that is an exception. Where the KV cache is to be FP8, the latter two also hold one scale for all keys of a
layer and one for all values, beside the projections of its attention module `A`, for engines that read them:

    A.k_scale, A.v_scale  BF16 [1]                                            kv_cache_scheme: FP8, static, per tensor

Despite its name `weight_scale_inv` multiplies. Scales are powers of two (blocks) or bfloat16 values (rows, groups):
vLLM requantizes to the former at load, and compressed-tensors in transformers casts to the model's dtype; so every
reader computes with the very same weights. Scales of groups also survive vLLM's conversion to E4M3
(`quantlab_calib.rounding`). What is ours alone lies in the sub-folder `quantlab/`, where no loader
looks for weights: `manifest.json`, `recipe.toml`, `summary.json`, `eval*.json`, `activation_scales.safetensors`,
`key_statistics.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantlab.errors import PreflightError
from quantlab.scheme import SCHEMES, Scheme
from quantlab.shards import TAGS, TORCH_DTYPES, TensorSlot
from quantlab_kernels.formats import E4M3, INT4
from quantlab_kernels.packing import pack_int4
from quantlab_kernels.qtensor import QuantizedTensor, TensorSpec

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OURS = "quantlab"
MANIFEST = f"{OURS}/manifest.json"
RECIPE = f"{OURS}/recipe.toml"
SUMMARY = f"{OURS}/summary.json"
ACTIVATION_SCALES = f"{OURS}/activation_scales.safetensors"
KEY_STATISTICS = f"{OURS}/key_statistics.safetensors"

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
WEIGHT = ".weight"
STACK_SCALE = "_scale_inv"  # added to the name of a stack of experts
PACKED, SHAPE = ".weight_packed", ".weight_shape"
ORDER = ".weight_g_idx"  # groups of columns that are not in order, which we do not read
KV_SCALES = (".k_scale", ".v_scale")
KV_SPEC = TensorSpec(E4M3, (-1, -1))
SCALE = {"fp8": ".weight_scale_inv", "float-quantized": ".weight_scale", "pack-quantized": ".weight_scale"}


@dataclass(frozen=True)
class Stored:
    """How the quantized weights of a checkpoint are stored, as its config says it.

    layout  "fp8", "float-quantized" or "pack-quantized"
    weight  spec of the weights
    input   spec of the activations, None for 16 bits
    skip    names of the modules that are not quantized
    others  (names of modules, how these are stored instead), of a checkpoint of several kinds
    kv      whether there are scales of an FP8 KV cache, `KV_SCALES`
    """

    layout: str
    weight: TensorSpec
    input: TensorSpec | None
    skip: tuple[str, ...] = ()
    others: tuple[tuple[tuple[str, ...], Stored], ...] = ()
    kv: bool = False

    @classmethod
    def of(cls, scheme: Scheme, skip: Iterable[str] = ()) -> Stored:
        return cls(scheme.layout, scheme.weight, scheme.input, tuple(skip))

    def kind(self, module: str) -> Stored:
        """How the weight of one module is stored."""
        return self._others.get(module, self)

    @cached_property
    def _others(self) -> dict[str, Stored]:
        return {module: stored for modules, stored in self.others for module in modules}

    @property
    def kinds(self) -> tuple[Stored, ...]:
        """All kinds, this one first."""
        return self, *(stored for _, stored in self.others)

    @property
    def scheme(self) -> str | None:
        """Name of our scheme of this kind: fp8-block also in its compressed-tensors form."""
        wanted = _numbers(self.weight), _numbers(self.input)
        for scheme in SCHEMES.values():
            if (_numbers(scheme.weight), _numbers(scheme.input)) == wanted:
                return scheme.name
        return None

    @property
    def weight_suffix(self) -> str:
        return PACKED if self.layout == "pack-quantized" else WEIGHT

    @property
    def scale_suffix(self) -> str:
        return SCALE[self.layout]

    def scale_dtype(self, source: str) -> str:
        """Dtype tag of the scales of a weight that was `source`.

        Scales of rows are bfloat16 values. Beside bfloat16 weights they are stored as such, because transformers 5.17
        dequantizes to the dtype of the scale wherever it renames a tensor.
        """
        return "BF16" if self.weight.scale == "bfloat16" and source == "BF16" else "F32"


def _numbers(spec: TensorSpec | None) -> tuple[Any, ...] | None:
    return None if spec is None else (spec.format, spec.block)


def module_of(tensor: str) -> str:
    """The module that owns a tensor, by its name: everything before the last dot."""
    return tensor.rpartition(".")[0]


def slots(module: str, shape: tuple[int, ...], source: str, stored: Stored) -> tuple[TensorSlot, ...]:
    """The tensors that a quantized weight [N, K], whose dtype tag was `source`, becomes on disk."""
    stored = stored.kind(module)
    scale = TensorSlot(module + stored.scale_suffix, stored.scale_dtype(source), stored.weight.scale_shape(shape))
    if stored.layout != "pack-quantized":
        return TensorSlot(module + WEIGHT, TAGS[stored.weight.format.dtype], shape), scale
    words = TensorSlot(module + PACKED, "I32", (shape[0], -(-shape[1] // 8)))
    return words, scale, TensorSlot(module + SHAPE, "I64", (2,))


def stack_slots(name: str, shape: tuple[int, ...], stored: Stored) -> tuple[TensorSlot, ...]:
    """The tensors that a stack of quantized experts [E, R, C] becomes on disk."""
    scale = TensorSlot(name + STACK_SCALE, "F32", (shape[0], *stored.weight.scale_shape(shape[1:])))
    return TensorSlot(name, TAGS[stored.weight.format.dtype], shape), scale


def encode(
    quantized: QuantizedTensor, module: str, stored: Stored, source: str, first_row: int = 0, rows: int | None = None
) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor name, first row in that tensor, data) for a weight, or for a band of whole blocks of its rows.

    rows  of the whole weight
    """
    stored = stored.kind(module)
    scale = quantized.scale.to(TORCH_DTYPES[stored.scale_dtype(source)])
    packed = stored.layout == "pack-quantized"
    yield module + stored.weight_suffix, first_row, pack_int4(quantized.codes) if packed else quantized.codes
    yield module + stored.scale_suffix, first_row // max(stored.weight.block[0], 1), scale
    if packed and first_row == 0:
        yield module + SHAPE, 0, torch.tensor([rows or len(quantized.codes), quantized.codes.shape[1]])


def quantization_config(stored: Stored) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    if stored.layout == "fp8":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(stored.weight.block),
            "modules_to_not_convert": list(stored.skip),
        }
    groups = [_config_group(stored, ["Linear"]), *(_config_group(kind, [*names]) for names, kind in stored.others)]
    layouts = {kind.layout for kind in stored.kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": stored.layout if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(stored.skip),
        "kv_cache_scheme": _compressed_tensors_args(KV_SPEC) if stored.kv else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.0",  # the oldest that has every field used here; nobody refuses an older one
    }


def _config_group(stored: Stored, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": stored.layout,
        "weights": _compressed_tensors_args(stored.weight),
        "input_activations": _compressed_tensors_args(stored.input) if stored.input else None,
        "output_activations": None,
    }


def _compressed_tensors_args(spec: TensorSpec) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs. Unknown keys would break its loader, so only those every version knows."""
    rows, columns = spec.block
    strategy = {(-1, -1): "tensor", (1, -1): "token" if spec.dynamic else "channel"}.get(spec.block)
    strategy = strategy or ("group" if rows == 1 else "block")
    return {
        "num_bits": spec.format.bits,
        "type": "float" if spec.format.is_float else "int",
        "strategy": strategy,
        "group_size": columns if strategy == "group" else None,
        "block_structure": [rows, columns] if strategy == "block" else None,
        "symmetric": spec.symmetric,
        "dynamic": spec.dynamic,
    }


def stored_in(config: dict[str, Any]) -> Stored | None:
    """How a checkpoint is quantized, from its config; None for one that is not quantized at all.

    Raises PreflightError for formats that this project does not read.
    """
    found = config_of_quantization(config)
    if found is None:
        return None
    readers = {"fp8": _stored_as_fp8, "compressed-tensors": _stored_as_compressed_tensors}
    method = found.get("quant_method")
    try:
        stored = readers[method](found) if isinstance(method, str) and method in readers else None
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):  # a field is missing or malformed
        raise PreflightError(f"quantization_config: {describe_quantization(found)}: a field is malformed") from None
    if stored is None:
        said = describe_quantization(found)
        raise PreflightError(f"quantization_config: {said} is a format that quantlab does not read")
    return stored


def _stored_as_fp8(found: dict[str, Any]) -> Stored | None:
    if not found.get("weight_block_size"):
        return None  # one scale per tensor: readers disagree about its name
    rows, columns = map(int, found["weight_block_size"])
    skip = found.get("modules_to_not_convert") or found.get("ignored_layers")
    weight, inputs = TensorSpec(E4M3, (rows, columns)), TensorSpec(E4M3, (1, columns), dynamic=True)
    return Stored("fp8", weight, inputs, _names(skip))


def _stored_as_compressed_tensors(found: dict[str, Any]) -> Stored | None:
    if is_transformed(found):
        return None
    groups = list(found["config_groups"].values())
    kinds = [_stored_of_group(group, found.get("format")) for group in groups]
    if any(kind is None for kind in kinds):
        return None
    main = [i for i, group in enumerate(groups) if "Linear" in group.get("targets", ["Linear"])] if groups[1:] else [0]
    if len(main) != 1:
        return None
    others = [
        (_names(g.get("targets")), kind) for i, (g, kind) in enumerate(zip(groups, kinds, strict=True)) if i != main[0]
    ]
    if any(name.startswith("re:") for names, _ in others for name in names):
        return None  # which modules those are would have to be found out by their names
    found_main = kinds[main[0]]
    assert found_main is not None
    kv = has_kv_scales(found)
    return replace(found_main, skip=_names(found.get("ignore")), others=tuple(others), kv=kv)  # type: ignore[arg-type]


def is_transformed(found: dict[str, Any]) -> bool:
    """Whether a compressed-tensors config says that activations are rotated on the way: the weights alone are not the
    model then."""
    return bool((found.get("transform_config") or {}).get("config_groups"))


def has_kv_scales(found: dict[str, Any]) -> bool:
    """Whether a compressed-tensors config says that there are `KV_SCALES` of FP8, one number each."""
    scheme = found.get("kv_cache_scheme") or {}
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    return {key: scheme.get(key) for key in keys} == {key: _compressed_tensors_args(KV_SPEC)[key] for key in keys}


def _stored_of_group(group: dict[str, Any], layout: Any) -> Stored | None:
    """One config group: FP8 weights, or symmetric INT4 in groups of 128, and what goes with them."""
    layout, args = group.get("format") or layout, group["weights"]
    weight, given = _spec_from(args), group.get("input_activations")
    inputs = _spec_from(given)
    formats = {"float-quantized": E4M3, "pack-quantized": INT4}
    if (
        weight is None
        or formats.get(layout) is not weight.format
        or (given and (inputs is None or inputs.format is INT4))
    ):
        return None
    if weight.format is INT4 and (weight.block != (1, 128) or not args.get("symmetric", True) or args.get("actorder")):
        return None
    return Stored(layout, weight, inputs)


def _names(values: Any) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values or ()):
        raise TypeError("names of modules are strings")
    return tuple(values or ())


def _spec_from(args: dict[str, Any] | None) -> TensorSpec | None:
    number = (args.get("type"), args.get("num_bits")) if args else None
    format = E4M3 if number == ("float", 8) else INT4 if number == ("int", 4) else None
    if not args or format is None:
        return None
    rows, columns = {
        "tensor": lambda: (-1, -1),
        "channel": lambda: (1, -1),
        "token": lambda: (1, -1),
        "group": lambda: (1, args["group_size"]),
        "block": lambda: args["block_structure"],
    }[args["strategy"]]()
    if format is INT4 and int(columns) == -1:
        return None
    return TensorSpec(format, (int(rows), int(columns)), dynamic=bool(args.get("dynamic")))


def config_of_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config`, wherever tools put it: at the top, in the text part, or under its older name."""
    for part in (config, config.get("text_config")):
        for key in QUANTIZATION_KEYS:
            if isinstance(part, dict) and isinstance(part.get(key), dict):
                return part[key]
    return None


def describe_quantization(found: dict[str, Any]) -> str:
    method = str(found.get("quant_method", "unknown method"))[:40]
    detail = found.get("format") or found.get("fmt") or found.get("bits") or ""
    return " ".join(f"{method} {detail}"[:80].split())
