"""Optimizers in NumPy float64, one number or one row at a time.

A step of a table is a list of pairs of an id and the gradient of its row, in which ids
may stand more than once; a step of any other variable is its gradient.
"""

import numpy as np


def adam(value, steps, rate, beta_1, beta_2, epsilon, weight_decay=0.0):
    """Return the variable, m and v after the steps, with an element at a time."""
    value = np.array(value, "float64")
    flat = value.reshape(-1)
    m, v = np.zeros(flat.size), np.zeros(flat.size)
    for t, gradient in enumerate(steps, start=1):
        for i, g in enumerate(np.asarray(gradient, "float64").reshape(-1)):
            flat[i] -= rate * weight_decay * flat[i]
            m[i] = beta_1 * m[i] + (1 - beta_1) * g
            v[i] = beta_2 * v[i] + (1 - beta_2) * g * g
            # The form with "epsilon hat", before section 2.1 of Kingma & Ba.
            rate_t = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
            flat[i] -= rate_t * m[i] / (np.sqrt(v[i]) + epsilon)
    return value, m.reshape(value.shape), v.reshape(value.shape)


def lazy_adam(table, steps, rate, beta_1, beta_2, epsilon):
    """Return the table, m and v: rows without a gradient do not change."""
    table = np.array(table, "float64")
    m, v = np.zeros_like(table), np.zeros_like(table)
    for t, step in enumerate(steps, start=1):
        for row, g in summed(step).items():
            if not np.any(g):
                continue
            m[row] = beta_1 * m[row] + (1 - beta_1) * g
            v[row] = beta_2 * v[row] + (1 - beta_2) * g**2
            rate_t = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
            table[row] -= rate_t * m[row] / (np.sqrt(v[row]) + epsilon)
    return table, m, v


def adagrad(table, steps, rate, start, epsilon):
    """Return the table and the accumulators of its elements."""
    table = np.array(table, "float64")
    total = np.full_like(table, start)
    for step in steps:
        for row, g in summed(step).items():
            total[row] += g**2
            table[row] -= rate * g / np.sqrt(total[row] + epsilon)
    return table, total


def rowwise_adagrad(table, steps, rate, start, epsilon):
    """Return the table and the accumulators of its rows."""
    table = np.array(table, "float64")
    total = np.full(len(table), float(start))
    for step in steps:
        for row, g in summed(step).items():
            total[row] += sum(x * x for x in g.reshape(-1)) / g.size
            table[row] -= rate * g / (np.sqrt(total[row]) + epsilon)
    return table, total


def summed(step):
    """Return the sum of the gradients of each id."""
    sums = {}
    for row, g in step:
        sums[row] = sums.get(row, 0.0) + np.asarray(g, "float64")
    return sums


def dense(step, shape):
    """Return the gradient of the whole table."""
    gradient = np.zeros(shape)
    for row, g in step:
        gradient[row] += g
    return gradient


def table_steps(rows, columns, count, ids=12, seed=0):
    """Return steps with repeated ids; ids beyond half of the rows are rare."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        drawn = rng.integers(0, rows // 2, ids)
        drawn[0], drawn[1] = rng.integers(0, rows, 2)
        steps.append([(int(row), rng.normal(size=columns)) for row in drawn])
    return steps
