"""Run by IPython as a notebook's kernel starts: after every cell it notes the most memory held.

The kernel itself is asked because nothing outside sees a GPU's peak, and after every cell because
a kernel that dies says nothing at its end. Imports nothing of saesub, and leaves no name behind in
the notebook.
"""

from __future__ import annotations


def _watch() -> None:
    import json
    import os
    import re
    import sys
    from pathlib import Path

    from IPython import get_ipython

    target = Path(os.environ["SAESUB_PEAK_MEMORY"])
    status = Path("/proc/self/status")  # Linux; getrusage would count the parent's peak as well

    def note(_: object) -> None:
        peak = {}
        if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else ""):
            peak["cpu"] = int(found[1]) * 1024
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            peak["gpu"] = torch.cuda.max_memory_reserved()
        temporary = target.with_suffix(".new")
        temporary.write_text(json.dumps(peak), encoding="utf-8")
        temporary.replace(target)

    shell = get_ipython()
    assert shell, "IPython runs this file"
    shell.events.register("post_run_cell", note)


_watch()
del _watch
