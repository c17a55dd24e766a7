"""What a step is modelled to take, and the choice that follows: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spdk_kv.errors import CapacityError
from spdk_kv.sparse import Settings, preset
from spdk_kv.sparse.tuning import (
    MISS_RATES,
    SHARES,
    Choice,
    Decoding,
    Goal,
    Machine,
    ReadTimes,
    best,
    best_of_shares,
    choose,
    cost,
    miss_rate,
    whole_cost,
)

MIB = 1 << 20
SIZES = (4, 8, 16, 32, 64)
# As an 8B model has it: 8 KV heads of 128 in bfloat16.
DECODING = Decoding(layers=32, token_nbytes=4096, metadata_nbytes=272.0, tokens=32768)
AMPLE = Goal(0.075, 1 << 40)


def drive(nbytes_per_s: float, command_s: float) -> Machine:
    """A drive that takes ``command_s`` for each group and moves ``nbytes_per_s``; hardly
    anything else takes time."""
    counts = (1, 8, 32, 128, 512)
    reads = {
        size: ReadTimes(
            counts,
            tuple(n * (command_s + size * 4096 / nbytes_per_s) for n in counts),
            tuple(n * size * 4096 for n in counts),
        )
        for size in SIZES
    }
    return Machine(reads, 4096 / nbytes_per_s, score_s=0.0, compute_s=1e-9)


FAST = drive(2e9, 1e-6)
SLOW_COMMANDS = drive(2e9, 200e-6)


def chosen(machine: Machine, goal: Goal = AMPLE, decoding: Decoding = DECODING) -> Choice:
    return choose(goal, machine, decoding)


def test_miss_rates_are_those_measured_and_between_them_in_between() -> None:
    assert [miss_rate(pool) for pool in MISS_RATES] == list(MISS_RATES.values())
    assert MISS_RATES[4.0] < miss_rate(3.0) < MISS_RATES[2.0]
    assert miss_rate(9.0) == MISS_RATES[4.0]


def test_times_between_and_beyond_what_was_measured() -> None:
    times = ReadTimes((1, 10, 20), (1.0, 2.0, 4.0), (100, 1000, 2000))
    assert [times.time_of(n) for n in (0.5, 1, 5.5, 15, 40)] == [1.0, 1.0, 1.5, 3.0, 8.0]
    assert times.nbytes_of(40) == 4000
    assert ReadTimes((10,), (2.0,), (50,)).time_of(30) == 6.0
    # A transfer that happened to be slow does not make larger ones quick.
    assert ReadTimes((1, 10), (3.0, 2.0), (1, 10)).time_of(20) == 2.0


def test_a_step_adds_scoring_to_the_slower_of_reading_and_computing() -> None:
    settings = preset("codes", tokens=400, pool=2.0)
    base = replace(FAST, score_s=1e-3)
    found = cost(settings, base, DECODING)
    missing = 100 * MISS_RATES[2.0]
    layer_s = missing * (1e-6 + 16384 / 2e9)
    assert found.read_s == pytest.approx(32 * layer_s)
    assert found.step_s == pytest.approx(32 * (1e-3 + layer_s))
    assert found.read_nbytes_per_token == pytest.approx(32 * missing * 16384)
    assert found.bound == "scoring"
    hidden = cost(settings, replace(base, compute_s=0.5), DECODING)
    assert hidden.step_s == pytest.approx(0.5 + 32e-3)
    assert hidden.bound == "computing"
    assert cost(settings, FAST, DECODING).bound == "reading"


def test_rows_of_a_batch_share_a_step() -> None:
    settings = preset("codes", tokens=400)
    one = cost(settings, FAST, DECODING)
    four = cost(settings, FAST, replace(DECODING, batch=4))
    assert four.step_s == pytest.approx(4 * one.step_s)
    assert four.tokens_per_s == pytest.approx(one.tokens_per_s)
    assert four.read_nbytes_per_token == pytest.approx(one.read_nbytes_per_token)
    assert four.memory_nbytes == pytest.approx(4 * one.memory_nbytes)
    shared = replace(FAST, compute_s=1.0)
    assert cost(settings, shared, replace(DECODING, batch=4)).tokens_per_s == pytest.approx(4.0)


def test_memory_is_of_resident_groups_newest_tokens_and_codes() -> None:
    settings = preset("codes", tokens=400, pool=2.0)
    held = 800 + settings.recent + 4
    expected = 32 * (held * 4096 + 32768 * 272)
    assert cost(settings, FAST, DECODING).memory_nbytes == expected


def test_a_pool_that_holds_everything_reads_nothing() -> None:
    found = cost(preset("codes", tokens=16384, pool=2.0), FAST, DECODING)
    assert (found.read_s, found.read_nbytes_per_token) == (0.0, 0.0)
    assert found.memory_nbytes == 32 * 32768 * (4096 + 272)


def test_small_groups_where_commands_are_cheap_and_large_ones_where_they_are_not() -> None:
    few = Goal(0.02, AMPLE.memory_nbytes)
    cheap, dear = chosen(FAST, few), chosen(SLOW_COMMANDS, few)
    assert (cheap.settings.group_tokens, dear.settings.group_tokens) == (4, 64)
    # Equal answers take more tokens in larger groups: four times as many in such of 64.
    assert dear.settings.tokens == pytest.approx(4 * cheap.settings.tokens, rel=0.01)


def test_what_computing_hides_costs_no_memory() -> None:
    hidden = chosen(replace(FAST, compute_s=60.0))
    assert (hidden.settings.group_tokens, hidden.settings.pool) == (4, 1.0)
    assert "a faster drive would not help" in " ".join(hidden.why)
    assert chosen(FAST).settings.pool == 4.0


def test_reads_that_are_hidden_with_nothing_to_spare_are_made_fewer() -> None:
    one = cost(chosen(replace(FAST, compute_s=60.0)).settings, FAST, DECODING)
    # Just hidden with the smallest pool; with twice as much time every pool is hidden well.
    just = chosen(replace(FAST, compute_s=1.1 * one.read_s))
    assert just.settings.pool > 1.0
    assert just.cost.read_s <= 0.75 * one.read_s
    assert chosen(replace(FAST, compute_s=2.1 * one.read_s)).settings.pool == 1.0


def test_little_memory_makes_the_pool_small_and_then_the_share() -> None:
    ample = chosen(FAST)
    short = chosen(FAST, Goal(0.075, round(0.8 * ample.cost.memory_nbytes)))
    assert short.settings.tokens == ample.settings.tokens
    assert short.settings.pool < ample.settings.pool
    assert short.cost.memory_nbytes <= 0.8 * ample.cost.memory_nbytes
    least = 32 * 32768 * 272
    tight = chosen(FAST, Goal(0.075, least + 32 * 4096 * 300))
    assert tight.share < 0.075
    assert tight.cost.memory_nbytes <= least + 32 * 4096 * 300
    assert "instead of 7.5 %" in tight.why[0]


def test_memory_for_no_group_at_all_is_an_error_that_says_how_much_it_takes() -> None:
    with pytest.raises(
        CapacityError, match=r"32,768 tokens take 2[78]\d\.\d MiB .* are 200\.0 MiB"
    ):
        chosen(FAST, Goal(0.075, 200 * MIB))


def test_the_frontier_has_the_best_of_each_share_and_says_where_none_fits() -> None:
    found = best_of_shares(SHARES, 1 << 40, FAST, DECODING)
    assert [share for share, _ in found] == list(SHARES)
    rates = [row[1].tokens_per_s for _, row in found if row is not None]
    assert rates == sorted(rates, reverse=True)
    tight = best_of_shares(SHARES, 32 * (32768 * 272 + 4096 * 500), FAST, DECODING)
    fits = [row is not None for _, row in tight]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    assert not fits[-1]


def test_the_best_is_at_most_a_little_slower_than_any_other_that_fits() -> None:
    goal = Goal(0.04, 1 << 30)
    found = best(goal, SLOW_COMMANDS, DECODING)
    assert found is not None
    for group in SIZES:
        for pool in (1.0, 2.0, 4.0):
            count = -(-int(0.04 * 32768 * (group / 4) ** 0.5) // group)
            other = preset("codes", tokens=count * group, group_tokens=group, pool=pool)
            price = cost(other, SLOW_COMMANDS, DECODING)
            if price.memory_nbytes <= goal.memory_nbytes:
                assert found[1].step_s <= 1.05 * price.step_s


def test_every_choice_says_why_and_can_be_written_down() -> None:
    for machine in (FAST, SLOW_COMMANDS, replace(FAST, compute_s=60.0)):
        for share in (0.01, 0.075, 0.3, 1.0):
            for memory in (300 * MIB, 1 << 30, 1 << 40):
                found = chosen(machine, Goal(share, memory))
                assert len(found.why) == 5 + (memory == 1 << 40)
                assert all(sentence.endswith(".") for sentence in found.why)
                assert Settings.from_json(found.settings.to_json()) == found.settings
                assert found.settings.tokens <= 32768
                assert found.settings.recent >= found.settings.group_tokens


def test_reading_everything_takes_the_drive_s_own_speed() -> None:
    found = whole_cost(FAST, DECODING)
    nbytes = 32 * 32768 * 4096
    assert found.read_nbytes_per_token == nbytes
    assert found.step_s == pytest.approx(nbytes / 2e9)
    assert chosen(FAST).cost.tokens_per_s > found.tokens_per_s
