#!/usr/bin/env bash
# Makes the environment of the Python $1 one in which SGLang's cache controller and host pools run
# without a GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wanted=$(grep -v '^#' "$here/requirements.txt")
# These would bring a torch for GPUs with them.
bare='^(sglang|compressed-tensors|triton)=='
grep -Ev "$bare" <<<"$wanted" | "$1" -m pip install -q -r /dev/stdin
grep -E "$bare" <<<"$wanted" | "$1" -m pip install -q --no-deps -r /dev/stdin

# SGLang imports torchvision, whose wheels on PyPI don't go with a torch for CPUs: names do.
site=$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for module in io transforms transforms/v2; do
    mkdir -p "$site/torchvision/$module"
    echo 'from torchvision import __getattr__' >"$site/torchvision/$module/__init__.py"
done
cp "$site/torchvision/io/__init__.py" "$site/torchvision/transforms/functional.py"
cp "$site/torchvision/io/__init__.py" "$site/torchvision/transforms/v2/functional.py"
cat >"$site/torchvision/__init__.py" <<'END'
class _Names(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (), {})
END
mkdir -p "$site/torchvision-0.28.0.dist-info"
printf 'Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n' \
    >"$site/torchvision-0.28.0.dist-info/METADATA"
