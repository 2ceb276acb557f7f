"""blip3o_ds: train diffusion transformers that generate CLIP patch embeddings from EVA-CLIP ones by rectified flow.

The Python face is imported when it is first used, so that `import blip3o_ds` imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip3o_ds.api import DiT, evaluate, load_dataset, load_pretrained, sample

__version__ = "0.1.0"
__all__ = ["DiT", "evaluate", "load_dataset", "load_pretrained", "sample"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blip3o_ds import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
