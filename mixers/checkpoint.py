"""Networks that are saved with their configuration and built again from one file, by name and never by pickled code.

A checkpoint is a safetensors file; where safetensors is not installed, a `torch.save` file that is read with
weights_only=True. Its metadata say in JSON which network it is, how it was built, and whatever notes were given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mixers.initial import fill_as_built
from mixers.mixer import _remember_arguments as remember_arguments

FORMAT = "sequence-mixers network"
Self = TypeVar("Self", bound="Network")


class Network(nn.Module):
    """A module that knows the arguments it was built with, and can be saved and loaded."""

    kinds: ClassVar[dict[str, type[Network]]] = {}
    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Network.kinds[cls.__name__] = cls
        cls.__init__ = remember_arguments(cls.__init__)  # type: ignore[method-assign]

    def config(self) -> dict[str, Any]:
        """The arguments that build this network again: `type(network)(**network.config())`."""
        return dict(self._config)

    def reset_parameters(self) -> None:
        """Gives all parameters and buffers new initial values in place, as building the network does; see
        `SequenceMixer.reset_parameters`."""
        fill_as_built(self)

    def save(self, path: str | Path, *, notes: Mapping[str, Any] | None = None) -> None:
        """Writes weights, configuration and notes to one file, which is never seen half written.

        notes: anything that JSON can hold, for `read_notes`.

        Raises:
            TypeError: the configuration or the notes hold what JSON cannot (a tensor as an option, for instance).
        """
        about = {"format": FORMAT, "network": type(self).__name__, "config": self.config(), "notes": dict(notes or {})}
        try:
            metadata = {name: json.dumps(value) for name, value in about.items()}
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.save: config and notes must be plain values: {error}") from error
        _write(Path(path), _separate(self.state_dict()), metadata)

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """The network that was saved, on the CPU, in the dtypes it was saved in. `Network.load` takes any kind.

        Raises:
            ValueError: the file holds no network of this kind, or its weights do not fit its configuration.
        """
        tensors, about = _read(Path(path))
        kind = Network.kinds.get(about["network"])
        if kind is None or not issubclass(kind, cls):
            raise ValueError(f"checkpoint {path}: holds a {about['network']}, expected a {cls.__name__}")
        # the numbers drawn to initialise it are thrown away; the caller's random state is as it was
        try:
            with torch.random.fork_rng(devices=[]):
                network = kind(**about["config"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint {path}: its configuration builds no {about['network']}: {error}") from error
        _check(network, tensors, path)
        network.load_state_dict(tensors, assign=True)
        return network

    def load_weights(self, path: str | Path) -> None:
        """Copies a checkpoint's weights into this network, keeping its device and dtypes; all of them or none.

        Raises:
            ValueError: names or shapes differ; every difference is listed, and nothing was changed.
        """
        tensors, _ = _read(Path(path))
        _check(self, tensors, path)
        self.load_state_dict(tensors)


def read_notes(path: str | Path) -> dict[str, Any]:
    """The notes that a network was saved with."""
    return _read(Path(path))[1]["notes"]


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file beside `path`, and puts it in path's place once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # some writers make files that nobody else may read
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        replace_file(path, lambda file: torch.save({"metadata": metadata, "tensors": tensors}, file))
    else:
        replace_file(path, lambda file: save_file(tensors, str(file), metadata))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        if zipped:
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors, metadata = content["tensors"], content["metadata"]
        else:
            tensors, metadata = _read_safetensors(path)
        about = {name: json.loads(value) for name, value in metadata.items()}
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"checkpoint {path}: reading it needs safetensors; pip install safetensors") from error
    except Exception as error:
        raise ValueError(f"checkpoint {path}: no {FORMAT}, or damaged: {error}") from error
    return tensors, about


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; those that share memory with another are copied."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _check(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    own = network.state_dict()
    wrong = [f"{name} is missing from the file" for name in own if name not in tensors]
    wrong += [f"{name} is in the file but not in the network" for name in tensors if name not in own]
    wrong += [
        f"{name} is {list(tensors[name].shape)} in the file but {list(own[name].shape)} in the network"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(
            f"checkpoint {path} does not fit this {type(network).__name__}; nothing was loaded:\n  {listed}"
        )
