"""The page on eight GPUs shows what the plan computes and what was recorded.

That the plan's bytes are real ones is for `test_distributed.py`.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from parallel_cost import Job, Rates, memory, seconds, traffic

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("processes-*.json"))
eight_gpus = runpy.run_path(str(ROOT / "benchmarks" / "eight_gpus.py"))
JOB = Job(d_in=576, d_sae=4608, k=32, batch=2048, processes=4)


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "eight_gpus.md").read_text()
    assert eight_gpus["written"](page) == page, "run `python benchmarks/eight_gpus.py`"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_recorded_bytes_are_those_planned(path: Path):
    record = json.loads(path.read_text())
    for row in record["rows"]:
        job = Job(**record["job"], processes=record["ranks"], mode=row["mode"])
        planned = sum(traffic(job).values())
        assert planned <= 1.001 * row["bytes_sent"]
        assert row["bytes_sent"] <= 1.01 * planned + 4000


def test_sharding_divides_memory_and_keeps_traffic_from_growing_with_the_dictionary():
    wider = replace(JOB, d_sae=2 * JOB.d_sae)
    assert traffic(wider) == traffic(JOB)
    assert memory(wider)["moments"] == pytest.approx(2 * memory(JOB)["moments"], rel=1e-3)
    data = replace(JOB, mode="data")
    assert traffic(replace(wider, mode="data"))["gradients"] > 1.9 * traffic(data)["gradients"]
    assert memory(data)["gradients"] == pytest.approx(4 * memory(JOB)["gradients"], rel=1e-3)
    assert sum(traffic(replace(JOB, processes=1)).values()) == 0


def test_a_faster_device_or_link_takes_that_part_s_time_down():
    slow = Rates(flops=1e12, memory=1e11, link=1e9)
    before, after = seconds(JOB, slow), seconds(JOB, replace(slow, link=2e9))
    assert after["traffic"] == pytest.approx(before["traffic"] / 2)
    assert (after["encoder"], after["memory"]) == (before["encoder"], before["memory"])
    few = replace(JOB, batch=8)  # few features have a gradient
    adam = seconds(replace(few, optimizer="adam"), slow)
    assert adam["memory"] > seconds(few, slow)["memory"]
