"""The store's own tests on the engine `spdk`: those that share one store. Blobs, destinations,
and the tokens of real models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engines.spdk.target import drives_fixture, target_fixture
from integrations.transformers import test_cache as cache
from integrations.transformers.test_cache import (  # noqa: F401
    test_crop_past_the_window_and_generate_again,
    test_second_turn_continues_from_the_cache,
)
from integrations.transformers.test_tokens import (  # noqa: F401
    test_chunked_prefill,
    test_either_order_on_the_drive,
    test_prompt_lookup_decoding,
    test_sliding_window_reads_only_the_window,
)
from integrations.transformers.test_trouble import (  # noqa: F401
    test_half_finished_forward_pass_is_noticed_and_mended_by_crop,
    test_two_caches_at_once_do_not_disturb_each_other,
)
from spdk_kv.store import KVStore
from store.helpers import check_books, open_store
from store.test_blobs import (  # noqa: F401
    test_a_future_s_callback_may_use_the_store,
    test_a_key_may_be_asked_for_twice_at_once,
    test_a_tensor_that_requires_grad_is_stored_as_its_values,
    test_every_dtype_of_torch_comes_back_with_its_bits,
    test_futures_carry_results_and_errors,
    test_futures_serve_asyncio,
    test_lazy_conjugates_and_negatives_are_stored_as_their_values,
    test_many_in_one_transfer,
    test_nothing_at_all_is_fine,
    test_numpy_arrays_go_in_and_out,
    test_numpy_views_with_negative_strides,
    test_sizes_and_addresses_off_every_boundary,
    test_views_are_stored_as_what_they_show,
    test_whatever_is_put_comes_back,
)
from store.test_out import (  # noqa: F401
    test_out_beside_a_missing_key_is_untouched,
    test_out_gets_the_bytes_and_nothing_around_it,
    test_out_of_another_shape_or_dtype_is_refused_and_untouched,
    test_out_that_cannot_be_written_is_refused_and_untouched,
    test_out_that_is_not_contiguous_is_filled_through_its_strides,
)

target, drives = target_fixture, drives_fixture


@pytest.fixture(scope="module")
def store(drives, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVStore]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_store(tmp_path_factory.mktemp("store"), capacity="256 MiB") as opened:
        assert opened.engine.name == "spdk"
        yield opened
        check_books(opened)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("seed", "resident"), [(0, 1), (1, 2), (2, 4)])
def test_random_changes_give_what_dynamic_cache_gives(store, seed, resident):
    cache.test_random_changes_give_what_dynamic_cache_gives(store, seed, resident)
