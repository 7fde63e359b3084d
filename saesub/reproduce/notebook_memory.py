"""IPython runs this as a notebook's kernel starts: it records the peak memory after every cell.

The kernel records it itself because nothing outside sees a GPU's peak, and after every cell because
a kernel that dies records nothing at its end. It imports nothing of saesub and leaves no name in
the notebook.
"""


def _watch() -> None:
    import json
    import os
    import re
    import sys
    from pathlib import Path

    from IPython import get_ipython

    target = Path(os.environ["SAESUB_PEAK_MEMORY"])
    status = Path("/proc/self/status")  # Linux; getrusage would count the parent's peak as well

    def record(_: object) -> None:
        peak = {}
        if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
            peak["cpu"] = int(found[1]) * 1024
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            peak["gpu"] = torch.cuda.max_memory_reserved()
        temporary = target.with_suffix(".new")
        temporary.write_text(json.dumps(peak), encoding="utf-8")
        temporary.replace(target)

    shell = get_ipython()
    assert shell, "IPython runs this file"
    shell.events.register("post_run_cell", record)


_watch()
del _watch
