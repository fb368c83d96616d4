"""What a store answered, as one line for people (spec §10.2). Shared by the drivers; nothing decides by this text."""

from __future__ import annotations

PREVIEW_BYTES = 256


def answer_text(
    label: str,
    operation: str,
    where: str,
    *,
    status: int | None = None,
    code: str = "",
    detail: str = "",
    request_id: str = "",
    preview: str = "",
    timed_out_ms: int | None = None,
) -> str:
    """``S3 get s3://b/k failed HTTP 403 AccessDenied — not yours [requestId=1] bodyPreview="…"``."""
    parts = [f"{label} {operation} {where} failed"]
    if timed_out_ms is not None:
        parts.append(f"timed out after {timed_out_ms}ms")
    if status is not None:
        parts.append(f"HTTP {status}")
    if code:
        parts.append(code)
    if detail:
        parts.append(f"— {detail}")
    if request_id:
        parts.append(f"[requestId={request_id}]")
    if preview:
        parts.append(f'bodyPreview="{preview}"')
    return " ".join(parts)
