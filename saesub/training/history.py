"""What a training run records of itself: some forty points of loss and dead features."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from saesub.errors import SaesubError
from saesub.precision import reading_waits, where_float64

CHECK_EVERY = 50  # steps between readings of what a GPU has noted, for which a step does not wait
_POINTS = 40
_COLUMNS = ("tokens", "mse", "dead_share")


class History:
    """Points at equal distances in a run, each with the loss averaged since the point before.

    Where reading would wait for a GPU, points stay there until `read`.

    Args:
        n_steps: of the run.
        since: (2,) zeros, in which the losses are summed.

    Attributes:
        points: one dict (tokens, mse, dead_share) per point that was read.
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
        kept = where_float64(since)
        # Loss, steps and dead share of the points that were not read, and their tokens.
        self._unread = torch.zeros(CHECK_EVERY, 3, dtype=torch.float64, device=kept.device)
        self._tokens: list[int] = []

    def add(self, mse: Tensor, steps: float, counts: Tensor | None = None) -> None:
        """Add the loss of a batch, which is so many steps of the configured size, unless the bool
        `counts` () says that it was left out."""
        loss = mse.detach() * steps
        if counts is not None:
            loss = loss.where(counts, 0.0)
        self.since[0] += loss
        self.since[1] += steps if counts is None else counts * steps

    def record(self, tokens: int, dead_share: Tensor | float) -> None:
        """Make a point of the losses since the last one. Raises as `read`."""
        if len(self._tokens) == len(self._unread):
            self.read()
        row = self._unread[len(self._tokens)]
        row[:2] = self.since
        row[2] = dead_share
        self._tokens.append(tokens)
        self.since.zero_()
        if not reading_waits(self.since):
            self.read()

    def read(self) -> None:
        """Take the points from the device, for which it waits.

        Raises SaesubError if a loss among theirs was NaN or infinite.
        """
        tokens, self._tokens = self._tokens, []
        if not tokens:
            return
        rows = self._unread[: len(tokens)].tolist()
        for place, (n, (total, steps, dead_share)) in enumerate(zip(tokens, rows, strict=True)):
            if not isfinite(total):
                self.since.copy_(self._unread[place, :2])  # it stays a run whose loss was not
                self.require_finite(n)
            if steps:  # else all of its batches were left out
                self.points.append({"tokens": n, "mse": total / steps, "dead_share": dead_share})

    def require_finite(self, tokens: int) -> None:
        """Raises SaesubError if a loss since the last point was NaN or infinite."""
        if not bool(self.since.isfinite().all()):
            raise SaesubError(
                f"The loss became NaN or infinite before {tokens:,} tokens: make the SAE anew and "
                "train with a smaller lr."
            )

    def state(self) -> dict[str, Tensor]:
        """The points by column, in float64, and the losses since the last one."""
        self.read()
        columns = {f"history.{name}": [point[name] for point in self.points] for name in _COLUMNS}
        made = {"dtype": torch.float64, "device": "cpu"}  # whatever the user's default device is
        kept = {name: torch.tensor(column, **made) for name, column in columns.items()}
        return kept | {"since_record": self.since}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self._tokens = []
        columns = [state[f"history.{name}"].tolist() for name in _COLUMNS]
        self.points = [
            {"tokens": int(tokens), "mse": mse, "dead_share": dead_share}
            for tokens, mse, dead_share in zip(*columns, strict=True)
        ]
        self.since.copy_(state["since_record"])
