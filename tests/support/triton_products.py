"""The integer products of linear layers in Triton: a second implementation that shares nothing with our CUDA source.

    TRITON_INTERPRET=1 python triton_products.py interpret    # on the processor, against the definitions
    python triton_products.py compile 90                      # for a device, prints what it is compiled to

Weights are those of a checkpoint, not repacked. Run as a program, because Triton decides when a kernel is defined
whether it is interpreted.
"""

import json
import re
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def linear_w8a8(
    x, weight, x_scale, weight_scale, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        there = (start + k) < K
        a = tl.load(x + m[:, None] * K + (start + k)[None, :], mask=(m < M)[:, None] & there[None, :], other=0)
        b = tl.load(weight + n[None, :] * K + (start + k)[:, None], mask=(n < N)[None, :] & there[:, None], other=0)
        sums = tl.dot(a, b, sums)
    scales = tl.load(weight_scale + n, mask=n < N, other=0.0)
    values = (sums.to(tl.float32) * scales[None, :]) * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    tl.store(out + m[:, None] * N + n[None, :], values, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def linear_w4a8(
    x, weight, multiplier, x_scale, weight_scale, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    # Groups of G channels, K a multiple of G; a byte holds an even channel low and the next one high.
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, G // 2)
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for group in range(0, K // G):
        place = group * (G // 2) + k
        packed = tl.load(weight + n[None, :] * (K // 2) + place[:, None], mask=(n < N)[None, :], other=0).to(tl.int32)
        factor = tl.load(multiplier + n * (K // G) + group, mask=n < N, other=0).to(tl.int32)[None, :]
        even = ((((packed & 15) ^ 8) - 8) * factor).to(tl.int8)
        odd = ((((packed >> 4) ^ 8) - 8) * factor).to(tl.int8)
        row = x + m[:, None] * K + 2 * place[None, :]
        sums = tl.dot(tl.load(row, mask=(m < M)[:, None], other=0), even, sums)
        sums = tl.dot(tl.load(row + 1, mask=(m < M)[:, None], other=0), odd, sums)
    scales = tl.load(weight_scale + n, mask=n < N, other=0.0)
    values = (sums.to(tl.float32) * scales[None, :]) * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    tl.store(out + m[:, None] * N + n[None, :], values, mask=(m < M)[:, None] & (n < N)[None, :])


BLOCK, GROUP = 64, 64


def interpret() -> None:
    """Compare both kernels with the definitions for some ragged shapes; raises where one differs."""
    from dcomp.kernels import packing, reference

    generator = torch.Generator().manual_seed(0)
    for rows, outputs, depth in ((1, 16, 64), (77, 136, 192), (128, 72, 320)):
        q = torch.randint(-128, 128, (rows, depth), generator=generator, dtype=torch.int8)
        x_scale, scale = torch.rand(rows, generator=generator), torch.rand(outputs, generator=generator)
        weight = torch.randint(-127, 128, (outputs, depth), generator=generator, dtype=torch.int8)
        packed = torch.randint(0, 256, (outputs, depth // 2), generator=generator, dtype=torch.uint8)
        signs = torch.randint(0, 2, (outputs, depth // GROUP), generator=generator) * 2 - 1
        multiplier = (torch.randint(1, 16, signs.shape, generator=generator) * signs).to(torch.int8)
        grid = (triton.cdiv(rows, BLOCK), triton.cdiv(outputs, BLOCK))
        out = torch.full((rows, outputs), float("nan"))
        linear_w8a8[grid](q, weight, x_scale, scale, out, rows, outputs, depth, BLOCK, BLOCK, BLOCK)
        assert torch.equal(out, reference.linear_a8(q, x_scale, weight, scale, None)), (rows, outputs, depth)
        linear_w4a8[grid](q, packed, multiplier, x_scale, scale, out, rows, outputs, depth, BLOCK, BLOCK, GROUP)
        image = packing.int8_image(packed, multiplier, depth)
        assert torch.equal(out, reference.linear_a8(q, x_scale, image, scale, None)), (rows, outputs, depth)
    print(json.dumps({"exact": True}))


def compile_for(capability: int) -> None:
    """Compile both kernels without a device and print which instructions multiply, and what is spilled."""
    from triton.backends.compiler import GPUTarget

    pointers = {"x": "*i8", "x_scale": "*fp32", "weight_scale": "*fp32", "out": "*fp32"}
    sizes = dict.fromkeys("MNK", "i32")
    found = {}
    for kernel, own, blocks in (
        (linear_w8a8, {"weight": "*i8"}, {"BM": 128, "BN": 128, "BK": 64}),
        (linear_w4a8, {"weight": "*u8", "multiplier": "*i8"}, {"BM": 128, "BN": 128, "G": GROUP}),
    ):
        signature = pointers | own | sizes | dict.fromkeys(blocks, "constexpr")
        signature = {name: signature[name] for name in kernel.arg_names}
        aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name not in blocks}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=blocks, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        ptx = compiled.asm["ptx"]
        found[kernel.fn.__name__] = {
            "products": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync[\w.:]*", ptx))),
            "bytes": len(compiled.asm["cubin"]),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[2]))
