"""The pipeline around mae_core as a library: the functions behind the `mae` commands.

    from pipelines import extension_of, finetune, pretrain, probe
    from pipelines.config import PrepareConfig, PretrainConfig, load_preset, with_overrides
    from pipelines.prepare import prepare
    from tune.sweep import sweep

    prepare("photos", "prepared", PrepareConfig())
    config = with_overrides(load_preset(PretrainConfig, "nano"), {"data.uri": "prepared"})
    outcome = pretrain(config, "nano")
    longer = pretrain(extension_of(outcome["folder"], {"epochs": 10}))

Two functions are not re-exported. `pipelines.prepare` is a package, and one name cannot be both a package and a
function: which of the two it means would depend on what was imported before. `sweep` belongs to `tune`, which is built
on top of `pipelines` and which `pipelines` must not import.

The functions are imported when they are first used, so that a process that only needs a submodule does not load Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.drivers.classify import finetune, probe
    from pipelines.drivers.extend import extension_of
    from pipelines.drivers.pretrain import pretrain

_HOME = {"extension_of": "extend", "finetune": "classify", "pretrain": "pretrain", "probe": "classify"}

__all__ = ["extension_of", "finetune", "pretrain", "probe"]


def __getattr__(name: str) -> Any:
    """Import the public function `name` from its module (PEP 562)."""
    if name in _HOME:
        return getattr(import_module(f"pipelines.drivers.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
