"""A result that is kept until one of the tensors that it was made of changes; no values are compared.

A tensor counts what is written to it, but not what is written through `.data`.  So a lazy copy stands beside tensors
that learn: it shares their memory until either is written to, by whatever way, and then makes the tensor move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Not public in PyTorch; without them, writing in place through `.data` is not seen.
_lazy_copy: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", Tensor.data_ptr)


class Kept:
    """A result and the tensors that it was made of.

    Args:
        result: what is kept.
        sources: the tensors that it was made of.
        learned: those of them that may be written to through `.data`.
    """

    def __init__(self, result: Tensor, sources: Iterable[Tensor], learned: Iterable[Tensor] = ()) -> None:
        self.result = result
        self.sources = [*sources]
        self.learned = [*learned]
        self._mark()

    def holds(self, sources: list[Tensor]) -> bool:
        """Whether the sources are the same tensors, and none has been written to or moved since."""
        return (
            len(sources) == len(self.sources)
            and all(a is b for a, b in zip(sources, self.sources, strict=True))
            and None not in self._versions
            and [*map(_version, sources)] == self._versions
            and [*map(_address, self.learned)] == self._addresses
        )

    def _mark(self) -> None:
        shared = (t for t in self.learned if _lazy_copy is not None and _owns_memory(t))
        self._lazy_copies = [_lazy_copy(tensor.detach()) for tensor in shared]  # type: ignore[misc]  # not None here
        self._versions = [*map(_version, self.sources)]
        self._addresses = [*map(_address, self.learned)]

    def __getstate__(self) -> dict[str, Any]:
        """Copies are marked anew, where there is still something to keep."""
        sources = self.sources if self.holds(self.sources) else []
        return {"result": self.result, "sources": sources, "learned": self.learned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mark()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _owns_memory(tensor: Tensor) -> bool:
    """Whether nobody else's tensor would move along with this one."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda")
    return plain and tensor.untyped_storage().nbytes() == tensor.nbytes
