"""A result that is kept until one of the tensors that it was made of changes.

A tensor counts what is written to it, but not what is written through `.data`, or through other tensors that share its
memory, nor what fused optimizers write, for which we count.  So those that learn are also compared by their values on
the CPU; elsewhere that would wait for the device.  Of large ones it would take long: a lazy copy stands beside them,
where it can, which shares their memory until either is written to, by whatever way, and the tensor moves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

LARGE = 10_000  # values, above which comparing takes longer than a forward pass of the head

# Not public in PyTorch; without them, large tensors are compared, too.
_lazy_copy: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", Tensor.data_ptr)
_version = operator.attrgetter("_version")

Result = TypeVar("Result")


def _count_steps(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """PyTorch's fused optimizers, and others with kernels of their own, do not count what they write."""
    if torch.compiler.is_compiling():
        return
    others = not type(optimizer).__module__.startswith("torch.optim.")
    for group in optimizer.param_groups:
        if others or group.get("fused"):
            for parameter in group["params"]:
                if parameter.grad is not None and not parameter.is_inference():
                    torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(_count_steps)


class Kept(Generic[Result]):
    """A result and the tensors that it was made of.

    Args:
        result: what is kept.
        sources: lists of the tensors that it was made of.
        learned: those of them that may be written to through `.data`.
        modules: that made it; a parametrization adds one.
    """

    def __init__(
        self,
        result: Result,
        sources: tuple[list[Tensor], ...],
        learned: Iterable[Tensor],
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.result = result
        self.sources = sources
        self.learned = [*learned]
        self.modules = modules
        self._mark()

    def holds(self, sources: tuple[list[Tensor], ...], modules: Sequence[nn.Module] = ()) -> bool:
        """Whether the sources are the same tensors, and none has been written to or moved since."""
        return (
            len(sources) == len(self.sources)
            and all(map(_same, sources, self.sources))
            and _same(modules, self.modules)
            and self._version is not None
            and _sum_of_versions(sources) == self._version
            and [*map(_address, self.learned)] == self._addresses
            and same_values(self._compared, self._values)
        )

    def written_to(self) -> bool:
        """Whether something was written in place to the sources, also where others stand in for them in a graph."""
        return self._version is None or _sum_of_versions(self.sources) != self._version

    def _mark(self) -> None:
        on_cpu = [tensor for tensor in self.learned if type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu]
        lazily = [_copies_lazily(tensor) for tensor in on_cpu]
        self._lazy_copies = [_lazy_copy(tensor.detach()) for tensor in compress(on_cpu, lazily)]  # type: ignore[misc]
        self._compared = [*compress(on_cpu, map(operator.not_, lazily))]
        self._values = values_of(self._compared)
        self._addresses = [*map(_address, self.learned)]
        counted = not any(tensor.is_inference() for tensors in self.sources for tensor in tensors)
        self._version = _sum_of_versions(self.sources) if counted else None  # inference tensors count nothing

    def __getstate__(self) -> dict[str, Any]:
        """Copies are marked anew, where there is still something to keep."""
        holds = self.holds(self.sources, self.modules)
        return {**self.__dict__, "sources": self.sources if holds else (), "_lazy_copies": [], "_values": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mark()


class ListedTensors:
    """The tensors of a module, which are listed again where one of its parts was replaced."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._list()

    def __call__(self) -> list[Tensor]:
        """As they are now."""
        parts = [*chain.from_iterable(map(dict.values, self._dictionaries))]
        if not _same(parts, self._parts) or any(self._empty):
            self._list()
        return self.tensors

    def switches(self) -> list[Any]:
        """How the adapters of PEFT in it are set, which are turned on and off without a tensor that changes."""
        return [(one.disable_adapters, [*one.active_adapters], [*one.merged_adapters]) for one in self._adapters]

    def _list(self) -> None:
        inner: list[Any] = [*self.module.modules()] if isinstance(self.module, nn.Module) else []
        self._adapters = [one for one in inner if isinstance(getattr(one, "merged_adapters", None), list)]
        parts: Any = (part for one in inner for part in (one._parameters, one._buffers, one._modules))
        every: list[dict[str, Any]] = [*parts]
        self._dictionaries, self._empty = [part for part in every if part], [part for part in every if not part]
        self._parts = [*chain.from_iterable(map(dict.values, self._dictionaries))]
        self.tensors = tensors_of(self.module)

    def __reduce__(self) -> tuple[type[ListedTensors], tuple[Any]]:
        return ListedTensors, (self.module,)


def tensors_of(module: Any) -> list[Tensor]:
    """Parameters and buffers."""
    if not isinstance(module, nn.Module):
        return []
    parts = (part for inner in module.modules() for part in (*inner._parameters.values(), *inner._buffers.values()))
    return [part for part in parts if part is not None]


def values_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies to compare with later."""
    return [tensor.detach().clone() for tensor in tensors]


def same_values(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    """Whether tensors have the values, the type and the device of these copies."""
    return len(tensors) == len(values) and all(map(_has_value, tensors, values))


def _has_value(tensor: Tensor, value: Tensor) -> bool:
    return tensor.dtype == value.dtype and tensor.device == value.device and torch.equal(tensor, value)


def still_kept(
    kept: Kept[Result] | None, compute: Callable[[], Result], sources: tuple[list[Tensor], ...], learned: list[Tensor]
) -> Kept[Result]:
    """What was kept, where it holds; else it is computed, so that it may be used anywhere, gradients or not."""
    if kept is not None and kept.holds(sources):
        return kept
    with torch.inference_mode(False), torch.no_grad():
        return Kept(compute(), sources, learned)


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return before is now or (len(before) == len(now) and all(map(operator.is_, before, now)))


def _sum_of_versions(sources: tuple[list[Tensor], ...]) -> int:
    """Grows with every write to one of the tensors."""
    return sum(sum(map(_version, tensors)) for tensors in sources)


def _copies_lazily(tensor: Tensor) -> bool:
    """Whether it is large, in memory that nobody else's tensor has, and that may move."""
    if _lazy_copy is None or tensor.numel() < LARGE or tensor.is_shared():
        return False
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes  # what torch.load gives is not: a copy would crash


def traced() -> bool:
    """Whether a graph is being traced, or a transform such as vmap is at work: what they see is not ours to keep."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
