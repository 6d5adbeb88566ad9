import numpy as np
import pytest
from scipy import linalg

from dit_jax.data import sources
from dit_jax.metrics import judge
from dit_jax.metrics.frechet import frechet_distance, statistics


@pytest.mark.parametrize("n", [500, 20])  # 20: singular covariances
def test_frechet_distance_against_scipy(n):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((n, 30)), rng.standard_normal((n, 30)) @ rng.standard_normal((30, 30)) * 0.3 + 0.5
    (mu1, s1), (mu2, s2) = statistics(a), statistics(b)
    expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    np.testing.assert_allclose(frechet_distance(mu1, s1, mu2, s2), expected, rtol=1e-6 if n > 30 else 1e-3)
    assert abs(frechet_distance(mu1, s1, mu1, s1)) < 1e-6


def test_the_judge_tells_good_samples_from_bad():
    train, held_out = sources.digits()
    real, rng = (train.x, train.y), np.random.default_rng(0)
    # As samples: the held-out pictures themselves, the same with wrong labels, with noise, one class only.
    good = judge.report(real, (held_out.x, held_out.y), held_out.x, held_out.y)
    assert good["judge_accuracy"] >= 0.97 and good["recognised"] == good["judge_accuracy"]
    assert abs(good["frechet"]) < 1e-3 < good["frechet_floor"] < good["frechet_noise"]
    wrong = judge.report(real, (held_out.x, held_out.y), held_out.x, (held_out.y + 1) % 10)
    assert wrong["recognised"] < 0.03
    noisy = held_out.x + rng.normal(0, 0.5, held_out.x.shape).astype(np.float32)
    assert judge.report(real, (held_out.x, held_out.y), noisy, held_out.y)["frechet"] > 3 * good["frechet_floor"]
    ones = train.x[train.y == 1]
    collapsed = judge.report(real, (held_out.x, held_out.y), ones, np.ones(len(ones)))
    assert collapsed["recognised"] > 0.97 and collapsed["frechet"] > 10 * good["frechet_floor"]


def test_judge_features_are_those_it_decides_by():
    train, held_out = sources.digits()
    j = judge.Judge(train.x, train.y)
    logits = j.features(held_out.x) @ j.network.coefs_[-1] + j.network.intercepts_[-1]
    np.testing.assert_array_equal(logits.argmax(1), j.recognise(held_out.x))
