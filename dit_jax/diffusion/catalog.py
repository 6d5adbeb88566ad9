"""The samplers by name, and the options of each: "unipc", or "unipc:order=3,spacing=karras".

`steps` is the number of evaluations of the network, except where a sampler says otherwise. A function of this file is a
sampler: its arguments are the objective, the steps, and the options with their defaults. The annotation of an option
says which values it takes.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dit_jax.diffusion import solvers, spacing
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.levels import Levels
from dit_jax.diffusion.meanflow import MeanFlow
from dit_jax.diffusion.objectives import DDPM, Objective
from dit_jax.diffusion.process import respace
from dit_jax.diffusion.samplers import Sampler, ScheduleSampler, TableSampler
from dit_jax.diffusion.spacing import ddim_schedule
from dit_jax.runtime.errors import UserError

Spacing = Literal["linspace", "leading", "trailing", "karras", "lu"]
Final = Literal["zero", "sigma_min"]
Rule = Literal["midpoint", "heun"]
Form = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]
Last = Literal["mean", "euler", "tweedie", "none"]


def ddpm(objective: DDPM, steps: str) -> Sampler:
    """DDPM with the learned variance (the paper's sampler). steps: also "a,b,c" or "ddimN" (process.kept_timesteps)."""
    return ScheduleSampler(respace(objective.schedule, steps), "ddpm")


def ddim(objective: DDPM, steps: str, *, eta: float = 0.0, spacing: Literal["", "leading", "trailing"] = "") -> Sampler:
    """DDIM (arXiv 2010.02502). eta: noise. steps: as in ddpm; with a spacing, a number."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta={eta}: must be between 0 and 1")
    if spacing:
        return ScheduleSampler(ddim_schedule(objective.schedule, _number(steps), spacing), "ddim", eta)
    return ScheduleSampler(respace(objective.schedule, steps), "ddim", eta)


def dpmpp_2m(
    objective: DDPM | Flow,
    steps: str,
    *,
    rule: Rule = "midpoint",
    spacing: Spacing = "linspace",
    final: Final = "zero",
    shift: float = 1.0,
) -> Sampler:
    """DPM-Solver++ of second order, multistep (arXiv 2211.01095)."""
    return _multistep(objective, steps, spacing, final, shift, order=2, rule=rule)


def dpmpp_3m(
    objective: DDPM | Flow, steps: str, *, spacing: Spacing = "linspace", final: Final = "zero", shift: float = 1.0
) -> Sampler:
    """DPM-Solver++ of third order, multistep, in its published form (solvers.multistep)."""
    return _multistep(objective, steps, spacing, final, shift, order=3)


def sde_dpmpp_2m(
    objective: DDPM | Flow,
    steps: str,
    *,
    rule: Rule = "midpoint",
    spacing: Spacing = "linspace",
    final: Final = "zero",
    shift: float = 1.0,
) -> Sampler:
    """The SDE form of dpmpp_2m: each step adds noise."""
    return _multistep(objective, steps, spacing, final, shift, order=2, rule=rule, stochastic=True)


def unipc(
    objective: DDPM | Flow,
    steps: str,
    *,
    order: Literal[1, 2, 3] = 2,
    solver: Literal["bh1", "bh2"] = "bh2",
    spacing: Spacing = "linspace",
    final: Final = "zero",
    shift: float = 1.0,
) -> Sampler:
    """UniPC (arXiv 2302.04867)."""
    points, ends = _points(objective, _number(steps), spacing, final, shift)
    return TableSampler(solvers.unipc(objective, points, ends, order=order, solver=solver))


def edm(
    objective: DDPM | Flow,
    steps: str,
    *,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
    rho: float = 7.0,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = np.inf,
    churn_noise: float = 1.0,
) -> Sampler:
    """EDM's Heun sampler with churn (arXiv 2206.00364). n published steps are 2 n - 1 evaluations, so `steps` is odd.

    sigma_min, sigma_max: the range of sigma / alpha; 0 is all timesteps for ddpm, and EDM's 0.002 and 80 for flow.
    """
    if isinstance(objective, DDPM):
        low, high = spacing.ratios(objective.schedule)[[0, -1]]
    else:
        low, high = 0.002, 80.0
    low, high = sigma_min or low, sigma_max or high
    n = _published_steps(steps, per_step=2, last=1, least=2)
    if not 0 < low < high < np.inf or not 0.1 <= rho <= 100 or churn < 0:
        raise UserError(f"edm: sigma_min={low:g}, sigma_max={high:g}, rho={rho:g}, churn={churn:g}: not in their range")
    ratios = solvers.edm_ratios(n, low, high, rho)
    tables = solvers.edm(
        objective, ratios, churn=churn, churn_min=churn_min, churn_max=churn_max, churn_noise=churn_noise
    )
    return TableSampler(tables)


def euler(objective: Objective, steps: str, *, shift: float = 1.0) -> Sampler:
    """Euler's method: over t for flow, over sigma / alpha for ddpm, where it is diffusers' Euler scheduler.

    SiT's num_steps counts points: it makes num_steps - 1 evaluations.
    """
    if isinstance(objective, DDPM):
        _no_shift(shift)
        times = np.linspace(objective.timesteps - 1, 0, _number(steps))
        return TableSampler(solvers.ratio_euler(objective, objective.levels(times)))
    return _runge_kutta(objective, steps, "euler", shift)


def heun(objective: Flow | MeanFlow, steps: str, *, shift: float = 1.0) -> Sampler:
    """Heun's method (the trapezoid rule): 2 evaluations a step. SiT's "heun2" makes 2 num_steps - 2 evaluations."""
    return _runge_kutta(objective, steps, "heun", shift)


def midpoint(objective: Flow | MeanFlow, steps: str, *, shift: float = 1.0) -> Sampler:
    """The midpoint method: 2 evaluations a step. SiT's num_steps is 2 num_steps - 2 evaluations."""
    return _runge_kutta(objective, steps, "midpoint", shift)


def heun3(objective: Flow | MeanFlow, steps: str, *, shift: float = 1.0) -> Sampler:
    """Heun's method of third order: 3 evaluations a step. SiT's num_steps is 3 num_steps - 3 evaluations."""
    return _runge_kutta(objective, steps, "heun3", shift)


def rk4(objective: Flow | MeanFlow, steps: str, *, shift: float = 1.0) -> Sampler:
    """The 3/8 rule, torchdiffeq's and SiT's "rk4": 4 evaluations a step, in SiT 4 num_steps - 4."""
    return _runge_kutta(objective, steps, "rk4", shift)


def sde_euler(
    objective: Flow,
    steps: str,
    *,
    form: Form = "sigma",
    norm: float = 1.0,
    last: Last = "mean",
    last_size: float = 0.04,
) -> Sampler:
    """Euler-Maruyama for SiT's SDE (solvers.sit_sde): steps - 1 random steps and the last. SiT's num_steps: `steps`."""
    n = _number(steps)
    points = n + 1 if last == "none" else n
    return _sde(objective, "euler", points, form, norm, last, last_size)


def sde_heun(
    objective: Flow,
    steps: str,
    *,
    form: Form = "sigma",
    norm: float = 1.0,
    last: Last = "mean",
    last_size: float = 0.04,
) -> Sampler:
    """Heun for SiT's SDE: 2 evaluations a random step. SiT's num_steps is 2 num_steps - 1 evaluations."""
    final = 0 if last == "none" else 1
    n = _published_steps(steps, per_step=2, last=final, least=2 - (not final))
    return _sde(objective, "heun", n if final else n + 1, form, norm, last, last_size)


def meanflow(objective: MeanFlow, steps: str) -> Sampler:
    """Steps of the average velocity, of equal length."""
    return TableSampler(solvers.average_velocity(objective, solvers.flow_times(1.0, 0.0, _number(steps))))


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    f.__name__: f
    for f in (
        *(ddpm, ddim, dpmpp_2m, dpmpp_3m, sde_dpmpp_2m, unipc, edm, euler),
        *(heun, midpoint, heun3, rk4, sde_euler, sde_heun, meanflow),
    )
}
# What is used where nothing is said: (sampler, evaluations).
DEFAULTS = {"ddpm": ("ddpm", "250"), "flow": ("heun", "250"), "meanflow": ("meanflow", "1")}


