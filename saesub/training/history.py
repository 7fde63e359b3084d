"""What a training run records of itself: some forty points of loss and dead features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saesub.errors import SaesubError

_POINTS = 40
_COLUMNS = ("tokens", "mse", "dead_share")


class History:
    """Points at equal distances in a run, each with the loss averaged since the point before.

    Args:
        n_steps: of the run.
        since: (2,) zeros, in which the losses are summed.

    Attributes:
        points: one dict (tokens, mse, dead_share) per point.
        every: steps of the configured batch size between points.
        since: (2,) sum of losses, and steps, since the last point; a smaller batch is a part of a
            step.
    """

    def __init__(self, n_steps: int, since: Tensor) -> None:
        self.points: list[dict[str, float]] = []
        self.every = max(1, n_steps // _POINTS)
        # If each step's loss were kept instead, it would lie between the tensors that the step
        # frees, and split the free memory.
        self.since = since

    def add(self, mse: Tensor, steps: float) -> None:
        """Add the loss of a batch, which is so many steps of the configured size."""
        self.since[0] += mse.detach() * steps
        self.since[1] += steps

    def record(self, tokens: int, dead_share: float) -> None:
        """Make a point of the losses since the last one. Raises as `require_finite`."""
        self.require_finite(tokens)
        total, steps = self.since.tolist()
        self.points.append({"tokens": tokens, "mse": total / steps, "dead_share": dead_share})
        self.since.zero_()

    def require_finite(self, tokens: int) -> None:
        """Raises SaesubError if a loss since the last point was NaN or infinite."""
        if not bool(self.since.isfinite().all()):
            raise SaesubError(
                f"The loss became NaN or infinite before {tokens:,} tokens, and so did the "
                "weights: make the SAE anew and train with a smaller lr."
            )

    def state(self) -> dict[str, Tensor]:
        """The points by column, in float64, and the losses since the last one."""
        columns = {f"history.{name}": [point[name] for point in self.points] for name in _COLUMNS}
        made = {"dtype": torch.float64, "device": "cpu"}  # whatever the user's default device is
        kept = {name: torch.tensor(column, **made) for name, column in columns.items()}
        return kept | {"since_record": self.since}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        columns = [state[f"history.{name}"].tolist() for name in _COLUMNS]
        self.points = [
            {"tokens": int(tokens), "mse": mse, "dead_share": dead_share}
            for tokens, mse, dead_share in zip(*columns, strict=True)
        ]
        self.since.copy_(state["since_record"])
