"""Seconds and bytes of a training step on several processes of this machine, over gloo.

for n in 1 2 4; do torchrun --standalone --nproc-per-node $n benchmarks/processes.py; done
python benchmarks/eight_gpus.py

Two cores are no place to time eight GPUs: what carries over is the bytes, which the kernel counts.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import time
from pathlib import Path
from typing import Any

import torch
from activations import CORPUS, HOOK, MODEL
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from saesub import stream_activations
from saesub.reproduce.report import processor
from saesub.training.distributed import (
    DataParallelSAETrainer,
    FeatureParallelSAETrainer,
    Processes,
    join,
    take_features,
)

RESULTS = Path(__file__).parent / "results"
D_IN, D_SAE, K, BATCH, STEPS = 576, 4608, 32, 2048, 3
_BYTES_SENT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info


def bytes_sent() -> int:
    """By all of this process's TCP connections since they were made, as Linux counts."""
    total = 0
    for open_file in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(open_file).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(open_file.name))) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
                total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
        except OSError:  # closed meanwhile, or not TCP
            continue
    return total


def measured(processes: Processes, x: Tensor, mode: str) -> dict[str, Any]:
    """The median step of the first process, after one to warm up."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    cfg = SAETrainerConfig(STEPS * BATCH, BATCH, lr=1e-3)
    rows: Any = lambda _: iter(())  # noqa: E731
    window = 1  # token: features are dead at once, so that AuxK is at work
    if mode == "data":
        trainer = DataParallelSAETrainer(processes, cfg, sae, rows, dead_window_tokens=window)
    else:
        sae = take_features(sae, processes.share(D_SAE))
        trainer = FeatureParallelSAETrainer(
            processes, cfg, sae, rows, backend="torch", dead_window_tokens=window
        )
    share, seconds, sent = processes.share(BATCH), [], []
    for step in range(STEPS + 1):
        batch = x[step * BATCH :][share.start : share.stop]
        processes.barrier()
        before, start = bytes_sent(), time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - start)
        sent.append(bytes_sent() - before)
    return {
        "mode": mode,
        "seconds": statistics.median(seconds[1:]),
        "bytes_sent": round(statistics.median(sent[1:])),
    }


def main() -> None:
    torch.set_num_threads(1)
    n_tokens = (STEPS + 1) * BATCH
    with join() as processes:
        x = torch.empty(n_tokens, D_IN)
        if processes.index == 0:
            parts = stream_activations(MODEL, CORPUS, [HOOK], n_tokens=n_tokens, progress=False)
            x = torch.cat([part[HOOK] for part in parts]).float()
        processes.broadcast_(x)
        rows = [measured(processes, x, mode) for mode in ("features", "data")]
        if processes.index == 0:
            record = {
                "job": {"d_in": D_IN, "d_sae": D_SAE, "k": K, "batch": BATCH, "auxk": True},
                "ranks": processes.count,
                "machine": {"processor": processor(), "cores": os.cpu_count()},
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "rows": rows,
            }
            path = RESULTS / f"processes-{processes.count}.json"
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
