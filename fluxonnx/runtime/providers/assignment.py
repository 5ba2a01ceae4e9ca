"""Which provider each node of a session was given to: what one does not take runs on the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fluxonnx.runtime.notices import warn
from fluxonnx.runtime.providers.plugins import short_name

# Has onnxruntime (1.24 and later) remember the assignment.
RECORD = "session.record_ep_graph_assignment_info"

_told: set[str] = set()


def assigned(session: Any) -> dict[str, Counter[str]] | None:
    """Return the types of a session's nodes by provider; None if this onnxruntime does not tell.

    Args:
        session: An InferenceSession that was made with the setting `RECORD`.
    """
    try:
        subgraphs = session.get_provider_graph_assignment_info()
    except Exception:  # an older one has no such function, and one without the setting raises
        return None
    found: dict[str, Counter[str]] = {}
    for part in subgraphs:
        found.setdefault(short_name(part.ep_name), Counter()).update(node.op_type for node in part.get_nodes())
    return found


def tell_of_fallback(session: Any, component: str, provider: str) -> None:
    """Warn, once, if nodes of a graph run on the CPU and not on the provider that was asked for."""
    found = assigned(session)
    if found is None:
        return
    left = Counter[str]()
    for name, nodes in found.items():
        if name != provider:
            left.update(nodes)
    count, whole = left.total(), sum(nodes.total() for nodes in found.values())
    if not count:
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in left.most_common(5)) + (", ..." if len(left) > 5 else "")
    share = f"{count} of {whole} nodes ({100 * count / whole:.0f} %)"
    message = f"{component}: {share} run on the CPU, not on {provider}: {kinds}"
    if message not in _told:
        _told.add(message)
        warn(message)
