"""Pictures hold what they should: the right numbers, labels with units, names that do not overlap."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from matplotlib.colors import to_hex

from scvi_lite import plot
from scvi_lite.plot.style import OKABE_ITO


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def one_column(name, values):
    return {name: pd.DataFrame({name: values}, index=pd.RangeIndex(len(values), name="epoch"))}


HISTORY = one_column("elbo_train", [900.0, 400, 300, 250, 240, 235, 232, 230, 229, 228, 227, 226]) | one_column(
    "elbo_validation", [800.0, 410, 310, 260, 250, 247, 245, 244, 243, 243, 242, 242]
)


def test_curves_show_the_history(tmp_path):
    ax = plot.training_curves(HISTORY, save=tmp_path / "curve.png")
    training, validation = ax.lines
    assert training.get_ydata().tolist() == HISTORY["elbo_train"]["elbo_train"].tolist()
    assert validation.get_label() == "validation"
    assert ax.get_xlabel() == "epoch" and "nats" in ax.get_ylabel()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_curves_leave_out_the_first_drop():
    low, high = plot.training_curves(HISTORY).get_ylim()
    assert low < 226 and 410 < high < 500
    flat = one_column("elbo_train", [3.0, 2.0, 1.0])
    assert plot.training_curves(flat).get_ylim()[1] >= 3


def test_curves_of_one_epoch_are_visible():
    (line,) = plot.training_curves(one_column("elbo_train", [3.0])).lines
    assert line.get_marker() == "o"


def test_curves_of_other_metrics_in_given_axes():
    _, ax = plt.subplots()
    assert plot.training_curves(one_column("kl_weight", [0.0, 0.5]) | HISTORY, "elbo", ax=ax) is ax
    with pytest.raises(ValueError, match="metric='elb'.*Did you mean 'elbo'"):
        plot.training_curves(HISTORY, "elb")


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    kind_n = np.repeat([0, 1, 2], 20)
    adata = AnnData(rng.poisson(1.0, (60, 3)).astype(np.float32))
    adata.var_names = ["A", "B", "C"]
    adata.obsm["X_scVI"] = rng.normal(size=(60, 4)) + 20 * np.eye(4)[kind_n]
    adata.obs["kind"] = pd.Categorical([None if i == 0 else f"kind {k}" for i, k in enumerate(kind_n)])
    adata.obs["depth"] = rng.random(60)
    adata.obs["many"] = pd.Categorical([f"many {i % 23}" for i in range(60)])
    return adata


def test_umap_draws_each_colour(cells, tmp_path):
    figure = plot.umap(cells, color=["kind", "depth", "B", "many"], save=tmp_path / "umap.png")
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "UMAP 1"]
    assert [ax.get_title() for ax in panels] == ["kind", "depth", "B (log1p)", "many"]
    legend = panels[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["kind 0", "kind 1", "kind 2"]
    assert (tmp_path / "umap.png").stat().st_size > 1000
    # 23 categories are told apart by colour and marker
    handles = panels[3].get_legend().legend_handles
    signs = {(to_hex(h.get_facecolor()[0]), h.get_paths()[0].vertices.tobytes()) for h in handles}
    assert len(signs) == 23


def test_umap_keeps_groups_apart_and_is_repeatable(cells):
    plot.umap(cells)
    first = cells.obsm["X_umap"].copy()
    centre = np.stack([first[i : i + 20].mean(0) for i in (0, 20, 40)])
    spread = max(first[i : i + 20].std(0).max() for i in (0, 20, 40))
    assert np.linalg.norm(centre[0] - centre[1]) > 3 * spread
    plot.umap(cells)
    assert np.array_equal(first, cells.obsm["X_umap"])


def test_umap_leaves_the_threads_of_pytorch_as_they_are(cells):
    torch.set_num_threads(3)
    plot.umap(cells)
    assert torch.get_num_threads() == 3


def test_umap_colours_lie_on_their_cells(cells):
    """Points are shuffled before they are drawn: each must keep its own colour."""
    figure = plot.umap(cells, color="kind")
    known = figure.axes[0].collections[1]
    position = {tuple(np.float32(xy)): code for xy, code in zip(cells.obsm["X_umap"], cells.obs["kind"].cat.codes)}
    for xy, color in zip(known.get_offsets(), known.get_facecolors()):
        assert to_hex(color).upper() == OKABE_ITO[position[tuple(np.float32(xy))]]


def test_umap_refuses(cells):
    with pytest.raises(ValueError, match="color='kid'.*Did you mean 'kind'"):
        plot.umap(cells, color="kid")
    with pytest.raises(ValueError, match="use_rep='X_scvi'.*Did you mean 'X_scVI'.*get_latent_representation"):
        plot.umap(cells, use_rep="X_scvi")


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    lfc = rng.normal(0, 0.3, 200)
    lfc[:15], lfc[15:25] = rng.uniform(2.0, 2.2, 15), -3
    return pd.DataFrame(
        {"lfc_mean": lfc, "bayes_factor": np.where(np.abs(lfc) > 1, 8.0, -2.0), "is_de_fdr_0.05": np.abs(lfc) > 1},
        index=[f"GENE{i}" for i in range(200)],
    )


def test_volcano_counts_and_names(table, tmp_path):
    ax = plot.volcano(table, n_labels=10, save=tmp_path / "volcano.png")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["not called (175)", "lower (10)", "higher (15)"]
    names = [text for text in ax.texts if text.get_text().startswith("GENE")]
    assert 1 < len(names) <= 10 and {int(text.get_text()[4:]) for text in names} <= set(range(25))
    ax.figure.canvas.draw()
    boxes = [super(type(text), text).get_window_extent() for text in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert ax.get_xlabel() == "log2 fold change" and "odds" in ax.get_ylabel()


def test_volcano_of_vanilla_mode():
    vanilla = pd.DataFrame({"bayes_factor": [4.0, -4.0, 0.1], "scale1": [0.4, 0.1, 0.2], "scale2": [0.1, 0.4, 0.2]})
    lower, higher = plot.volcano(vanilla).collections[1:]
    np.testing.assert_allclose(higher.get_offsets(), [[2, 4]], atol=1e-5)
    np.testing.assert_allclose(lower.get_offsets(), [[-2, 4]], atol=1e-5)


def test_volcano_of_several_comparisons(table):
    both = pd.concat([table.assign(comparison="a vs Rest"), table.assign(comparison="b vs Rest")])
    with pytest.raises(ValueError, match="2 comparisons: choose with comparison="):
        plot.volcano(both)
    with pytest.raises(ValueError, match="comparison='a vs rest'.*Did you mean 'a vs Rest'"):
        plot.volcano(both, "a vs rest")
    ax = plot.volcano(both, "b vs Rest")
    assert ax.get_title() == "b vs Rest" and sum(len(c.get_offsets()) for c in ax.collections) == 200


def test_loadings_show_the_genes_that_move_most(tmp_path):
    table = pd.DataFrame({"Z_0": [0.0] * 4, "Z_1": [0.5, -3.0, 0.1, 1.0]}, index=["ACTB", "CD3E", "MALAT1", "NKG7"])
    ax = plot.loadings(table, factor=1, n_genes=3, save=tmp_path / "loadings.png")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["CD3E", "ACTB", "NKG7"]
    assert ax.collections[1].get_offsets()[:, 0].tolist() == [-3.0, 0.5, 1.0]
    assert ax.get_title() == "Z_1"
    assert (tmp_path / "loadings.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [{"factor": "Z_2"}, {"factor": 7}, {"factor": -1}, {"n_genes": 0}])
def test_loadings_refuse(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        plot.loadings(pd.DataFrame({"Z_0": [1.0], "Z_1": [2.0]}), **options)
