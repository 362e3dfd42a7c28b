"""The chat page: one file, sent with a policy that lets nothing but its own script and style run."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path


def page() -> tuple[str, str]:
    """(the page, its Content-Security-Policy). The policy names the hashes of the script and the style in the file."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)

    policy = (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
