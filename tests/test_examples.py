"""The notebook in examples/ is run cell by cell, and says what it shows."""

import ast
import html
import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(source, names):
    """Runs a cell; returns the value of its last line if that is an expression, as a notebook does."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def shown_in(frame):
    """Returns the answer in a frame, and of each forward the places and tokens that it decided."""
    [data] = re.findall(r'<script id="data"[^>]*>(.*?)</script>', html.unescape(frame), re.DOTALL)
    [replay] = json.loads(data)["replays"]
    steps = [(step["length"], step["starts"], [change[:2] for change in step["changes"]]) for step in replay["steps"]]
    return replay["prompt"], replay["text"], replay["forwards"], steps


def test_the_quickstart_notebook_shows_what_its_cells_print(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    names, frames = {"__name__": "__main__"}, 0
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        value = run("".join(cell["source"]), names)
        streams = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        assert capsys.readouterr().out == "".join(streams)
        kept = [output["data"]["text/html"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert len(kept) == (value is not None and hasattr(value, "_repr_html_"))
        for frame in kept:
            assert shown_in(value._repr_html_()) == shown_in("".join(frame))
            frames += 1
    assert frames == 2
