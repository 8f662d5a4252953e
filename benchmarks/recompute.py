"""Compare the leader of a study with its nearest rival, from sums.npz and numpy alone.

    python recompute.py runs/compare-small/sums.npz [--bytes 45000] [--arms MFT LoRA] [--text stdlib]

Ranks the arms by their validation loss over the seeds that all have, best first. The leader and the runner-up are then
compared on test: the mean difference per token, its 95 % interval and two-sided p before any correction. The method is
that of the report, written a second time without its code. mft_study/evidence/sums.py documents the file.

Notation: x[s, d] is the difference of the two arms' losses in nats, summed over document d with seed s; n[d] are the
tokens of d; t[s] = sum_d x[s, d] / sum_d n[d]. The estimate is the mean of t over the seeds. A draw of the bootstrap
takes as many seeds (shares u) and as many documents (w times each) as there are, with replacement:

    estimate + r (f(S) sum_s u[s] (t[s] - estimate) + f(D) sum_s u[s] (sum_d w[d] e[s, d]) / (sum_d w[d] n[d]))

Here e[s, d] = x[s, d] - t[s] n[d], and f(k) = sqrt(k / (k - 1)) corrects the variance for few seeds or documents.
r^2 = v / chi^2_v makes the shape a Student t with Satterthwaite's v degrees of freedom.
"""

import argparse
import functools
import math
import sys

import numpy as np

UNITS = 10_000  # units of the file's sums per nat
DRAWS = 10_000
FEW_SEEDS = 5  # with fewer, a p below 0.01 cannot be told from 0.01


def loss(arrays, place, arm, arms):
    """Return the loss per token of arm, averaged over the seeds that all arms have."""
    shared = functools.reduce(np.intersect1d, [arrays[f"{place}/{one}/seeds"] for one in arms])
    sums = arrays[f"{place}/{arm}/loss"][np.isin(arrays[f"{place}/{arm}/seeds"], shared)]
    return sums.sum(1).mean() / UNITS / arrays[f"{place}/tokens"].sum()


def paired(arrays, place, arm, other):
    """Return (x, n) as defined above, for the seeds that both arms have."""
    seeds = np.intersect1d(arrays[f"{place}/{arm}/seeds"], arrays[f"{place}/{other}/seeds"])
    of_arm, of_other = (
        arrays[f"{place}/{name}/loss"][np.searchsorted(arrays[f"{place}/{name}/seeds"], seeds)] / UNITS
        for name in (arm, other)
    )
    return of_arm - of_other, arrays[f"{place}/tokens"].astype(float)


def difference(arrays, place, arm, other):
    """Return arm - other: estimate, ends of the 95 % interval, p, number of seeds, number of documents."""
    x, n = paired(arrays, place, arm, other)
    drawn, estimate = draw(x, n), (x.sum(1) / n.sum()).mean()
    low, high = np.quantile(drawn, (0.025, 0.975))
    rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
    found = {"estimate": estimate, "low": low, "high": high, "p": min(1, 2 * (1 + rarer) / (1 + DRAWS))}
    return {name: float(value) for name, value in found.items()} | {"seeds": x.shape[0], "documents": x.shape[1]}


def draw(x, n):
    """Return (DRAWS,) draws of the estimate, with the random numbers of the report."""
    seeds, documents = x.shape
    t = x.sum(1) / n.sum()
    estimate, e = t.mean(), x - t[:, None] * n
    generator = np.random.default_rng(0)
    shares = generator.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds
    drawn = np.empty(DRAWS)
    for i in range(DRAWS):
        times = np.bincount(generator.integers(documents, size=documents), minlength=documents)
        over_documents = shares[i] @ (e @ times) / (times @ n)
        drawn[i] = few(seeds) * shares[i] @ (t - estimate) + few(documents) * over_documents
    v = degrees_of_freedom(t - estimate, e.mean(0), n)
    return estimate + np.sqrt(v / np.random.default_rng((0, 1)).chisquare(v, DRAWS)) * drawn


