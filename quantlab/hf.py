"""All contact with transformers: what it would build, our layers inside its models, loading.

`enable` costs nothing until transformers is imported: where its registry of quantizers is not loaded yet, an import
hook on that one module waits for it. Replacing two entries of a registry is the smallest change that makes
`from_pretrained` and `pipeline` work unchanged; patching functions inside transformers (the alternative) would have to
follow every move of its internals.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from quantlab.architecture import Architecture, architecture
from quantlab.errors import QuantlabError, UsageError, VerificationError, one_line
from quantlab.locate import locate, require_name

__all__ = ["Architecture", "IntegrationWarning", "architecture", "disable", "enable", "load", "pipeline", "status"]

_REGISTRY = "transformers.quantizers.auto"
_MODELS = "transformers.modeling_utils"
_METHODS = ("fp8", "compressed-tensors")
ATTENTION = ("int8", "fp8")
# What `quantizers` and `architecture` lean on beyond the public interface; looked up before anything is replaced.
_NEEDED = (
    "core_model_loading.rename_source_key",
    "core_model_loading.WeightConverter._original_source_patterns",
    "core_model_loading.WeightConverter._original_target_patterns",
    "core_model_loading.WeightConverter.scope_prefix",
    "core_model_loading.WeightConverter.base_model_prefix",
    "quantizers.base.HfQuantizer.update_weight_conversions",
    "quantizers.base.HfQuantizer._process_model_before_weight_loading",
    "quantizers.base.HfQuantizer._process_model_after_weight_loading",
)
_replaced: dict[str, tuple[Any, Any]] = {}
_failure: str | None = None


class IntegrationWarning(UserWarning):
    """This version of transformers lacks something; checkpoints load through its own path."""


def enable() -> None:
    """Make transformers use our layers for `fp8` and compressed-tensors checkpoints. Done by `import quantlab`."""
    for name, action in ((_REGISTRY, _replace), (_MODELS, _register_attention)):
        if name in sys.modules:
            action(sys.modules[name])
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, action))


def disable() -> None:
    """Undo `enable`: checkpoints load through transformers' own path again."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]
    registry: Any = sys.modules.get(_REGISTRY)
    for method, (quantizer, config) in _replaced.items():
        registry.AUTO_QUANTIZER_MAPPING[method] = quantizer
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
    _replaced.clear()


def status() -> str:
    """One line for people: whether checkpoints run on our layers, or why not."""
    importlib.import_module(_REGISTRY)
    if _replaced:
        version = importlib.import_module("transformers").__version__
        return f"transformers {version}: fp8 and compressed-tensors checkpoints run on our layers"
    return _failure or "off; `quantlab.hf.enable()` turns it on"


def load(
    path: str | Path,
    *,
    device_map: Any = None,
    dtype: Any = "auto",
    kv: Any = None,
    attention: str | None = None,
    warmup: bool = False,
    **kwargs: Any,
) -> Any:
    """The model of a checkpoint on our layers, by the class that its config names.

    path        a folder, or a hub id; `revision` among kwargs is of the latter
    device_map  as in `from_pretrained`; None is the CPU
    dtype       of everything that is not quantized; "auto" takes the checkpoint's. `torch_dtype` is the same
    kv          format of the KV cache that `generate` makes: "fp8", "int8", "int4", "k8v4" or a `cache.KV`; "none" for
                16 bits; None takes what the checkpoint's recipe says
    attention   "int8" or "fp8": prompts attend in 8 bits where that is faster (`quantlab.attention`); None is the
                model's own
    warmup      runs every shape of layer once, so that kernels are compiled before the first real call
    kwargs      go to `from_pretrained`

    Raises UsageError where there is no such checkpoint or transformers does not know its class, VerificationError
    where a parameter would start from random numbers or a quantized layer did not become one of ours.
    """
    import transformers

    from quantlab import decoding

    enable()
    require_settings(kv, attention)
    kwargs, dtype = _with_dtype(dtype, kwargs)
    _require_loadable(path, kwargs.pop("local_files_only", False), kwargs.pop("output_loading_info", False))
    # mismatched sizes are refused below, by name; transformers would raise without one
    kwargs = {"ignore_mismatched_sizes": True, **_with_attention(attention, kwargs)}
    path = _checkpoint(path, kwargs.pop("revision", None))
    with _told_in_a_line(path):
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=kwargs.get("trust_remote_code", False)
        )
    name = next(iter(config.architectures or []), "")
    if not hasattr(transformers, name):
        raise UsageError(
            f"{path}: its config names the class {name}, which transformers does not have; load it with its own class"
        )
    with _told_in_a_line(path):
        model, info = getattr(transformers, name).from_pretrained(
            path, device_map=device_map, dtype=dtype, local_files_only=True, output_loading_info=True, **kwargs
        )
    if getattr(config, "quantization_config", None) is not None:
        _require_ours(path, model)
    _require_complete(path, info)
    if attention not in (None, "none"):
        decoding.stop_late(model)
    if warmup:
        warm_up(model)
    return with_kv(model, path, kv)


