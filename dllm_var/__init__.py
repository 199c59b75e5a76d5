"""Variable-length diffusion language models: train, sample and measure them.

Importing this package is cheap: the exported names load on first use.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "DiffusionLM": "dllm_var.module",
    "UserError": "dllm_var.errors",
    "load_pretrained": "dllm_var.checkpoints.pretrained",
}
__all__ = ["DiffusionLM", "UserError", "__version__", "load_pretrained"]

# callbacks/ and datamodules/ stand beside this folder in a checkout but inside it in a wheel. Looking in the checkout's
# root as well gives them the same names in both: dllm_var.callbacks and dllm_var.datamodules.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from dllm_var.checkpoints.pretrained import load_pretrained
    from dllm_var.errors import UserError
    from dllm_var.module import DiffusionLM


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dllm_var' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
