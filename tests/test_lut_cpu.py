"""Products with packed codes on a CPU: right for every layout and shape, no byte beyond them read, and torch where there is no kernel."""

import ctypes
import mmap

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from conftest import signed
from leanquant import lut_cpu
from leanquant.linear import QuantizedLinear, prepare_linears
from leanquant.lut_cpu import can_multiply, packed_linear
from leanquant.packing import PackedLinear, pack_codes

LANES = lut_cpu.CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ())
needs_kernel = pytest.mark.skipif(not LANES, reason="needs a CPU with AVX2")  # the tests' other C++ needs a compiler too
LAYOUTS = [(4, "dense"), (3, "dense"), (2, "dense"), (3, "nibble"), (2, "nibble")]


def make(O: int, I: int, G: int, bits: int, layout: str = "dense", dtype=torch.float16) -> PackedLinear:
    """G = 0: free levels."""
    g = torch.Generator().manual_seed(O + I)
    codes = pack_codes(torch.randint(2**bits, (O, I), dtype=torch.uint8, generator=g), bits, layout)
    if not G:
        return PackedLinear(codes, torch.randn(O, 2**bits, generator=g).to(dtype))
    zero = torch.randint(2**bits, (O, G), dtype=torch.uint8, generator=g)
    return PackedLinear(codes, None, signed(torch.rand(O, G, generator=g) + 0.1).to(dtype), zero)


def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=LANES)
def lanes(request, monkeypatch):
    """The kernel for registers of so many words."""
    monkeypatch.setattr(lut_cpu, "CAPABILITIES", dict.fromkeys(lut_cpu.CAPABILITIES, (request.param,)))
    lut_cpu._lanes.cache_clear()
    yield request.param
    lut_cpu._lanes.cache_clear()