@contextmanager
def _told_in_a_line(path: str | Path) -> Iterator[None]:
    """What transformers raises for a model that it cannot load, as a UsageError."""
    try:
        yield
    except (QuantlabError, MemoryError, RuntimeError):  # ours, and what the machine lacks
        raise
    except Exception as error:
        raise UsageError(f"{path}: transformers cannot load it ({one_line(error)})") from error


def require_settings(kv: Any, attention: Any) -> None:
    """Raise UsageError for a KV cache or an attention that there is not, whatever the model."""
    from quantlab.scheme import KV_FORMATS, did_you_mean

    if isinstance(kv, str) and kv not in (*KV_FORMATS, "none"):
        raise UsageError(f"unknown KV format {kv!r}; {did_you_mean(kv, KV_FORMATS)}")
    if attention not in (None, "none", *ATTENTION):
        raise UsageError(f"unknown attention {attention!r}; {did_you_mean(str(attention), [*ATTENTION, 'none'])}")


def _with_dtype(dtype: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arguments of `from_pretrained` without `torch_dtype`, and the dtype that it or `dtype` names."""
    older = kwargs.get("torch_dtype")
    if older is not None and dtype not in ("auto", older):
        raise UsageError(f"dtype = {dtype} and torch_dtype = {older} are both given; leave one out")
    return {name: x for name, x in kwargs.items() if name != "torch_dtype"}, dtype if older is None else older


def _require_loadable(model: str | Path, local: bool, info: bool) -> None:
    """Raise UsageError where arguments of `from_pretrained` ask for what `load` does in another way."""
    if info:
        raise UsageError("output_loading_info: `load` checks it and gives the model alone; from_pretrained gives both")
    if local and not Path(model).is_dir():
        raise UsageError(f"{model}: local_files_only needs a folder here; set HF_HUB_OFFLINE=1 to read the hub's cache")


def _checkpoint(model: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint, downloaded where it is one of the hub's."""
    from quantlab.source import NOT_DOWNLOADED

    require_name(model)
    folder = locate(str(model), revision, NOT_DOWNLOADED)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model}: no config.json there; give the folder of a checkpoint")
    return folder


