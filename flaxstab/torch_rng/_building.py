"""Tells of every layer whose constructor returns, while a model is being built."""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

from flax import nnx

from flaxstab._checks import check

Built = Callable[[nnx.Module], None]

_one_at_a_time = threading.Lock()
_here = threading.local()  # .building: whether this thread holds the lock


class _Site:
    """Where a model is being built."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.thread = threading.get_ident()
        self.depth = 0  # inside how many owners


@contextmanager
def telling(
    built: Built,
    types: Collection[type[nnx.Module]],
    owners: Collection[type[nnx.Module]],
) -> Iterator[None]:
    """Calls ``built`` with every module of given types, in the order in which they are built.

    NNX has no hook for that, so meanwhile the constructors of these types are wrapped; other
    threads do not notice.

    Args:
      built: called when a constructor returns.
      types: exact types; what is built inside of one comes before it.
      owners: those of them whose insides are parts of them and not told of.

    Raises:
      ValueError: if this thread is telling already.
    """
    nested = getattr(_here, "building", False)
    fix = "Build the parts with one call."
    check(not nested, "models are seeded one after the other", fix=fix, nested=nested)
    with _one_at_a_time, ExitStack() as stack:
        site = _Site(built)
        for module_type in types:
            stack.enter_context(_wrapped(module_type, site, module_type in owners))
        _here.building = True
        try:
            yield
        finally:
            _here.building = False


@contextmanager
def _wrapped(module_type: type[nnx.Module], site: _Site, owns: bool) -> Iterator[None]:
    inherited = "__init__" not in vars(module_type)
    init: Callable[..., None] = module_type.__init__

    @wraps(init)
    def telling_init(self: nnx.Module, *args: object, **kwargs: object) -> None:
        # A subclass runs its own constructor around this one: it is another type.
        counts = type(self) is module_type and threading.get_ident() == site.thread
        site.depth += counts and owns
        try:
            init(self, *args, **kwargs)
        finally:
            site.depth -= counts and owns
        if counts and site.depth == 0:
            site.built(self)

    type.__setattr__(module_type, "__init__", telling_init)
    try:
        yield
    finally:
        if inherited:
            type.__delattr__(module_type, "__init__")
        else:
            type.__setattr__(module_type, "__init__", init)
