"""Hand-made records of one ratio."""

QUANTITY = "ours, from scores / dense: forward, 4 x 8, M = 2"


def spread(median, width=0.01):
    return {"median": median, "low": median - width, "high": median + width}


def record(median=1.0, width=0.01, *, quantity=QUANTITY, unit="x", **environment):
    found = [{"quantity": quantity, "measured": spread(median, width), "unit": unit}]
    return {"environment": {"device": "a", "commit": "0" * 40} | environment, "findings": found}
