"""SAELens' trainer with deaths counted in tokens, a choice of optimizer and a sparse TopK step."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import SAETrainer, TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saesub.errors import SaesubError
from saesub.optim import SparseAdam, parameter_groups
from saesub.sparse_ops import decode_sparse, encode_topk

OptimizerName = Literal["adam", "sparse_adam"]

DEAD_TOKENS_FILENAME = "tokens_since_fired.safetensors"
_HISTORY_POINTS = 40
_UNREADABLE = (
    OSError,
    SafetensorError,
    RuntimeError,
    KeyError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
)
_FIELD_WINDOW = 10_000_000  # tokens; what papers on SAEs use


class SubspaceSAETrainer(SAETrainer[Any, Any]):
    """`SAETrainer` for any SAELens training SAE, with three differences.

    Dead features are counted in tokens (SAELens counts steps), also where AuxK asks for them; the
    optimizer is chosen by name; and a TopK SAE without AuxK takes the sparse step of
    `saesub.sparse_ops`, which has the same loss and gradients as the dense one.

    Args:
        cfg, sae, data_provider, evaluator, save_checkpoint_fn: as `SAETrainer` takes them;
            `data_provider` is any iterator of float tensors (batch, d_in).
        optimizer: "sparse_adam" (`saesub.optim.SparseAdam`) or "adam" (torch's).
        dead_window_tokens: a feature silent for this many tokens is dead. By default 10M, or a
            fifth of the run where that is less.

    Attributes:
        tokens_since_fired: (d_sae,) int64.
        history: one dict (tokens, mse, dead_share) per recorded point, `mse` being the summed
            squared error per token, averaged since the last point, and `dead_share` NaN until
            a whole window has been seen.

    Raises:
        SaesubError: unknown optimizer, a batch of the wrong shape, or NaN or Inf in a batch
            (before any weight is touched).
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: Any,
        data_provider: Iterator[Tensor],
        *,
        optimizer: OptimizerName = "sparse_adam",
        dead_window_tokens: int | None = None,
        evaluator: Evaluator[Any] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ) -> None:
        if cfg.lr_end is None:
            cfg = replace(cfg, lr_end=cfg.lr / 10)  # as SAELens' runner does
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        assert cfg.lr_end is not None  # set above
        self.optimizer_name = optimizer
        self.optimizer = _make_optimizer(optimizer, sae, cfg)
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )
        if dead_window_tokens is None:
            dead_window_tokens = min(_FIELD_WINDOW, max(1, cfg.total_training_samples // 5))
        if dead_window_tokens < 1:
            raise SaesubError(f"dead_window_tokens must be at least 1, not {dead_window_tokens}.")
        self.dead_window_tokens = dead_window_tokens
        self.tokens_since_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=cfg.device)
        self.history: list[dict[str, float]] = []
        self._record_every = max(1, cfg.total_training_steps // _HISTORY_POINTS)
        self._mse_since_record: list[Tensor] = []

    @property
    def dead_neurons(self) -> Tensor:
        """(d_sae,) bool: silent for the whole window of tokens. SAELens' AuxK reads this."""
        return self.tokens_since_fired >= self.dead_window_tokens

    def dead_fraction(self) -> float:
        """Share of features silent over the last `dead_window_tokens` training tokens.

        Raises:
            SaesubError: less than one window has been trained on, so nothing can be said.
        """
        if self.n_training_samples < self.dead_window_tokens:
            raise SaesubError(
                f"Only {self.n_training_samples} tokens were trained on, less than the window of "
                f"{self.dead_window_tokens}: pass a smaller dead_window_tokens, or train longer."
            )
        return self.dead_neurons.float().mean().item()

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One training step on raw activations (batch, d_in); counts firing by tokens."""
        self._check_batch(batch)
        output = super().step(batch)
        self.tokens_since_fired += len(batch)
        # SAELens has just set its own per-step counter to zero where a feature fired.
        self.tokens_since_fired[self.n_forward_passes_since_fired == 0] = 0
        self._mse_since_record.append(output.losses["mse_loss"].detach())
        if (self.n_training_steps + 1) % self._record_every == 0:
            self._record()
        return output

    def _record(self) -> None:
        seen_window = self.n_training_samples >= self.dead_window_tokens
        self.history.append(
            {
                "tokens": self.n_training_samples,
                "mse": torch.stack(self._mse_since_record).mean().item(),
                "dead_share": self.dead_fraction() if seen_window else float("nan"),
            }
        )
        self._mse_since_record.clear()

    def _check_batch(self, batch: Tensor) -> None:
        if batch.ndim != 2 or batch.shape[1] != self.sae.cfg.d_in:
            raise SaesubError(
                f"A batch of shape {tuple(batch.shape)} came, but the SAE reads "
                f"(batch, {self.sae.cfg.d_in}): pass activations of its own hook point, flattened."
            )
        if not batch.sum(dtype=torch.float32).isfinite():  # a float16 sum would overflow
            raise SaesubError(
                f"NaN or Inf in the activations of batch {self.n_training_steps} "
                f"(after {self.n_training_samples} tokens); the SAE was left as it was before it."
            )

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        if not takes_sparse_step(sae, self.cfg, self.dead_neurons):
            return super()._train_step(sae, sae_in)
        sae.train()
        output, features = sparse_forward(sae, sae_in)
        self._count_firing(features, output.feature_acts.values() > 0, len(sae_in))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)  # SAELens clips here, at 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    @torch.no_grad()
    def _count_firing(self, features: Tensor, active: Tensor, n_tokens: int) -> None:
        counts = torch.bincount(features.flatten()[active], minlength=self.sae.cfg.d_sae)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[counts > 0] = 0
        self.act_freq_scores += counts
        self.n_frac_active_samples += n_tokens

    def set_final_sae_metadata(self) -> None:
        """Record, beside SAELens' own figures, the dead window and the optimizer."""
        super().set_final_sae_metadata()
        self.sae.cfg.metadata.dead_window_tokens = self.dead_window_tokens
        self.sae.cfg.metadata.optimizer = self.optimizer_name

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens' trainer state, and the firing counts in tokens beside it."""
        super().save_trainer_state(checkpoint_path)
        target = checkpoint_path / DEAD_TOKENS_FILENAME
        partial = target.with_suffix(".partial")
        state = {"tokens_since_fired": self.tokens_since_fired.cpu()}
        state |= {
            f"history.{name}": torch.tensor([h[name] for h in self.history], dtype=torch.float64)
            for name in ("tokens", "mse", "dead_share")
        }
        state["mse_since_record"] = torch.tensor(
            [m.item() for m in self._mse_since_record], dtype=torch.float64
        )
        save_file(state, partial)
        os.replace(partial, target)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Restore a state written by `save_trainer_state`.

        Raises:
            SaesubError: the checkpoint is damaged, half-written, or of another SAE.
        """
        path = Path(checkpoint_path)
        try:
            super().load_trainer_state(path)
            state = load_file(path / DEAD_TOKENS_FILENAME)
        except _UNREADABLE as error:
            raise SaesubError(
                f"The checkpoint {path} is damaged or incomplete, or another optimizer's "
                f"({type(error).__name__}): resume from an earlier one, or start anew."
            ) from error
        if len(state["tokens_since_fired"]) != self.sae.cfg.d_sae:
            raise SaesubError(
                f"The checkpoint {path} holds {len(state['tokens_since_fired'])} features, "
                f"this SAE has {self.sae.cfg.d_sae}: resume with the SAE it was made from."
            )
        self.tokens_since_fired = state["tokens_since_fired"].to(self.cfg.device)
        # SAELens saves in the middle of a step: its step counter lags the steps taken by one.
        self.n_training_steps = self.n_training_samples // self.cfg.train_batch_size_samples
        columns = {n: state[f"history.{n}"].tolist() for n in ("tokens", "mse", "dead_share")}
        columns["tokens"] = [int(tokens) for tokens in columns["tokens"]]
        self.history = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        self._mse_since_record = list(state["mse_since_record"].float().to(self.cfg.device))


def takes_sparse_step(sae: Any, cfg: SAETrainerConfig, dead: Tensor) -> bool:
    """Whether `sparse_forward` computes exactly what this SAE's own training pass would."""
    if type(sae) is not TopKTrainingSAE or cfg.autocast or sae.W_enc.device.type == "mps":
        return False
    plain_input = sae.cfg.normalize_activations in ("none", "expected_average_only_in")
    without_auxk = sae.cfg.aux_loss_coefficient == 0 or not bool(dead.any())
    hooked = any(hook.fwd_hooks or hook.bwd_hooks for hook in sae.hook_dict.values())
    exact_dtype = sae.W_enc.dtype in (torch.float32, torch.float64)
    return plain_input and without_auxk and exact_dtype and not hooked


def sparse_forward(sae: TopKTrainingSAE, sae_in: Tensor) -> tuple[TrainStepOutput, Tensor]:
    """`TopKTrainingSAE.training_forward_pass` through k entries a token, and their features.

    The output's `feature_acts` and `hidden_pre` are sparse COO tensors that hold only the k
    selected entries of each token.
    """
    x = sae_in.to(sae.dtype)
    norms = sae.W_dec.detach().norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    b_in = sae.b_dec if sae.cfg.apply_b_dec_to_input else None
    pre, features = encode_topk(x, b_in, sae.W_enc, sae.b_enc, sae.cfg.k, norms)
    sae_out = decode_sparse(pre.relu(), features, sae.W_dec, sae.b_dec)
    loss = (sae_out - x).square().sum(-1).mean()
    with torch.no_grad():
        ranked = pre if norms is None else pre * norms[features]
        rows = torch.arange(len(x), device=x.device).repeat_interleave(sae.cfg.k)
        where, shape = torch.stack([rows, features.flatten()]), (len(x), sae.cfg.d_sae)
        hidden_pre = _coo(where, ranked, shape)
        feature_acts = _coo(where, ranked.relu(), shape)
    output = TrainStepOutput(
        sae_in=x,
        sae_out=sae_out,
        feature_acts=feature_acts,
        hidden_pre=hidden_pre,
        loss=loss,
        losses={"mse_loss": loss, "auxiliary_reconstruction_loss": loss.new_zeros(())},
    )
    return output, features


def _coo(where: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # A token's k features are distinct, so the tensor is coalesced but for the order in a row.
    return torch.sparse_coo_tensor(
        where, values.flatten(), shape, is_coalesced=True, check_invariants=False
    )


def _make_optimizer(name: str, sae: Any, cfg: SAETrainerConfig) -> torch.optim.Adam:
    settings = {"lr": cfg.lr, "betas": (cfg.adam_beta1, cfg.adam_beta2)}
    if name == "sparse_adam":
        return SparseAdam(parameter_groups(sae), **settings)
    if name == "adam":
        return torch.optim.Adam(sae.parameters(), fused=True, **settings)
    raise SaesubError(f"Unknown optimizer {name!r}: pass 'adam' or 'sparse_adam'.")
