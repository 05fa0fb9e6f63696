r"""The head of a language model, by chunks: the matrix that logits come from, and what happens to them on the way.

.. math:: z = \frac{c}{\tau} \tanh\Big(\frac{s}{c} (h W^\top + b)\Big), \qquad
          \text{without a soft cap } z = \frac{s}{\tau} (h W^\top + b)

with s the logit scale (Cohere's ``logit_scale``; the inverse of Granite's ``logits_scaling``), c the soft cap (Gemma's
``final_logit_softcapping``, applied after the scale) and tau the sampling temperature.

Products are taken in float32 (float64 for float64 input). 16-bit inputs: on a CPU they are widened, block by block; on
an accelerator the product is 16-bit with float32 sums and a float32 result, so no logit and no gradient is rounded
twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from mirrorpo._checks import Float, Tensor
from mirrorpo.divergences.base import LOG_ZERO
from mirrorpo.errors import check_number, unknown_name

# Logits of one chunk, (chunk, V): on a CPU small enough to stay near the cores, large enough that reading the weight
# once a chunk costs little.
CPU_CHUNK_ELEMENTS = 1 << 23
DEVICE_CHUNK_ELEMENTS = 1 << 27
# Below this many rows a matrix product is bound by reading the weight.
SMALLEST_CHUNK = 256
# Elements that the element-wise part works on at once on a CPU: they and their temporaries stay in its caches.
CPU_BLOCK_ELEMENTS = 1 << 17
# Entries of a 16-bit weight that a CPU holds in float32 at once.
WIDENED_ELEMENTS = 1 << 22
_HALF = (torch.bfloat16, torch.float16)
# What works on the logits of a head: see ``mirrorpo.kernels.backend``.
KERNELS = ("torch", "triton", "auto")


@dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to logits.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: c > 0, or None.
        scale: s.
        temperature: tau > 0.
        kernels: what the sweeps over its logits run on: ``torch``; ``triton``, which reads a chunk of logits twice and
            writes it once (a GPU and the package triton; what it has no form for is taken by torch, with a warning);
            ``auto``, Triton where it can run and has a form.

    Raises:
        ValueError: shapes that do not fit, a number out of range, unknown kernels.

    Example:
        >>> import torch
        >>> Head(torch.eye(2), temperature=0.5).logits(torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    kernels: str = "torch"

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not self.weight.dtype.is_floating_point:
            raise ValueError(f"weight must be a floating (V, H), got {self.weight.dtype} {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must have shape ({self.vocabulary},), got {tuple(self.bias.shape)}")
        if self.softcap is not None:
            check_number("softcap", self.softcap, 0.0, open_low=True)
        check_number("scale", self.scale)
        check_number("temperature", self.temperature, 0.0, open_low=True)
        if self.kernels not in KERNELS:
            raise unknown_name("kernels", self.kernels, KERNELS)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def factor(self) -> float:
        """dz/d(h W^T + b), up to the soft cap's slope."""
        return self.scale / self.temperature

    @property
    def only_scales(self) -> bool:
        """Whether logits are products times ``factor``."""
        return self.bias is None and self.softcap is None

    def detached(self) -> Head:
        """The same head, constant."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def logits(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """All logits at once, by plain differentiable operations: what the sweeps are equal to."""
        work = work_dtype(hidden, self.weight)
        z = hidden.to(work) @ self.weight.to(work).t()
        if self.bias is not None:
            z = z + self.bias.to(work)
        if self.softcap is None:
            return z * self.factor
        return torch.tanh(z * (self.scale / self.softcap)) * (self.softcap / self.temperature)

    def transform_(self, z: Tensor) -> Tensor:
        """Products h W^T become logits, in place."""
        if self.bias is not None:
            z.add_(self.bias).clamp_(min=LOG_ZERO)  # a bias of -inf marks tokens that cannot occur
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.factor != 1.0:
            z.mul_(self.factor)
        return z

    def chain_(self, grad: Tensor, z: Tensor) -> Tensor:
        """``grad`` times the soft cap's slope at logits ``z``, in place; ``z`` is overwritten."""
        if self.softcap is None:
            return grad
        slope = z.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)
        return grad.mul_(slope)


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, statistics and accumulated gradients."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that products take their factors in: 16-bit only on an accelerator that adds up in float32."""
    device = hidden.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if device == "cuda" and hidden.dtype in _HALF and weight.dtype in _HALF:
        return hidden.dtype
    return work_dtype(hidden, weight)