def assert_right(packed: PackedLinear, bits: int, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """As float32 sums are: against float64, of what is stored."""
    W = packed.dequantize(bits, x.shape[-1], torch.float64)
    y, exact = packed_linear(x, *packed, bias, bits), torch.nn.functional.linear(x.double(), W, None if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == exact.shape
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
    assert (y.double() - exact).norm() <= tolerance * exact.norm()


@needs_kernel
@pytest.mark.parametrize("bits, layout", LAYOUTS)
@pytest.mark.parametrize("O, I, G", [(1, 1, 0), (37, 200, 0), (5, 576, 0), (16, 256, 1), (9, 131, 1), (3, 1024, 4), (3, 1024, 2)])
def test_products(lanes, bits, layout, O, I, G):
    packed = make(O, I, G, bits, layout)
    assert can_multiply(packed, I)
    for N in (1, 2, 3, 4, 7, 16, 17, 70):
        assert_right(packed, bits, draw(N, I))


@needs_kernel
@pytest.mark.parametrize("few", [0, 10**6], ids=["rebuilt", "looked up"])
def test_many_tokens(lanes, few, monkeypatch):
    """More than half a megabyte of inputs is multiplied in turns; which way is a matter of the CPU."""
    monkeypatch.setattr(lut_cpu, "FEW_TOKENS", {lanes: few})
    monkeypatch.setattr(lut_cpu._library(lanes), "lut_is_amd", lambda: False)
    for O, I, G in ((37, 1000, 0), (5, 4096, 128)):
        assert_right(make(O, I, G, 4), 4, draw(300, I))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("G", [0, 1])
def test_types(lanes, G, dtype):
    packed = make(20, 300, G, 3, dtype=dtype)
    for wanted in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((300,), (2, 3, 300), (1, 30, 300), (2, 40, 300)):
            assert_right(packed, 3, draw(*shape, dtype=wanted))
            assert_right(packed, 3, draw(*shape, dtype=wanted), draw(20, dtype=wanted))
    assert packed_linear(draw(0, 300), *packed, None, 3).shape == (0, 20)


@needs_kernel
@pytest.mark.parametrize("has_units", [True, False])
def test_many_tokens_in_bfloat16(lanes, has_units, monkeypatch):
    """By the CPU's units for it, in three pieces of rows, whether this CPU has them or not."""
    monkeypatch.setattr(lut_cpu, "PIECE_WEIGHTS", 7 * 300)
    monkeypatch.setattr(lut_cpu, "_has_bfloat16", lambda: has_units)
    monkeypatch.setattr(lut_cpu._library(lanes), "lut_is_amd", lambda: False)
    mm, multiplied = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda x, W, out: multiplied.append((x.dtype, W.dtype)) or mm(x, W, out=out))
    for strided in (draw(300, 80, dtype=torch.bfloat16).T, draw(2, 80, 300, dtype=torch.bfloat16)[:, ::2]):
        assert_right(make(20, 300, 0, 4), 4, strided, draw(20, dtype=torch.bfloat16))
    assert multiplied == 6 * [2 * (torch.bfloat16 if has_units else torch.float32,)]


@needs_kernel
def test_a_weight_in_pieces(lanes, monkeypatch):
    monkeypatch.setattr(lut_cpu, "PIECE_WEIGHTS", 3 * 384)
    monkeypatch.setattr(lut_cpu._library(lanes), "lut_is_amd", lambda: False)
    assert_right(make(20, 300, 0, 4), 4, draw(80, 300))


@needs_kernel
def test_a_strided_input(lanes):
    assert_right(make(20, 300, 0, 4), 4, draw(300, 3).T)


@needs_kernel
@pytest.mark.parametrize("bits, layout", LAYOUTS)
@pytest.mark.parametrize("O, I, G", [(7, 200, 0), (7, 200, 1), (30, 5, 0), (3, 64, 2), (1, 1, 1)])
@pytest.mark.parametrize("at_end", [True, False])
def test_no_byte_beyond_a_tensor_is_read(lanes, bits, layout, O, I, G, at_end, monkeypatch):
    """Each lies at an end of memory that may be read: a process that reads on dies."""
    packed, x = make(O, I, G, bits, layout), draw(3, I)
    guarded, kept = zip(*(at_an_end(t, at_end) for t in (*packed, x)), strict=True)
    assert_right(PackedLinear(*guarded[:4]), bits, guarded[4])
    monkeypatch.setattr(lut_cpu, "FEW_TOKENS", {lanes: 0})
    monkeypatch.setattr(lut_cpu._library(lanes), "lut_is_amd", lambda: False)
    assert_right(PackedLinear(*guarded[:4]), bits, guarded[4])
    del kept


def at_an_end(tensor: torch.Tensor | None, at_end: bool) -> tuple:
    """A copy between two pages that may not be read, next to one of them, and the memory it lies in."""
    if tensor is None:
        return None, None
    memory, page = mmap.mmap(-1, 3 * mmap.PAGESIZE), mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert tensor.nbytes <= page
    for forbidden in (address, address + 2 * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    offset = 2 * page - tensor.nbytes if at_end else page
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    copy.copy_(tensor)
    return copy, memory


def test_groups_that_are_no_whole_registers_are_left_to_torch():
    assert not can_multiply(make(3, 60, 3, 4), 60)


@needs_kernel
@pytest.mark.parametrize("I, bits, levels", [(0, 4, 16), (64, 5, 32), (64, 8, 256), (64, 4, 8)])
def test_products_that_no_kernel_knows_are_refused(I, bits, levels):
    with pytest.raises(ValueError, match="no kernel of this CPU"):
        packed_linear(draw(2, I), torch.zeros(3, I, dtype=torch.uint8), torch.zeros(3, levels).half(), None, None, None, bits)


def test_other_types_of_levels_are_left_to_torch():
    packed = make(3, 96, 0, 4)
    assert not can_multiply(packed._replace(grid=packed.grid.float()), 96)


def forget() -> None:
    for cached in (lut_cpu._lanes, lut_cpu._library):
        cached.cache_clear()


@pytest.fixture
def anew():
    """Nothing has been asked of this machine yet, nor after the test."""
    forget()
    yield
    forget()


@needs_kernel
@pytest.mark.parametrize("name, value", [("CXX", "no-such-compiler"), ("CXX", "false"), ("PATH", "/nowhere")])
def test_without_a_compiler_weights_are_rebuilt(monkeypatch, anew, name, value):
    monkeypatch.setenv(name, value)
    linear = QuantizedLinear(make(3, 256, 0, 4), 4, 256, None)
    with pytest.warns(UserWarning, match="the CPU's kernels cannot be made, so that products are slower"):
        prepare_linears(linear, torch.float32, "auto")
    assert linear.form == "dense"


def test_torch_may_be_asked_for(monkeypatch, anew):
    monkeypatch.setenv("LEANQUANT_KERNELS", "torch")
    assert not can_multiply(make(3, 256, 0, 4), 256)


@needs_kernel
def test_what_is_compiled_is_kept(monkeypatch, anew, cache):
    assert can_multiply(make(3, 256, 0, 4), 256)
    made = list((cache / "kernels").iterdir())
    assert len(made) == 1 and (cache / "kernels").stat().st_mode & 0o077 == 0
    monkeypatch.setenv("CXX", "false")
    forget()
    assert can_multiply(make(3, 256, 0, 4), 256)


@needs_kernel
def test_what_is_damaged_is_made_again(anew, cache, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -pipe")  # with arguments
    compile = lut_cpu._compile
    monkeypatch.setattr(lut_cpu, "_compile", lambda lanes, out: out.write_bytes(b""))
    with pytest.warns(UserWarning, match="cannot be made"):
        assert lut_cpu._library(LANES[0]) is None
    monkeypatch.setattr(lut_cpu, "_compile", compile)
    lut_cpu._library.cache_clear()
    assert lut_cpu._library(LANES[0]) is not None


@needs_kernel
def test_a_folder_that_others_write_to_is_not_trusted(anew, cache):
    (cache / "kernels").mkdir()
    (cache / "kernels").chmod(0o777)
    assert lut_cpu._library(LANES[0]) is not None and not list((cache / "kernels").iterdir())


@needs_kernel
def test_no_home(anew, monkeypatch):
    monkeypatch.delenv("LEANQUANT_CACHE")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(lut_cpu.Path, "home", home)
    assert lut_cpu._library(LANES[0]) is not None


# --- the operator and the module ----------------------------------------------------------------------------------


def make_linear(bias: bool = True) -> QuantizedLinear:
    linear = QuantizedLinear(make(20, 300, 0, 4), 4, 300, draw(20) if bias else None)
    linear.prepare("looked_up", torch.float32)
    assert linear.form == "looked_up"
    return linear


@needs_kernel
@pytest.mark.parametrize("x", [draw(2, 3, 300), draw(20, 300).requires_grad_()], ids=["", "with a gradient"])
@pytest.mark.parametrize("bias", [None, draw(20)], ids=["", "bias"])
def test_operator_is_well_formed(x, bias):
    torch.library.opcheck(torch.ops.leanquant.packed_linear.default, (x, *make(20, 300, 0, 4), bias, 4))
    torch.library.opcheck(torch.ops.leanquant.packed_product.default, (x.detach(), *make(20, 300, 0, 4), bias, 4))


@needs_kernel
@pytest.mark.parametrize("tokens", [2, 40])
def test_defaults_of_torch_do_not_matter(tokens):
    linear, x = make_linear(), draw(tokens, 300)
    expected = linear(x)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(linear(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(linear(x), expected)


@needs_kernel
def test_what_sees_operations_sees_this_one():
    linear, x = make_linear(), draw(3, 300)
    with_gradient = (2 * x).requires_grad_()
    ways = (lambda: torch.jit.trace(linear, (x,)), lambda: make_fx(linear)(x), lambda: torch.export.export(linear, (x,)).module())
    with torch.no_grad():
        without = [way() for way in ways]
    for seen in (*(way() for way in ways), *without):
        torch.testing.assert_close(seen(2 * x), linear(2 * x))
        (gradient,) = torch.autograd.grad(seen(with_gradient).sum(), with_gradient)
        torch.testing.assert_close(gradient, torch.autograd.grad(linear(with_gradient).sum(), with_gradient)[0])
    torch.testing.assert_close(torch.func.vmap(linear)(x[:, None])[:, 0], linear(x), rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("bits", [4, 2])
def test_inputs_of_another_width_are_refused(bits):
    linear = QuantizedLinear(make(20, 600, 0, bits), bits, 600, None)
    linear.prepare("looked_up", torch.float32)
    for width in (300, 599, 601):
        with pytest.raises(RuntimeError, match="shape"):
            linear(draw(2, width))


@needs_kernel
def test_codes_elsewhere_and_strided_ones():
    linear = make_linear().to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        linear(draw(2, 300))
    packed = make(20, 300, 0, 4)
    strided = PackedLinear(*(None if t is None else t.T.contiguous().T for t in packed))
    products = [packed_linear(draw(2, 300), *weight, None, 4) for weight in (strided, packed)]
    torch.testing.assert_close(*products, rtol=0, atol=0)


@needs_kernel
def test_float64_is_left_to_torch():
    linear = QuantizedLinear(make(20, 300, 0, 4), 4, 300, draw(20))
    prepare_linears(linear, torch.float64, "auto")
    assert linear.form == "dense"
    assert torch.equal(make_linear()(draw(2, 300).double()), linear(draw(2, 300).double()))


@needs_kernel
def test_module_in_torch_compile_without_graph_breaks():
    linear, x = make_linear(), draw(3, 300)
    with torch.no_grad():
        compiled = torch.compile(lambda x: linear(x).relu(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), linear(x).relu(), rtol=0, atol=0)


@needs_kernel
def test_the_bias_is_a_part_of_the_operator():
    """torch.compile would merge one of its own with what follows: with vLLM's split into q, k and v, whose parts it then reads by the
    strides of the whole, far beyond them."""
    linear = make_linear()
    called = [node.target for node in make_fx(lambda x: linear(x))(draw(3, 300)).graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.leanquant.packed_linear.default]
    torch.testing.assert_close(linear.product(draw(3, 300), None) + linear.bias, linear(draw(3, 300)))


@needs_kernel
def test_gradients_reach_the_input_and_the_bias():
    linear, x = make_linear(), draw(3, 300).requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.float().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    linear.bias.requires_grad_()
    (2 * linear(x)).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full((20,), 6.0), rtol=0, atol=0)
    linear.bias.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), linear(x.detach()), rtol=0, atol=0)


@needs_kernel
def test_a_module_that_is_loaded_or_cast_is_still_right():
    linear, other = make_linear(), make_linear()
    expected, x = linear(draw(3, 300)), draw(3, 300)
    other.weight_codes = torch.zeros_like(other.weight_codes)
    other.load_state_dict(linear.state_dict())
    assert other.form == "looked_up"
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    half = linear.to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.05, atol=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("I, form", [(320, "tiles"), (24, "dense")])
def test_a_module_that_has_moved_to_a_gpu_takes_a_form_for_there(I, form):
    linear = QuantizedLinear(make(20, I, 1 if form == "tiles" else 3, 4), 4, I, None)
    x = draw(3, I)
    expected, linear.form = linear(x), "looked_up"
    moved = linear.cuda()
    torch.testing.assert_close(moved(x.cuda().half()).cpu().float(), expected, rtol=0.01, atol=0.05)
    assert moved.form == form
