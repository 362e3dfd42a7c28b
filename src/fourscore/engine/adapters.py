"""LoRA adapters on one network: loaded by name from PEFT folders, also later, one selected at a time.

Between calls the network is as it was loaded: with its own adapter when it came with one, else without any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fourscore.files import FourscoreError
from fourscore.model.adapter import peft_seam


class Adapters:
    """The adapters of a network. `network` is the bare CausalLM, which the adapters' layers are part of."""

    def __init__(self, network: nn.Module, folders: dict[str, Path]) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._peft: Any = network if isinstance(network, PeftModel) else None
        self._loaded: str | None = self._peft.active_adapter if self._peft is not None else None
        if folders and self._peft is None and any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            raise FourscoreError("the network carries the adapters of another engine", todo="use that engine, or load the model again")
        for name, folder in folders.items():
            self._load(network, name, Path(folder))
        self._check_kinds()
        self.network: nn.Module = self._peft.get_base_model() if self._peft is not None else network
        self._restore()

    @property
    def names(self) -> list[str]:
        """Those that can be selected."""
        return list(self._peft.peft_config) if self._peft is not None else []

    def add(self, name: str, folder: Path) -> None:
        """Load one more. Errors leave the network as it was."""
        known = self.names
        try:
            self._load(self.network, name, Path(folder))
            self._check_kinds()
        except FourscoreError:
            if name in self.names and name not in known:
                self._peft.delete_adapter(name)
            raise
        finally:
            self._restore()

    def remove(self, name: str) -> None:
        """Forget one; its memory is free. The adapter that the model was loaded with stays."""
        self.check(name)
        if name == self._loaded:
            raise FourscoreError(f"the model was loaded with adapter `{name}`", todo="load the model without it")
        self._peft.delete_adapter(name)
        self._restore()

    def check(self, name: str | None) -> None:
        """An unknown name is a FourscoreError."""
        if name is not None and name not in self.names:
            todo = f"known: {', '.join(self.names)}" if self.names else "load it with Engine(model, adapters={name: folder})"
            raise FourscoreError(f"no adapter named `{name}`", todo=todo)

    def _load(self, network: nn.Module, name: str, folder: Path) -> None:
        from peft import PeftModel

        if self._peft is not None and name in self._peft.peft_config:
            raise FourscoreError(f"the model already has an adapter `{name}`", where=str(folder), todo="give it another name")
        if not (folder / "adapter_config.json").is_file():
            raise FourscoreError("not an adapter: no adapter_config.json", where=str(folder), todo="give the folder that training wrote")
        try:
            with peft_seam():
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(network, str(folder), adapter_name=name)
                else:
                    self._peft.load_adapter(str(folder), adapter_name=name)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise FourscoreError(f"the adapter does not fit the model ({str(error).splitlines()[0]})", where=str(folder)) from error

    def _check_kinds(self) -> None:
        for name, config in (self._peft.peft_config if self._peft is not None else {}).items():
            if config.is_prompt_learning:
                raise FourscoreError(f"adapter `{name}` ({config.peft_type.value}) adds tokens to the prompt", todo="use a LoRA adapter")

    def _restore(self) -> None:
        if self._peft is None:
            return
        if self._loaded is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.set_adapter(self._loaded)

    @contextmanager
    def selected(self, name: str | None) -> Iterator[None]:
        """Run the block with the adapter `name`; None: the network as it was loaded. An unknown name is a FourscoreError."""
        if name is None:
            yield
            return
        self.check(name)
        asks_gradient = [(p, p.requires_grad) for p in self._peft.parameters()]  # PEFT's set_adapter changes it
        self._peft.base_model.enable_adapter_layers()
        self._peft.base_model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            self._restore()
            for parameter, asked in asks_gradient:
                parameter.requires_grad_(asked)