def few(k):
    """Compute f of the formula; one seed says nothing about how seeds vary."""
    return math.sqrt(k / (k - 1)) if k > 1 else 0.0


def degrees_of_freedom(over_seeds, over_documents, n):
    """Compute (V_S + V_D)^2 / (V_S^2 / (S - 1) + V_D^2 / (D - 1)), V the squared standard errors over each."""
    seeds, documents = len(over_seeds), len(n)
    of_seeds = (over_seeds**2).sum() / (seeds * max(1, seeds - 1))
    of_documents = (over_documents**2).sum() * documents / (documents - 1) / n.sum() ** 2
    share = of_seeds / (of_seeds + of_documents) if of_seeds + of_documents else 0.0
    return 1 / (share**2 / max(1, seeds - 1) + (1 - share) ** 2 / (documents - 1))


def candidates(arrays, place, asked):
    """Return (arms to rank, bytes of each): those named, or those with at most the given bytes."""
    domain, held = place.split("/")[0], [name.split("/") for name in arrays if name.startswith(f"{place}/")]
    arms = sorted(parts[3] for parts in held if parts[-1] == "seeds")
    if unknown := [arm for arm in asked.arms or [] if arm not in arms]:
        sys.exit(f"error: --arms must be of {', '.join(arms)}, got {', '.join(unknown)}")
    sizes = {arm: arrays.get(f"{domain}/bytes/{arm}") for arm in arms}
    most = math.inf if asked.bytes is None else asked.bytes
    arms = asked.arms or [arm for arm in arms if asked.bytes is None or (sizes[arm] or math.inf) <= most]
    if len(arms) < 2:
        sys.exit(f"error: there must be two arms at least to compare, got {', '.join(arms) or 'none'}")
    return arms, sizes


def main(arguments=None):
    """Print the ranking and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sums", help="the sums.npz of a study")
    parser.add_argument("--domain", help="default: the first")
    parser.add_argument("--text", help="a text by which forgetting is measured; default: the domain's own")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--bytes", type=float, help="only arms that take at most this many bytes")
    asked = parser.parse_args(arguments)
    with np.load(asked.sums) as file:
        arrays = {name: file[name] for name in file.files}
    domains = list(dict.fromkeys(name.split("/")[0] for name in arrays))
    domain = asked.domain or domains[0]
    if domain not in domains:
        sys.exit(f"error: --domain must be one of {', '.join(domains)}, got {domain}")
    texts = sorted({name.split("/")[2] for name in arrays if name.startswith(f"{domain}/test/")})
    text = asked.text or domain
    if text not in texts:
        sys.exit(f"error: --text must be one of {', '.join(texts)}, got {text}")
    validation, test = f"{domain}/validation/{text}", f"{domain}/test/{text}"
    arms, sizes = candidates(arrays, test, asked)
    if not all(f"{validation}/{arm}/loss" in arrays for arm in arms):
        print("warning: the file lacks validation sums, test itself ranks the arms: the difference is optimistic")
        validation = test
    arms = sorted(arms, key=lambda arm: loss(arrays, validation, arm, arms))
    print(f"{'arm':30} {'bytes':>12} {validation.split('/')[1]:>10} {'test':>8}")
    for arm in arms:
        size = "" if sizes[arm] is None else f"{sizes[arm]:,.0f}"
        print(f"{arm:30} {size:>12} {loss(arrays, validation, arm, arms):10.4f} {loss(arrays, test, arm, arms):8.4f}")
    found = difference(arrays, test, arms[0], arms[1])
    least = 0.01 if found["seeds"] < FEW_SEEDS else 0.001
    shown = f"<{least:g}" if found["p"] < least else f"{found['p']:.3f}"
    print(
        f"\n{arms[0]} - {arms[1]}: {found['estimate']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] nats per token "
        f"on {text}, p {shown} ({found['seeds']} seeds, {found['documents']} documents, uncorrected)"
    )


if __name__ == "__main__":
    main()
