"""Solvers of the differential equations of sampling, as tables in float64. No network and no JAX is needed to make one.

A state x is linear in the states and network outputs before it, with coefficients that are known beforehand. So a
solver is a table with a row for each evaluation of the network, and one loop runs them all (samplers.TableSampler).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float

from dit_jax.diffusion.flow import Flow, shift_times
from dit_jax.diffusion.levels import Levels

Vector = Float[np.ndarray, " n"]


class Process(Protocol):
    """What a solver knows of the network: what it predicts, and the levels of noise at its times."""

    @property
    def prediction(self) -> str: ...

    def levels(self, time: Vector) -> Levels: ...


class RatioProcess(Process, Protocol):
    """A Process whose levels can be found by their ratio sigma / alpha."""

    def at_ratio(self, ratio: Vector) -> Levels: ...


@dataclass(frozen=True, eq=False)
class Tables:
    """A solver. x begins as `start` times standard normal noise, and base as x. Evaluation i, with fresh noise n_i:

        x      <- x + before[i] n_i
        output  = network(scale[i] x, time[i], interval[i])
        d_0     = read[i, 0] scale[i] x + read[i, 1] output;   d_1, d_2, .. are those of the evaluations before
        x, base <- next[i] . (x, base, n_i, d_0, d_1, ..), keep[i] . (x, base, n_i, d_0, d_1, ..)

    time: what the network is given. interval: its second time, of MeanFlow. step: the index of the step that an
    evaluation belongs to; a state of the published code is x after the last evaluation of a step.
    """

    start: float
    time: Vector
    interval: Vector
    scale: Vector
    read: Float[np.ndarray, "n 2"]
    before: Vector
    next: Float[np.ndarray, "n history"]
    keep: Float[np.ndarray, "n history"]
    step: Vector

    def __len__(self) -> int:
        return len(self.time)

    @property
    def history(self) -> int:
        """How many of d_0, d_1, .. are needed."""
        return self.next.shape[1] - 3

    @property
    def draws(self) -> Bool[np.ndarray, " n"]:
        """Whether an evaluation needs noise."""
        return (self.before != 0) | (self.next[:, 2] != 0)

    @property
    def finite(self) -> bool:
        """Whether all coefficients are."""
        return all(np.isfinite(a).all() for a in (self.time, self.scale, self.read, self.before, self.next, self.keep))


class _Rows:
    """Collects the rows of Tables. history: how many of d_0, d_1, .. they use."""

    def __init__(self, history: int):
        self.columns = {"x": 0, "base": 1, "noise": 2} | {f"d{j}": 3 + j for j in range(history)}
        self.rows: list[tuple] = []

    def add(self, step, time, read, next, keep=None, *, before=0.0, scale=1.0, interval=0.0):
        self.rows.append((step, time, interval, scale, read, before, self._row(next), self._row(keep or {"base": 1.0})))

    def _row(self, named):
        row = np.zeros(len(self.columns))
        for name, value in named.items():
            row[self.columns[name]] = value
        return row

    def tables(self, start: float = 1.0) -> Tables:
        step, time, interval, scale, read, before, next, keep = (np.array(column) for column in zip(*self.rows))
        return Tables(start, time, interval, scale, read, before, next, keep, step)


# Explicit Runge-Kutta methods: (weights of the slopes at each later stage, weights of the step). heun is the trapezoid
# rule, rk4 the 3/8 rule: torchdiffeq's heun2 and rk4, which SiT uses.
RUNGE_KUTTA: dict[str, tuple[list[list[float]], list[float]]] = {
    "euler": ([], [1]),
    "midpoint": ([[1 / 2]], [0, 1]),
    "heun": ([[1]], [1 / 2, 1 / 2]),
    "heun3": ([[1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "rk4": ([[1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]),
}


def runge_kutta(process: Process, method: str, times: Vector) -> Tables:
    """Integrates the velocity over `times`, a step between each two. method: a key of RUNGE_KUTTA."""
    stages, weights = RUNGE_KUTTA[method]
    rows = _Rows(len(weights))
    for step, (t, h) in enumerate(zip(times[:-1], np.diff(times))):
        for stage, combination in enumerate([*stages, weights]):
            at = t + h * sum(stages[stage - 1]) if stage else t
            read = process.levels(np.array([at])).convert(process.prediction, "velocity")[0]
            base = "base" if stage else "x"  # the first evaluation of a step is at its base
            slopes = {f"d{stage - j}": h * a for j, a in enumerate(combination)}
            rows.add(step, at, read, {base: 1.0} | slopes, {base: 1.0})
    return rows.tables()


def flow_times(start: float, end: float, steps: int, shift: float = 1.0) -> Vector:
    """The times of `steps` equal steps from start to end. shift: of flow.shift_times; other than 1 for [0, 1] only."""
    return shift_times(np.linspace(start, end, steps + 1), shift)


# SiT's diffusion forms: w(t, sigma, w of SBDM, norm). SBDM is the coefficient of the score in the velocity.
DIFFUSIONS: Mapping[str, Callable[[Any, Any, Any, float], Any]] = {
    "constant": lambda t, sigma, sbdm, norm: norm,
    "SBDM": lambda t, sigma, sbdm, norm: norm * sbdm,
    "sigma": lambda t, sigma, sbdm, norm: norm * sigma,
    "linear": lambda t, sigma, sbdm, norm: norm * (1 - t),
    "decreasing": lambda t, sigma, sbdm, norm: 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, sigma, sbdm, norm: norm * np.sin(np.pi * t) ** 2,
}


def diffusion_weight(flow: Flow, form: str, norm: float, time: Vector) -> Vector:
    """w(t) of SiT's SDE dx = (velocity + w score) dt + sqrt(2 w) dW. form: a key of DIFFUSIONS."""
    at = flow.levels(time)
    with np.errstate(divide="ignore", invalid="ignore"):
        sbdm = at.d_alpha / at.alpha * at.sigma**2 - at.sigma * at.d_sigma
        return DIFFUSIONS[form](at.time, at.sigma, sbdm, norm) * np.ones_like(at.time)


