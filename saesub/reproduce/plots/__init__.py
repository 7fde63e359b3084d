"""The notebooks' figures, in one style, with one fixed colour per site and per condition.

Every function takes data (a tidy DataFrame, or a dict of arrays) and returns a closed matplotlib
`Figure`: as a cell's last expression it shows once. Missing columns, empty data, NaN and Inf raise
`SaesubError`. All figures have their names here; the modules they are written in are those imported
below.
"""

from saesub.errors import needs_extra

with needs_extra("saesub.reproduce.plots"):
    from saesub.reproduce.plots.drawing import CONDITIONS, SITES, style
    from saesub.reproduce.plots.features import (
        cosine_histogram,
        density_histogram,
        probe_accuracy,
        shared_features,
    )
    from saesub.reproduce.plots.outcomes import (
        dead_against_rank,
        dead_and_fvu,
        dead_by_dictionary,
        dead_by_hook_point,
        forecast_and_outcome,
        overlap_by_fate,
        pareto,
    )
    from saesub.reproduce.plots.spectra import (
        cumulative_variance,
        loss_recovered,
        predicted_variance,
        rank_by_layer,
        rank_heatmap,
        singular_values,
    )
    from saesub.reproduce.plots.training import (
        d_init_by_place,
        d_init_sweep,
        dead_over_tokens,
        learning_rate,
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
    "dead_by_hook_point",
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
