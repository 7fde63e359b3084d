"""The notebooks' figures, in one style, with one fixed colour per site and per condition.

Every figure's function takes data (a tidy DataFrame, or a dict of arrays), a `title` and a `note`
below, and returns a closed matplotlib `Figure`: as a cell's last expression it shows once. Missing
columns, empty data, NaN and Inf raise `SaesubError`. `counted` and `signed` write numbers for
titles and notes. All figures have their names here; the modules they are written in are those
imported below.
"""

from saesub.errors import needs_extra

with needs_extra("saesub.reproduce.plots"):
    from saesub.reproduce.plots.diagnosis import diagnosis
    from saesub.reproduce.plots.drawing import counted, signed, style
    from saesub.reproduce.plots.features import (
        coherence_by_density,
        probe_accuracy,
        shared_features,
    )
    from saesub.reproduce.plots.looks import CONDITIONS, SITES
    from saesub.reproduce.plots.mitigations import mitigation_panels
    from saesub.reproduce.plots.outcomes import (
        dead_against_rank,
        dead_by_dictionary,
        dead_by_remedy,
    )
    from saesub.reproduce.plots.protocol import dead_against_fvu, dead_by_window, firing_counts
    from saesub.reproduce.plots.regimes import recipe_by_regime
    from saesub.reproduce.plots.sliders import with_sliders
    from saesub.reproduce.plots.spectra import (
        causes_by_layer,
        cumulative_variance,
        loss_by_layer,
        loss_recovered,
        overlap_by_layer,
        predicted_variance,
        rank_by_layer,
        rank_by_stack,
        rank_heatmap,
        rank_heatmap_by_layer,
        singular_values,
        variance_and_loss,
    )
    from saesub.reproduce.plots.training import (
        d_init_by_place,
        width,
    )

__all__ = [
    "CONDITIONS",
    "SITES",
    "causes_by_layer",
    "coherence_by_density",
    "counted",
    "cumulative_variance",
    "d_init_by_place",
    "dead_against_fvu",
    "dead_against_rank",
    "dead_by_dictionary",
    "dead_by_remedy",
    "dead_by_window",
    "diagnosis",
    "firing_counts",
    "loss_by_layer",
    "loss_recovered",
    "mitigation_panels",
    "overlap_by_layer",
    "predicted_variance",
    "probe_accuracy",
    "rank_by_layer",
    "rank_by_stack",
    "rank_heatmap",
    "rank_heatmap_by_layer",
    "recipe_by_regime",
    "shared_features",
    "signed",
    "singular_values",
    "style",
    "variance_and_loss",
    "width",
    "with_sliders",
]