def default(objective: Objective) -> tuple[str, str]:
    """Returns (sampler, evaluations) to use where nothing is said."""
    if objective.prediction == "x_0":
        return "dpmpp_2m", "250"
    return DEFAULTS[objective.name]


def fitting(objective: Objective) -> list[str]:
    """The names of the samplers that fit an objective."""
    return [name for name in SAMPLERS if _fits(name, objective)]


def _fits(name, objective):
    if objective.prediction == "x_0" and name in ("heun", "rk4"):
        return False  # they evaluate the network without noise, where x_0 gives no velocity
    kind = typing.get_type_hints(SAMPLERS[name])["objective"]
    return isinstance(objective, typing.get_args(kind) or kind)


def make(name: str, objective: Objective, steps: str | int, **options: Any) -> Sampler:
    """Returns the sampler of a name with options, as in "unipc:order=3", for so many evaluations.

    options: further ones, that the name does not set. Raises UserError naming the sampler, the option or the steps.
    """
    name, _, text = str(name).partition(":")
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}: use one of {', '.join(SAMPLERS)}")
    if not _fits(name, objective):
        what = objective.name + (" that predicts x_0" if objective.prediction == "x_0" else "")
        raise UserError(
            f"sampler={name}: does not fit the objective {what}; use one of {', '.join(fitting(objective))}"
        )
    function = SAMPLERS[name]
    options |= _parse(name, function, text)
    with np.errstate(all="ignore"):
        sampler = function(objective, str(steps), **options)
    if isinstance(sampler, TableSampler) and not (sampler.tables.finite and sampler.times.min() >= 0):
        raise UserError(f"sampler={name}: has no finite steps with these options: use others, or another sampler")
    return sampler


