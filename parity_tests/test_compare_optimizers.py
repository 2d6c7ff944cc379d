"""``compare`` of optax transformations with torch optimizers: updates, parameters, state."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flaxstab import optim, parity
from flaxstab.parity import Verdict
from parity_tests.support.cases import values
from parity_tests.support.pairs import failures, finding

Params = list[torch.nn.Parameter]
Factory = Callable[[Params], object]

PARAMS = (values(4, 3), values(3, seed=1), values(seed=2), values(2, 1, 2, seed=3))
KINDS = (np.float32, jnp.bfloat16)
MASK = [True, False, True, False]


def adamw(params: Params) -> torch.optim.AdamW:
    return torch.optim.AdamW(params)


def quantities(*kinds: str, count: int = len(PARAMS)) -> set[str]:
    return {f"{kind} {i}" for kind in kinds for i in range(count)}


OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0, "eps": 0.3},
    "betas": {"betas": (0.0, 0.5)},
    "all": {"amsgrad": True, "maximize": True, "betas": (0.5, 0.9), "eps": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_our_adamw_agrees_in_every_precision(options: dict[str, object]) -> None:
    def theirs(params: Params) -> torch.optim.AdamW:
        return torch.optim.AdamW(params, lr=1e-2, **options)

    report = parity.compare(optim.adamw(1e-2, **options), theirs, *PARAMS, dtypes=KINDS)
    assert report.passed, str(report)
    assert report.side == ""
    assert report.departure is None
    expected = quantities("update", "param", "exp_avg", "exp_avg_sq", "step")
    expected |= quantities("max_exp_avg_sq") if "amsgrad" in options else set()
    assert {f.name for f in report.findings if f.dtype == "float64"} == expected
    low = {f.name for f in report.findings if f.dtype == "bfloat16"}
    assert low == expected - quantities("step")  # counts are integers in optax


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "weight_decay", "betas", "eps"])
def test_every_option_of_adamw_is_seen(option: str) -> None:
    odd = {**OPTIONS["all"], "weight_decay": 0.3}[option]
    report = parity.compare(optim.adamw(**{option: odd}), adamw, PARAMS[0], dtypes=())
    assert "update 0" in failures(report)


def test_optax_adamw_has_another_default_of_weight_decay() -> None:
    report = parity.compare(optax.adamw(1e-3), adamw, *PARAMS, dtypes=())
    assert failures(report) == quantities("update", "param")
    first = report.departure
    assert first is not None
    assert (first.step, first.name[:6], first.dtype) == (1, "update", "float64")
    assert first.excess > 1e6
    assert f"first apart: {first.name} after step 1, in float64" in str(report)
    assert finding(report, "update 0").explanation.startswith("at step 1 the sides differ by")
    same = parity.compare(optax.adamw(1e-3, weight_decay=1e-2), adamw, *PARAMS, dtypes=KINDS)
    assert same.passed, str(same)
    assert same.departure is None


@pytest.mark.parametrize("nesterov", [False, True])
def test_optax_sgd_with_momentum_is_torchs(nesterov: bool) -> None:
    def sgd(momentum: float) -> Factory:
        return lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=momentum, nesterov=nesterov)

    ours = optax.sgd(0.1, momentum=0.9, nesterov=nesterov)
    report = parity.compare(ours, sgd(0.9), *PARAMS, dtypes=KINDS)
    assert report.passed, str(report)
    names = {f.name for f in report.findings}
    assert names == quantities("update", "param", "momentum_buffer")
    other = parity.compare(ours, sgd(0.9 * (1 + 1e-9)), *PARAMS, dtypes=())
    assert failures(other) == names


def test_optax_amsgrad_takes_the_maximum_of_corrected_moments() -> None:
    def theirs(params: Params) -> torch.optim.Adam:
        return torch.optim.Adam(params, lr=1e-3, amsgrad=True)

    report = parity.compare(optax.amsgrad(1e-3), theirs, *PARAMS, dtypes=())
    assert failures(report) == quantities("max_exp_avg_sq", "update", "param")
    first = report.departure
    assert first is not None
    assert (first.step, first.name.split()[0]) == (1, "max_exp_avg_sq")


class PlainAdamW(torch.optim.Optimizer):
    """The formula; ``sign`` and ``corrected`` plant a fault."""

    def __init__(self, params: Iterable, *, sign: int = -1, corrected: bool = True) -> None:
        super().__init__(params, {})
        self.sign, self.corrected = sign, corrected

    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p] or {"step": 0, "exp_avg": 0 * p.data, "exp_avg_sq": 0 * p.data}
            t, g = state["step"] + 1, p.grad
            m, v = 0.9 * state["exp_avg"] + 0.1 * g, 0.999 * state["exp_avg_sq"] + 0.001 * g**2
            self.state[p] = {"step": t, "exp_avg": m, "exp_avg_sq": v}
            first, second = (1 - 0.9**t, 1 - 0.999**t) if self.corrected else (1, 1)
            change = m / first / ((v / second).sqrt() + 1e-8)
            p.data = p.data * (1 - 1e-5) + self.sign * 1e-3 * change


def uncorrected() -> optax.GradientTransformation:
    """AdamW without bias correction."""

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), int), zeros, zeros)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state.nu, updates)
        change = jax.tree.map(
            lambda m, v, p: -1e-3 * m / (jnp.sqrt(v) + 1e-8) - 1e-5 * p, mu, nu, params
        )
        return change, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


OUR_FAULTS = {
    "sign": (optax.chain(optim.adamw(), optax.scale(-1.0)), 1, "update"),
    "no update": (optax.chain(optim.adamw(), optax.set_to_zero()), 1, "update"),
    "beta2": (optim.adamw(betas=(0.9, 0.999 + 1e-4)), 1, "exp_avg_sq"),
    "bias correction": (uncorrected(), 1, "update"),
}
TORCH_FAULTS = {
    "sign": (lambda ps: PlainAdamW(ps, sign=1), 1, "update"),
    "no update": (lambda ps: torch.optim.AdamW(ps, lr=0.0), 1, "update"),
    "beta2": (lambda ps: torch.optim.AdamW(ps, betas=(0.9, 0.999 + 1e-4)), 1, "exp_avg_sq"),
    "bias correction": (lambda ps: PlainAdamW(ps, corrected=False), 1, "update"),
}


def test_the_plain_formula_is_adamw() -> None:
    report = parity.compare(optim.adamw(), PlainAdamW, *PARAMS[:2], dtypes=())
    assert report.passed, str(report)


def assert_found(report: parity.Report, step: int, kind: str, side: str) -> None:
    first = report.departure
    assert first is not None
    assert (first.step, first.name.split()[0]) == (step, kind)
    assert quantities("update", "param", count=2) <= failures(report)
    assert {f.side for f in report.findings if not f.passed} == {side}
    assert report.side == side
    assert report.verdict == Verdict.SEMANTICS_DIFFER


@pytest.mark.parametrize("fault", OUR_FAULTS)
def test_a_faulty_transformation_is_found_and_named_by_the_witness(fault: str) -> None:
    ours, step, kind = OUR_FAULTS[fault]
    report = parity.compare(ours, adamw, *PARAMS[:2], dtypes=(), witness=PlainAdamW)
    assert_found(report, step, kind, "jax")
    assert_found(parity.compare(ours, adamw, *PARAMS[:2], dtypes=()), step, kind, "")


@pytest.mark.parametrize("fault", TORCH_FAULTS)
def test_a_faulty_torch_optimizer_is_found_and_named_by_the_witness(fault: str) -> None:
    theirs, step, kind = TORCH_FAULTS[fault]
    report = parity.compare(optim.adamw(), theirs, *PARAMS[:2], dtypes=(), witness=adamw)
    assert_found(report, step, kind, "torch")


def clip(params: Params) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(params, 1.0)


def test_optax_clipping_is_worse_in_float16_and_ours_agrees() -> None:
    ours = parity.compare(optim.clip_grad_norm(1.0), clip, *PARAMS, dtypes=(jnp.float16,))
    assert ours.passed, str(ours)
    assert {f.name for f in ours.findings} == quantities("gradient")
    optaxs = optax.clip_by_global_norm(1.0)
    report = parity.compare(optaxs, clip, *PARAMS, dtypes=(jnp.float16,))
    low = [f for f in report.findings if f.dtype == "float16"]
    assert {(f.verdict, f.side) for f in low} == {(Verdict.JAX_WORSE, "jax")}


def test_a_wrong_clip_is_found() -> None:
    report = parity.compare(optim.clip_grad_norm(1.0 + 1e-9), clip, *PARAMS, dtypes=())
    assert failures(report) == quantities("gradient")


def clipped(params: Params) -> torch.optim.AdamW:
    optimizer = adamw(params)

    def before(*_: object) -> None:
        clip(params)

    optimizer.register_step_pre_hook(before)
    return optimizer


def test_a_hook_chains_clipping_and_adamw() -> None:
    chained = optax.chain(optim.clip_grad_norm(1.0), optim.adamw())
    report = parity.compare(chained, clipped, *PARAMS)
    assert report.passed, str(report)
    for wrong in (
        optax.chain(optim.adamw(), optim.clip_grad_norm(1.0)),
        optax.chain(optim.clip_grad_norm(2.0), optim.adamw()),
    ):
        report = parity.compare(wrong, clipped, *PARAMS, dtypes=())
        assert "exp_avg 0" in failures(report)


def test_a_state_that_optax_lacks_is_noted() -> None:
    ours = optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=False)
    report = parity.compare(ours, lambda ps: torch.optim.RMSprop(ps, lr=1e-2), *PARAMS, dtypes=())
    assert report.passed, str(report)
    assert set(report.notes) == {f"{n} (only PyTorch keeps it)" for n in quantities("step")}
    assert "not compared: step 0 (only PyTorch keeps it)" in str(report)
    assert quantities("square_avg") <= {f.name for f in report.findings}


def test_a_moment_that_one_side_lacks_is_noted_and_its_update_found() -> None:
    report = parity.compare(
        optax.sgd(0.1), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), *PARAMS, dtypes=()
    )
    assert "momentum_buffer 0 (only PyTorch keeps it)" in report.notes
    assert not finding(report, "update 0").passed


def groups(decay: float) -> Factory:
    def make(params: Params) -> torch.optim.AdamW:
        kept = [p for p, decays in zip(params, MASK, strict=True) if not decays]
        given = [p for p, decays in zip(params, MASK, strict=True) if decays]
        return torch.optim.AdamW([{"params": given}, {"params": kept, "weight_decay": decay}])

    return make


def test_a_decay_mask_is_torchs_parameter_groups() -> None:
    ours = optim.adamw(mask=MASK)
    report = parity.compare(ours, groups(0.0), *PARAMS)
    assert report.passed, str(report)
    wrong = parity.compare(ours, groups(1e-2), *PARAMS, dtypes=())
    assert failures(wrong) == {"update 1", "param 1", "update 3", "param 3"}


def test_a_masked_state_holds_the_masked_parameters_only() -> None:
    frozen = optax.masked(optax.set_to_zero(), [not chosen for chosen in MASK])
    ours = optax.chain(optax.masked(optim.adamw(), MASK), frozen)

    def theirs(params: Params) -> torch.optim.AdamW:
        return adamw([p for p, chosen in zip(params, MASK, strict=True) if chosen])

    report = parity.compare(ours, theirs, *PARAMS)
    assert report.passed, str(report)
    names = {f.name for f in report.findings}
    assert "exp_avg 2" in names
    assert "exp_avg 1" not in names
    assert "update 1" in names
    wrong = failures(parity.compare(ours, adamw, *PARAMS, dtypes=()))
    assert {"update 1", "param 3"} <= wrong
    assert "update 0" not in wrong


def test_other_seeds_give_other_gradients() -> None:
    errors = [
        finding(
            parity.compare(optax.adamw(1e-3), adamw, PARAMS[0], dtypes=(), seed=seed), "param 0"
        )
        for seed in (0, 0, 1)
    ]
    assert errors[0] == errors[1]
    assert errors[0] != errors[2]
