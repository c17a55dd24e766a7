"""Starts llama-cpp-python's OpenAI-compatible server with the states of its models in a store.

    python -m spdk_kv.integrations.llama_cpp.serve --kv_store file:///var/cache/kv --model FILE ...

All other arguments are the server's own. It makes its caches itself, of the two kinds that it has:
this gives each model that it loads a `StateCache` instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from spdk_kv.integrations.llama_cpp.cache import StateCache
from spdk_kv.store import open


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the server until it is stopped, and closes the store."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        print("\nAll other arguments are the server's:\n", flush=True)
        _server().main()  # shows them, and ends
    options, rest = parser.parse_known_args(arguments)
    server = _server()
    from llama_cpp.server.model import LlamaProxy

    load = LlamaProxy.load_llama_from_model_settings
    beginning: dict[str, Any] = {"read_only": True} if options.kv_read_only else {}
    # Who reads beside another server may be started with the same arguments as that one.
    if options.kv_capacity is not None and not options.kv_read_only:
        beginning["capacity"] = options.kv_capacity
    with open(options.kv_store, **beginning) as store:

        def load_with_states(settings: Any) -> Any:
            llama = load(settings)
            # What a model saw in pictures is not in the tokens that its states are found by.
            if settings.clip_model_path is None:
                llama.set_cache(
                    StateCache(
                        store, llama, least_tokens=options.kv_least_tokens, every=options.kv_every
                    )
                )
            return llama

        LlamaProxy.load_llama_from_model_settings = staticmethod(load_with_states)
        sys.argv[1:] = rest
        try:
            server.main()
        finally:
            LlamaProxy.load_llama_from_model_settings = staticmethod(load)


def _server() -> Any:
    from llama_cpp.server import __main__ as server

    return server


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: they might be the server's arguments. No --help: the server has one.
    parser = argparse.ArgumentParser(
        "python -m spdk_kv.integrations.llama_cpp.serve", allow_abbrev=False, add_help=False
    )
    parser.add_argument("--kv_store", required=True, help="where the store lies, as a URI")
    parser.add_argument("--kv_capacity", help='bytes at most, as in "16 GiB"')
    parser.add_argument("--kv_read_only", action="store_true", help="add nothing to the store")
    parser.add_argument(
        "--kv_least_tokens", type=int, default=64, help="shorter beginnings are not stored (64)"
    )
    parser.add_argument("--kv_every", type=int, default=256, help="tokens in a piece (256)")
    return parser


if __name__ == "__main__":
    main()
