"""Every kernel compiled for a Hopper GPU where there is none: by the calls that launch it, on tensors without memory.

    python tests/kernels/compiled_kernels.py [WORDS]     a table: shared memory, registers and spills of each kernel,
                                                         of the calls whose names hold a word

Tensors pretend to be on an H200, and a launch stops where the compiler is done. What is seen: that wrappers and kernels
fit each other and the compiler takes them, in 16-bit types and float32, with the stored shapes and the options that
only a GPU gets (descriptors, launches that wait in the kernel); and what a program needs of a multiprocessor. What is
not seen: what a kernel computes, and whether the driver takes the launch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from imagined_hopper import CUDA, imagine_h200, resources


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What one launch would run."""

    call: str
    """Which call launched it."""
    kernel: str
    """Its name."""
    shared_bytes: int
    """Of a program."""
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread's registers, in memory."""
    warps: int
    """Of a program."""
    reads_shared_cache: bool
    """Some of its loads pass a multiprocessor's own cache."""


def compile_calls(words: list[str]) -> list[Compiled]:
    """All kernels of the calls whose names hold one of `words`; of all calls without."""
    rows: list[Compiled] = []
    seen: set[str] = set()
    found = imagine_h200()
    for name, call in calls():
        if words and not any(word in name for word in words):
            continue
        call()
        for key in found.keys() - seen:
            kernel = found[key]
            registers, spilled = resources(kernel.asm["cubin"])
            rows.append(
                Compiled(
                    call=name,
                    kernel=kernel.name,
                    shared_bytes=kernel.metadata.shared,
                    registers=registers,
                    spilled_bytes=spilled,
                    reads_shared_cache="ld.global.cg" in kernel.asm["ptx"],
                    warps=kernel.metadata.num_warps,
                )
            )
        seen.update(found)
    return rows