def project_(out: Tensor, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """out = hidden weight^T, (C, V)."""
    if dtype in _HALF:
        torch.mm(hidden.to(dtype), weight.to(dtype).t(), out_dtype=out.dtype, out=out)
        return
    left = hidden.to(dtype)
    for columns, block in _widened(weight, dtype):
        torch.mm(left, block.t(), out=out[:, columns])


def add_hidden_grad_(out: Tensor, grad: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """out += grad weight, (C, H)."""
    if dtype == torch.bfloat16:
        torch.addmm(out, grad.to(dtype), weight.to(dtype), out_dtype=out.dtype, out=out)
        return
    for columns, block in _widened(weight, out.dtype):  # a gradient over all tokens is too small for float16
        out.addmm_(grad[:, columns], block)


def add_weight_grad_(out: Tensor, grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """out += grad^T hidden, (V, H)."""
    if dtype == torch.bfloat16:
        torch.addmm(out, grad.to(dtype).t(), hidden.to(dtype), out_dtype=out.dtype, out=out)
        return
    out.addmm_(grad.t(), hidden.to(out.dtype))


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in that dtype, whole where it has it already, else by blocks of the vocabulary."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    rows = max(1, WIDENED_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield part, weight[part].to(dtype)


def check_inputs(hidden: Tensor, head: Head, tokens: Tensor | None, chunk: int | None, name: str = "hidden") -> None:
    """Raises ``ValueError`` unless (N, H) hidden states, (N,) tokens and the head fit together."""
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1] or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"{name} must be a floating (N, {head.weight.shape[1]}), got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an integer >= 1, got {chunk!r}")
    if tokens is None:
        return
    if tokens.shape != hidden.shape[:1] or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError(
            f"tokens must be integers ({hidden.shape[0]},), got {tokens.dtype} {tuple(tokens.shape)}: one for each row "
            f"of {name}"
        )
    if tokens.device.type == "cpu" and tokens.numel():  # elsewhere the look would make the host wait
        low, high = (int(x) for x in torch.aminmax(tokens))
        if low < 0 or high >= head.vocabulary:
            raise ValueError(f"tokens must be in [0, {head.vocabulary}), got {low if low < 0 else high}")


def chunk_rows(num_tokens: int, vocabulary: int, device: torch.device, chunk: int | None) -> int:
    """Rows of each chunk: at most ``chunk`` (None: what suits the device), the chunks as equal as can be."""
    if chunk is None:
        elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
        chunk = max(SMALLEST_CHUNK, elements // max(1, vocabulary))
    return -(-num_tokens // max(1, -(-num_tokens // chunk)))


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Rows that the element-wise part works on at once; on an accelerator all of them."""
    return max(1, CPU_BLOCK_ELEMENTS // max(1, vocabulary)) if device.type == "cpu" else 1 << 62


def slices(length: int, size: int) -> Iterator[slice]:
    """[0, length) in pieces of ``size``."""
    for start in range(0, length, max(1, size)):
        yield slice(start, min(start + size, length))


@contextmanager
def memory_advice(head: Head, rows: int, buffers: int, device: torch.device, itemsize: int) -> Iterator[None]:
    """Out of memory becomes an error that says which ``chunk`` would have fitted."""
    try:
        yield
    except RuntimeError as error:
        # A CPU's allocator has no error class of its own, only this sentence.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        row = buffers * head.vocabulary * itemsize
        fitting = _free_bytes(device) // (2 * row)  # half of it: the gradients need room too
        advice = (
            f"chunk={min(fitting, max(1, rows // 2))} fits"
            if fitting
            else "not even chunk=1 fits: use a smaller model, or a device with more memory"
        )
        raise torch.OutOfMemoryError(
            f"out of memory with chunk={rows}: its logits take {buffers} x {rows} x {head.vocabulary} numbers "
            f"({rows * row / 2**30:.3g} GiB); {advice}"
        ) from error


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


__all__ = ["Head"]
