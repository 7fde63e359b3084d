"""SAELens' trainer with deaths counted in tokens, a choice of optimizer and a sparse TopK step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from safetensors import SafetensorError
from torch import Tensor

from saesub.activations.checks import require_finite
from saesub.errors import SaesubError, near_names
from saesub.optim import SparseAdam, parameter_groups
from saesub.topk.backend import RowBackend
from saesub.topk.eligibility import (
    check_sae,
    is_topk,
    lay_out_by_feature,
    memory_advice,
    takes_sparse_step,
)
from saesub.topk.step import MAX_NORM, autograd_pass, row_backend, row_step, search_of
from saesub.training.checkpoint import (
    UNREADABLE,
    check_same_settings,
    check_same_shapes,
    follow_folding,
    history_of,
    history_tensors,
    is_write_failure,
    random_state,
    read_checkpoint_state,
    restore_random_state,
    settings_of,
    write_checkpoint_state,
)
from saesub.training.mitigations.mitigation import Mitigation, one_of_each

OptimizerName = Literal["adam", "sparse_adam"]
Backend = Literal["auto", "exact_search", "torch", "triton", "dense"]

_HISTORY_POINTS = 40
_FIELD_WINDOW = 10_000_000  # tokens; what papers on SAEs use


class SubspaceSAETrainer(SAETrainer[Any, Any]):
    """`SAETrainer` for any SAELens training SAE, with four differences.

    Dead features are counted in tokens (SAELens counts steps), also where AuxK asks for them; the
    optimizer is chosen by name; mitigations against dead features can be added, in any combination;
    and a TopK or BatchTopK SAE takes the sparse step of `saesub.topk.step`, which has the same loss
    and gradients as SAELens' dense one. Its `W_enc` then lies feature-major in memory (same shape,
    other strides) until the state is saved.

    Args:
        cfg, sae, data_provider, evaluator, save_checkpoint_fn: as `SAETrainer` takes them;
            `data_provider` is any iterator of float tensors (batch, d_in).
        optimizer: "sparse_adam" (`saesub.optim.SparseAdam`) or "adam" (torch's).
        backend: how a TopK step is computed. "auto": on the CPU the compiled step with its 8-bit
            candidate search, where a C++ compiler can be had, else torch operators; the search
            alone is compiled where a mitigation adds to the loss or weights are, or were, frozen.
            "torch": torch operators alone, which on a CPU with AVX-512 VNNI search in 8 bits too.
            "exact_search": as "auto" with the whole float32 product for the search. "triton":
            Triton kernels on CUDA; asked for by name until they have been run on a GPU. "dense":
            SAELens' own step.
        dead_window_tokens: a feature silent for this many tokens is dead. By default 10M, or a
            fifth of the run where that is less.
        mitigations: at most one of each kind, applied in this order. AuxK and whitening are settings
            of the SAE (`aux_loss_coefficient`, `normalize_activations="covariance_whitening"`).

    Attributes:
        tokens_since_fired: (d_sae,) int64.
        history: one dict (tokens, mse, dead_share) per recorded point, `mse` being the summed
            squared error per token, averaged since the last point, and `dead_share` NaN until
            a whole window has been seen.
        mitigation_state: tensors that mitigations keep from step to step, saved with the rest.

    Raises:
        SaesubError: no iterator of batches, unknown optimizer or backend, a mitigation that does not
            apply, k outside 1..d_sae, weights in float16, a batch of the wrong shape, NaN or Inf in
            a batch (before any weight is touched), or more features than the GPU's memory holds.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: Any,
        data_provider: Iterator[Tensor],
        *,
        optimizer: OptimizerName = "sparse_adam",
        backend: Backend = "auto",
        dead_window_tokens: int | None = None,
        mitigations: Sequence[Mitigation] = (),
        evaluator: Evaluator[Any] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ) -> None:
        # A rate out of a table is NumPy's, which no weights-only reading of a checkpoint takes.
        cfg = replace(
            cfg, **{k: v.item() for k, v in vars(cfg).items() if isinstance(v, np.generic)}
        )
        if cfg.lr_end is None:
            cfg = replace(cfg, lr_end=cfg.lr / 10)  # as SAELens' runner does
        check_sae(sae)
        if not isinstance(data_provider, Iterator):
            given = type(data_provider).__name__
            raise SaesubError(
                f"data_provider must be an iterator of batches, and {given} is none: of a store "
                "pass store.batches(batch_size, seed=0), of a list iter(...)."
            )
        if backend not in get_args(Backend):
            raise SaesubError(
                f"Unknown backend {backend!r}: {near_names(backend, get_args(Backend))}"
            )
        if backend == "triton" and row_backend(sae.W_enc.device, triton=True) is None:
            raise SaesubError(
                "backend='triton' needs the SAE on a CUDA device and a Triton that runs there: "
                "move it with sae.to('cuda'), install triton, or pass backend='torch'."
            )
        self.backend = backend
        if is_topk(sae) and backend != "dense":
            lay_out_by_feature(sae)
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
        self.dead_window_tokens = int(dead_window_tokens)
        self._parameters_in_step = True
        self.tokens_since_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=cfg.device)
        self.history: list[dict[str, float]] = []
        self._record_every = max(1, cfg.total_training_steps // _HISTORY_POINTS)
        # (2,) sum of losses, and steps, since the last point of the history. A tensor kept from
        # every step instead would lie amid the memory that the step frees, and split it.
        exact = torch.promote_types(sae.dtype, torch.float32)
        self._since_record = torch.zeros(2, dtype=exact, device=cfg.device)
        self.mitigations = one_of_each(mitigations)
        self.mitigation_state: dict[str, Tensor] = {}
        for mitigation in self.mitigations:
            mitigation.check(self)

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
        try:
            with ExitStack() as stack:
                for mitigation in self.mitigations:
                    stack.enter_context(mitigation.around_step(self))
                output = super().step(batch)
        except torch.OutOfMemoryError as error:
            copies = 3 if self.backend == "triton" else 5
            raise SaesubError(memory_advice(self.sae, len(batch), copies)) from error
        self.tokens_since_fired += len(batch)
        # SAELens has just set its own per-step counter to zero where a feature fired.
        self.tokens_since_fired[self.n_forward_passes_since_fired == 0] = 0
        self._since_record[0] += output.losses["mse_loss"].detach()
        self._since_record[1] += 1
        if (self.n_training_steps + 1) % self._record_every == 0:
            self._record()
        for mitigation in self.mitigations:
            mitigation.after_step(self, output)
        return output

    def _record(self) -> None:
        seen_window = self.n_training_samples >= self.dead_window_tokens
        mse_sum, steps = self._since_record.tolist()
        self.history.append(
            {
                "tokens": self.n_training_samples,
                "mse": mse_sum / steps,
                "dead_share": self.dead_fraction() if seen_window else float("nan"),
            }
        )
        self._since_record.zero_()

    def _check_batch(self, batch: Tensor) -> None:
        if batch.ndim != 2 or batch.shape[1] != self.sae.cfg.d_in:
            raise SaesubError(
                f"A batch of shape {tuple(batch.shape)} came, but the SAE reads "
                f"(batch, {self.sae.cfg.d_in}): pass activations of its own hook point, flattened."
            )
        self._require_finite(batch)

    def _require_finite(self, batch: Tensor) -> None:
        what = f"the activations of batch {self.n_training_steps}"
        advice = "leave that batch out and continue; the weights are as they were"
        require_finite(batch, f"{what} (after {self.n_training_samples} tokens)", advice)

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        sparse = self.backend != "dense" and takes_sparse_step(sae, self.cfg)
        adds_loss = any(mitigation.loss_name for mitigation in self.mitigations)
        if not (sparse or adds_loss):
            return super()._train_step(sae, sae_in)
        sae.train()
        if sparse:
            lay_out_by_feature(sae)  # the weights may have been replaced since the last step
        rows = self._row_backend(sae) if sparse and not adds_loss else None
        if rows is None:
            output = self._autograd_step(sae, sae_in, sparse)
        else:
            exact = self.backend == "exact_search"
            dead = self._dead_for_auxk(sae)
            found = row_step(rows, sae, self.optimizer, sae_in, dead, exact_search=exact)
            self._count_firing(found.selected.times_fired(), len(sae_in))
            output = found.output
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def _row_backend(self, sae: Any) -> RowBackend | None:
        if not all(parameter.requires_grad for parameter in sae.parameters()):
            self._parameters_in_step = False  # the frozen ones' step count stays behind
        return self._compiled(sae) if self._parameters_in_step else None

    def _compiled(self, sae: Any) -> RowBackend | None:
        """Whose search a step takes; the whole step is its too, unless autograd is needed."""
        if self.backend == "torch" or sae.W_enc.dtype != torch.float32:
            return None
        return row_backend(sae.W_enc.device, triton=self.backend == "triton")

    def _dead_for_auxk(self, sae: Any) -> Tensor | None:
        return self.dead_neurons if sae.cfg.aux_loss_coefficient else None

    def _autograd_step(self, sae: Any, sae_in: Tensor, sparse: bool) -> TrainStepOutput:
        output, counts = self._forward(sae, sae_in, sparse)
        self._count_firing(counts, len(sae_in))
        for mitigation in self.mitigations:
            if mitigation.loss_name:
                output.losses[mitigation.loss_name] = mitigation.extra_loss(self, output)
                output.loss = output.loss + output.losses[mitigation.loss_name]
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output

    def _forward(self, sae: Any, sae_in: Tensor, sparse: bool) -> tuple[TrainStepOutput, Tensor]:
        """A pass of the SAE, and how often each feature fired in it."""
        if sparse:
            # On CUDA the whole product: what a search misses there has not been measured.
            rows = self._compiled(sae) if sae.W_enc.device.type == "cpu" else None
            search = search_of(rows, self.backend == "exact_search")
            found = autograd_pass(sae, sae_in, self._dead_for_auxk(sae), search=search)
            return found.output, found.selected.times_fired()
        step = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        with self.autocast_if_enabled:
            output = sae.training_forward_pass(step_input=step)
        counts = output.feature_acts.detach().bool().float().sum(0)
        return output, counts.to_dense() if counts.is_sparse else counts

    @torch.no_grad()
    def _count_firing(self, counts: Tensor, n_tokens: int) -> None:
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[counts > 0] = 0
        self.act_freq_scores += counts
        self.n_frac_active_samples += n_tokens

    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        """What SAELens logs of a step, with the batch's FVU and, once a whole window of tokens has
        been seen, the share of dead features. Logged where `cfg.logger` says so: not by default."""
        figures = super().build_train_step_log_dict(output, n_training_samples)
        figures["metrics/fvu"] = 1 - figures["metrics/explained_variance"]
        if n_training_samples >= self.dead_window_tokens:
            figures["sparsity/dead_share"] = self.dead_fraction()
        return figures

    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 10
    ) -> None:
        """Oftener than SAELens' every hundred steps, which on a CPU can be minutes."""
        super()._update_pbar(step_output, pbar, update_interval)

    def set_final_sae_metadata(self) -> None:
        """Record, beside SAELens' own figures, the dead window, the optimizer and mitigations."""
        super().set_final_sae_metadata()
        self.sae.cfg.metadata.dead_window_tokens = self.dead_window_tokens
        self.sae.cfg.metadata.optimizer = self.optimizer_name
        self.sae.cfg.metadata.backend = self.backend
        self.sae.cfg.metadata.mitigations = [repr(mitigation) for mitigation in self.mitigations]

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """SAELens' checkpoint; raises SaesubError where it cannot be written."""
        try:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_write_failure(error):
                raise
            raise SaesubError(
                f"The checkpoint {checkpoint_name!r} could not be written ({error}): make room, or "
                "name another folder; the checkpoints before it are as they were."
            ) from error

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens' trainer state, and beside it the firing counts in tokens, the settings, the
        state of torch's random numbers, and checksums of all files in the folder."""
        super().save_trainer_state(checkpoint_path)
        write_checkpoint_state(checkpoint_path, self._own_state(), self._settings())

    def _own_state(self) -> dict[str, Tensor]:
        state = {"tokens_since_fired": self.tokens_since_fired} | random_state(self.cfg.device)
        state |= {"since_record": self._since_record} | history_tensors(self.history)
        return state | {f"mitigation.{name}": kept for name, kept in self.mitigation_state.items()}

    def _settings(self) -> dict[str, Any]:
        """What a run that is gone on with must have in common with its first part."""
        own = {
            "optimizer": self.optimizer_name,
            "dead_window_tokens": self.dead_window_tokens,
            "mitigations": [repr(mitigation) for mitigation in self.mitigations],
        }
        return settings_of(self.cfg, self.sae, own)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Restore a state written by `save_trainer_state`.

        Raises:
            SaesubError: the checkpoint is damaged, half-written, or of another SAE or settings.
        """
        path = Path(checkpoint_path)
        state, kept_settings = read_checkpoint_state(path)
        check_same_settings(path, kept_settings, self._settings())
        try:
            super().load_trainer_state(path)
        except UNREADABLE as error:
            raise SaesubError(
                f"The checkpoint {path} is damaged or incomplete, or another optimizer's "
                f"({type(error).__name__}): resume from an earlier one, or start anew."
            ) from error
        check_same_shapes(path, state, self.optimizer, self.sae.cfg.d_sae)
        steps = {float(kept["step"]) for kept in self.optimizer.state.values()}
        self._parameters_in_step = len(steps) <= 1
        restore_random_state(state, self.cfg.device)
        self.tokens_since_fired = state["tokens_since_fired"].to(self.cfg.device)
        kept_by_mitigations = [name for name in state if name.startswith("mitigation.")]
        self.mitigation_state = {
            name.removeprefix("mitigation."): state[name].to(self.cfg.device)
            for name in kept_by_mitigations
        }
        follow_folding(self.sae, path)
        # SAELens saves in the middle of a step: its step counter lags the steps taken by one.
        self.n_training_steps = self.n_training_samples // self.cfg.train_batch_size_samples
        self.history = history_of(state)
        self._since_record = state["since_record"].to(self.cfg.device)


def _make_optimizer(name: str, sae: Any, cfg: SAETrainerConfig) -> torch.optim.Adam:
    settings = {"lr": cfg.lr, "betas": (cfg.adam_beta1, cfg.adam_beta2)}
    if name == "sparse_adam":
        return SparseAdam(parameter_groups(sae), **settings)
    if name == "adam":
        return torch.optim.Adam(sae.parameters(), fused=True, **settings)
    raise SaesubError(f"Unknown optimizer {name!r}: pass 'adam' or 'sparse_adam'.")
