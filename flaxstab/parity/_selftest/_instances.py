"""Faults planted in one layer of a network alone: is that layer named, and the side?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flaxstab import interop
from flaxstab.parity._alone import Programs
from flaxstab.parity._models import Pair
from flaxstab.parity._selftest._mistakes import KINDS, NEEDS, Mistake, mistakes
from flaxstab.parity._selftest._networks import Twins, networks
from flaxstab.parity._selftest._plant import Function
from flaxstab.parity._words import aligned

if TYPE_CHECKING:
    pass

TOP = 0.95  # of the faults must be found in the layer where they are
RIGHT = 0.99  # and on the side
_MARK = "planted"  # of the one layer, on either side; copies and split modules keep it


class Planted(NamedTuple):
    """What came of one mistake in one layer.

    Attributes:
      mistake: its name.
      network: where.
      layer: the layer's name.
      direction: in which it must be found.
      side: the side that makes it.
      found: whether the comparison failed.
      named_side: the side that it names.
      named_layer: the first layer that it names.
      named_direction: in which direction.
      excess: the layer's own error over its bound.
    """

    mistake: str
    network: str
    layer: str
    direction: str
    side: str
    found: bool
    named_side: str
    named_layer: str
    named_direction: str
    excess: float

    @property
    def right_side(self) -> bool:
        """Whether the side was named."""
        return self.found and self.named_side == self.side

    @property
    def right_layer(self) -> bool:
        """Whether the layer was named, in the right direction."""
        named = self.named_layer, self.named_direction
        return self.found and named == (self.layer, self.direction)


class _Plan(NamedTuple):
    network: str
    mistake: Mistake
    layer: str
    kind: str
    side: str


def plan(seed: int, each: int | None) -> list[_Plan]:
    """Draws a layer and a side for mistakes in every network.

    Args:
      seed: of layers and sides.
      each: how many mistakes a network gets; None = all that its layers can make.
    """
    rng, planned = np.random.default_rng(seed), []
    for name, build in networks().items():
        sides = build()
        module = dict(sides.theirs.named_modules())
        twins = interop.named_modules(sides.ours)
        layers = {
            n: next((k for k, kind in KINDS.items() if type(m).__name__ == kind.torch), "")
            for n, m in module.items() if n in twins
        }  # fmt: skip
        chosen = []
        for mistake in mistakes():
            fits = [
                n for n, kind in layers.items()
                if kind and mistake.kind in ("", kind)
                and NEEDS.get(mistake.name, lambda _: True)(module[n])
            ]  # fmt: skip
            if fits:
                layer = fits[int(rng.integers(len(fits)))]
                side = ("jax", "torch")[int(rng.integers(2))]
                chosen.append(_Plan(name, mistake, layer, layers[layer], side))
        if each is not None:
            picked = sorted(rng.choice(len(chosen), min(each, len(chosen)), replace=False))
            chosen = [chosen[i] for i in picked]
        planned += chosen
    return planned


class Instances(NamedTuple):
    """What came of all mistakes, and of the networks without any.

    Attributes:
      planted: one per mistake.
      alarms: networks without a mistake that fail nevertheless, or in which a layer is named.
    """

    planted: tuple[Planted, ...]
    alarms: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all were found, the side named in 99 %, the layer in 95 %, without alarms."""
        count = len(self.planted)
        found = all(p.found for p in self.planted)
        sides = sum(p.right_side for p in self.planted) >= RIGHT * count
        layers = sum(p.right_layer for p in self.planted) >= TOP * count
        return found and sides and layers and not self.alarms

    def __str__(self) -> str:
        blocks = [*aligned(self.rows()), ""] if self.planted else []
        return "\n".join([*blocks, *self.sums()])

    def rows(self) -> list[tuple[str, ...]]:
        """Returns a heading and a row for each mistake."""
        heads = ("fault", "network", "layer", "planted", "named", "first layer named", "excess")
        return [
            heads,
            *(
                (
                    p.mistake, p.network, p.layer, p.side, p.named_side or "-",
                    f"{p.named_layer or '-'} {p.named_direction}".strip(), f"{p.excess:.2g}",
                )
                for p in self.planted
            ),
        ]  # fmt: skip

    def sums(self) -> list[str]:
        """Returns how many were found, on which side and in which layer."""
        total = len(self.planted)
        return [
            *(
                f"not found: {p.mistake} in {p.layer} ({p.side})"
                for p in self.planted
                if not p.found
            ),
            *(f"false alarm: {name}" for name in self.alarms),
            f"faults of one layer found {sum(p.found for p in self.planted)}/{total}",
            f"side named rightly {sum(p.right_side for p in self.planted)}/{total}",
            f"layer and direction named rightly {sum(p.right_layer for p in self.planted)}/{total}",
        ]


