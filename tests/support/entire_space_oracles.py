"""Models of chains of events again, row by row, in plain NumPy float64.

Nothing here is shared with keras_moe. Labels are lists of rows; a label of a row
without the event before it is not read.
"""

import math

import numpy as np

from tests.support.task_oracles import log_loss, sigmoid


def chain(logits):
    """Conditional and joint probabilities of one row: lists by stage."""
    conditional = [sigmoid(z) for z in logits]
    joint = []
    for p in conditional:
        joint.append(p if not joint else joint[-1] * p)
    return conditional, joint


def happened(labels):
    """Whether the stages 1..i all happened, for each i."""
    found = []
    for label in labels:
        found.append(1.0 if label > 0 and all(found) else 0.0)
    return found


def log_joint_loss(y, logits):
    """The log loss of a product of probabilities, exact for the smallest ones."""
    if y:
        return sum(math.log1p(math.exp(-z)) for z in logits)
    product = 1.0
    for z in logits:
        product *= sigmoid(z)
    return -math.log1p(-product)


def esmm(logits, labels, weights):
    """Ma et al. 2018, equation 3. logits, labels: (n, s)."""
    total = 0.0
    for row, label, weight in zip(logits, labels, weights, strict=True):
        events = happened(label)
        for i in range(len(row)):
            total += weight * log_joint_loss(events[i], row[: i + 1])
    return total / sum(weights)


def naive(logits, labels, weights):
    """Each stage on the rows where the one before it happened."""
    total = 0.0
    for i in range(len(logits[0])):
        above, below = 0.0, 0.0
        for row, label, weight in zip(logits, labels, weights, strict=True):
            if i == 0 or happened(label)[i - 1] > 0:
                above += weight * log_loss(label[i], sigmoid(row[i]))
                below += weight
        total += above / below if below else 0.0
    return total


def escm2(
    logits, labels, weights, method, held, conversion_weight, joint_weight, least
):
    """Wang et al. 2022. logits: (n, 2), or (n, 3) with those of the imputation.

    `held` are the logits before one was moved: what has no gradient reads them.
    """
    clicks, risk, joint, n = 0.0, 0.0, 0.0, sum(weights)
    for row, fixed, label, weight in zip(logits, held, labels, weights, strict=True):
        clicked, converted = happened(label)
        clicks += weight * log_loss(clicked, sigmoid(row[0]))
        joint += weight * log_joint_loss(converted, row[:2])
        inverse = clicked / max(sigmoid(fixed[0]), least)
        rate = sigmoid(row[1])
        error = log_loss(converted, rate)
        if method == "ipw":
            risk += weight * conversion_weight * inverse * error
            continue
        imputed = log_loss(sigmoid(fixed[2]), rate)
        risk += weight * conversion_weight * (imputed + inverse * (error - imputed))
        still = sigmoid(fixed[1])
        difference = log_loss(converted, still) - log_loss(sigmoid(row[2]), still)
        risk += weight * inverse * difference**2
    return (clicks + risk + joint_weight * joint) / n


def relu(x):
    return np.maximum(x, 0.0)


def aitm(features, parameters, k):
    """Xi et al. 2021, equations 4 to 8. features: s arrays (n, d); (n, s) outputs.

    parameters: the transfer, query, key and value (kernel, bias) of each stage after
    the first, and the layers of each tower.
    """
    outputs = []
    for row in range(len(features[0])):
        z, probabilities = None, []
        for i, of_stage in enumerate(features):
            own = of_stage[row]
            if i == 0:
                z = own
            else:
                transfer, query, key, value = parameters["stages"][i - 1]
                passed = relu(z @ transfer[0] + transfer[1])
                scores, values = [], []
                for u in (passed, own):
                    q, k_, v = (u @ w + b for w, b in (query, key, value))
                    scores.append(float(np.dot(k_, q)) / math.sqrt(k))
                    values.append(v)
                largest = max(scores)
                parts = [math.exp(score - largest) for score in scores]
                z = sum(
                    part / sum(parts) * v for part, v in zip(parts, values, strict=True)
                )
            hidden = z
            tower = parameters["towers"][i]
            for j, (w, b) in enumerate(tower):
                hidden = hidden @ w + b
                if j < len(tower) - 1:
                    hidden = relu(hidden)
            probabilities.append(sigmoid(float(hidden[0])))
        outputs.append(probabilities)
    return np.array(outputs)


def calibrator(probabilities):
    """The mean over rows of sum_i max(y_i - y_{i-1}, 0)."""
    total = 0.0
    for row in probabilities:
        for i in range(1, len(row)):
            total += max(row[i] - row[i - 1], 0.0)
    return total / len(probabilities)


def dbmtl(features, parents, layers):
    """Each task's MLP on its features and the hidden units of its parents."""
    hidden = {}
    for task, of in parents.items():
        rows = []
        for row in range(len(features[task])):
            x = np.concatenate([features[task][row], *(hidden[p][row] for p in of)])
            for w, b in layers[task]:
                x = relu(x @ w + b)
            rows.append(x)
        hidden[task] = np.array(rows)
    return hidden
