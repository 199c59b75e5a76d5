"""Many clients at a time, some of which leave early or cannot be read: none is lost, and none is mixed up."""

import pytest

from benchmarks.serve_load import main


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up_under_load():
    found = main(["--requests", "90", "--clients", "24", "--rows", "8", "--rounds", "1"])
    became = found["what_became_of_them"]
    assert sum(became.values()) == 90
    assert min(became[kind] for kind in ("whole", "stream", "leaves a stream", "malformed")) > 5
    first, last, _ = found["server_megabytes"].values()
    assert last < 1.1 * first
    assert found["seconds_to_first_text"]["p95"] >= found["seconds_to_first_text"]["median"] > 0
    assert found["share_of_generate"] > 0.2, "far below what it is on an idle machine"
