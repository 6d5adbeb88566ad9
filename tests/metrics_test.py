import signal

import numpy as np
import pytest
from conftest import GOLDEN
from scipy import linalg

from dit_jax.data import sources
from dit_jax.evaluation import classifier, precision_recall as pr
from dit_jax.evaluation.frechet import Moments, frechet_distance, statistics
from dit_jax.evaluation.inception_score import inception_score
from dit_jax.evaluation.kid import kid


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
    good = classifier.report(real, (held_out.x, held_out.y), held_out.x, held_out.y)
    assert good["judge_accuracy"] >= 0.97 and good["recognised"] == good["judge_accuracy"]
    assert abs(good["frechet"]) < 1e-3 < good["frechet_floor"] < good["frechet_noise"]
    wrong = classifier.report(real, (held_out.x, held_out.y), held_out.x, (held_out.y + 1) % 10)
    assert wrong["recognised"] < 0.03
    noisy = held_out.x + rng.normal(0, 0.5, held_out.x.shape).astype(np.float32)
    assert classifier.report(real, (held_out.x, held_out.y), noisy, held_out.y)["frechet"] > 3 * good["frechet_floor"]
    ones = train.x[train.y == 1]
    collapsed = classifier.report(real, (held_out.x, held_out.y), ones, np.ones(len(ones)))
    assert collapsed["recognised"] > 0.97 and collapsed["frechet"] > 10 * good["frechet_floor"]


def test_a_judge_whose_fit_is_interrupted_is_none():
    def interrupt(*_):
        raise KeyboardInterrupt

    import sklearn.neural_network  # noqa: F401, which takes longer than the alarm

    before, images = signal.signal(signal.SIGALRM, interrupt), np.zeros((20_000, 8, 8, 1), np.float32)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt, match="^$"):
            classifier.Classifier(images, np.arange(len(images)) % 10)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_judge_features_are_those_it_decides_by():
    train, held_out = sources.digits()
    j = classifier.Classifier(train.x, train.y)
    logits = j.features(held_out.x) @ j.network.coefs_[-1] + j.network.intercepts_[-1]
    np.testing.assert_array_equal(logits.argmax(1), j.recognise(held_out.x))


@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_moments_of_batches_are_those_of_all_at_once(mean):
    x = np.random.default_rng(0).standard_normal((500, 20)).astype(np.float32) + np.float32(mean)
    mu, sigma = np.asarray(x, np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)
    for size in (1, 7, 500):
        for order in (slice(None), slice(None, None, -1)):
            moments = Moments()
            for start in range(0, 500, size):
                moments.add(x[order][start : start + size])
            np.testing.assert_allclose(moments.statistics()[0], mu, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(moments.statistics()[1], sigma, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_whole_blocks_of_float32_are_multiplied_in_float32(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(Moments, "ROWS", 150)
    x = (np.random.default_rng(0).standard_normal((500, 20)) @ np.diag(10.0 ** -np.arange(0, 4, 0.2)) + 1).astype(dtype)
    sigma = np.cov(x.astype(np.float64), rowvar=False)
    scale = np.sqrt(np.outer(np.diag(sigma), np.diag(sigma)))
    for size in (7, 150, 500):
        moments = Moments()
        for start in range(0, 500, size):
            moments.add(x[start : start + size])
        np.testing.assert_allclose(moments.statistics()[0], x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(moments.statistics()[1] / scale, sigma / scale, atol=tolerance)


def test_moments_refuse_what_has_no_covariance():
    moments = Moments()
    moments.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="two pictures"):
        moments.statistics()
    with pytest.raises(ValueError, match="picture 2 are not finite"):
        moments.add(np.array([[0, 0, 0], [0, np.nan, 0]]))


def test_precision_and_recall_against_every_distance_one_by_one(monkeypatch):
    monkeypatch.setattr(pr, "ROWS", 16)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((90, 5)) + 300, 1.3 * rng.standard_normal((70, 5)) + 300.5
    a[10:13], b[5:9] = a[9], b[20]  # twins, with a radius of 0 where there are as many as neighbours
    a[30] = b[20]
    a, b = a.astype(np.float32), b.astype(np.float32)

    def distance(x, y):
        return [[np.sqrt(np.square(p.astype(np.float64) - q).sum()) for q in y.astype(np.float64)] for p in x]

    radii = [np.sort(distance(x, x), axis=1)[:, 3] for x in (a, b)]
    across = np.array(distance(a, b))
    expected = (across <= radii[1]).any(1).mean(), (across <= radii[0][:, None]).any(0).mean()
    assert radii[1].min() == 0 and 0.2 < expected[0] < 0.99 and 0.2 < expected[1] < 0.99
    assert pr.precision_recall(a, b) == expected
    order = rng.permutation(90)
    assert pr.precision_recall(a[order], b[::-1]) == expected
    with pytest.raises(ValueError, match="4 pictures of each set, and there are 3 samples and 70"):
        pr.precision_recall(a[:3], b)


def test_the_metrics_against_torch_fidelity():
    """Its own numbers (0.4.0) on given features. It cannot be asked here: it takes another PyTorch than the tests do."""
    g = np.load(GOLDEN / "eval" / "metrics_golden.npz")
    samples, reference, logits = g["samples"], g["reference"], g["logits"]
    np.testing.assert_allclose(frechet_distance(*statistics(samples), *statistics(reference)), g["fid"], rtol=1e-6)
    few = samples[: 40 if samples.shape[1] > 40 else 10]  # fewer than numbers: a singular covariance
    np.testing.assert_allclose(
        frechet_distance(*statistics(few), *statistics(reference)), g["fid_first_40_samples"], rtol=1e-3
    )
    split = len(logits) // int(g["inception_score_splits"])
    np.testing.assert_allclose(inception_score(logits, split), g["inception_score"], rtol=1e-6)
    np.testing.assert_allclose(pr.precision_recall(samples, reference), g["precision_recall"], rtol=1e-6)
    if "kid" in g:  # the first as many of both sets, in one subset
        np.testing.assert_allclose(kid(samples[: len(reference)], reference), g["kid"], rtol=1e-6)


def test_kid_pair_by_pair(monkeypatch):
    from dit_jax.evaluation import kid as module

    monkeypatch.setattr(module, "ROWS", 16)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 7)), 0.3 + rng.standard_normal((35, 7))

    def mean(a, b):
        return np.mean([(p @ q / 7 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if a is not b or i != j])

    expected = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    np.testing.assert_allclose(kid(x, y), expected, rtol=1e-12)
    np.testing.assert_allclose(kid(x[::-1], y[rng.permutation(35)]), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="two pictures of each"):
        kid(x, y[:1])


def test_the_inception_score_of_what_is_sure_and_even():
    logits = 1000 * np.eye(10)[np.arange(40) % 10]
    assert inception_score(logits) == pytest.approx(10)
    assert inception_score(np.ones((40, 10))) == pytest.approx(1)
    assert inception_score(logits, 35) == pytest.approx((10 * np.exp(0) + 5) / 2, rel=0.02)  # the last split: five
