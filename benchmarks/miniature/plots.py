"""The plots of report.md."""

import numpy as np

from benchmarks.miniature.decisions import JUDGES, Value
from dit_jax.runtime.images import grid
from dit_jax.runtime.plots import plots


def line(axes, x, values, label, **style):
    """Draws Values with their ranges over x."""
    mean = [v.mean for v in values]
    axes.errorbar(
        x,
        mean,
        yerr=[[v.mean - v.low for v in values], [v.high - v.mean for v in values]],
        label=label,
        **{"marker": "o", "capsize": 3} | style,
    )


def _name(axes, text, x, y, below=False):
    """Writes a text to the right of the point (x, y), above or below it."""
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(5, -12 if below else 5))


def style(model, models):
    """Returns a line's style: the size's colour, the patch's marker and dashes. models: as S/2, by their Gflops."""
    size, _, patch = model.partition("/")
    sizes, patches = (list(dict.fromkeys(m.split("/")[i] for m in of)) for i, of in enumerate((models, sorted(models))))
    at = patches.index(patch) % 4
    return {"color": f"C{sizes.index(size)}", "marker": "os^D"[at], "linestyle": ("-", "--", ":", "-.")[at]}


def scaling(path, rows, published):
    """Distances over Gflops, and the paper's beside them.

    rows: of findings.scaling. published: of findings.paper_models.
    """
    with plots(path, 3, xscale="log", yscale="log", xlabel="Gflops of a forward pass") as axes:
        for panel, judge in zip(axes, JUDGES):
            for size in dict.fromkeys(name.split("/")[0] for name, *_ in rows):
                mine = [row for row in rows if row[0].split("/")[0] == size]
                line(panel, [row[1] for row in mine], [row[3][judge] for row in mine], size)
                for row in mine:
                    _name(panel, row[0], row[1], row[3][judge].mean, below=not row[0].startswith(rows[0][0][0]))
            panel.set(title=f"by {judge}", ylabel="Fréchet distance")
            panel.legend()
        for size in ("S", "B", "L", "XL"):
            mine = sorted(m[1:3] for m in published if m[0].startswith(f"DiT-{size}/"))
            axes[2].plot(*zip(*mine), label=f"DiT-{size}", marker="o")
        axes[2].set(title="the paper's table 4", ylabel="FID-50K")
        axes[2].legend()


def losses(path, runs, models):
    """The smoothed loss of each run. runs: [(model, records of metrics.jsonl)]. models: by their Gflops."""
    with plots(path, 1, yscale="log", xlabel="training step", ylabel="loss (mean-squared error and bound)") as axes:
        for model, records in runs:
            records = [q for q in records if "loss" in q]
            smooth, steps = (np.array([q[key] for q in records]) for key in ("loss", "step"))
            for i in range(1, len(smooth)):
                keep = 0.8 ** ((steps[i] - steps[i - 1]) / steps[0])  # a record at a checkpoint is of fewer steps
                smooth[i] = keep * smooth[i - 1] + (1 - keep) * smooth[i]
            axes[0].plot(steps, smooth, label=model, **style(model, models) | {"marker": "", "linewidth": 1})
        axes[0].legend(ncols=3)


def blocks(path, rows, names, published):
    """Distances of the block designs, and the paper's beside them.

    rows: of findings.blocks. names: {block: name}, in the order of the rows. published: {block: FID}.
    """
    with plots(path, 3) as axes:
        for panel, judge in zip(axes, JUDGES):
            for i, (_, _, values, seeds, _) in enumerate(rows):
                line(panel, [i], [values[judge]], None)
                panel.plot(
                    [i] * len(seeds[judge]),
                    list(seeds[judge].values()),
                    "k_",
                    markersize=12,
                    label=None if i else "single seeds",
                )
            panel.set(title=f"by {judge}", ylabel="Fréchet distance")
            panel.legend()
        axes[2].plot(range(4), [published[block] for block in names], "o")
        axes[2].set(title="the paper's XL/2", ylabel="FID-50K")
        for panel in axes:
            panel.set_xticks(range(4), [name.replace(" ", "\n") for name in names.values()])
            panel.set_xlim(-0.5, 3.5)


def guidance(path, rows, metrics):
    """Each metric over the guidance scale, a panel for each. rows: of findings.guidance."""
    with plots(path, 4, xlabel="guidance scale") as axes:
        for panel, metric in zip(axes, metrics):
            for judge in JUDGES:
                # Distances of two judges have no common unit: each is shown as a multiple of its own without guidance.
                unit = rows[0][1][judge][metric].mean if metric == "frechet" else 1.0
                values = [row[judge][metric] for _, row in rows]
                line(
                    panel,
                    [scale for scale, _ in rows],
                    [Value(v.mean / unit, v.low / unit, v.high / unit) for v in values],
                    judge,
                )
            panel.set(ylabel="Fréchet distance, times that without" if metric == "frechet" else metric)
            panel.legend()


def distances(path, rows, x, xlabel, steps=False):
    """Distances by each judge over x(row), a line for each model.

    rows: of compute.Row. steps: whether the number of steps is written beside the points.
    """
    models = sorted({row.model for row in rows}, key=lambda model: min(row.cost for row in rows if row.model == model))
    with plots(path, 2, xscale="log", yscale="log", xlabel=xlabel) as axes:
        for panel, judge in zip(axes, JUDGES):
            for model in models:
                mine = [row for row in rows if row.model == model]
                line(panel, list(map(x, mine)), [row.values[judge] for row in mine], model, **style(model, models))
                for row in mine if steps else ():
                    _name(panel, str(row.steps), row.cost, row.values[judge].mean)
            panel.set(title=f"by {judge}", ylabel="Fréchet distance")
            if xlabel == "training step":
                panel.set_xticks(ticks := sorted({row.steps for row in rows}), [f"{tick:,}" for tick in ticks])
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def samples(path, pictures, names):
    """Pictures (20 a name, H, W, 3), a row for each name, which stands above it."""
    with plots(path, len(names), height=0.58) as axes:
        for i, (panel, name) in enumerate(zip(axes, names)):
            panel.imshow(grid(pictures[20 * i : 20 * i + 20], 20))
            panel.set_title(name, loc="left", fontsize=10, pad=3)
            panel.set_axis_off()
        picture = grid(pictures[:20], 20)
        width = picture.shape[1] / 20
        axes[-1].set_axis_on()
        axes[-1].grid(False)
        axes[-1].spines[:].set_visible(False)
        axes[-1].set_xticks([(i + 0.5) * width for i in range(20)], [str(i % 10) for i in range(20)])
        axes[-1].set_yticks([])
