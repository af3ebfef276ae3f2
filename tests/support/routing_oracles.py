"""The routers and auxiliary losses again, in plain NumPy float64, token by token.

Nothing here is shared with keras_moe. Axis letters: n tokens, d input features,
e experts, k choices a token, c capacity (slots an expert), g groups of experts.
Every router returns its record as a dict of arrays.
"""

import math

import numpy as np


def softmax(logits):
    rows = []
    for z in logits:
        z = np.exp(z - max(z))
        rows.append(z / sum(z))
    return np.array(rows).reshape(logits.shape)


def sigmoid(logits):
    return 1.0 / (1.0 + np.exp(-logits))


def best(row, k):
    """The indices of the k largest, the largest first, the lower index of equals."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


def weigh(scores, indices, renormalize, factor=1.0):
    weights = []
    for row, chosen in zip(scores, indices, strict=True):
        total = sum(row[i] for i in chosen) if renormalize else 1.0
        weights.append([factor * row[i] / total for i in chosen])
    return np.array(weights)


def score(logits, score_function):
    scores = softmax(logits) if score_function == "softmax" else sigmoid(logits)
    return scores, np.array([row / sum(row) for row in scores])


def top_k(x, kernel, k, bias=0.0, score_function="softmax", renormalize=True):
    logits = x @ kernel + bias
    scores, probs = score(logits, score_function)
    indices = [best(z, k) for z in logits]
    return {
        "expert_indices": np.array(indices),
        "combine_weights": weigh(scores, indices, renormalize),
        "router_logits": logits,
        "router_probs": probs,
    }


def kth_excluding(row, k, i):
    """Shazeer et al. 2017, appendix A: the k-th highest, component i left out."""
    rest = [value for j, value in enumerate(row) if j != i]
    return sorted(rest, reverse=True)[k - 1]


def noisy_top_k(x, kernel, noise_kernel, noise, k):
    clean = x @ kernel
    scale = np.log1p(np.exp(x @ noise_kernel))
    noisy = clean + noise * scale
    choice_probs = np.ones_like(clean)
    for n, e in np.ndindex(clean.shape):
        if k < clean.shape[1]:
            z = (clean[n, e] - kth_excluding(noisy[n], k, e)) / scale[n, e]
            choice_probs[n, e] = 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))
    indices = [best(h, k) for h in noisy]
    probs = softmax(noisy)
    return {
        "expert_indices": np.array(indices),
        "combine_weights": weigh(probs, indices, True),
        "router_logits": noisy,
        "router_probs": probs,
        "choice_probs": choice_probs,
    }


def bias_balanced(
    x,
    kernel,
    expert_bias,
    k,
    num_groups=1,
    top_k_groups=1,
    routed_scaling_factor=1.0,
    score_function="sigmoid",
    renormalize=True,
):
    logits = x @ kernel
    scores, probs = score(logits, score_function)
    size = kernel.shape[1] // num_groups
    indices = []
    for row in scores + expert_bias:
        sums = [
            sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)
        ]
        kept = best(sums, top_k_groups)
        allowed = [e for e in range(len(row)) if e // size in kept]
        indices.append([allowed[i] for i in best([row[e] for e in allowed], k)])
    return {
        "expert_indices": np.array(indices),
        "combine_weights": weigh(scores, indices, renormalize, routed_scaling_factor),
        "router_logits": logits,
        "router_probs": probs,
    }


def expert_choice(x, kernel, k, capacity_factor, mask):
    logits = x @ kernel
    probs = softmax(logits)
    n, e = logits.shape
    slots = max(1, min(n, math.ceil(capacity_factor * k * n / e)))
    tokens = np.full((e, slots), n)
    weights = np.zeros((e, slots))
    for expert in range(e):
        wanted = [i for i in range(n) if mask[i]]
        wanted.sort(key=lambda i: (-probs[i, expert], i))
        for slot, i in enumerate(wanted[:slots]):
            tokens[expert, slot] = i
            weights[expert, slot] = probs[i, expert]
    return {
        "token_indices": tokens,
        "combine_weights": weights,
        "router_logits": logits,
        "router_probs": probs,
    }


def sinkhorn(x, kernel, k, iterations, temperature, renormalize, mask):
    """The plan itself, scaled row by row and column by column, without logarithms."""
    logits = x @ kernel
    plan = np.exp(logits / temperature)
    n, e = plan.shape
    for _ in range(iterations):
        for i in range(n):
            plan[i] /= sum(plan[i])
        for j in range(e):
            plan[:, j] /= sum(plan[i, j] for i in range(n) if mask[i])
    indices = [best(row, k) for row in plan]
    probs = softmax(logits)
    return {
        "expert_indices": np.array(indices),
        "combine_weights": weigh(probs, indices, renormalize),
        "router_logits": logits,
        "router_probs": probs,
    }


def dense(x, kernel, temperature):
    logits = x @ kernel / temperature
    return {
        "combine_weights": softmax(logits),
        "router_logits": logits,
        "router_probs": softmax(logits),
    }


def keep_top_k(row, k):
    """Shazeer et al. 2017, equations 3 and 5 without noise: {index: gate}.

    The gate of a single one is its share among all.
    """
    chosen = best(row, k)
    if k == 1:
        return {chosen[0]: softmax(row[None])[0, chosen[0]]}
    gates = softmax(row[chosen][None])[0]
    return dict(zip(chosen, gates, strict=True))


def hierarchical(
    x, kernel, expert_kernel, bias=None, expert_bias=None, top_k_groups=2, top_k=2
):
    """Shazeer et al. 2017, appendix B: two levels, an expert at a time."""
    groups, _, size = expert_kernel.shape
    indices, weights, logits, probs = [], [], [], []
    for token in x:
        primary = token @ kernel + (0.0 if bias is None else bias)
        secondary = [
            token @ expert_kernel[i] + (0.0 if bias is None else expert_bias[i])
            for i in range(groups)
        ]
        products = {
            i * size + j: group_gate * gate
            for i, group_gate in keep_top_k(primary, top_k_groups).items()
            for j, gate in keep_top_k(secondary[i], top_k).items()
        }
        order = sorted(products, key=lambda expert: -products[expert])
        indices.append(order)
        weights.append([products[expert] for expert in order])
        p = softmax(primary[None])[0]
        q = [softmax(z[None])[0] for z in secondary]
        pairs = [(i, j) for i in range(groups) for j in range(size)]
        probs.append([p[i] * q[i][j] for i, j in pairs])
        logits.append([primary[i] + math.log(q[i][j]) for i, j in pairs])
    return {
        "expert_indices": np.array(indices),
        "combine_weights": np.array(weights),
        "router_logits": np.array(logits),
        "router_probs": np.array(probs),
    }


def load_balancing_loss(probs, indices, mask):
    n, e = probs.shape
    kept = [i for i in range(n) if mask[i]]
    total = 0.0
    for expert in range(e):
        choices = sum(list(indices[i]).count(expert) for i in kept)
        share = choices / (len(kept) * indices.shape[1])
        total += share * sum(probs[i, expert] for i in kept) / len(kept)
    return e * total


def cv_squared_of_sums(values, mask):
    sums = [
        sum(v for v, m in zip(column, mask, strict=True) if m) for column in values.T
    ]
    mean = sum(sums) / len(sums)
    return sum((s - mean) ** 2 for s in sums) / len(sums) / mean**2


def router_z_loss(logits, mask):
    kept = [z for z, m in zip(logits, mask, strict=True) if m]
    return sum(math.log(sum(math.exp(v) for v in z)) ** 2 for z in kept) / len(kept)


def entropy_loss(probs, mask):
    kept = [p for p, m in zip(probs, mask, strict=True) if m]
    return -sum(v * math.log(v) for p in kept for v in p if v > 0) / len(kept)
