"""What saesub relies on in SAELens beyond its public interface, pinned by hashes of the source.

When a test here fails after an update of sae-lens, read what changed, follow it at the place that
is named, run the tests named there, and write the new hash.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from sae_lens.saes import batchtopk_sae, sae, topk_sae
from sae_lens.training import optim
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

PACKAGE = Path(__file__).resolve().parent.parent / "saesub"
STEP = "saesub/topk/step.py; tests/test_step.py and tests/test_sparse_sae.py"
FUSED = "saesub/training/trainer.py and native_step.py; tests/test_as_saelens.py"
CHECKPOINT = "saesub/training/checkpoint.py; tests/test_as_saelens.py and tests/test_trainer.py"
TOGETHER = "saesub/training/comparison.py; tests/test_trainer.py"
FIRING = "saesub/training/firing.py; tests/test_as_saelens.py"
BAR = "the bar of saesub/training/trainer.py and comparison.py"

# Private functions that saesub calls or overrides.
PRIVATE: list[tuple[Any, str, str]] = [
    (SAETrainer._train_step, "e82b4976559c", FUSED),
    (SAETrainer._update_pbar, "9ee1053ca3a4", BAR),
    (MultiSAETrainer._update_pbar, "0719fd500b2b", BAR),
    (MultiSAETrainer._estimate_scaling_factors, "caa3b6e3716c", TOGETHER),
]
# Public functions whose content saesub computes in another way, or builds on.
CONTENT: list[tuple[Any, str, str]] = [
    (sae.TrainingSAE.training_forward_pass, "bb3b1b41e49d", STEP),
    (sae.SAE.process_sae_in, "1922f948f491", STEP),
    (sae.mse_loss, "90f915fd2ebb", STEP),
    (topk_sae.TopK.forward, "a314ecf40588", STEP),
    (topk_sae.TopKTrainingSAE.encode_with_hidden_pre, "fa01c2c46e59", STEP),
    (topk_sae.TopKTrainingSAE.decode, "f9e65d02cb35", STEP),
    (topk_sae.TopKTrainingSAE.calculate_aux_loss, "65400cbd5604", STEP),
    (topk_sae.TopKTrainingSAE.calculate_topk_aux_loss, "3df3a7a68492", STEP),
    (topk_sae.calculate_topk_aux_acts, "2648dd1c2fcd", STEP),
    (topk_sae.act_times_W_dec, "15bac682fd4a", STEP),
    (batchtopk_sae.BatchTopK.forward, "d3d00534e129", STEP),
    (batchtopk_sae.BatchTopKTrainingSAE.training_forward_pass, "6a0fee48d88c", STEP),
    (batchtopk_sae.BatchTopKTrainingSAE.update_topk_threshold, "24633921f3f5", STEP),
    (SAETrainer.step, "93048147bf66", FUSED),
    (SAETrainer.fit, "cff96ac0206b", FUSED),
    (
        SAETrainer.dead_neurons.fget,
        "3330c42772bb",
        FIRING,
    ),
    (SAETrainer.set_final_sae_metadata, "62f6a5e92049", FUSED),
    (SAETrainer.build_train_step_log_dict, "ce7c9c38ead3", FIRING),
    (sae.SAE.fold_activation_norm_scaling_factor, "29c96f504056", CHECKPOINT),
    (topk_sae.TopKTrainingSAE.fold_activation_whitening, "f02bbf41a5ad", CHECKPOINT),
    (sae.TrainingSAE.get_sae_class_for_architecture, "c997ef7f6a51", "saesub/topk/sae.py"),
    (sae.TrainingSAE.save_inference_model, "5b38fe7ab948", "saesub/topk/sae.py"),
    (SAETrainer.save_checkpoint, "47743acfe344", CHECKPOINT),
    (SAETrainer.save_trainer_state, "a842fa50814e", CHECKPOINT),
    (SAETrainer.load_trainer_state, "4b5b00a32c9b", CHECKPOINT),
    (optim.get_lr_scheduler, "c8facaea8a1e", CHECKPOINT),
    (MultiSAETrainer.fit, "7428369cf40e", TOGETHER),
    (MultiSAETrainer.load_checkpoint, "dcbbd582160a", TOGETHER),
]


def digest(function: Any) -> str:
    """Of the source without white space, so that it is the same under every Python."""
    return hashlib.sha256("".join(inspect.getsource(function).split()).encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("function", "known", "look"), PRIVATE + CONTENT, ids=lambda v: getattr(v, "__qualname__", "")
)
def test_the_source_is_the_one_that_was_read(function, known, look):
    assert digest(function) == known, f"{function.__qualname__} of SAELens changed: look at {look}"


def test_no_other_private_name_of_saelens_is_used():
    """Of the classes that saesub derives from or is given, and of its modules."""
    classes = (SAETrainer, MultiSAETrainer, batchtopk_sae.BatchTopKTrainingSAE, ActivationScaler)
    bases = {base for cls in classes for base in cls.__mro__}
    of_saelens = [base for base in bases if base.__module__.startswith("sae_lens")]
    theirs = {name for base in of_saelens for name in vars(base) if name.startswith("_")}
    for base in of_saelens:
        theirs |= set(re.findall(r"self\.(_\w+)", inspect.getsource(base)))
    theirs = {name for name in theirs if not name.startswith("__")}
    used, imported = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                used.add(node.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae_lens"):
                imported |= {alias.name for alias in node.names if alias.name.startswith("_")}
    assert "_train_step" in theirs
    assert imported == set()
    assert used & theirs == {function.__name__ for function, _, _ in PRIVATE}
