"""The Inception Score (arXiv 1606.03498)."""

import numpy as np
from scipy.special import log_softmax

SPLIT = 5000


def inception_score(logits, split=SPLIT):
    """logits (N, K) without bias, as the paper's evaluator takes them -> the mean over consecutive splits of
    exp(E KL(p(y|x) || p(y))), the last split being as long as what is left. It depends on the order of the pictures."""
    scores = []
    for start in range(0, len(logits), split):
        log_p = log_softmax(np.asarray(logits[start: start + split], np.float64), axis=1)
        p = np.exp(log_p)
        # A class that nothing belongs to, to the last bit, adds nothing.
        marginal = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - marginal)).sum(1).mean()))
    return float(np.mean(scores))
