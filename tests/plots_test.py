"""Grids with names, and the style of plots."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from benchmarks.miniature import plots as study
from dit_jax.runtime import images, plots
from dit_jax.training.metrics import loss_curve

PHONE = 390  # pixels


def grey(n, size=8):
    return np.full((n, size, size, 3), 100, np.uint8)


def texts(picture, n, columns, labels, size=96):
    """Where the pixels of texts are: (above, left of, below) the pictures, as numbers of dark pixels."""
    grid = images.grid(picture, columns, labels)
    plain = images.grid(picture, columns)
    dark = (grid < 90).any(-1)
    top, left = grid.shape[0] - plain.shape[0], grid.shape[1] - plain.shape[1]
    return top, left, dark


def test_names_stand_above_columns_left_of_rows_or_below_each_picture():
    six = grey(6)
    top, left, dark = texts(six, 6, 3, ["cat", "dog", "cow"] * 2)
    assert top > 0 and left == 0 and dark[:top].any() and not dark[top:].any()
    top, left, dark = texts(six, 6, 3, ["cat"] * 3 + ["dog"] * 3)
    assert top == 0 and left > 0 and dark[:, :left].any() and not dark[:, left:].any()
    top, left, dark = texts(six, 6, 3, list("abcdef"))
    assert top % 2 == 0 and top > 0 and left == 0  # a line for each of two rows
    line = top // 2
    assert dark[98 : 98 + line].any() and dark[-line:].any() and not dark[:98].any()
    grid = images.grid(six, 3, list("abcdef"))
    for i in range(6):
        y, x = 2 + i // 3 * (98 + line), 2 + i % 3 * 98
        assert (grid[y : y + 96, x : x + 96] == 100).all()


def test_long_names_are_cut_to_the_first_synonym_and_the_width():
    one = grey(1)
    assert (images.grid(one, 1, ["tench, Tinca tinca"]) == images.grid(one, 1, ["tench"])).all()
    long = images.grid(one, 1, ["a name that is much longer than its picture is wide"])
    assert long.shape == images.grid(one, 1, ["a"]).shape and (long[:, [0, 1, -2, -1]] == 255).all()
    rows = images.grid(grey(2), 1, ["a name that is much longer than its picture is wide", "b"])
    assert rows.shape[1] <= 3 * 96 + 4
    assert images.class_labels([2, 0], ["zero", "one"]) == [2, "zero"] and images.class_labels([1], None) == [1]
    assert (images.grid(one, 1, ["ä"]) != images.grid(one, 1, ["ж"])).any()  # not two empty boxes


@pytest.mark.parametrize("size, shown", [(8, 96), (28, 112), (64, 128), (96, 96), (256, 256)])
def test_small_pictures_are_enlarged_by_a_whole_factor(size, shown):
    picture = np.random.default_rng(0).integers(256, size=(1, size, size, 3), dtype=np.uint8)
    grid = images.grid(picture, 1)
    assert grid.shape == (shown + 4, shown + 4, 3)
    assert (grid[2:-2:1, 2:-2][:: shown // size, :: shown // size] == picture[0]).all()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, kept."""
    from matplotlib.figure import Figure

    kept, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), savefig(self, *a, **k)))
    return kept


def check_style(figure):
    """On a phone: fonts of 9 pixels; no tick is a power; axes have labels; texts of a legend hide nothing important."""
    pixels = PHONE / figure.get_size_inches()[0] / 72  # of a point
    assert pixels * 9.5 >= 9
    for axes in figure.axes:
        assert axes.get_ylabel() and (axes.get_xlabel() or len(set(t.get_text() for t in axes.get_xticklabels())) > 1)
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [t.get_text() for t in axis.get_ticklabels(which="both") if t.get_text()]
            assert len(ticks) > 1 and not any(mark in text for text in ticks for mark in ("10^", "$", "\\times", "e"))
            assert all(t.get_fontsize() * pixels >= 9 for t in axis.get_ticklabels(which="both"))
        legend = axes.get_legend()
        assert legend is None or all(t.get_fontsize() * pixels >= 9 for t in legend.get_texts())
        assert all(t.get_fontsize() * pixels >= 9 for t in axes.texts)


def records(steps, first=0, **more):
    return [{"step": first + step, "loss": 1 / step + 0.1} | more for step in steps]


def test_the_loss_curve_begins_after_the_first_steps_and_says_its_last_value(drawn, tmp_path):
    path = str(tmp_path / "loss.png")
    run = records(range(1, 1001)) + [{"step": s, "fid_5000": 1e3 / s} for s in (1, 500, 1000)]
    loss_curve(run, path)
    loss, fid = drawn[0].axes
    assert [min(line.get_xdata()) for line in (*loss.lines, *fid.lines)] == [11, 500]
    assert loss.get_ylim()[1] < 0.3  # not 1.1, the loss of the first step
    assert "0.101 at step 1,000" in loss.get_legend().get_texts()[0].get_text()
    assert "fid_5000: 1 at step 1,000" in fid.get_legend().get_texts()[0].get_text()
    check_style(drawn[0])
    for few in (records([1]), records([1, 2]), records(range(50, 401, 50), first=399_600), run[-1:], []):
        loss_curve(few, path)  # a record alone; a run that resumed; a distance alone; none
        assert Image.open(path).width == 840
    assert drawn[1].axes[0].lines and len(drawn[3].axes[0].lines[0].get_xdata()) == 8


@pytest.mark.parametrize("low, high", [(1e-3, 0.1), (6, 30), (9, 11), (0.2, 3e3), (1, 1e7), (200, 400_000)])
def test_ticks_of_a_logarithmic_axis_are_numbers(low, high, drawn, tmp_path):
    settings = {"xscale": "log", "yscale": "log", "xlabel": "x", "ylabel": "y"}
    with plots.plots(str(tmp_path / "a.png"), 2, **settings) as panels:
        for panel in panels:
            panel.plot([low, high], [low, high])
    check_style(drawn[0])
    with pytest.raises(KeyError), plots.plots(str(tmp_path / "b.png")):
        raise KeyError
    assert not (tmp_path / "b.png").exists()


def test_the_samples_of_a_study_have_their_names(tmp_path):
    study.samples(str(tmp_path / "a.png"), grey(40, 16), ["S/2, 16 Mflops", "M/4 cross-attention, 8.75 Mflops"])
    assert Image.open(tmp_path / "a.png").width == 840


def test_all_pictures_of_the_pages_have_the_style():
    """As far as a file shows it: the width. loss.png of the paper in miniature needs records that are not committed."""
    for path in (ROOT / "benchmarks").rglob("*.png"):
        if path.name != "loss.png":
            assert Image.open(path).width == 840, path
