"""Batches of floats from packed bytes: the same bits as one image at a time, on every path, and
Triton's kernel in the interpreter."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.compile import missing_toolchain
from kernels import dispatch
from kernels import image_batch as module
from kernels.image_batch import image_batch
from tests import interpreted

GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
N, M = 11, 7
# H, W, C, size, and whether windows have corners.
SHAPES = [
    (64, 64, 3, 64, False),
    (28, 28, 1, 28, False),
    (9, 9, 3, 9, False),
    (1, 1, 1, 1, False),
    (16, 32, 3, 16, False),  # the left half of a pair
    (7, 19, 1, 7, False),
    (72, 72, 3, 64, True),
    (13, 17, 1, 5, True),
    (10, 9, 4, 9, True),
    (8, 8, 3, 8, True),  # one corner alone
]
CASES = [(*shape, flip) for shape in SHAPES for flip in (False, True)]


def given(
    height: int, width: int, channels: int, size: int, corners: bool, flip: bool
) -> list[Tensor | int | None]:
    """Arguments of `image_batch`: a row twice, the first and last row, the outermost corners."""
    random = torch.Generator().manual_seed(0)

    def integers(end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=random)

    images = integers(256, N, height, width, channels).to(torch.uint8)
    rows = integers(N, M)
    rows[1:4] = torch.tensor([N - 1, N - 1, 0])
    top = left = None
    if corners:
        top, left = integers(height - size + 1, M), integers(width - size + 1, M)
        top[:2], left[:2] = torch.tensor([0, height - size]), torch.tensor([0, width - size])
    return [images, rows, size, torch.arange(M) % 3 != 1 if flip else None, top, left]


def one_at_a_time(
    images: Tensor,
    rows: Tensor,
    size: int,
    flip: Tensor | None = None,
    top: Tensor | None = None,
    left: Tensor | None = None,
) -> Tensor:
    """Each image by itself, in float64, where x - 127.5 times a float32 is exact, rounded once."""
    scale = torch.tensor(1 / 127.5, dtype=torch.float32).double()
    batch = []
    for i, row in enumerate(rows.tolist()):
        y, x = (0 if corner is None else int(corner[i]) for corner in (top, left))
        window = images[row, y : y + size, x : x + size].permute(2, 0, 1)
        window = window.flip(2) if flip is not None and flip[i] else window
        batch.append(((window.double() - 127.5) * scale).float())
    return torch.stack(batch)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    channels, size = wanted.shape[1:3]
    assert found.stride() == (size * size * channels, 1, size * channels, channels)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@interpreted.either
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_have_the_bits_of_one_image_at_a_time(case):
    arguments = given(*case)
    before = arguments[0].clone()
    assert_same(image_batch(*arguments), one_at_a_time(*arguments))
    assert torch.equal(arguments[0], before)


@interpreted.either
def test_every_byte_has_its_value_and_the_extremes_are_exact():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    found = image_batch(images, torch.tensor([0]), 16)
    assert_same(found, one_at_a_time(images, torch.tensor([0]), 16))
    values = found.flatten()
    assert values[0] == -1 and values[255] == 1
    assert torch.equal(values, -values.flip(0)) and (values.diff() > 0).all()


@interpreted.either
def test_the_right_half_of_a_pair_is_a_window():
    images, rows, size, flip, _, _ = given(16, 32, 3, 16, False, True)
    left, top = torch.full((M,), size), torch.zeros(M, dtype=torch.int64)
    found = image_batch(images, rows, size, flip, top, left)
    assert_same(found, one_at_a_time(images[:, :, size:], rows, size, flip))


@interpreted.either
@pytest.mark.parametrize("corners", [False, True])
def test_datasets_beyond_two_gigabytes_are_addressed(corners, monkeypatch):
    """Memory that is not written to costs nothing, unless the interpreter copies it onto itself."""
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda to, _: to)
    images = torch.empty(2**31 // (64 * 64 * 3) + 3, 64, 64, 3, dtype=torch.uint8)
    last = len(images) - 1
    assert last * 64 * 64 * 3 > 2**31
    images[-2:].random_(generator=torch.Generator().manual_seed(0))
    rows, flip = torch.tensor([last, last - 1, last]), torch.tensor([False, True, True])
    size = 60 if corners else 64
    corner = (torch.tensor([4, 0, 3]), torch.tensor([4, 1, 0])) if corners else (None, None)
    found = image_batch(images, rows, size, flip, *corner)
    assert_same(found, one_at_a_time(images, rows, size, flip, *corner))


@interpreted.either
def test_one_image_and_many_chunks_of_images(monkeypatch):
    images, rows, *rest = given(9, 9, 3, 9, False, False)
    assert_same(image_batch(images, rows[:1], *rest), one_at_a_time(images, rows[:1], *rest))
    for floats in (1, 500):  # an image at a time, and two
        monkeypatch.setattr(module, "CACHED", floats)
        assert_same(image_batch(images, rows, *rest), one_at_a_time(images, rows, *rest))


@interpreted.either
def test_what_does_not_fit_is_refused_in_one_sentence():
    images, rows, size, flip, top, left = given(8, 8, 3, 6, True, True)

    def refused(match: str, *arguments: Tensor | int | None) -> None:
        with pytest.raises(ValueError, match=match) as told:
            image_batch(*arguments)
        assert "\n" not in str(told.value)

    kind = r"images must be contiguous uint8 \(n, H, W, C\), not "
    refused(kind + "float32", images.float(), rows, size)
    refused(kind + r"uint8 \(8, 8, 3\)", images[0], rows, size)
    refused(kind + ".*not contiguous", images.permute(0, 3, 1, 2), rows, size)
    refused(r"rows must be int64 \(M,\), not int32", images, rows.int(), size)
    refused(r"rows must be int64 \(M,\), not int64 \(7, 1\)", images, rows[:, None], size)
    refused(r"flip must be bool \(7,\), not uint8", images, rows, size, flip.byte(), top, left)
    refused(r"left must be int64 \(7,\), not int64 \(6,\)", images, rows, size, None, top, left[1:])
    refused("both top and left", images, rows, size, flip, top)
    refused("size 6 does not fit images of 8 x 8 pixels; .* needs top and left", images, rows, size)
    refused("size 9 does not fit images of 8 x 8 pixels$", images, rows, 9, flip, top, left)
    refused("one device for all", images, rows.to("meta"), 8)


def test_rows_and_corners_out_of_range_are_refused_on_a_cpu():
    images, rows, size, _, top, left = given(8, 8, 3, 6, True, False)
    with dispatch.using("reference"):
        for wrong in ((rows + N, top, left), (rows, top + 3, left), (rows, top, left + 3)):
            with pytest.raises(IndexError):
                image_batch(images, wrong[0], size, None, *wrong[1:])
        with pytest.raises(IndexError):
            image_batch(images, rows + N, 8)


# paths of plain PyTorch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_form_without_shapes_that_depend_on_data_has_the_same_bits(case):
    arguments = given(*case)
    torch.compiler.reset()
    fn = torch.compile(module.reference, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(fn(*arguments), one_at_a_time(*arguments))


@pytest.mark.skipif(dispatch.INTERPRET, reason="without the interpreter")
@pytest.mark.parametrize("case", [CASES[1], CASES[13]], ids=str)
def test_compiled_code_has_the_same_bits(case):
    if reason := missing_toolchain():
        pytest.skip(reason)
    arguments = given(*case)
    fn = torch.compile(image_batch, fullgraph=True)
    assert_same(fn(*arguments), one_at_a_time(*arguments))


@pytest.mark.parametrize("setting", ["fused", "reference"])
@pytest.mark.parametrize("device", ["meta", "cpu", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_tensors_have_shape_and_strides(case, device, setting):
    if device == "cuda" and setting == "fused" and not dispatch.TRITON:
        pytest.skip("Triton is for Linux")
    arguments = given(*case)
    wanted = one_at_a_time(*arguments)
    with FakeTensorMode() as mode, dispatch.using(setting):
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = [a.to(device) if isinstance(a, Tensor) else a for a in fake]
        found = image_batch(*fake)
    assert (found.shape, found.dtype, found.device.type) == (wanted.shape, torch.float32, device)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_tensors_without_data_have_shape():
    for case in CASES:
        arguments = [a.to("meta") if isinstance(a, Tensor) else a for a in given(*case)]
        found = image_batch(*arguments)
        assert found.is_meta and found.shape == (M, case[2], case[3], case[3])


# the kernel, in the interpreter


@pytest.mark.skipif(dispatch.INTERPRET, reason="this starts the interpreter")
def test_the_interpreted_tests_of_this_file_pass():
    interpreted.run(__file__, fewest=len(CASES) + 10)


@interpreted.only
def test_the_kernel_is_launched_once(monkeypatch):
    from kernels import image_batch_triton as triton

    launched = []
    monkeypatch.setattr(triton, "launchable", lambda k: launched.append(k.fn.__name__) or k)
    image_batch(*given(64, 64, 3, 60, True, True))
    assert launched == ["gather_kernel"]


@interpreted.only
@pytest.mark.parametrize("case", [CASES[1], CASES[12]], ids=str)
def test_the_kernel_compiles_as_one_opaque_operation(case):
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(str(graph.graph))
        return aot_eager(graph, inputs)

    arguments = given(*case)
    compiled = torch.compile(image_batch, fullgraph=True, backend=backend)
    assert_same(compiled(*arguments), one_at_a_time(*arguments))
    assert len(graphs) == 1 and graphs[0].count("saddle.image_batch") == 1


@interpreted.only
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[13]], ids=str)
def test_the_kernel_passes_the_checks_of_custom_operations(case):
    torch.library.opcheck(module.image_batch_op, tuple(given(*case)))


# the kernel, on a GPU


@GPU_ONLY
@pytest.mark.parametrize("setting", ["fused", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_gives_the_same_bits_without_waiting(case, setting):
    arguments = given(*case)
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with dispatch.using(setting):
            found = image_batch(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found.cpu(), one_at_a_time(*arguments))


@GPU_ONLY
@pytest.mark.parametrize("case", [CASES[1], CASES[13]], ids=str)
def test_a_gpu_gives_the_same_bits_compiled_and_captured(case):
    arguments = given(*case)
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    wanted = one_at_a_time(*arguments)
    assert_same(torch.compile(image_batch, fullgraph=True)(*moved).cpu(), wanted)
    image_batch(*moved)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = image_batch(*moved)
    moved[1].copy_(arguments[1].flip(0))
    graph.replay()
    arguments[1] = arguments[1].flip(0)
    assert_same(found.cpu(), one_at_a_time(*arguments))
