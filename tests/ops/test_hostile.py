"""Native ops called with anything: they compute, or refuse with a Python error; they never touch memory not theirs.

By itself this shows that nothing crashes; `tests/native/test_sanitized_ops.py` runs it under ASan and UBSan.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unirank import ops  # noqa: F401 - loads the native library

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
native = torch.ops.unirank


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, dimensions: int = 3) -> torch.Tensor:
    """Of any shape, zero sizes too, and laid out in any way: transposed, sliced, expanded, overlapping, meta, lazy."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 7]), max_size=dimensions))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    tensor = (3 * torch.randn(shape, generator=generator)).to(dtype)
    special = draw(st.sampled_from([None, float("nan"), float("inf"), -float("inf"), 1e38]))
    if special is not None and tensor.numel() and dtype.is_floating_point:
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = special
    layout = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded", "overlapping", "gradient", "meta"]))
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, -1)
    if layout == "sliced" and tensor.ndim:
        return tensor[1::2]
    if layout == "expanded":
        return tensor.unsqueeze(0).expand(3, *shape)
    if layout == "overlapping" and tensor.numel() > 3:
        return tensor.view(-1).as_strided((3, 2), (1, 1))
    if layout == "gradient" and (dtype.is_floating_point or dtype.is_complex):
        return tensor.requires_grad_()
    return tensor.to("meta") if layout == "meta" and draw(st.booleans()) else tensor


sizes = st.integers(-3, 40) | st.sampled_from([2**31, 2**62, -(2**63), 2**63 - 1])
integers = tensors((torch.int64, torch.float64), 1) | st.lists(sizes, max_size=5).map(torch.tensor)
calls = st.one_of(
    st.tuples(st.just("cosine_accumulate_"), tensors(), tensors(), tensors()),
    st.tuples(st.just("gram_accumulate_"), tensors(), tensors(), tensors()),
    st.tuples(st.just("batched_eigh"), tensors()),
    st.tuples(st.just("batched_svd"), tensors()),
    st.tuples(
        st.just("global_topk"), tensors(dimensions=1), integers, integers, integers, sizes, sizes, sizes, st.booleans()
    ),
)


def attempt(call: tuple[Any, ...]) -> bool:
    """Whether it was computed; False where it was refused."""
    name, *arguments = call
    try:
        results = getattr(native, name)(*arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    for result in results if isinstance(results, tuple | list) else [results]:
        if isinstance(result, torch.Tensor) and not result.is_meta:
            result.detach().clone().sum()  # every byte of it is read
    return True


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls)
def test_anything_is_computed_or_refused(call: tuple[Any, ...]) -> None:
    assert attempt(call) in (True, False)


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[tuple[Any, ...], bool]:
    """Arguments that fit, with at most one of them replaced (what gets past the first check), and whether one was."""
    T, N, B = (draw(st.integers(0, 9)) for _ in range(3))
    x, y = torch.randn(T, N), torch.randn(T, N)
    K = torch.tensor(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), K.cumsum(0)])
    value = torch.cat([torch.rand(int(k)).sort(descending=True).values for k in K])
    call: list[Any] = list(
        draw(
            st.sampled_from(
                [
                    ("cosine_accumulate_", torch.zeros(3, dtype=torch.float64), x, y),
                    ("gram_accumulate_", torch.zeros(N, N), torch.zeros(N), x),
                    ("batched_eigh", torch.randn(B, N, N)),
                    ("batched_svd", torch.randn(B, T, N)),
                    ("global_topk", value, 3 * torch.ones_like(K), 9 * torch.ones_like(K), offsets, 99, 1, 1),
                    ("global_topk", value, 2 * K, 9 * torch.ones_like(K), offsets, 99, 1, 1, True),
                ]
            )
        )
    )
    index = draw(st.integers(0, len(call) - 1))
    if index:
        call[index] = draw(sizes if isinstance(call[index], int) else tensors())
    return tuple(call), index > 0


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(nearly_right())
def test_one_wrong_argument_is_computed_or_refused(case: tuple[tuple[Any, ...], bool]) -> None:
    call, replaced = case
    assert attempt(call) or replaced, call
