"""What a training run records of itself: some forty points of loss and dead features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_POINTS = 40
_COLUMNS = ("tokens", "mse", "dead_share")


class History:
    """Points at equal distances in a run, each with the loss averaged since the point before.

    Args:
        n_steps: of the run.
        since: (2,) zeros, in which the losses are summed.

    Attributes:
        points: one dict (tokens, mse, dead_share) per point.
        every: steps between points.
        since: (2,) sum of losses, and steps, since the last point.
    """

    def __init__(self, n_steps: int, since: Tensor) -> None:
        self.points: list[dict[str, float]] = []
        self.every = max(1, n_steps // _POINTS)
        # If each step's loss were kept instead, it would lie between the tensors that the step
        # frees, and split the free memory.
        self.since = since

    def add(self, mse: Tensor) -> None:
        """Add the loss of a step."""
        self.since[0] += mse.detach()
        self.since[1] += 1

    def record(self, tokens: int, dead_share: float) -> None:
        """Make a point of the losses since the last one."""
        total, steps = self.since.tolist()
        self.points.append({"tokens": tokens, "mse": total / steps, "dead_share": dead_share})
        self.since.zero_()

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
