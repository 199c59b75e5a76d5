"""What devices send in a step, against a ring counted out by hand."""

import pytest

from dllm_var.benchmarking.communication import Links, communication_bytes, step_with_communication


def ring(parts, passes):
    """Bytes one device of a ring sends when `passes` times every part but its own goes round."""
    return passes * sum(parts[1:])


@pytest.mark.parametrize(
    ("strategy", "passes"),
    [
        ("ddp", 2),  # gradients: reduce-scatter, all-gather
        ("fsdp2", 3),  # weights for forward and for backward, gradients
        ("zero2", 2),  # gradients, updated weights
    ],
)
def test_a_ring_of_four(strategy, passes):
    assert communication_bytes(strategy, 1000, 4, 2, 1000) == ring([500.0] * 4, passes)
    assert communication_bytes(strategy, 1000, 1, 2, 1000) == 0


def test_frozen_weights_are_gathered_but_have_no_gradients():
    assert communication_bytes("ddp", 1000, 2, 2, 10) == communication_bytes("zero2", 1000, 2, 2, 10) == 20
    assert communication_bytes("fsdp2", 1000, 2, 2, 10) == 2000 + 10


def test_the_slowest_link_counts_and_what_is_overlapped_costs_nothing_while_it_lasts():
    links = Links(per_node=8, inside=100.0, between=10.0, achieved=0.5)
    assert (links.bandwidth(8), links.bandwidth(9)) == (50.0, 5.0)
    assert step_with_communication(10.0, 5.0, overlapped=1.0) == 10.0
    assert step_with_communication(10.0, 5.0, overlapped=0.8) == pytest.approx(11.0)
    assert step_with_communication(1.0, 5.0, overlapped=0.8) == pytest.approx(5.0)
