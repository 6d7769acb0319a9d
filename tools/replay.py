"""AML replayed: the weights that other settings of Eq. (9) would have given a run, and slopes."""

import itertools
from collections.abc import Mapping, Sequence

from losses import SINGLE_TASK_F1, SOTA_F1, achievement_weights

Setting = Mapping[str, object]  # reference, margin, gamma, temperature of achievement_weights


def variants(own: Setting) -> dict[str, Setting]:
    """The run's setting of Eq. (9) and, one change at a time, others: each p_m, where the p_m come
    from, margin, gamma, temperature."""
    p: Mapping[str, float] = own["reference"]
    found = {"run": own}
    for x in (0.9, 0.95, 1.05, 1.1):
        found |= {f"p {m} x {x}": {**own, "reference": {**p, m: p[m] * x}} for m in p}
        found[f"p all x {x}"] = {**own, "reference": {m: p[m] * x for m in p}}
    found["p single"] = {**own, "reference": SINGLE_TASK_F1}
    found["p sota"] = {**own, "reference": SOTA_F1}
    for name, values in (("margin", (1.0, 1.05, 1.1)), ("gamma", (1.0, 2.0, 3.0)),
                         ("temperature", (0.1, 0.3, 1.0))):
        found |= {f"{name} {value:g}": {**own, name: value} for value in values}
    return found


def replay(history: Sequence[Mapping], settings: Mapping[str, Setting],
           rows: Mapping[str, int]) -> list[dict]:
    """The weights that each setting gives after each epoch; one dict per setting, epoch, unit.

    shift: against settings["run"].  share: of the loss' weight, with `rows` training rows per unit.
    """
    found = []
    for past, (name, setting) in itertools.product(history, settings.items()):
        f1 = past["f1"]
        own, w = (achievement_weights(f1, **s) for s in (settings["run"], setting))
        for m in f1:
            level = f1[m] / (setting["margin"] * setting["reference"][m])
            found.append({"setting": name, "after_epoch": past["epoch"], "unit": m, "f1": f1[m],
                          "achievement": level, "achieved": int(level >= 1), "weight": w[m],
                          "shift": w[m] - own[m],
                          "share": rows[m] * w[m] / sum(rows[k] * w[k] for k in f1)})
    return found


def weight_slopes(f1: Mapping[str, float], reference: Mapping[str, float], margin: float = 1.05,
                  gamma: float = 2.0, temperature: float = 1.0) -> dict[tuple[str, str], float]:
    """{(m, k): d weight_m / d ln p_k} of `achievement_weights`, 0 for an achieved k: a p_k
    that is wrong by 1 % moves weight m by a hundredth of it."""
    weights = achievement_weights(f1, reference, margin, gamma, temperature)
    slopes = {}
    for k in f1:
        a = f1[k] / (margin * reference[k])
        inner = 0.0 if a >= 1 else gamma * (1 - a) ** (gamma - 1) * a / temperature
        slopes |= {(m, k): weights[m] * ((m == k) - weights[k] / len(f1)) * inner for m in f1}
    return slopes
