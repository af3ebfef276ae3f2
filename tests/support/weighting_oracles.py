"""Loss and gradient weightings again, in plain NumPy float64, as literal as can be.

Nothing here is shared with keras_moe. Gradient methods take the gradients themselves,
one row a task, and return the update, a vector: where a problem is solved, it is by
another algorithm than in keras_moe. Axis letters: t tasks, p shared parameters.
"""

import itertools

import numpy as np
from scipy import optimize


def unit_scale(gradients):
    """The gradients (t, p) divided by the root mean square of their norms."""
    total = sum(float(g @ g) for g in gradients)
    return gradients / np.sqrt(total / len(gradients))


def subsets(t):
    return [s for n in range(t + 1) for s in itertools.combinations(range(t), n)]


def pcgrad(gradients, orders):
    """Algorithm 1 of Yu et al.; orders[i] lists the tasks for task i."""
    update = np.zeros_like(gradients[0])
    for i, own in enumerate(gradients):
        projected = own.copy()
        for j in orders[i]:
            if j == i:
                continue
            other = gradients[j]
            if projected @ other < 0:
                projected = projected - (projected @ other) / (other @ other) * other
        update = update + projected
    return update


def mgda(gradients):
    """The shortest of all points nearest to 0 on the faces of the convex hull."""
    found = []
    for face in subsets(len(gradients))[1:]:
        base, rest = gradients[face[0]], gradients[list(face[1:])]
        # base + sum_k v_k (rest_k - base)
        v = np.linalg.lstsq((rest - base).T, -base, rcond=None)[0]
        w = np.concatenate([[1.0 - v.sum()], v])
        if w.min() >= -1e-10:
            found.append(w @ gradients[list(face)])
    return min(found, key=np.linalg.norm)


