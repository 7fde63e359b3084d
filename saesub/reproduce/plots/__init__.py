"""The notebooks' figures: one style, one fixed colour per site and per condition.

Every function takes data (a tidy DataFrame, or a dict of arrays) and returns a closed matplotlib
`Figure`: as a cell's last expression it shows once. Missing columns, empty data and values that
are not finite raise `SaesubError`. All figures have their names here; the modules they are written
in are those imported below.
"""

from saesub.reproduce.plots.dictionaries import dead_by_dictionary
from saesub.reproduce.plots.features import (
    cosine_histogram,
    density_histogram,
    probe_accuracy,
    shared_features,
)
from saesub.reproduce.plots.forecast import d_init_by_place, forecast_and_outcome
from saesub.reproduce.plots.mitigations import pareto
from saesub.reproduce.plots.spectra import (
    cumulative_variance,
    loss_recovered,
    predicted_variance,
    rank_by_layer,
    rank_heatmap,
    singular_values,
)
from saesub.reproduce.plots.style import CONDITIONS, SITES, style
from saesub.reproduce.plots.training import (
    d_init_sweep,
    dead_against_rank,
    dead_and_fvu,
    dead_over_tokens,
    learning_rate,
    overlap_by_fate,
    width,
)

__all__ = [
    "CONDITIONS",
    "SITES",
    "cosine_histogram",
    "cumulative_variance",
    "d_init_by_place",
    "d_init_sweep",
    "dead_against_rank",
    "dead_and_fvu",
    "dead_by_dictionary",
    "dead_over_tokens",
    "density_histogram",
    "forecast_and_outcome",
    "learning_rate",
    "loss_recovered",
    "overlap_by_fate",
    "pareto",
    "predicted_variance",
    "probe_accuracy",
    "rank_by_layer",
    "rank_heatmap",
    "shared_features",
    "singular_values",
    "style",
    "width",
]