def run_instances(
    seed: int = 0, each: int | None = None, told: Callable[[str], None] = lambda _: None
) -> Instances:
    """Plants mistakes in single layers of four networks, and compares.

    Args:
      seed: of layers, sides and cotangents.
      each: see :func:`plan`.
      told: is told what is being done.
    """
    planned, planted, alarms = plan(seed, each), [], []
    for name, build in networks().items():
        sound = _Network(build(), seed)
        alarms += [name] if sound.alarm() else []
        here = [p for p in planned if p.network == name]
        for number, item in enumerate(here, 1):
            told(f"{name} {number}/{len(here)} {item.mistake.name} in {item.layer} ({item.side})")
            planted.append(_outcome(item, sound, build, seed))
    return Instances(tuple(planted), tuple(alarms))


class _Network:
    """One network's sides, compiled.

    Args:
      sides: of the network.
      seed: of the cotangents.
      sound: the same without a mistake, if this has one: its magnitudes and its layers' programs
        serve this one, too, which is faster.
    """

    def __init__(self, sides: Twins, seed: int, sound: "_Network | None" = None) -> None:
        self._sides, self._seed = sides, seed
        self._pair = Pair(
            sides.ours, sides.theirs, sides.inputs, layout=sides.layout, witness=sides.witness
        )
        if sound is None:
            self._pair.magnitudes = self._pair.measured(sides.inputs, seed)
        else:
            self._pair.magnitudes = sound._pair.magnitudes
            self._pair.programs = Programs(sound._pair.programs)

    def judge(self) -> tuple[bool, str, str, str, float]:
        """Returns whether it failed, the side, the first layer, its direction and own error."""
        report = self._pair.judge(self._sides.inputs, dtypes=(), seed=self._seed)
        location = report.location
        error = None if location is None else location.error
        if location is None or error is None:
            return not report.passed, report.side, "", "", 0.0
        return not report.passed, report.side, location.first, location.direction, error.own

    def alarm(self) -> bool:
        """Whether a sound network fails, or one of its layers is named."""
        locator = self._pair.locator(self._pair.fed(self._sides.inputs, self._seed))
        return self.judge()[0] or bool(locator.locate(free=False, stop=True).first)

    @contextmanager
    def marked(self, layer: str) -> Iterator[None]:
        """Marks one of PyTorch's layers inside a ``with`` block."""
        module = self._pair.torch_module.get_submodule(layer)
        setattr(module, _MARK, True)
        try:
            yield
        finally:
            delattr(module, _MARK)


def _outcome(item: _Plan, sound: _Network, build: Callable[[], Twins], seed: int) -> Planted:
    kind = KINDS[item.kind]
    if item.side == "torch":
        import torch

        owner = _definer(vars(torch.nn)[kind.torch], "forward")
        with sound.marked(item.layer), _faulty(owner, "forward", item.mistake.torch):
            seen = sound.judge()
    else:
        sides = build()
        setattr(interop.named_modules(sides.ours)[item.layer], _MARK, True)
        owner, method = kind.flax
        with _faulty(_definer(owner, method), method, item.mistake.jax):
            seen = _Network(sides, seed, sound).judge()
    return Planted(
        item.mistake.name, item.network, item.layer, item.mistake.direction, item.side, *seen
    )


def _definer(kind: type, method: str) -> type:
    """Returns the class that a method is written in."""
    return next(base for base in kind.__mro__ if method in vars(base))


@contextmanager
def _faulty(owner: type, method: str, make: Callable[[Function], Function]) -> Iterator[None]:
    """Makes the marked layer's calls faulty, inside a ``with`` block.

    Args:
      owner: the class that has the method.
      method: through which the layer runs.
      make: from a call to the faulty one.
    """
    original, running = vars(owner)[method], [False]

    def now(layer: object, *args: object, **named: object) -> object:
        return getattr(type(layer), method)(layer, *args, **named)  # what is planted by now

    def call(layer: object, *args: object, **named: object) -> object:
        if running[0] or not vars(layer).get(_MARK):
            return original(layer, *args, **named)
        running[0] = True
        try:
            return make(now)(layer, *args, **named)
        finally:
            running[0] = False

    setattr(owner, method, call)
    try:
        yield
    finally:
        setattr(owner, method, original)