def cagrad(gradients, c):
    """The primal problem: the best worst decrease in a ball round the mean."""
    # In coordinates of the span of the gradients.
    basis = np.linalg.qr(gradients.T)[0]
    g = gradients @ basis
    mean = g.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    scale = np.linalg.norm(g, axis=1).max()
    g, mean, radius = g / scale, mean / scale, radius / scale
    constraints = [
        {"type": "ineq", "fun": lambda z: g @ z[:-1] - z[-1]},
        {
            "type": "ineq",
            "fun": lambda z: radius**2 - ((z[:-1] - mean) ** 2).sum(),
        },
    ]
    start = np.concatenate([mean, [(g @ mean).min()]])
    solution = optimize.minimize(
        lambda z: -z[-1],
        start,
        jac=lambda z: np.eye(len(z))[-1] * -1.0,
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    return basis @ solution.x[:-1] * scale


def nash_mtl(gradients):
    """The weights of (sum_j w_j g_j) . g_i = 1 / w_i, for gradients of unit scale."""
    g = unit_scale(gradients)

    def residual(w):
        return [w[i] * float((w @ g) @ g[i]) - 1.0 for i in range(len(g))]

    # The minimum of a convex function, then the equation itself.
    near = optimize.minimize(
        lambda w: 0.5 * float((w @ g) @ (w @ g)) - np.log(w).sum(),
        np.ones(len(g)),
        jac=lambda w: g @ (w @ g) - 1.0 / w,
        method="L-BFGS-B",
        bounds=[(1e-6, None)] * len(g),
        options={"maxiter": 10_000},
    )
    found, _, solved, message = optimize.fsolve(residual, near.x, full_output=True)
    assert solved == 1, message
    assert found.min() > 0
    return found


def imtl_g(gradients):
    """The closed form of Liu et al., whose first task takes what the others leave."""
    units = [g / np.linalg.norm(g) for g in gradients]
    by_gradient = np.stack([gradients[0] - g for g in gradients[1:]])
    by_unit = np.stack([units[0] - u for u in units[1:]])
    others = gradients[0] @ by_unit.T @ np.linalg.inv(by_gradient @ by_unit.T)
    return (1.0 - others.sum()) * gradients[0] + others @ gradients[1:]


def upgrad(gradients):
    """The mean of the nearest points of {d: g_j . d >= 0 for all j}."""
    update = np.zeros_like(gradients[0])
    for own in gradients:
        found = []
        for face in subsets(len(gradients)):
            normals = gradients[list(face)]
            # The nearest point with g_j . d = 0 on the face.
            nearest = own - np.linalg.pinv(normals) @ (normals @ own) if face else own
            if (gradients @ nearest).min() >= -1e-9 * np.abs(gradients).max() ** 2:
                found.append(nearest)
        update = update + min(found, key=lambda d: np.linalg.norm(d - own))
    return update / len(gradients)


def aligned_mtl(gradients):
    """All singular values set to the smallest."""
    u, sigma, v = np.linalg.svd(gradients, full_matrices=False)
    return (sigma.min() * u @ v).sum(axis=0)


def gradnorm_step(weights, gradients, losses, first_losses, alpha, learning_rate):
    """The weights after a step, by central differences of equation 2 of Chen et al."""
    t = len(weights)
    norms = [np.linalg.norm(g) for g in unit_scale(gradients)]
    ratios = [losses[i] / first_losses[i] for i in range(t)]
    rates = [ratio / (sum(ratios) / t) for ratio in ratios]
    mean = sum(weights[i] * norms[i] for i in range(t)) / t
    targets = [mean * rate**alpha for rate in rates]

    def objective(w):
        return sum(abs(w[i] * norms[i] - targets[i]) for i in range(t))

    moved = []
    for i in range(t):
        step = np.zeros(t)
        step[i] = 1e-7
        slope = (objective(weights + step) - objective(weights - step)) / 2e-7
        moved.append(max(weights[i] - learning_rate * slope, 0.0))
    return np.array(moved) * sum(weights) / sum(moved)


def dwa(losses, defined, steps, temperature):
    """The weights (n, t) of all steps, from their losses (n, t) and masks (n, t)."""
    n, t = losses.shape
    means = [[] for _ in range(t)]  # of the windows of each task
    found = []
    for step in range(n):
        if step and step % steps == 0:
            window = slice(step - steps, step)
            for k in range(t):
                rows = losses[window, k][defined[window, k]]
                if len(rows):
                    means[k].append(rows.mean())
        rates = [m[-1] / m[-2] if len(m) > 1 else 1.0 for m in means]
        exponents = [np.exp(rate / temperature) for rate in rates]
        found.append([t * e / sum(exponents) for e in exponents])
    return np.array(found)


def famo_weights(logits, losses, least):
    """The weights of the gradients of the losses, which sum to 1."""
    z = np.exp(logits) / np.exp(logits).sum()
    raw = [z[i] / (losses[i] - least[i]) for i in range(len(z))]
    return np.array(raw) / sum(raw)


class FAMO:
    """The logits of Liu et al.'s code, whose gradient is taken numerically here."""

    def __init__(self, t, learning_rate, weight_decay, least):
        self.logits, self.m, self.v, self.n = np.zeros(t), np.zeros(t), np.zeros(t), 0
        self.learning_rate, self.decay, self.least = learning_rate, weight_decay, least

    def update(self, old, new):
        decrease = np.log(old - self.least) - np.log(new - self.least)

        def objective(logits):
            z = np.exp(logits) / np.exp(logits).sum()
            return float(z @ decrease)

        for_logits = np.zeros_like(self.logits)
        for i in range(len(for_logits)):
            step = np.zeros_like(self.logits)
            step[i] = 1e-6
            up, down = objective(self.logits + step), objective(self.logits - step)
            for_logits[i] = (up - down) / 2e-6
        for_logits = for_logits + self.decay * self.logits
        self.n += 1
        self.m = 0.9 * self.m + 0.1 * for_logits
        self.v = 0.999 * self.v + 0.001 * for_logits**2
        mean, square = self.m / (1 - 0.9**self.n), self.v / (1 - 0.999**self.n)
        self.logits = self.logits - self.learning_rate * mean / (np.sqrt(square) + 1e-8)
