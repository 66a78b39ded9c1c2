"""The window between two chunks: local slots move up, keys turn to new positions, memory spreads.

Shapes: Y layers, B batch, S slots, M memory slots, H heads, D head size, P = D / 2 pairs. Slots are
tokens; a window's tensors are views of the same slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from echo_kernels.device import load_pairs, store_pairs, store_turned
from echo_kernels.dispatch import Op, expect
from echo_kernels.launch import block_of, kernel
from echo_kernels.rotate import check_slots, parts_of, rotate

if TYPE_CHECKING:
    import triton.language as tl


def check_advance(
    raw_YBSHD: Tensor, keys_YBSHD: Tensor, values_YBSHD: Tensor, rope_KP: Tensor, gone: int
) -> None:
    op, held = "chunk_advance", raw_YBSHD.shape[2]
    if not 0 <= gone <= held:
        raise ValueError(f"{op}: {gone} slots cannot leave; {held} are held")
    expect(op, "keys", keys_YBSHD, raw_YBSHD.shape)
    expect(op, "values", values_YBSHD, raw_YBSHD.shape)
    expect(op, "rope", rope_KP, (held - gone, raw_YBSHD.shape[-1] // 2))
    for name, part in (("raw", raw_YBSHD), ("keys", keys_YBSHD), ("values", values_YBSHD)):
        check_slots(op, name, part)


def advance_truth(
    raw_YBSHD: Tensor, keys_YBSHD: Tensor, values_YBSHD: Tensor, rope_KP: Tensor, gone: int
) -> None:
    """The first `gone` slots leave, the others take their place with keys turned by `rope`.

    With none gone, keys are turned where they are. The last `gone` slots are left as they were.
    """
    held = raw_YBSHD.shape[2]
    if gone:
        # In blocks that do not overlap.
        for slot in range(0, held - gone, gone):
            size = min(gone, held - gone - slot)
            for part in (raw_YBSHD, values_YBSHD):
                source = part[:, :, slot + gone : slot + gone + size]
                part[:, :, slot : slot + size].copy_(source)
    # Layer by layer, for the product is taken in float64: all at once would be gigabytes.
    for raw_BSHD, keys_BSHD in zip(raw_YBSHD, keys_YBSHD, strict=True):
        keys_BSHD[:, : held - gone].copy_(rotate(raw_BSHD[:, : held - gone], rope_KP))


@kernel
def chunk_advance_kernel(
    raw: tl.tensor, keys: tl.tensor, values: tl.tensor, rope: tl.tensor,
    kept: tl.tensor, gone: tl.tensor, step: tl.tensor, channels: tl.tensor, pairs: tl.tensor,
    raw_y: tl.tensor, raw_b: tl.tensor, keys_y: tl.tensor, keys_b: tl.tensor,
    values_y: tl.tensor, values_b: tl.tensor,
    MOVE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    raw += layer * raw_y + batch * raw_b
    keys += layer * keys_y + batch * keys_b
    values += layer * values_y + batch * values_b
    pair = tl.arange(0, BLOCK)
    real = pair < channels // 2
    turn = pair % pairs
    # Slots that move into one another are one program's, in order, so nothing is read too late.
    for slot in range(tl.program_id(0), kept, step):
        even, odd = load_pairs(raw + (slot + gone) * channels, pair, real)
        store_turned(keys + slot * channels, even, odd, rope + slot * pairs * 2, pair, turn, real)
        if MOVE:
            store_pairs(raw + slot * channels, even, odd, pair, real)
            even, odd = load_pairs(values + (slot + gone) * channels, pair, real)
            store_pairs(values + slot * channels, even, odd, pair, real)


def run_advance(
    raw_YBSHD: Tensor, keys_YBSHD: Tensor, values_YBSHD: Tensor, rope_KP: Tensor, gone: int
) -> None:
    layers, batch, held, heads, size = raw_YBSHD.shape
    kept = held - gone
    step = gone or kept
    chunk_advance_kernel.launch(
        (min(step, kept), batch, layers),
        raw_YBSHD, keys_YBSHD, values_YBSHD, parts_of(rope_KP),
        kept, gone, step, heads * size, size // 2,
        *raw_YBSHD.stride()[:2], *keys_YBSHD.stride()[:2], *values_YBSHD.stride()[:2],
        MOVE=gone > 0, BLOCK=block_of(heads * size // 2),
    )  # fmt: skip


def check_memory(
    k_BMHD: Tensor, v_BMHD: Tensor, rope_MP: Tensor, keys_YBMHD: Tensor, values_YBMHD: Tensor
) -> None:
    op = "place_memory"
    expect(op, "v", v_BMHD, k_BMHD.shape)
    expect(op, "rope", rope_MP, (k_BMHD.shape[1], k_BMHD.shape[-1] // 2))
    for name, part in (("keys", keys_YBMHD), ("values", values_YBMHD)):
        expect(op, name, part, (keys_YBMHD.shape[0], *k_BMHD.shape))
        check_slots(op, name, part)


def memory_truth(
    k_BMHD: Tensor, v_BMHD: Tensor, rope_MP: Tensor, keys_YBMHD: Tensor, values_YBMHD: Tensor
) -> None:
    """Give every layer the memory's one pair: keys turned by `rope`, values as they are."""
    keys_YBMHD.copy_(rotate(k_BMHD, rope_MP))
    values_YBMHD.copy_(v_BMHD)


@kernel
def place_memory_kernel(
    k: tl.tensor, v: tl.tensor, rope: tl.tensor, keys: tl.tensor, values: tl.tensor,
    layers: tl.tensor, tokens: tl.tensor, channels: tl.tensor, pairs: tl.tensor,
    keys_y: tl.tensor, keys_b: tl.tensor, values_y: tl.tensor, values_b: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = (batch * tokens + slot) * channels
    keys += batch * keys_b + slot * channels
    values += batch * values_b + slot * channels
    pair = tl.arange(0, BLOCK)
    real = pair < channels // 2
    even, odd = load_pairs(k + row, pair, real)
    value_even, value_odd = load_pairs(v + row, pair, real)
    for _ in range(layers):
        store_turned(keys, even, odd, rope + slot * pairs * 2, pair, pair % pairs, real)
        store_pairs(values, value_even, value_odd, pair, real)
        keys += keys_y
        values += values_y


def run_memory(
    k_BMHD: Tensor, v_BMHD: Tensor, rope_MP: Tensor, keys_YBMHD: Tensor, values_YBMHD: Tensor
) -> None:
    layers, batch, tokens, heads, size = keys_YBMHD.shape
    place_memory_kernel.launch(
        (tokens, batch),
        k_BMHD.contiguous(), v_BMHD.contiguous(), parts_of(rope_MP), keys_YBMHD, values_YBMHD,
        layers, tokens, heads * size, size // 2,
        *keys_YBMHD.stride()[:2], *values_YBMHD.stride()[:2],
        BLOCK=block_of(heads * size // 2),
    )  # fmt: skip


chunk_advance = Op("chunk_advance", check_advance, advance_truth, run_advance)
place_memory = Op("place_memory", check_memory, memory_truth, run_memory)
