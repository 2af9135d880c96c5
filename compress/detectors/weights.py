"""Files of tensors: read one without running code from it, and load it into a module without losing a key.

`read_tensors` reads `.safetensors` and torch's `.pth`/`.pt`; `load_exactly` copies a state dict into a
module and names the keys that are missing, left over or of another shape; `state_sha256` tells weights apart.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deploy.core.errors import UserError, first_line
from deploy.core.shown import some
from deploy.core.storage import fetch


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU.

    `.safetensors` files are read as they are. Anything else is read by torch with `weights_only=True`, so
    that no code in the file runs; it may be a state dict or a dict with one under `state_dict` (mmdet,
    Lightning) or `model` (torchvision's reference scripts).

    Raises UserError when there is no such file, or it cannot be read, or holds no tensors.
    """
    if not fetch(path).is_file():
        raise UserError(f"{path}: no such file; give a .safetensors or .pth file with weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({first_line(error)}); copy or download it again"
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"{path}: holds Python objects beside tensors, which are not loaded because they could "
                "run code; save its state_dict alone and pass that file"
            ) from error
        raise UserError(
            f"{path}: not a readable torch checkpoint ({first_line(error)}); copy or download it again"
        ) from error
    except Exception as error:  # torch raises whatever a damaged zip or pickle stream makes its readers raise
        raise UserError(
            f"{path}: not a readable torch checkpoint ({type(error).__name__}: {first_line(error)}); "
            "copy or download it again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path}: no state dict in this file; expected tensors by name, at the top or under 'state_dict'"
        )
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def load_exactly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    file_key: Callable[[str], str] = lambda key: key,
) -> None:
    """Copy `state` into `module`; nothing is copied unless everything fits.

    BatchNorm's batch counters (`num_batches_tracked`) may be absent: old files lack them and nothing here
    reads them. `file_key` turns a key of the module into the file's name for it; `source` names the file in
    messages.

    Raises UserError that lists, by the file's names, missing and unexpected keys and those of another shape.
    """
    wanted = {file_key(key): tensor for key, tensor in module.state_dict().items()}
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems = [
        f"{what} {len(keys)} key(s): {some(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape for", misshapen))
        if keys
    ]
    if problems:
        raise UserError(f"{source}: weights do not fit the model; {'; '.join(problems)}")
    fitting = {key: state[file_key(key)] for key in module.state_dict() if file_key(key) in state}
    module.load_state_dict(fitting, strict=False)


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over names and values of the state dict: equal weights give equal digits."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
