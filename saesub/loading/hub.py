"""The Hugging Face hub: whether it can be reached, and what to say of a name that it lacks."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from saesub.errors import near_names
from saesub.loading.registry import Kind, packaged_names


def hub_is_reachable() -> bool:
    """One short request, since the hub's own client retries for half a minute when offline."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever stops this request stops the download
        return False
    return True


def not_found(name: str, kind: Kind, reason: str, hub_names: Sequence[str] = ()) -> str:
    """The message about a name that is neither packaged nor local nor on the hub."""
    offline = packaged_names(kind)
    hint = near_names(name, [*offline, *hub_names])
    if name in hub_names:
        hint = "try again where it can be reached"
    hint += "" if hint.endswith("?") else "."
    return (
        f"nothing loads under {name!r}, which is neither one of the packaged {kind} nor a local "
        f"path, and the hub did not give it: {hint} "
        f"Without the hub, these load: {', '.join(offline)}. (The hub: {reason})"
    )
