"""The Inception Score (arXiv 1606.03498)."""

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax

SPLIT = 5000


def inception_score(logits: Float[np.ndarray, "n k"], split: int = SPLIT) -> float:
    """Returns the mean over consecutive splits of exp(E KL(p(y|x) || p(y))).

    logits: without bias, as in the paper's evaluator. The last split may be shorter. The score depends on the order of
    the pictures.
    """
    scores = []
    for start in range(0, len(logits), split):
        log_p = log_softmax(np.asarray(logits[start : start + split], np.float64), axis=1)
        p = np.exp(log_p)
        # A class that has probability 0 in every picture adds nothing.
        marginal = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - marginal)).sum(1).mean()))
    return float(np.mean(scores))
