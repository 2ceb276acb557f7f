"""Triton, or just enough of it to define kernels where it is not installed and nothing can launch them.

Every file with kernels takes `triton` and `tl` from here, so that the references can be imported anywhere.
"""

from importlib import import_module
from typing import Any

from blip3o_kernels.dispatch import TRITON_INSTALLED


class _Absent:
    """Stands for a module: a decorated function stays as it is, a constant is its value."""

    def jit(self, function: Any = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    def constexpr(self, value: Any) -> Any:
        return value


triton: Any = import_module("triton") if TRITON_INSTALLED else _Absent()
tl: Any = import_module("triton.language") if TRITON_INSTALLED else _Absent()
