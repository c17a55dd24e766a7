"""The store's own tests on the engine `spdk`: those that open stores, close them, and kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from engines.spdk.target import drives_fixture, target_fixture
from sequence.test_lasting import (  # noqa: F401
    test_a_closed_store_has_its_sequences_when_reopened,
    test_a_deleted_sequence_stays_deleted,
    test_a_temporary_sequence_is_gone_after_close_and_its_space_with_it,
    test_layers_of_unequal_length_last,
    test_the_order_of_rows_lasts,
    test_truncation_lasts,
)
from sequence.test_reading import (  # noqa: F401
    test_a_prefetch_is_read_once_and_not_again,
    test_appends_between_prefetch_and_read,
    test_appends_of_any_size_read_back,
    test_changes_between_prefetch_and_read,
    test_deleting_gives_the_space_back_and_ends_all_use,
    test_deleting_while_others_read_gives_tokens_or_a_typed_error,
    test_futures,
    test_heads_that_lie_apart_are_read_alone,
    test_some_heads,
    test_threads_on_different_layers,
)
from sequence.test_rows import RowsMachine
from spdk_kv.store import KVStore
from store import test_concurrency as concurrency
from store.helpers import check_books, folder_fixture, kill_loop, open_store
from store.test_blobs import (  # noqa: F401
    test_a_tensor_outlives_overwriting_deleting_closing_and_the_next_owner,
)
from store.test_capacity import (  # noqa: F401
    test_a_full_store_replaces_a_key_in_place_of_another,
    test_fragments_are_joined_by_evicting_more,
    test_none_refuses_and_says_what_is_asked_and_what_is_free,
    test_recency_survives_a_reopening,
    test_several_sequences_and_blobs_share_the_room,
    test_the_blobs_used_longest_ago_make_room,
)
from store.test_concurrency import (  # noqa: F401
    test_a_forgotten_store_is_closed_and_complained_about,
    test_a_forked_child_is_refused_and_its_end_harms_nobody,
    test_a_store_still_open_at_exit_is_closed,
    test_everything_raises_after_close_and_close_may_be_repeated,
    test_multiprocessing_with_fork,
    test_readers_of_what_is_overwritten_get_one_version_whole,
)
from store.test_model import FullMachine, StoreMachine
from store.test_truth import (  # noqa: F401
    test_a_flipped_bit_is_found_counted_and_forgotten,
    test_a_second_process_is_refused_by_pid_and_the_first_is_unharmed,
    test_one_bad_superblock_is_enough_and_is_mended,
    test_reopening_finds_everything_that_was_put,
    test_what_was_flushed_in_the_background_survives,
)
from support.rounds import examples

target, drives, folder = target_fixture, drives_fixture, folder_fixture


@pytest.fixture(scope="module", autouse=True)
def on_drives(drives) -> None:
    pass


@pytest.fixture
def where(folder: Path) -> Path:
    return folder


@pytest.fixture
def store(folder: Path) -> Iterator[KVStore]:
    with open_store(folder, capacity="64 MiB") as opened:
        assert opened.engine.name == "spdk"
        yield opened
        check_books(opened)


@pytest.mark.parametrize("capacity", ["16 MiB", "640 KiB"])
def test_16_threads_put_get_and_delete_the_same_keys(folder, capacity):
    test = concurrency.test_16_threads_put_get_and_delete_the_same_keys
    test(folder, "spdk", capacity)


@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_closing_amid_use_ends_every_call_with_success_or_closed_error(folder, delay_s):
    test = concurrency
    test.test_closing_amid_use_ends_every_call_with_success_or_closed_error(folder, "spdk", delay_s)


@pytest.mark.parametrize("what", ["blobs", "sequences"])
def test_kills_leave_old_or_new_values_and_all_that_was_flushed(folder, what):
    counts = kill_loop(folder, 8, what, 1)
    assert counts["killed"] == 8


few = settings(max_examples=examples(4), stateful_step_count=25)
TestEvicting = StoreMachine.TestCase
TestFull = FullMachine.TestCase
TestRows = RowsMachine.TestCase


class TestEvictingOnSpdk(TestEvicting):
    settings = few


class TestFullOnSpdk(TestFull):
    settings = few


class TestRowsOnSpdk(TestRows):
    settings = few


del TestEvicting, TestFull, TestRows
