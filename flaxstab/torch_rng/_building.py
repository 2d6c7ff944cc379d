"""Tells of every layer whose constructor returns, while a model is being built.

PyTorch's layers draw in their constructors, one after the other. NNX offers no hook there and keeps
no record of the order, so the constructors of the types in question are wrapped for as long as
somebody listens; only the listening thread notices. This rests on one thing alone: that building a
module calls ``type(module).__init__``. The types are as before when the last listener has gone
(``test_constructors_are_left_as_they_were``).
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

from flax import nnx

from flaxstab._checks import check

Built = Callable[[nnx.Module, type[nnx.Module]], None]

_lock = threading.Lock()
_listeners: dict[type[nnx.Module], int] = {}  # how many listen to a wrapped type
_here = threading.local()  # .site: where this thread is building, if it listens


class _Site:
    """A model being built in one thread."""

    def __init__(
        self,
        built: Built,
        types: Collection[type[nnx.Module]],
        owners: Collection[type[nnx.Module]],
    ) -> None:
        self.built, self.types, self.owners = built, frozenset(types), frozenset(owners)
        self.depth = 0  # inside how many owners


@contextmanager
def telling(
    built: Built,
    types: Collection[type[nnx.Module]],
    owners: Collection[type[nnx.Module]],
) -> Iterator[None]:
    """Calls ``built`` whenever a constructor of given types returns in this thread.

    Args:
      built: called with the module and the type whose constructor returns: that of the module or,
        when a subclass calls ``super().__init__``, a base.
      types: whose constructors are listened to.
      owners: those of them whose insides are parts of them and not told of.

    Raises:
      ValueError: if this thread is listening already.
    """
    nested = _site() is not None
    fix = "Build the parts with one call."
    check(not nested, "models are seeded one after the other", fix=fix, nested=nested)
    with ExitStack() as stack:
        for module_type in types:
            stack.enter_context(_wrapped(module_type))
        _here.site = _Site(built, types, owners)
        stack.callback(setattr, _here, "site", None)
        yield


def _site() -> _Site | None:
    return getattr(_here, "site", None)


@contextmanager
def _wrapped(module_type: type[nnx.Module]) -> Iterator[None]:
    """Wraps a type's constructor, or finds it wrapped; the last to leave unwraps it."""
    with _lock:
        if module_type not in _listeners:
            _wrap(module_type)
        _listeners[module_type] = _listeners.get(module_type, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _listeners[module_type] -= 1
            if not _listeners[module_type]:
                del _listeners[module_type]
                _unwrap(module_type)


def _wrap(module_type: type[nnx.Module]) -> None:
    init: Callable[..., None] = module_type.__init__

    @wraps(init)
    def telling_init(self: nnx.Module, *args: object, **kwargs: object) -> None:
        site = _site()
        if site is None or module_type not in site.types:
            init(self, *args, **kwargs)
            return
        owns = module_type in site.owners
        site.depth += owns
        try:
            init(self, *args, **kwargs)
        finally:
            site.depth -= owns
        if site.depth == 0:
            site.built(self, module_type)

    vars(telling_init)["inherited"] = "__init__" not in vars(module_type)
    type.__setattr__(module_type, "__init__", telling_init)


def _unwrap(module_type: type[nnx.Module]) -> None:
    wrapper = vars(vars(module_type)["__init__"])
    if wrapper["inherited"]:
        type.__delattr__(module_type, "__init__")
    else:
        type.__setattr__(module_type, "__init__", wrapper["__wrapped__"])
