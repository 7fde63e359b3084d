"""The proposal to SAELens: applied to the version that it names, its hooks are called."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sae_lens

PAGE = Path(__file__).parents[1] / "docs" / "upstream.md"
pytestmark = pytest.mark.skipif(
    f"sae-lens {sae_lens.__version__}," not in PAGE.read_text(),
    reason="another SAELens is installed than the one that the proposal is written against",
)
TRAINS = """
import inspect, torch, sae_lens
from sae_lens import LanguageModelSAETrainingRunner, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from saesub import SparseAdam, parameter_groups
def trainer(**hook):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
    cfg = SAETrainerConfig(total_training_samples=64, train_batch_size_samples=32, lr_end=1e-4)
    return SAETrainer(cfg, sae, (torch.randn(32, 8) for _ in range(2)), **hook)
plain = trainer()
assert type(plain.optimizer) is torch.optim.Adam
with_hook = trainer(optimizer_fn=lambda sae, cfg: SparseAdam(parameter_groups(sae), lr=cfg.lr))
with_hook.fit()
assert type(with_hook.optimizer) is SparseAdam
assert all(s["step"] == 2 for s in with_hook.optimizer.state.values())
assert "optimizer_fn" in inspect.signature(LanguageModelSAETrainingRunner).parameters
print(sae_lens.__file__)
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed SAELens with the page's diff applied."""
    folder = tmp_path_factory.mktemp("patched")
    source = Path(sae_lens.__file__).parent
    shutil.copytree(source, folder / "sae_lens", ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    command = ["git", "apply", "--verbose", "-"]
    done = subprocess.run(command, cwd=folder, input=diff, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Applied patch") == 2
    return folder


def test_the_trainer_calls_the_hook(patched: Path) -> None:
    root = str(PAGE.parents[1])
    program = f"import sys; sys.path[:0] = [{str(patched)!r}, {root!r}]\n{TRAINS}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(patched))
