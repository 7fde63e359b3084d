"""SAELens' trainer with dead features counted in tokens, a choice of optimizer, mitigations against
dead features and a sparse TopK step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, TopKTrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import (
    T_TRAINING_SAE,
    T_TRAINING_SAE_CONFIG,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import Evaluator, SaveCheckpointFn
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from saesub.activations.checks import require_finite
from saesub.arguments import batch_of
from saesub.errors import SaesubError
from saesub.precision import reading_waits
from saesub.topk.eligibility import (
    check_sae,
    lay_out_by_feature,
    lay_out_contiguous,
    memory_advice,
    other_pass,
    why_dense,
)
from saesub.topk.optim import OptimizerName, align_moments, make_optimizer
from saesub.topk.sae import DENSE_STEP, SparseTopKTrainingSAE, use_sparse_step
from saesub.topk.step import WHOLE, SparseStepOutput, WholeDictionary
from saesub.training.checkpoint import (
    load_state,
    note_scaling,
    save_state,
    settings_of,
    writing,
)
from saesub.training.firing import TokenCountingTrainer
from saesub.training.history import CHECK_EVERY
from saesub.training.mitigations.mitigation import Mitigation, one_of_each
from saesub.training.native_step import Backend, NativeStep
from saesub.training.plan import (
    NO_SCALE,
    PlanWatch,
    completed,
    ended,
    for_scale,
    lacks_scale,
    require_iterator,
    zero_scale,
)


class SubspaceSAETrainer(TokenCountingTrainer[T_TRAINING_SAE, T_TRAINING_SAE_CONFIG]):
    """`SAETrainer` for any SAELens training SAE, with four differences.

    Dead features can be counted in tokens (SAELens counts steps), also for AuxK; the optimizer is
    chosen by name; mitigations against dead features can be added, in any combination; and a TopK
    or BatchTopK SAE is given the sparse pass of `SparseTopKTrainingSAE`, and where the optimizer
    allows it a fused step. Loss and gradients are those of SAELens' dense pass; a warning says
    where that pass is taken, and why. `W_enc` lies feature-major in memory (same shape, other
    strides) until training ends.

    Everything that SAELens counts in steps (schedules, windows, annealing) is counted in tokens:
    a step is `cfg.train_batch_size_samples` of them, whatever size batches have. With batches of
    that size this is SAELens' count. The optimizer moves the weights once for each batch; a warning
    says where batches have another size, or the rate is 0.

    Args:
        cfg, sae, data_provider, evaluator, save_checkpoint_fn: as `SAETrainer` takes them;
            `data_provider` is any iterator of float tensors (batch, d_in), also NumPy's or each in
            a list of its own, that lasts as long as the run. Weights are at least float32;
            `cfg.autocast` is for products in bfloat16.
        optimizer: "sparse_adam" (`saesub.topk.optim.SparseAdam`) or "adam" (torch's).
        backend: how a TopK step is computed. A sparse SAE keeps its own `search_name` under "auto".
            "auto": on the CPU the compiled step with its 8-bit candidate search, in the active
            subspace of the tokens where that costs less, if there is a C++ compiler; on a GPU the
            Triton kernels, once `saesub check-gpu` has found them right there; else torch
            operators. The search alone is compiled if a mitigation adds to the loss, weights are
            frozen, or the optimizer is another than Adam and `SparseAdam`.
            "torch": torch operators alone, which on a CPU with AVX-512 VNNI search in 8 bits too.
            "exact_search": as "auto" with the whole float32 product for the search. "triton": the
            Triton kernels, checked or not. "dense": SAELens' own step.
        dead_window_tokens: a feature silent for this many tokens is dead. By default SAELens'
            window counts: silent for more than w = `cfg.dead_feature_window` steps, which are
            (w + 1) × `cfg.train_batch_size_samples` tokens.
        mitigations: at most one of each kind, applied in this order. AuxK and whitening are
            settings of the SAE (`aux_loss_coefficient`,
            `normalize_activations="covariance_whitening"`).

    Attributes:
        tokens_since_fired: (d_sae,) int64.
        history: one dict (tokens, mse, dead_share) per recorded point. `mse` is the summed squared
            error per token, averaged since the last point; `dead_share` is NaN until a whole
            window has been seen.
        planned_schedule: the learning rate schedule that `cfg` gave.
        mitigation_state: tensors that mitigations keep from step to step, saved with the rest.

    Raises:
        SaesubError: no iterator of batches or one that ends too early, settings of `cfg` out of
            range, unknown optimizer or backend, two windows, a mitigation that does not apply, k
            outside 1..d_sae, weights in float16 or bfloat16, or not finite, a batch of the wrong
            shape, NaN or Inf in a batch (before any weight is touched), a loss that is no longer
            finite, or more features than the GPU's memory holds.

    The fused step on a GPU does not wait for it. There a batch on the GPU with NaN or Inf changes
    no weight and no count of firing, and the error comes up to 50 steps later, at a checkpoint or
    at the end; so does that of the loss.
    """

    dictionary: WholeDictionary = WHOLE  # another in trainers on several processes
    leaves_out_bad_batches = True  # if a GPU finds them; not in trainers on several processes
    _checked_later = False

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: Any,
        data_provider: Iterator[Tensor],
        evaluator: Evaluator[Any] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        *,
        optimizer: OptimizerName = "sparse_adam",
        backend: Backend = "auto",
        dead_window_tokens: int | None = None,
        mitigations: Sequence[Mitigation] = (),
    ) -> None:
        cfg = completed(cfg)
        check_sae(sae)
        require_iterator(data_provider)
        self.native_step = NativeStep(backend, sae)
        _make_sparse(sae, backend)
        super().__init__(cfg, sae, data_provider, dead_window_tokens, evaluator, save_checkpoint_fn)
        self.backend, self.optimizer_name = backend, optimizer
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        self.optimizer = make_optimizer(optimizer, sae, lr=cfg.lr, betas=betas)
        self.lr_scheduler = self.planned_schedule = self.new_schedule()
        self._watch = PlanWatch()
        self.mitigations = one_of_each(mitigations)
        self.mitigation_state: dict[str, Tensor] = {}
        for mitigation in self.mitigations:
            mitigation.check(self)

    def new_schedule(self) -> LRScheduler:
        """The learning rate schedule of `cfg`, at its first step, for the optimizer as it is."""
        cfg = self.cfg
        assert cfg.lr_end is not None  # `completed` sets it
        return get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    def fit(self) -> T_TRAINING_SAE:
        """Train to the end of the plan.

        Raises:
            SaesubError: the data provider ended before, its first batches are all zero where the
                SAE scales its input by them, or a loss is no longer finite; and what `step` raises.
        """
        given = self.data_provider
        self.data_provider = self._batches_of(given)
        try:
            return super().fit()
        except NO_SCALE as error:
            if not lacks_scale(self):
                raise
            raise SaesubError(zero_scale(self.cfg)) from error
        finally:
            self.data_provider = given

    def _batches_of(self, given: Iterator[Any]) -> Iterator[Tensor]:
        """The batches as tensors, checked where SAELens reads them before the first step."""
        came = 0
        for came, batch in enumerate(given, start=1):  # noqa: B007 - it is counted for the error
            tensor = batch_of(batch)
            yield for_scale(self, tensor) if lacks_scale(self) else tensor
        raise ended(self, came)

    def step(self, batch: Tensor) -> TrainStepOutput:
        """One training step on raw activations (batch, d_in); counts firing by tokens."""
        batch = batch_of(batch).detach()
        if batch.is_inference():
            batch = batch.clone()  # autograd saves no others
        self._checked_later = self.leaves_out_bad_batches and reading_waits(batch)
        if self._checked_later:
            self._check_width(batch)
        else:
            self.check_batch(batch)
        self._watch.before_step(self)
        try:
            with ExitStack() as stack:
                for mitigation in self.mitigations:
                    stack.enter_context(mitigation.around_step(self))
                output = super().step(batch)
        except torch.OutOfMemoryError as error:
            fused = self.native_step.fused
            raise SaesubError(memory_advice(self.sae, len(batch), fused=fused)) from error
        self._watch.after_step(self)
        note_scaling(self)
        for mitigation in self.mitigations:
            mitigation.after_step(self, output)
        if any(mitigation.may_change_weights(self) for mitigation in self.mitigations):
            self.native_step.invalidate()
        return output

    def check_batch(self, batch: Tensor) -> None:
        """Raises SaesubError for another width, and for NaN or Inf; waits for the device."""
        self._check_width(batch)
        self._require_finite(batch)

    def _check_width(self, batch: Tensor) -> None:
        width = getattr(self.sae, "batch_width", self.sae.cfg.d_in)
        if batch.ndim != 2 or batch.shape[1] != width:
            raise SaesubError(
                f"A batch of shape {tuple(batch.shape)} came, but the SAE reads (batch, {width}): "
                "pass activations of its own hook point, flattened, or those of a transcoder's two "
                "hook points side by side."
            )

    def _require_finite(self, batch: Tensor) -> None:
        what = f"the activations of batch {self.n_training_steps}"
        advice = "leave that batch out and continue; the weights are as they were"
        require_finite(batch, f"{what} (after {self.n_training_samples} tokens)", advice)

    def _note_finite(self, sae_in: Tensor, fused: bool) -> None:
        """Check a batch that is checked late: the fused step leaves it out on the device, and
        autograd must not see it."""
        self.batch_is_finite = None
        if self._checked_later and fused:
            self.batch_is_finite = self.bad_batches.note(sae_in, self.n_training_steps)
        elif self._checked_later:
            seen, self.n_training_samples = self.n_training_samples, self.tokens_before
            self._require_finite(sae_in)
            self.n_training_samples = seen

    def _train_step(self, sae: T_TRAINING_SAE, sae_in: Tensor) -> TrainStepOutput:
        if len(sae_in) == 0:
            raise SaesubError("A batch without tokens came, whose mean loss is NaN: leave it out.")
        rows = self.native_step.rows(self)
        self._note_finite(sae_in, fused=rows is not None)
        if rows is None:
            if isinstance(sae, SparseTopKTrainingSAE):
                lay_out_by_feature(sae)  # the weights may have been replaced since the last step
                align_moments(self.optimizer)
            with self._added_losses(), self._schedules_at_rest():
                output = super()._train_step(sae, sae_in)
            # SAELens counts every batch as one of the configured size.
            self.n_frac_active_samples += len(sae_in) - self.cfg.train_batch_size_samples
        else:
            sae.train()
            output = self.native_step.take(self, rows, sae_in)
            self._count_firing(output.times_fired(), len(sae_in))
        self._advance_schedules()
        return self._as_asked(output)

    def _as_asked(self, output: TrainStepOutput) -> TrainStepOutput:
        """The output with sparse activations only where SAELens' own pass would return some."""
        if isinstance(output, SparseStepOutput):
            cfg = self.sae.cfg
            batch = isinstance(self.sae, BatchTopKTrainingSAE)
            output.dense_when_read = batch or not cfg.use_sparse_activations
        return output

    def _advance_schedules(self) -> None:
        """By the whole steps of the configured size that the tokens so far make."""
        size = self.cfg.train_batch_size_samples
        for _ in range(self.n_training_samples // size - self.tokens_before // size):
            self.lr_scheduler.step()
            for scheduler in self.coefficient_schedulers.values():
                scheduler.step()

    @contextmanager
    def _schedules_at_rest(self) -> Iterator[None]:
        """SAELens' step advances the schedules for every batch; inside the block it does not."""
        own = self.lr_scheduler, self.coefficient_schedulers
        still: Any = [SimpleNamespace(value=s.value, step=lambda: None) for s in own[1].values()]
        self.lr_scheduler = SimpleNamespace(step=lambda: None)  # pyright: ignore
        self.coefficient_schedulers = dict(zip(own[1], still, strict=True))
        try:
            yield
        finally:
            self.lr_scheduler, self.coefficient_schedulers = own

    @contextmanager
    def _added_losses(self) -> Iterator[None]:
        """Let the SAE's pass return the losses of mitigations too, inside the block."""
        adding = [mitigation for mitigation in self.mitigations if mitigation.loss_name]
        if not adding:
            yield
            return
        sae, given = self.sae, vars(self.sae).get("training_forward_pass")
        own_pass = sae.training_forward_pass

        def with_losses(step_input: TrainStepInput) -> TrainStepOutput:
            output = own_pass(step_input=step_input)
            with torch.autocast(torch.device(self.cfg.device).type, enabled=False):
                for mitigation in adding:
                    loss = mitigation.extra_loss(self, output)
                    output.losses[str(mitigation.loss_name)] = loss
                    output.loss = output.loss + loss
            return output

        sae.training_forward_pass = with_losses
        try:
            yield
        finally:
            if given is None:
                del sae.training_forward_pass
            else:
                sae.training_forward_pass = given

    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 10
    ) -> None:
        """More often than SAELens' every hundred steps, which on a CPU can be minutes; and by the
        tokens that came. On a GPU each time is a wait for it."""
        if reading_waits(step_output.loss):
            update_interval = max(update_interval, CHECK_EVERY)
        if self.n_training_steps % update_interval == 0:
            super()._update_pbar(step_output, pbar, update_interval)
            pbar.update(self.n_training_samples - pbar.n)

    def set_final_sae_metadata(self) -> None:
        """Record, beside SAELens' own figures, the optimizer, rate, tokens and mitigations.

        SAELens calls it when training is over, so the weights become contiguous again here.
        """
        self.native_step.end()
        if isinstance(self.sae, SparseTopKTrainingSAE):
            lay_out_contiguous(self.sae)
        super().set_final_sae_metadata()
        metadata = self.sae.cfg.metadata
        metadata.backend, metadata.optimizer = self.backend, self.optimizer_name
        metadata.lr, metadata.training_tokens = self.cfg.lr, self.n_training_samples
        metadata.mitigations = [repr(mitigation) for mitigation in self.mitigations]
        note_scaling(self)

    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """SAELens' checkpoint. Raises SaesubError if it cannot be written, or as `read_device`."""
        self.read_device()
        with writing(checkpoint_name):
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)

    def save_trainer_state(self, checkpoint_path: Path) -> None:
        """SAELens' trainer state, and beside it the firing counts in tokens, the settings, the
        state of torch's random numbers, and checksums of all files in the folder.

        Raises SaesubError as `read_device`.
        """
        self.read_device()
        save_state(self, checkpoint_path, super().save_trainer_state)

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Restore a state written by `save_trainer_state`, SAELens' or this one's, and the SAE's
        weights where the folder has them.

        A run may be continued with more tokens, another batch size, learning rate or dead window:
        the schedule is then that of `cfg` from the step that was reached, and a warning says so.

        Raises:
            SaesubError: the checkpoint is damaged, half-written, or of another SAE, optimizer or
                settings that contradict.
        """
        load_state(self, Path(checkpoint_path), super().load_trainer_state)

    def settings(self) -> dict[str, Any]:
        """What a run that continues must have in common with its first part."""
        return settings_of(self)


def _make_sparse(sae: Any, backend: Backend) -> None:
    """Give a TopK SAE the sparse pass and the search of a backend; warn where it cannot be."""
    sparse = isinstance(sae, SparseTopKTrainingSAE)
    if backend == "dense":
        if sparse:
            raise SaesubError(
                f"backend='dense' is SAELens' own step, and {type(sae).__name__} has a sparse "
                "pass, perhaps from an earlier trainer or use_sparse_step: pass a new SAE of "
                "SAELens' own class, or leave the backend out."
            )
    elif "training_forward_pass" in vars(sae) and isinstance(sae, TopKTrainingSAE):
        warnings.warn(DENSE_STEP.format(other_pass(sae)), stacklevel=3)
    elif sparse or type(sae) in (TopKTrainingSAE, BatchTopKTrainingSAE):
        given = sae.search_name if sparse else "auto"
        search = backend if backend in ("torch", "exact_search") else given
        use_sparse_step(sae, search=search, in_subspace=getattr(sae, "in_subspace", True))
    elif isinstance(sae, TopKTrainingSAE):
        derive = f"{type(sae).__name__} is not derived from saesub.SparseTopKTrainingSAE"
        warnings.warn(DENSE_STEP.format(why_dense(sae) or derive), stacklevel=3)
