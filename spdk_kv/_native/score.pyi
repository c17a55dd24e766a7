from typing_extensions import Buffer

def implementation() -> str: ...
def encode(
    keys: Buffer,
    mean: Buffer,
    signs: Buffer,
    codes: Buffer,
    scales: Buffer,
    implementation: str | None = None,
) -> None: ...
def score(
    queries: Buffer,
    signs: Buffer,
    codes: Buffer,
    scales: Buffer,
    out: Buffer,
    implementation: str | None = None,
) -> None: ...
def softmax_max(
    scores: Buffer, group: int, out: Buffer, implementation: str | None = None
) -> None: ...
def top_groups(
    scores: Buffer, count: int, out: Buffer, implementation: str | None = None
) -> None: ...
def gather(source: Buffer, offsets: Buffer, nbytes: int, target: Buffer) -> None: ...
