"""Metrics against scikit-learn, on random inputs with ties, and where they are not defined."""
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sk

import common


def all_metrics(task, classes, labels, scores, ordinal=False):
    """common.all_metrics on a dataset of this task and these classes."""
    return common.all_metrics(SimpleNamespace(task=task, classes=classes, ordinal=ordinal), labels, scores)


def rounded(rng, shape):
    """Probabilities with many ties."""
    scores = rng.random(shape).round(1) + 0.05
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_classes_equal_scikit_learn(seed, classes):
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(classes, size=200), rounded(rng, (200, classes))
    guess = scores.argmax(1)
    ours = all_metrics("classes", list("abcdef")[:classes], labels, scores, ordinal=True)
    column = scores[:, 1] if classes == 2 else None
    one_hot = np.eye(classes)[labels]
    expected = {
        "accuracy": sk.accuracy_score(labels, guess),
        "recall": sk.recall_score(labels, guess, average="macro"),
        "precision": sk.precision_score(labels, guess, average="macro", zero_division=0),
        "f1": sk.f1_score(labels, guess, average="macro"),
        "quadratic_kappa": sk.cohen_kappa_score(labels, guess, weights="quadratic"),
        "roc_auc": sk.roc_auc_score(labels, column) if classes == 2
        else np.mean([sk.roc_auc_score(one_hot[:, c], scores[:, c]) for c in range(classes)]),
        "average_precision": sk.average_precision_score(labels, column) if classes == 2
        else np.mean([sk.average_precision_score(one_hot[:, c], scores[:, c]) for c in range(classes)])}
    assert ours.pop("undefined") == []
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(5))
def test_multilabel_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels, scores = (rng.random((150, 4)) < 0.3).astype(np.float32), rng.random((150, 4)).round(1)
    guess = scores > 0.5
    ours = all_metrics("multilabel", list("abcd"), labels, scores)
    assert ours["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores, average="macro"), abs=1e-6)
    assert ours["average_precision"] == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-6)
    assert ours["recall"] == pytest.approx(sk.recall_score(labels, guess, average="macro"), abs=1e-6)
    assert ours["precision"] == pytest.approx(sk.precision_score(labels, guess, average="macro"), abs=1e-6)
    assert ours["f1"] == pytest.approx(sk.f1_score(labels, guess, average="macro"), abs=1e-6)
    assert ours["accuracy"] == pytest.approx((labels == guess).mean(), abs=1e-6)


def test_what_is_not_defined_is_said():
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[.7, .2, .1], [.3, .6, .1], [.1, .8, .1], [.2, .7, .1]])
    ours = all_metrics("classes", ["a", "b", "c"], labels, scores)
    assert ours["undefined"] == ["c"]
    assert ours["recall"] == pytest.approx((0.5 + 1) / 2)  # over a and b alone
    one = all_metrics("classes", ["a", "b"], np.zeros(4, int), scores[:, :2])
    assert one["roc_auc"] is None and one["undefined"] == ["b"]
    assert common.metric("quadratic_kappa", "classes", np.zeros(3, int), np.eye(2)[[0, 0, 0]]) is None
    labels, scores = np.array([[1, 0], [0, 0]], np.float32), np.array([[.9, .1], [.2, .3]])
    assert all_metrics("multilabel", ["a", "b"], labels, scores)["undefined"] == ["b"]


@pytest.mark.parametrize("task, classes, counts, ordinal, metric", [
    ("classes", "ab", [90, 10], False, "roc_auc"), ("classes", "abc", [5, 5, 5], True, "quadratic_kappa"),
    ("classes", "abc", [51, 25, 24], False, "recall"), ("classes", "abc", [49, 26, 25], False, "accuracy"),
    ("multilabel", "abc", None, False, "roc_auc"), (None, "", None, False, "iou")])
def test_the_headline_fits_the_data(task, classes, counts, ordinal, metric):
    labels = None if counts is None else np.repeat(np.arange(len(counts)), counts)
    assert common.fitting_metric(task, list(classes), labels, ordinal)[0] == metric


def scored(train, labels, scores, metric="accuracy", task="classes"):
    """score_test of a dataset with these labels of train and test."""
    labels = np.concatenate([train, labels])
    rows = {"train": np.arange(len(train)), "test": np.arange(len(train), len(labels))}
    names = list("abc")[:scores.shape[1]]
    return common.score_test(SimpleNamespace(rows=rows, labels=labels, task=task, classes=names, metric=metric, ordinal=True,
                                             groups_of=lambda rows: None), scores)


def test_a_model_that_says_one_thing_is_called_that(capsys):
    """Test has 60 % of the class that is the most frequent in train."""
    train, test = np.repeat([0, 1], [9, 1]), np.repeat([0, 1], [60, 40])
    constant = scored(train, test, np.tile([0.3, 0.7], (100, 1)))
    assert constant["one_class"] == "b" and constant["guess"] == 0.6 and constant["accuracy"] == 0.4
    assert "predicts 'b' for every test image" in capsys.readouterr().out
    right = scored(train, test, np.eye(2)[test])
    assert right["one_class"] is None and right["beats_guess"] and "WARNING" not in capsys.readouterr().out
    weak = np.eye(2)[np.where(np.arange(100) < 5, 1, 0)]  # 5 of a are called b
    assert scored(train, test, weak)["beats_guess"] is False and "does not beat" in capsys.readouterr().out
    assert scored(train, test, weak, "roc_auc")["guess"] == 0.5 and scored(train, test, weak, "quadratic_kappa")["guess"] == 0
    several = np.stack([test, 1 - test], 1).astype(np.float32)
    assert scored(several[:30], several, several * 0.8, "roc_auc", "multilabel")["guess"] == 0.5


def test_bootstrap_interval_covers_the_truth():
    """95 % intervals of the mean of 100 coin tosses hold 0.5 in 85 to 100 % of 100 repetitions."""
    rng, hits = np.random.default_rng(0), 0
    for repetition in range(100):
        tosses = rng.integers(2, size=100)
        low, high = common.bootstrap_interval(lambda rows: float(tosses[rows].mean()), 100, seed=repetition,
                                              resamples=200)
        hits += low <= 0.5 <= high
    assert 85 <= hits <= 100


def test_bootstrap_resamples_whole_groups():
    values, groups = np.repeat([0.0, 1.0, 0.0, 1.0], 25), np.repeat(list("abcd"), 25)

    def score(rows):
        return float(values[rows].mean())
    spread = np.ptp(common.bootstrap_interval(score, 100))
    assert np.ptp(common.bootstrap_interval(score, 100, groups.tolist())) > 2 * spread
    assert common.bootstrap_interval(lambda rows: None, 10) is None