# ---- the calls -------------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Each with a name."""
    for shape in ((16, 8, 128), (32, 8, 128), (32, 4, 128), (32, 8, 64), (14, 2, 64), (8, 4, 256)):
        yield from _attention(shape, torch.bfloat16)
    yield from _attention((24, 24, 96), torch.float16)
    yield from _attention((4, 2, 16), torch.float32)
    yield from _attention((16, 8, 128), torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _layers(dtype)
        yield from _experts(dtype)
        yield from _draws(dtype)
    yield "float32 router", partial(_route, torch.float32, True)
    yield "few rows", partial(_few_rows, 9)
    yield "every launch of products", partial(_few_rows, 1)
    yield "copies", _copies


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def _numbers(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.int32)


def _attention(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    for window in (None, 1024):
        for exact in (False, True):
            said = f"{shape} {dtype} window={window} exact={exact}".replace("torch.", "")
            for batch in (1, 64, 512):
                call = partial(_decode, shape, dtype, window, exact, batch)
                yield f"decode of {batch} {said}", call
            yield f"prefill {said}", partial(_prefill, shape, dtype, window, exact)
            if window is None:
                for batch in (8, 256):
                    call = partial(_shared, shape, dtype, exact, batch)
                    yield f"shared prefixes of {batch} {said}", call


def _batch(
    shape: tuple[int, int, int], dtype: torch.dtype, batch: int, block_size: int
) -> dict[str, Any]:
    heads, kv_heads, size = shape
    return {
        "q": _empty(batch, (heads + 2 * kv_heads) * size, dtype=dtype)[:, : heads * size].unflatten(
            1, (heads, size)
        ),
        "pool": _empty(64, block_size, 2, kv_heads, size, dtype=dtype),
        "block_tables": _numbers(batch, 256),
        "seq_lens": _numbers(batch),
        "out": _empty(batch, heads, size, dtype=dtype),
        "scale": size**-0.5,
    }


def _workspace(shape: tuple[int, int, int], batch: int) -> dict[str, Any]:
    sizes = dict(zip(("num_heads", "num_kv_heads", "head_dim"), shape, strict=True))
    return {"max_batch": batch, **sizes, "device": CUDA}


def _decode(
    shape: tuple[int, int, int], dtype: torch.dtype, window: int | None, exact: bool, batch: int
) -> None:
    from rollout_kernels.paged_decode import DecodeWorkspace, paged_decode

    for few in (False, True):
        paged_decode(
            **_batch(shape, dtype, batch, 16),
            window=window,
            workspace=DecodeWorkspace.allocate(**_workspace(shape, batch)),
            deterministic=exact,
            max_len=40960,
            order=_numbers(batch),
            few_kernels=few,
        )


def _shared(shape: tuple[int, int, int], dtype: torch.dtype, exact: bool, batch: int) -> None:
    from rollout_kernels.paged_decode import DecodeWorkspace
    from rollout_kernels.shared_prefix_decode import SharedState, shared_prefix_decode
    from rollout_kernels.shared_prefixes import SharedPrefixes, num_numbers

    sizes = _workspace(shape, batch)
    shared_prefix_decode(
        **_batch(shape, dtype, batch, 16),
        shared=SharedPrefixes.views(_numbers(num_numbers(batch)), batch),
        workspace=DecodeWorkspace.allocate(**sizes),
        state=SharedState.allocate(**sizes),
        deterministic=exact,
        max_len=40960,
        order=_numbers(batch),
    )


def _prefill(
    shape: tuple[int, int, int], dtype: torch.dtype, window: int | None, exact: bool
) -> None:
    from rollout_kernels.paged_prefill import paged_prefill

    for block_size, most in ((16, 1), (16, 8192), (256, 8192)):
        sizes = _batch(shape, dtype, 4, block_size)
        sizes["q"] = _batch(shape, dtype, 8192, block_size)["q"]
        sizes["out"] = _empty(8192, shape[0], shape[2], dtype=dtype)
        paged_prefill(
            **sizes,
            query_starts=_numbers(5),
            window=window,
            max_query_len=most,
            deterministic=exact,
        )


def _layers(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    from rollout_kernels.fused_norm import add_rms_norm
    from rollout_kernels.invariant_matmul import invariant_linear
    from rollout_kernels.qk_norm_rope import HeadNorms, rotate_and_store
    from rollout_kernels.silu_mul import silu_mul

    empty = partial(_empty, dtype=dtype)

    def norms() -> None:
        for size in (64, 1024, 2560, 5120, 8192):
            x, weight = empty(8, size), empty(size)
            add_rms_norm(x, empty(8, size), weight, 1e-6, empty(8, size))
            add_rms_norm(x, None, weight, 1e-6, empty(8, size))

    def rotation() -> None:
        for heads, kv_heads, size, turned in (
            *((16, 8, 128, 128), (14, 2, 64, 64), (4, 2, 16, 16)),
            *((24, 24, 96, 96), (8, 4, 256, 64)),
        ):
            for normed in (False, True):
                norms = HeadNorms(query=empty(size), key=empty(size), eps=1e-6)
                rotate_and_store(
                    empty(8, (heads + 2 * kv_heads) * size),
                    empty(64, 16, 2, kv_heads, size),
                    empty(4096, turned),
                    _numbers(8),
                    _numbers(8),
                    norms=norms if normed else None,
                )

    def gates() -> None:
        for width in (96, 3072, 12288):
            silu_mul(empty(70000, 2 * width), empty(70000, width))

    def products() -> None:
        for rows, columns, depth in ((1, 1, 1), (1, 4096, 4096), (8192, 4096, 1024), (8, 100, 72)):
            for bias in (None, empty(columns)):
                invariant_linear(empty(rows, depth), empty(columns, depth), bias)

    named = {"norms": norms, "rotation": rotation, "gates": gates, "products": products}
    for name, call in named.items():
        yield f"{name} {dtype}".replace("torch.", ""), call


def _experts(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    from rollout_kernels import expert_configs

    said = str(dtype).replace("torch.", "")
    stored = json.loads(expert_configs.FILE.read_text())
    for device in stored:
        for limit, config in expert_configs._entries(device):
            if dtype != torch.bfloat16:
                continue  # those have smaller tiles: by the number of rows below
            yield f"experts {said} {device} {limit:.0f}", partial(_grouped, dtype, 64, config)
    for tokens in (1, 8, 64, 256, 1024, 8192):
        yield f"experts of {tokens} {said}", partial(_grouped, dtype, tokens, None)
    for hidden, width in ((2048, 768), (72, 40)):
        call = partial(_grouped, dtype, 300, expert_configs.EXACT, hidden, width)
        yield f"experts exact {hidden} {said}", call
    yield f"experts of sizes that tiles cut {said}", partial(_grouped, dtype, 300, None, 72, 40)
    yield f"router {said}", partial(_route, dtype, False)


def _grouped(
    dtype: torch.dtype, tokens: int, config: Any, hidden: int = 2048, width: int = 768
) -> None:
    from rollout_kernels.grouped_experts import grouped_experts

    for count, first in ((128, 0), (64, 64)):
        grouped_experts(
            _empty(tokens, hidden, dtype=dtype),
            _empty(tokens, 8, dtype=torch.float32),
            _empty(tokens, 8, dtype=torch.int64),
            _empty(count, 2 * width, hidden, dtype=dtype),
            _empty(count, hidden, width, dtype=dtype),
            first_expert=first,
            config=config,
        )


def _route(dtype: torch.dtype, grouped: bool) -> None:
    from rollout_kernels.expert_routing import Routing, choose_experts

    routing = Routing(
        top_k=8,
        sigmoid=grouped,
        normalise=True,
        scale=2.5 if grouped else 1.0,
        num_groups=8 if grouped else 1,
        top_groups=4 if grouped else 1,
        rounded=not grouped,
    )
    experts = 256 if grouped else 128
    for tokens in (1, 64):
        choose_experts(
            _empty(tokens, experts, dtype=dtype),
            _empty(experts, dtype=torch.float32) if grouped else None,
            routing,
            slots=_numbers(tokens),
            routes=_empty(1025, 4, 8, dtype=torch.int16)[:, 1] if tokens > 1 else None,
        )


def _draws(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    for vocab in (151936, 320, 1):  # the compiler takes an argument that is 1 for a constant
        for edited in (False, True):
            for filtered in (False, True):
                said = f"{vocab} {dtype} edits={edited} filters={filtered}"
                call = partial(_draw, dtype, vocab, edited, filtered)
                yield f"draws {said}".replace("torch.", ""), call
        said = f"log-probabilities {vocab} {dtype}".replace("torch.", "")
        yield said, partial(_logprobs, dtype, vocab)


def _draw(dtype: torch.dtype, vocab: int, edited: bool, filtered: bool) -> None:
    from rollout_kernels.logit_edits import LogitEdits
    from rollout_kernels.logit_filters import SamplingFilters
    from rollout_kernels.sampling import SampledTokens, SamplingRows, SamplingScratch, sample

    num = 256
    numbers = partial(_numbers, num)
    reals = partial(_empty, num, dtype=torch.float32)
    edits = LogitEdits(
        counts=_empty(8, vocab, dtype=torch.int16),
        tables=numbers(),
        repetition=reals(),
        frequency=reals(),
        presence=reals(),
        bias_ids=_numbers(num, 4),
        biases=_empty(num, 4, dtype=torch.float32),
        num_biases=numbers(),
        end_ids=_numbers(num, 2),
        num_ends=numbers(),
        min_tokens=numbers(),
    )
    filters = SamplingFilters(top_k=numbers(), top_p=reals(), min_p=reals())
    for rows in (None, numbers()):
        sample(
            _empty(num, vocab, dtype=dtype),
            SamplingRows(
                seeds=_empty(num, dtype=torch.int64),
                positions=numbers(),
                temperature=reals(),
                greedy=_empty(num, dtype=torch.bool),
                logit_rows=rows,
            ),
            SamplingScratch.allocate(num, vocab, CUDA),
            SampledTokens.allocate(num, CUDA),
            edits=edits if edited else None,
            filters=filters if filtered else None,
        )


def _logprobs(dtype: torch.dtype, vocab: int) -> None:
    from rollout_kernels.logit_stats import LogitStats
    from rollout_kernels.token_logprobs import gather_logprobs, top_logprobs

    num, stats = 8, LogitStats.allocate(8, vocab, CUDA)
    logits, heat = _empty(num, vocab, dtype=dtype), _empty(num, dtype=torch.float32)
    for rows in (None, _numbers(num)):
        for width in (1, 5):
            given, values = _numbers(num, width), _empty(num, width, dtype=torch.float32)
            gather_logprobs(logits, heat, given, stats, values, logit_rows=rows)
            best = _empty(num, width, dtype=torch.int64)
            top_logprobs(logits, heat, _numbers(num), stats, best, values, logit_rows=rows)


def _few_rows(step: int) -> None:
    """Every `step`-th launch that the search tries."""
    from rollout_benchmarks.few_rows import candidates
    from rollout_kernels.few_rows_matmul import few_rows_linear

    weight = _empty(4096, 1024, dtype=torch.bfloat16)
    for config in list(candidates())[::step]:
        for rows in (1, 16):
            few_rows_linear(_empty(rows, 1024, dtype=torch.bfloat16), weight, None, None, config)


def _copies() -> None:
    """Launches of tables, whose pieces and addresses do not matter to the compiler."""
    from rollout_kernels import fingerprint
    from rollout_kernels.copy_table import _Elements, _Words

    def longs(*shape: int) -> torch.Tensor:
        return _empty(*shape, dtype=torch.int64)

    fingerprint.fine_keys = lambda device: longs(1024)
    half, wide = torch.bfloat16, torch.float32
    same = (torch.int8, torch.int16, torch.int32, torch.int64)
    pairs = [(wide, half), (half, wide), *((each, each) for each in same)]
    batches: list[Any] = [_Words(longs(4, 7), 1, aligned) for aligned in (False, True)]
    for flat, aligned in ((True, True), (True, False), (False, False)):
        for pair in pairs if aligned or not flat else pairs[:1]:
            batches.append(_Elements(longs(4, 4), longs(4, 20), 1, *pair, flat, aligned))
    for batch in batches:
        whole = isinstance(batch, _Words) or batch.source == wide
        for num, copy in ((3, True), (3, False), (0, True))[: 3 if whole else 1]:
            out, addresses = longs(2, num), (longs(4), longs(4), longs(1024))
            for back in (False, True)[: 1 + (isinstance(batch, _Words) and copy and num > 0)]:
                more: dict[str, bool] = {"copy": copy, "finite": copy and not back}
                batch.launch(*addresses, out, longs(max(num, 1)), read_back=back, **more)
    for even in (False, True):
        fingerprint.launch(longs(4096), longs(4, 6), longs(1024), longs(3), even=even)


def main() -> None:
    """The table, or with "--json" the rows."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    rows = compile_calls(words)
    if "--json" in sys.argv:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'kernel':20} {'warps':>5} {'shared':>7} {'registers':>9} {'spilled':>7}  call")
    for row in sorted(rows, key=lambda row: (row.kernel, row.call)):
        cells = f"{row.warps:5} {row.shared_bytes:7} {row.registers:9} {row.spilled_bytes:7}"
        print(f"{row.kernel:20} {cells}  {row.call}")


if __name__ == "__main__":
    main()
