"""One page that shows how answers were decoded: plain HTML, CSS and JavaScript in one file."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

FRAME_HEIGHT = 360  # pixels, until the page in the frame says how high it is


def page(replays: Sequence[dict[str, Any]], live: dict[str, Any] | None = None, title: str = "dLLM-Var") -> str:
    """Returns a whole HTML document that shows replays (`dllm_var.sampling.recording.replay_of`).

    It loads nothing, and all that it shows is text: neither prompts nor tokens can become markup or script.

    Args:
        live: The server that the page asks for further answers: its `model` and `samplers`, whether it is asked in a
            `chat`, and whether it is `locked` with an API key. A file has none.
    """
    style, script, document = (_part(name) for name in ("replay.css", "replay.js", "page.html"))
    # Escaped so that nothing in it ends the element it stands in.
    data = json.dumps({"replays": list(replays), "live": live})
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    return Template(document).substitute(
        title=html.escape(title),
        policy=_policy(style, script, connects=live is not None),
        style=style,
        data=data,
        script=script,
    )


def frame(replays: Sequence[dict[str, Any]]) -> str:
    """Returns an HTML element with the page inside, for a notebook: neither one's styles reach the other."""
    look = "width:100%;border:0;border-radius:12px"
    return f'<iframe srcdoc="{html.escape(page(replays))}" height="{FRAME_HEIGHT}" style="{look}"></iframe>'


def _policy(style: str, script: str, connects: bool) -> str:
    """Returns the page's content security policy: its own style and script run, and no other."""
    own = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    rules = f"default-src 'none'; style-src 'sha256-{own[0]}'; script-src 'sha256-{own[1]}'; base-uri 'none'"
    return f"{rules}; connect-src 'self'" if connects else rules


@cache
def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
