"""Cross entropy plus a penalty for moving away from the base: KL(model || base) of each scored token."""

from torch import Tensor

from mft.checks import check_rule
from mft.objectives.token_objective import TokenObjective


class KL(TokenObjective):
    """-log p(token) + beta * sum over words of p * (log p - log p_base), with beta > 0.

    The direction of the KL is that of RLHF's penalty: tokens that the base finds unlikely are penalised.
    """

    name = "kl"
    of_base = True

    def __init__(self, beta: float = 0.1) -> None:
        check_rule(beta > 0, "beta", "be positive", beta)
        self.beta = beta

    def token_losses(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        return self.token_figures(logits, targets, reference)["loss"]

    def token_figures(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        assert reference is not None, "the way gives the base's states to an objective of_base"
        log_p = logits.log_softmax(-1)
        kl = divergence(log_p, reference.log_softmax(-1))
        return {"loss": cross_entropy(log_p, targets) + self.beta * kl, "kl": kl}


def cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target), (M,), for log-probabilities log_p (M, V)."""
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q), (M,), for log-probabilities (M, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
