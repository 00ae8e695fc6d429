"""A probe's picture has a panel for each thing that was measured, with every push."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import pyplot as plt

import dbjax
from experiments import plots_probe


@pytest.mark.parametrize(
    ("probes", "expected"),
    [
        (("distance",), ["relative_distance"]),
        (("cosine", "stability"), ["cosine", "eta_lambda"]),
        (("distance", "cosine", "stability"), list(plots_probe.PANELS)),
    ],
)
def test_each_measure_has_its_panel_and_each_push_its_point(probes, expected):
    data = dbjax.from_arrays({"x": np.ones((8, 1), np.float32)}, batch_size=4)
    seen = dbjax.probe(
        dbjax.Trace.from_delays(np.minimum(np.arange(12), 3)),
        lambda p, b: jnp.mean((p["w"] - b["x"]) ** 2), {"w": jnp.zeros(1)}, data,
        optimizer=optax.sgd(0.05), probes=probes, learning_rate=0.05, every=2,
    )  # fmt: skip
    picture = plots_probe.draw(seen)
    *panels, bar = picture.axes
    assert [panel.get_title(loc="left") for panel in panels] == [
        plots_probe.PANELS[name] for name in expected
    ]
    assert bar.get_ylabel() == "staleness (updates)"
    for panel, name in zip(panels, expected, strict=True):
        (points,) = panel.collections
        np.testing.assert_allclose(points.get_offsets()[:, 0], seen.step)
        np.testing.assert_allclose(points.get_offsets()[:, 1], seen.values[name])
        assert points.get_array().tolist() == seen.staleness[:, 0].tolist()
    plt.close(picture)
