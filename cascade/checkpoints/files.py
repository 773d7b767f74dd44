"""Weights on disk: safetensors that carry their configuration; atomic writes, strict reads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cascade.checkpoints.mapped import SafetensorsFile, Stored, StoredTensors, open_safetensors
from cascade.checkpoints.written_tensors import save_tensors
from cascade.config import from_dict, to_dict
from cascade.errors import UserError, describe_os_error

CLASS_KEY = "cascade_class"
CONFIG_KEY = "cascade_config"
_PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
_SHOWN = 5


N = TypeVar("N", bound=nn.Module)
V = TypeVar("V")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` on success, remove it on error.

    Raises:
        UserError: The folder can't be written to, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        # A short beginning of the name: with all of a long one it would be too long.
        prefix = f".{path.name[:32]}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private.
        _open_to_others(temporary)
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        described = describe_os_error(error)
        if described is None:
            raise
        reason = described.split(": ", 1)[-1]
        raise UserError(f"{path}: can't be written: {reason}") from error
    except SafetensorError as error:
        _discard(temporary)
        raise UserError(f"{path}: can't be written: {_reason(error)}") from error
    except BaseException:
        _discard(temporary)
        raise


def _reason(error: SafetensorError) -> str:
    """Say what the file system said, which safetensors hands on as text."""
    number = re.search(r"os error (\d+)", str(error))
    described = describe_os_error(OSError(int(number[1]), "")) if number else None
    return str(error) if described is None else described


def _open_to_others(path: Path) -> None:
    """Give a private file or folder the mode that a plain open() or mkdir() would have given."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _discard(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; rename it to ``path`` on success, else remove it.

    ``path`` may be an empty folder, or not there.

    Raises:
        UserError: It can't be made, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:32]}.", dir=path.parent))
        yield temporary
        # mkdtemp makes it private, and so do some libraries what they write.
        for inside in (temporary, *temporary.rglob("*")):
            _open_to_others(inside)
        if path.is_dir():
            path.rmdir()  # Windows renames onto nothing; a folder with files stays
        temporary.rename(path)
    except OSError as error:
        described = describe_os_error(error)
        if described is None:
            raise
        raise UserError(f"{path}: can't be written: {described.split(': ', 1)[-1]}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: can't be written: {_reason(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file so that it is there whole or not at all."""
    atomic_write_bytes(path, text.encode("utf-8"))


def file_hash(path: str | Path) -> str:
    """Return the first 12 hex digits of a file's SHA-256."""
    path = Path(path)
    if not path.is_file():
        what = "a folder; name a file" if path.is_dir() else "no such file; check the path"
        raise UserError(f"{path}: {what}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def save_network(
    path: str | Path,
    module: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network with its class name and configuration in the file's metadata.

    Args:
        path: The ``.safetensors`` file.
        module: A network with a ``config`` dataclass.
        dtype: Number format of the floating-point tensors; None keeps each one's own.
        metadata: More metadata, all strings.

    Raises:
        UserError: It can't be written, or a number is not finite, in ``dtype``.
    """
    state = {
        key: finite_in(value, dtype, f"{path}, {key}").detach().cpu().contiguous()
        for key, value in module.state_dict().items()
    }
    described = {
        CLASS_KEY: type(module).__name__,
        CONFIG_KEY: json.dumps(to_dict(module.config)),
        **(metadata or {}),
    }
    with atomic_path(path) as temporary:
        save_tensors(state, temporary, described)


def finite_in(value: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """Return a tensor in another number format (None, or whole numbers: as it is).

    Raises:
        UserError: It holds a number that is not finite, such as one too large for the format.
    """
    if dtype is None or not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if not bool(cast.isfinite().all()):
        count = int((~cast.isfinite()).sum())
        name = str(cast.dtype).removeprefix("torch.")
        cure = "; write bfloat16 or float32" if cast.dtype == torch.float16 else ""
        raise UserError(f"{what}: {count} of its numbers are not finite in {name}{cure}")
    return cast


def check_finite_weights(network: nn.Module, where: object) -> None:
    """Refuse weights that hold a number that is not finite: all that they compute would be lost.

    Raises:
        UserError: The first tensor that does.
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            count = int((~value.isfinite()).sum())
            raise UserError(
                f"{where}: {count} numbers of {name} are not finite; train or fetch it again"
            )


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return a safetensors file's metadata without reading its tensors."""
    return _opened(path).metadata


def read_tensors(path: str | Path) -> StoredTensors:
    """Return a safetensors file's tensors, each memory-mapped when it is asked for."""
    return StoredTensors(strip_prefixes(_opened(path).tensors.stored))


def strip_prefixes(state: Mapping[str, V]) -> dict[str, V]:
    """Remove the prefixes that torch.compile and data-parallel wrappers put before all keys."""
    stripped = dict(state)
    changed = True
    while changed and stripped:
        changed = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in stripped):
                stripped = {key[len(prefix) :]: value for key, value in stripped.items()}
                changed = True
    return stripped


def _opened(path: str | Path) -> SafetensorsFile:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check the path")
    if path.suffix in {".pt", ".pth", ".ckpt", ".bin", ".pkl"}:
        raise UserError(
            f"{path}: refused: a pickle can run code when it is opened; use safetensors"
        )
    return open_safetensors(path)


@torch.inference_mode(False)
def load_network(
    path: str | Path,
    *,
    expect: type[N],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> N:
    """Load a network that ``save_network`` wrote; nothing may be missing or left over.

    The network is built on the meta device and takes the file's tensors one by one, memory-mapped
    where they stay as they are, so that the peak of memory is the weights themselves. Loaded inside
    ``torch.inference_mode``, as the previewer is, its tensors are ordinary ones and work outside of
    it as well.

    Args:
        path: The ``.safetensors`` file.
        expect: The network's class.
        device: Where its tensors go.
        dtype: Number format of its floating-point tensors; None keeps the file's.

    Returns:
        The network in evaluation mode.

    Raises:
        UserError: No such file, a pickle, a truncated file, another network's weights, or keys
            that don't fit; the first five of each kind are named.
    """
    path = Path(path)
    opened = _opened(path)
    metadata = opened.metadata
    found = metadata.get(CLASS_KEY)
    if found != expect.__name__:
        what = f"holds a {found}" if found else "says nothing of its network"
        raise UserError(f"{path}: {what}, but a {expect.__name__} is needed; check the path")
    config_class = _config_class(expect)
    try:
        values = json.loads(metadata[CONFIG_KEY])
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: its metadata holds no configuration; export it again") from error
    config = from_dict(config_class, values, f"{path} (configuration)")
    network = build_on_meta(expect, config, str(path))
    tensors = StoredTensors(strip_prefixes(opened.tensors.stored))
    assign_strictly(network, tensors.moved(device, dtype), str(path))
    return network.eval()


class _NoDraws(TorchFunctionMode):
    """Leaves the first values of weights out: on the meta device there are none to draw.

    torch draws there all the same, through decompositions in Python whose import alone takes a
    second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let networks be built in this block without memory for their tensors, and fast."""
    with torch.device("meta"), _NoDraws():
        yield


def build_on_meta(network: type[N], config: Any, where: str) -> N:
    """Build a network without memory for its tensors.

    Raises:
        UserError: If the sizes that ``config`` names make no network.
    """
    try:
        with on_meta():
            return network(config)
    # A file's sizes are checked as far as its config class knows them; layers refuse the others.
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
        raise UserError(
            f"{where}: no {network.__name__} can be built of its configuration ({reason}); "
            "export it again"
        ) from e


def _config_class(network: type[nn.Module]) -> type[Any]:
    """Return the class of the ``config`` argument of a network's constructor."""
    return get_type_hints(network.__init__)["config"]


def assign_strictly(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put ``state`` in place of a network's tensors; every key must fit.

    Of ``StoredTensors`` none is read before all fit.

    Raises:
        UserError: Naming the first five missing, unexpected and misshapen keys, and those with
            whole numbers in place of fractions.
    """
    if not state:
        raise UserError(f"{where}: holds no tensor at all; export or download it again")
    own = network.state_dict()
    found = sizes(state)
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} ({sides(found[key].shape)} in the file, {sides(own[key].shape)} in the network)"
        for key in own
        if key in found and found[key].shape != own[key].shape
    ]
    of_integers = [
        f"{key} ({found[key].dtype} in the file, {own[key].dtype} in the network)"
        for key in own
        if key in found and found[key].dtype.is_floating_point != own[key].is_floating_point()
    ]
    complaints = [
        f"{len(keys)} {kind}: {first_keys(keys)}"
        for kind, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("of another kind of number", of_integers),
        )
        if keys
    ]
    if complaints:
        name = type(network).__name__
        raise UserError(f"{where}: does not fit {name}: {'; '.join(complaints)}")
    network.load_state_dict(dict(state), strict=True, assign=True)


def sizes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor | Stored]:
    """Return what tells each tensor's shape and number format, reading none."""
    return state.stored if isinstance(state, StoredTensors) else state


def first_keys(keys: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


def sides(shape: torch.Size) -> str:
    """Return a shape as 3x4x5."""
    return "x".join(str(side) for side in shape) or "scalar"