def _parse(name, function, text):
    """{option: value} of "order=3,spacing=karras"."""
    hints = typing.get_type_hints(function)
    known = [key for key, p in inspect.signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY]
    options = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key in options:
            raise UserError(f"sampler={name}: {key} is given twice")
        if key not in known:
            raise UserError(f"sampler={name}: no option {key!r}; it has {', '.join(known) or 'none'}")
        choices = typing.get_args(hints[key])
        if choices:
            found = [choice for choice in choices if str(choice) == value]
            if not found:
                raise UserError(f"sampler={name}: {key}={value!r}: must be one of {', '.join(map(str, choices))}")
            options[key] = found[0]
        else:
            try:
                options[key] = float(value)
            except ValueError:
                raise UserError(f"sampler={name}: {key}={value!r}: must be a number") from None
            if np.isnan(options[key]):
                raise UserError(f"sampler={name}: {key}={value!r}: must be a number")
    return options


def _number(steps: str) -> int:
    if not steps.isdecimal() or len(steps) > 6 or not 1 <= int(steps) <= 100_000:
        raise UserError(f"steps={steps!r:.40}: must be a number of evaluations, at least 1 and 100,000 at most")
    return int(steps)


def _published_steps(steps: str, per_step: int, last: int = 0, least: int = 1) -> int:
    """The number of steps whose evaluations are `steps`: per_step each, but `last` in the last one, if that is not 0.

    Raises UserError naming numbers that fit.
    """
    count = _number(steps)
    n, rest = divmod(count + (per_step - last if last else 0), per_step)
    if rest or n < least:
        n = max(n, least)
        near = [per_step * k - (per_step - last if last else 0) for k in (n, n + 1)]
        raise UserError(
            f"steps={steps}: this sampler evaluates the network {near[0]}, {near[1]}, .. times: use one of these"
        )
    return n


def _no_shift(shift):
    if shift != 1:
        raise UserError(f"shift={shift:g}: is of flow; ddpm has spacing")


def _points(
    objective: DDPM | Flow, steps: int, name: str, final: str, shift: float
) -> tuple[Levels, tuple[float, float]]:
    """(levels of the evaluations, (alpha, sigma) at the end) of a multistep solver."""
    if isinstance(objective, DDPM):
        _no_shift(shift)
        return spacing.spaced(objective.schedule, steps, name), spacing.end(objective.schedule, final)
    for option, value, only in (("spacing", name, "linspace"), ("final", final, "zero")):
        if value != only:
            raise UserError(f"{option}={value}: is of ddpm; flow has shift")
    # At the very beginning alpha is 0, by which these solvers divide.
    times = _times(0.0, 1.0, steps, shift)
    times[0] = min(max(1e-5, objective.sample_eps), times[1] / 2)
    return objective.levels(times[:-1]), (1.0, 0.0)


def _times(start, end, steps, shift):
    if not 1e-3 <= shift <= 1e3:
        raise UserError(f"shift={shift:g}: must be between 0.001 and 1000; 1 is none")
    return solvers.flow_times(start, end, steps, shift)


def _multistep(objective, steps, name, final, shift, **settings):
    points, ends = _points(objective, _number(steps), name, final, shift)
    return TableSampler(solvers.multistep(objective, points, ends, final=final, **settings))


def _runge_kutta(objective: Flow | MeanFlow, steps, method, shift):
    n = _published_steps(steps, per_step=len(solvers.RUNGE_KUTTA[method][1]))
    if isinstance(objective, Flow):
        start, end = objective.interval(objective.sample_eps)
        if shift != 1 and (start, end) != (0, 1):
            raise UserError(f"shift={shift:g}: needs a path without singular ends: a velocity or x_0 on linear or gvp")
        times = _times(start, end, n, shift)
    else:  # MeanFlow's time falls; its shift is that of the time from noise to data
        times = 1 - _times(0.0, 1.0, n, shift)
    return TableSampler(solvers.runge_kutta(objective, method, times))


def _sde(objective, method, points, form, norm, last, last_size):
    if points < 2:
        raise UserError("steps: an SDE sampler makes one random step at least: use 2 or more (sde_heun: 3)")
    if not 0 < last_size < 1 or norm < 0:
        raise UserError(f"last_size={last_size:g}, norm={norm:g}: must be in (0, 1), and not negative")
    settings = dict(form=form, norm=norm, last=last, last_size=last_size)
    return TableSampler(solvers.sit_sde(objective, method, points, **settings))
