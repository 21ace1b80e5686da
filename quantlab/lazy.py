"""A transformers model whose weights come from the checkpoint module by module, and go again.

Names, fused experts and rearranged weights are transformers' own business: each part of the checkpoint goes through its
loader. The alternative, accelerate's hooks on a model that is offloaded to disk, reads every weight again for every
batch and rewrites fused experts to disk first.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from quantlab.architecture import load_targets, meta_model
from quantlab.errors import PreflightError
from quantlab.source import Source

READERS = 8  # threads: one alone does not keep a disk busy


class LazyModel:
    """`model` has real buffers and parameters without data; `load` and `release` fill and empty a part of it.

    device  where parts are loaded to
    dtype   of the parameters; None takes the config's
    Raises PreflightError where transformers cannot build the model.
    """

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
    ) -> None:
        from accelerate import init_empty_weights

        empty = meta_model(source.folder, trust_remote_code)
        if empty is None:
            kind = source.config.get("model_type", "without model_type")
            raise PreflightError(
                f"{source.model}: transformers cannot build this model ({kind}), so no data can run through it"
            )
        options = {} if dtype is None else {"dtype": dtype}
        # eager experts call one linear function per expert, which is what can be observed
        with init_empty_weights(include_buffers=False):
            self.model = type(empty)._from_config(empty.config, experts_implementation="eager", **options)
        self.model.eval()
        self.source, self.device = source, device
        self._aliases = _aliases(self.model)
        self._wanted: dict[str, list[str]] = defaultdict(list)  # parameter or buffer -> the tensors that it is made of
        for tensor, target in load_targets(self.model, source.tensors).items():
            self._wanted[target.parameter].append(tensor)
        self._loaded: set[str] = set()
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)

    def load(self, path: str, recurse: bool = True) -> None:
        """Fill the parameters and persistent buffers of the module at `path`, and below it if `recurse`.

        Raises PreflightError that names a parameter for which the checkpoint has nothing.
        """
        module = self.model.get_submodule(path)
        names = [name for name, _ in module.named_parameters(prefix=path, recurse=recurse, remove_duplicate=False)]
        names += [name for name, _ in module.named_buffers(prefix=path, recurse=recurse) if name in self._wanted]
        names = [name for name in names if name not in self._loaded]
        wanted = {alias for name in names for alias in self._aliases.get(name, (name,)) if alias in self._wanted}
        if wanted:
            tensors = [tensor for name in sorted(wanted) for tensor in self._wanted[name]]
            with ThreadPoolExecutor(READERS) as readers:
                self._convert(dict(zip(tensors, readers.map(self.source.read, tensors), strict=True)))
        for name in names:
            self._tie(name)
            if _tensor(self.model, name).is_meta:
                raise PreflightError(f"{self.source.model}: the checkpoint has no tensor for {name}")
        self._loaded |= set(names)

    def release(self, path: str) -> None:
        """Give the memory of the parameters below `path` back."""
        module = self.model.get_submodule(path)
        for name, parameter in list(module.named_parameters(prefix=path, remove_duplicate=False)):
            owner, leaf = _owner(self.model, name)
            owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            self._loaded.discard(name)

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        config = LoadStateDictConfig(
            device_map={"": self.device}, weight_mapping=get_model_conversion_mapping(self.model)
        )
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        finally:
            if shown:
                logging.enable_progress_bar()
        for name, *shapes in info.mismatched_keys:
            raise PreflightError(f"{self.source.model}: {name} has shape {shapes[0]}, the config says {shapes[1]}")
        for name, error in info.conversion_errors.items():
            raise PreflightError(f"{self.source.model}: {name} cannot be loaded: {error}")

    def _tie(self, name: str) -> None:
        """Give a parameter the data of the one that it shares them with, where only that one is in the checkpoint."""
        for alias in self._aliases.get(name, ()):
            shared = _tensor(self.model, alias)
            if not shared.is_meta:
                owner, leaf = _owner(self.model, name)
                owner._parameters[leaf] = shared
                return


def _aliases(model: Any) -> dict[str, tuple[str, ...]]:
    """Parameter -> the parameters that the config ties it to, itself among them."""
    groups: dict[str, set[str]] = defaultdict(set)
    for target, source in (model.all_tied_weights_keys or {}).items():
        groups[source] |= {source, target}
    return {name: tuple(sorted(group)) for group in groups.values() for name in group}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _tensor(model: nn.Module, name: str) -> Any:
    owner, leaf = _owner(model, name)
    return getattr(owner, leaf)