def _with_attention(attention: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that ask for our attention."""
    if attention in (None, "none"):
        return kwargs
    if "attn_implementation" in kwargs:
        raise UsageError(f"attention = {attention!r} and attn_implementation are both given; leave one out")
    return {**kwargs, "attn_implementation": f"quantlab_{attention}"}


def with_kv(model: Any, path: str | Path, kv: Any) -> Any:
    """The model with a quantized KV cache: as asked for, or as the recipe beside its checkpoint says."""
    from quantlab import checkpoint
    from quantlab.scheme import Recipe

    recipe = Path(path) / checkpoint.RECIPE
    if kv is None:
        kv = Recipe.from_toml(recipe).kv if recipe.is_file() else "none"
    if kv == "none":
        return model
    from quantlab import cache, keys
    from quantlab_calib import data

    found = cache.load_keys(path)
    if found is not None:
        return cache.use(model, kv, keys=found)
    try:
        tokens = keys.texts(path, model.config)
    except data.DataError:  # no tokenizer: random tokens do nearly as well
        tokens = None
    return cache.use(model, kv, tokens)


def pipeline(
    task: str,
    model: str | Path,
    *,
    device_map: Any = None,
    dtype: Any = "auto",
    kv: Any = None,
    attention: str | None = None,
    **kwargs: Any,
) -> Any:
    """`transformers.pipeline` on a model that `load` has checked; tokenizer and processors are those of the folder.

    Raises UsageError where the task wants a tokenizer and the folder has none, and what `load` raises.
    """
    import transformers

    from quantlab_calib import data

    kwargs, dtype = _with_dtype(dtype, kwargs)
    model = _checkpoint(model, kwargs.pop("revision", None))
    try:
        implementation = transformers.pipelines.check_task(task)[1]["impl"]
    except KeyError as error:
        raise UsageError(f"transformers has no pipeline for {task!r}: {error.args[0]}") from None
    if isinstance(implementation, str):
        implementation = getattr(transformers, implementation.rpartition(".")[2])
    for part in ("tokenizer", "image_processor", "feature_extractor", "processor"):
        if getattr(implementation, f"_load_{part}", False):
            kwargs.setdefault(part, str(model))
    code = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
    if kwargs.get("tokenizer") == str(model):
        try:
            kwargs["tokenizer"] = data.load_tokenizer(model, **code)
        except data.DataError as error:
            raise UsageError(str(error)) from None
    loaded = load(model, device_map=device_map, dtype=dtype, kv=kv, attention=attention, **code)
    return transformers.pipeline(task, model=loaded, **kwargs)


def warm_up(model: Any, tokens: tuple[int, ...] = (1, 16, 128)) -> None:
    """Run each distinct shape of quantized linear layer, and of experts, once for each number of tokens."""
    import torch

    from quantlab.experts import Experts
    from quantlab.linear import QuantizedLinear
    from quantlab.placement import device_of

    layers = {(type(m), m.key.shape, device_of(m)): m for m in model.modules() if isinstance(m, QuantizedLinear)}
    experts = {(type(m), m.extents, device_of(m)): m for m in model.modules() if isinstance(m, Experts)}
    choices = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    with torch.inference_mode():
        for layer in layers.values():
            for count in tokens:
                layer(torch.zeros(count, layer.in_features, dtype=model.dtype, device=device_of(layer)))
        for module in experts.values():
            device = device_of(module)
            for count in tokens:
                index = torch.arange(count * choices, device=device).view(count, -1) % module.num_experts
                hidden = torch.zeros(count, module.hidden_dim, dtype=model.dtype, device=device)
                module(hidden, index, torch.ones_like(index, dtype=model.dtype))


def _require_ours(path: str | Path, model: Any) -> None:
    from quantlab.linear import MovesWithoutCasting

    quantizer = getattr(model, "hf_quantizer", None)  # gone where transformers dequantized the model
    reason = getattr(quantizer, "reason", "transformers took its own path, and said why in its log")
    if reason is not None:
        raise VerificationError(f"{path}: is not for our layers ({reason}); transformers' from_pretrained loads it")
    if not any(isinstance(module, MovesWithoutCasting) for module in model.modules()):
        raise VerificationError(
            f"{path}: config.json says that it is quantized, but no weight of the model is; take "
            "quantization_config out if that is meant, else get the checkpoint again"
        )


def _require_complete(path: str | Path, info: dict[str, Any]) -> None:
    shapes = [f"{name} {list(has)}, by config.json {list(wanted)}" for name, has, wanted in info["mismatched_keys"]]
    unused = set(info.get("unexpected_keys", ()))
    weights = {key.removesuffix("_packed") for key in unused}  # with its weight a scale may stay unused (MTP)
    scales = {
        key for key in unused if "_scale" in key.rpartition(".")[2] and key.rpartition("_scale")[0] not in weights
    }
    for names, problem in (
        (info["missing_keys"], "parameters are not in the checkpoint and would start from random numbers"),
        (shapes, "parameters have another shape in the checkpoint"),
        (info["error_msgs"], "errors of the loader"),
        (scales, "scales have no quantized layer"),
    ):
        if names:
            first = min(map(str, names))
            raise VerificationError(f"{path}: {len(names)} {problem}: {first}; check the folder with `quantlab verify`")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets a module be found as usual and calls the action on it once it has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_attention(models: ModuleType) -> None:
    """Make our attention functions known; a model takes one when it is asked for by name."""
    try:
        from quantlab import attention

        attention.register()
    except (ImportError, AttributeError) as error:
        version = importlib.import_module("transformers").__version__
        warnings.warn(f"transformers {version}: no attention of ours ({error})", IntegrationWarning, stacklevel=2)


def _replace(registry: ModuleType) -> None:
    global _failure
    if _replaced:
        return
    try:
        for name in _NEEDED:
            attrgetter(name)(sys.modules["transformers"])
        from quantlab import quantizers

        entries = {
            "fp8": (quantizers.Fp8Quantizer, quantizers.FineGrainedFP8Config),
            "compressed-tensors": (quantizers.CompressedTensorsQuantizer, quantizers.CompressedTensorsConfig),
        }
        old = {m: (registry.AUTO_QUANTIZER_MAPPING[m], registry.AUTO_QUANTIZATION_CONFIG_MAPPING[m]) for m in _METHODS}
    except (ImportError, AttributeError, KeyError) as error:
        version = importlib.import_module("transformers").__version__
        _failure = f"transformers {version} is not supported ({error}); quantized checkpoints load through its own path"
        warnings.warn(_failure, IntegrationWarning, stacklevel=2)
        return
    for method, (quantizer, config) in entries.items():
        registry.AUTO_QUANTIZER_MAPPING[method] = quantizer
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
    _replaced.update(old)