def sit_sde(
    flow: Flow,
    method: str,
    points: int,
    *,
    form: str = "sigma",
    norm: float = 1.0,
    last: str = "mean",
    last_size: float = 0.04,
    eps: float | None = None,
) -> Tables:
    """SiT's SDE (section 2.4): points - 1 random steps of `method`, "euler" (Euler-Maruyama) or "heun", then the last.

    The last step goes from 1 - last_size to the data: with the drift of the SDE ("mean") or of the ODE ("euler"), or to
    the expected data ("tweedie"); "none" leaves it out. eps: in place of flow.sample_eps.
    """
    eps = flow.sample_eps if eps is None else eps
    size = 0.0 if last == "none" else last_size
    t0, t1 = flow.interval(eps, stochastic=True, form=form, last_step=size)
    times = np.linspace(t0, t1, points)
    h = (t1 - t0) / (points - 1)

    def read(at, target):
        levels = flow.levels(np.array([at]))
        if target != "sde":
            return levels.convert(flow.prediction, target)[0]
        velocity, score = (levels.convert(flow.prediction, p)[0] for p in ("velocity", "score"))
        return velocity + diffusion_weight(flow, form, norm, np.array([at]))[0] * score

    rows = _Rows(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        for step, t in enumerate(times[:-1]):
            kick = np.sqrt(2 * diffusion_weight(flow, form, norm, np.array([t]))[0] * h)
            if method == "euler":
                rows.add(step, t, read(t, "sde"), {"x": 1.0, "d0": h, "noise": kick})
            else:  # the noise first, then one step of Heun
                rows.add(step, t, read(t, "sde"), {"x": 1.0, "d0": h}, {"x": 1.0}, before=kick)
                rows.add(step, t + h, read(t + h, "sde"), {"base": 1.0, "d1": h / 2, "d0": h / 2})
        if last == "tweedie":
            rows.add(points - 1, t1, read(t1, "x_0"), {"d0": 1.0})
        elif last != "none":
            rows.add(points - 1, t1, read(t1, "sde" if last == "mean" else "velocity"), {"x": 1.0, "d0": size})
    return rows.tables()


def multistep(
    process: Process,
    points: Levels,
    ends: tuple[float, float],
    *,
    order: int = 2,
    rule: str = "midpoint",
    stochastic: bool = False,
    final: str = "zero",
) -> Tables:
    """DPM-Solver++ (arXiv 2211.01095), multistep, of order 1 to 3; the SDE form of order 2.

    points: the levels of the evaluations. ends: (alpha, sigma) after the last step. rule: "midpoint" or "heun", for
    order 2. The last step has order 1 if it ends without noise (final="zero") or there are fewer than 15 steps. With
    fewer than 15 steps the one before it has order 2 at most. This is diffusers' lower_order_final. The third order is
    the published form, which lacks a factor of 2 in its second difference, and converges with order 2.
    """
    alpha, sigma = (np.append(a, end) for a, end in zip((points.alpha, points.sigma), ends))
    with np.errstate(divide="ignore"):
        lambdas = np.log(alpha) - np.log(sigma)
    read, n, rows = points.convert(process.prediction, "x_0"), len(points.time), _Rows(3)
    for i in range(n):
        this = min(order, i + 1)
        if i == n - 1 and (final == "zero" or n < 15):
            this = 1
        elif i == n - 2 and n < 15:
            this = min(this, 2)
        h = lambdas[i + 1] - lambdas[i]
        shrink = np.expm1(-2 * h if stochastic else -h)  # negative
        to_x0 = -alpha[i + 1] * shrink
        d = np.array([to_x0, 0, 0])
        if this > 1:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            first = np.array([1, -1, 0]) / r0
            first_weight = to_x0 / 2
            if (rule == "heun" or this == 3) and not stochastic:
                first_weight = alpha[i + 1] * (shrink / h + 1)
            if this == 3:
                r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
                earlier = np.array([0, 1, -1]) / r1
                second = (first - earlier) / (r0 + r1)
                first = first + r0 * second
                d = d - alpha[i + 1] * ((shrink + h) / h**2 - 0.5) * second
            d = d + first_weight * first
        ratio = sigma[i + 1] / sigma[i]
        names = {f"d{j}": value for j, value in enumerate(d)}
        if stochastic:
            names |= {"x": ratio * np.exp(-h), "noise": sigma[i + 1] * np.sqrt(-shrink)}
        else:
            names |= {"x": ratio}
        rows.add(i, points.time[i], read[i], names)
    return rows.tables()


def unipc(
    process: Process, points: Levels, ends: tuple[float, float], *, order: int = 2, solver: str = "bh2"
) -> Tables:
    """UniPC (arXiv 2302.04867) with predictions of x_0: UniC corrects a state with the output there, UniP makes the
    next.

    solver: "bh1" or "bh2". The order falls to 1 at the last step, as in diffusers. Others as in multistep.
    """
    alpha, sigma = (np.append(a, end) for a, end in zip((points.alpha, points.sigma), ends))
    with np.errstate(divide="ignore"):
        lambdas = np.log(alpha) - np.log(sigma)
    read, n, rows, before = points.convert(process.prediction, "x_0"), len(points.time), _Rows(order + 1), 0

    def coefficients(start, this, corrects):
        """The weights of (state at `start`, d of start + 1, d of start and before) in the state at start + 1."""
        h = lambdas[start + 1] - lambdas[start]
        rks = np.array([(lambdas[start - j] - lambdas[start]) / h for j in range(1, this)] + [1.0])
        growth = np.expm1(-h)
        b_h, phi, factorial, matrix, rhs = (-h if solver == "bh1" else growth), growth / -h - 1, 1, [], []
        for k in range(this):
            matrix.append(rks**k)
            rhs.append(phi * factorial / b_h)
            factorial *= k + 2
            phi = phi / -h - 1 / factorial
        matrix, rhs = np.array(matrix), np.array(rhs)
        if corrects:
            rhos = np.array([0.5]) if this == 1 else np.linalg.solve(matrix, rhs)
        else:
            rhos = np.array([0.5]) if this == 2 else np.linalg.solve(matrix[:-1, :-1], rhs[:-1])
        weights = -alpha[start + 1] * b_h * rhos[: this - 1] / rks[:-1]  # of d at start - 1, ..
        newest = -alpha[start + 1] * b_h * rhos[-1] if corrects else 0.0
        own = -alpha[start + 1] * growth - weights.sum() - newest
        return sigma[start + 1] / sigma[start], newest, np.array([own, *weights])

    for i in range(n):
        corrected = {"x": 1.0}
        if before:
            of_base, newest, old = coefficients(i - 1, before, True)
            corrected = {"base": of_base, "d0": newest} | {f"d{j + 1}": w for j, w in enumerate(old)}
        before = min(order, n - i, i + 1)
        of_corrected, _, old = coefficients(i, before, False)
        next = {name: of_corrected * w for name, w in corrected.items()}
        for j, w in enumerate(old):
            next[f"d{j}"] = next.get(f"d{j}", 0.0) + w
        rows.add(i, points.time[i], read[i], next, corrected)
    return rows.tables()


def edm(
    process: RatioProcess,
    ratios: Vector,
    *,
    second_order: bool = True,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = np.inf,
    churn_noise: float = 1.0,
) -> Tables:
    """EDM's sampler (arXiv 2206.00364, algorithm 2): Heun's method, or Euler's, in x / alpha over sigma / alpha.

    ratios: sigma / alpha of the steps, falling, without the 0 that follows. churn, churn_min, churn_max, churn_noise:
    S_churn, S_min, S_max and S_noise of the paper. The last step is Euler's.
    """
    n, rows, after = len(ratios), _Rows(2), np.append(ratios, 0.0)
    gamma = np.where((ratios >= churn_min) & (ratios <= churn_max), min(churn / n, np.sqrt(2) - 1), 0.0)

    def add(step, ratio, next, keep, before=0.0):
        at = process.at_ratio(np.array([ratio]))
        u, v = at.convert(process.prediction, "noise")[0]
        rows.add(step, at.time[0], (u, v), next, keep, before=before, scale=at.alpha[0])

    for i in range(n):
        ratio = ratios[i] * (1 + gamma[i])
        kick, h = churn_noise * np.sqrt(ratio**2 - ratios[i] ** 2), after[i + 1] - ratio
        add(i, ratio, {"x": 1.0, "d0": h}, {"x": 1.0}, kick)
        if second_order and i < n - 1:
            add(i, after[i + 1], {"base": 1.0, "d1": h / 2, "d0": h / 2}, None)
    return rows.tables(start=float(ratios[0]))


def edm_ratios(steps: int, low: float, high: float, rho: float = 7.0) -> Vector:
    """sigma / alpha of EDM's steps (equation 5): equal steps of its rho-th root, from high to low."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def average_velocity(process: Process, times: Vector) -> Tables:
    """MeanFlow's sampling (algorithm 2): from t to r in one step of the average velocity, z_r = z_t - (t - r) u."""
    rows = _Rows(1)
    for step, (t, r) in enumerate(zip(times[:-1], times[1:])):
        rows.add(step, t, (0.0, 1.0), {"x": 1.0, "d0": r - t}, interval=t - r)
    return rows.tables()


def ratio_euler(process: Process, points: Levels) -> Tables:
    """Euler's method in x / alpha over sigma / alpha, through these levels to the data: diffusers' Euler scheduler."""
    ratio = points.sigma / points.alpha
    read, steps, rows = points.convert(process.prediction, "noise"), np.diff(np.append(ratio, 0.0)), _Rows(1)
    for i, step in enumerate(steps):
        rows.add(i, points.time[i], read[i], {"x": 1.0, "d0": step}, scale=points.alpha[i])
    return rows.tables(start=float(ratio[0]))
