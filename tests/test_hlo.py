"""Counts of compiled programs, against counts by hand: on TPU slices that are not at hand, and of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import hlo
from alignax.mesh import sharding
from alignax.models import moe


def compiled(mesh, function, *shapes: tuple[tuple[int, ...], tuple[str | None, ...]], dtype=jnp.bfloat16) -> hlo.Program:
    """The program of a function of arrays, each with its shape and its logical axes."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes)) for shape, axes in shapes]
    return hlo.read(jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text())


@pytest.fixture
def mesh(tpu_slice):
    return tpu_slice("v5e:2x2", {"data": 2, "fsdp": 2})


def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[R, D], [L, D, D]: products one after another."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_products_in_a_loop_count_by_its_turns(mesh):
    """R 1,024 over 4 devices, D 512, 6 layers whose weights are gathered."""
    program = compiled(mesh, layers, ((1024, 512), ("batch", None)), ((6, 512, 512), (None, "embed", None)))
    assert hlo.flops(program) == 6 * 2 * 256 * 512 * 512 and program.unknown == 0


def test_gradients_of_a_loop_count_three_times(mesh):
    loss = lambda x, w: layers(x, w).astype(jnp.float32).sum()
    shapes = ((1024, 512), ("batch", None)), ((6, 512, 512), (None, "embed", None))
    assert hlo.flops(compiled(mesh, jax.grad(loss, (0, 1)), *shapes)) == 3 * 6 * 2 * 256 * 512 * 512


def test_collectives_in_a_loop_count_by_its_turns_and_name_their_devices(mesh):
    """Each of 6 weights of 512 x 512 in bfloat16 is gathered from 2 shards of fsdp: half of it is sent."""
    program = compiled(mesh, layers, ((1024, 512), ("batch", None)), ((6, 512, 512), (None, "embed", None)))
    found = hlo.collectives(program)
    assert sum(c.sent for c in found) == 6 * 512 * 512 * 2 / 2
    assert {c.group for c in found} == {(0, 1)} and {c.kind for c in found} <= {"all-gather", "collective-permute"}


def test_bytes_of_memory_are_those_of_arguments_and_results(mesh):
    """1 GB in and out by an addition; an array that a loop reads slice by slice is read once, not once a turn."""
    program = compiled(mesh, lambda x: x + 1, ((1 << 16, 1 << 13), ("batch", None)))
    assert hlo.moved(program) == pytest.approx(2 * (1 << 29) * 2 / 4, rel=1e-3)
    shapes = ((256, 2048), ("batch", None)), ((12, 2048, 2048), (None, None, None))
    read = 12 * 2048 * 2048 * 2
    assert read < hlo.moved(compiled(mesh, layers, *shapes)) < 1.5 * read


def test_a_loop_whose_turns_depend_on_data_counts_for_a_share_of_its_parts(mesh):
    """Blocks of 128 rows up to a row that the program is told."""

    def some(x: jax.Array, w: jax.Array) -> jax.Array:
        last = jnp.argmax(x[:, 0]) // 128

        def block(state):
            i, out = state
            own = jax.lax.dynamic_slice_in_dim(x, i * 128, 128)
            return i + 1, jax.lax.dynamic_update_slice_in_dim(out, own @ w, i * 128, 0)

        return jax.lax.while_loop(lambda state: state[0] < last, block, (jnp.zeros((), last.dtype), jnp.zeros_like(x)))[1]

    program = compiled(mesh, some, ((1024, 256), (None, None)), ((256, 256), (None, None)))
    one = 2 * 128 * 256 * 256
    assert program.unknown == 1
    assert [hlo.flops(program, {"": share}) / one for share in (0.0, 0.5, 1.0)] == [1, 4, 8]


def test_blocks_of_routed_experts_count_by_the_scope_of_their_loop(mesh):
    """Blocks of 512 rows, forward and backward: three products, then those again and two for each."""

    def some(x: jax.Array, share: jax.Array, chosen: jax.Array, *weights: jax.Array) -> jax.Array:
        return moe.apply_experts(jax.nn.silu, x, share, weights, chosen.astype(jnp.int32)).sum()

    D, F, E = 256, 128, 4
    shapes = ((1024, D), (None, None)), ((1024, 2), (None, None)), ((1024, 2), (None, None))
    weights = ((E, D, F), (None,) * 3), ((E, D, F), (None,) * 3), ((E, F, D), (None,) * 3)
    program = compiled(mesh, jax.grad(some, (0, 1, 3, 4, 5)), *shapes, *weights)
    one = (3 + 6) * 2 * 512 * D * F
    assert [hlo.flops(program, {"": 0.01, "experts": share}) / one for share in (0.25, 1.0, 1.5)] == [1, 4, 6]


@pytest.mark.parametrize("slices", [2, 4])
def test_what_crosses_slices_is_the_share_of_a_chip(slices, tpu_slice):
    """A gradient [1024, 512] in float32, summed over the rows of all slices: each chip's quarter crosses, twice (s - 1) / s of it."""
    mesh = tpu_slice("v5e:2x2", {"data": slices, "fsdp": 4, "slices": slices})
    place = sharding(mesh, ("embed", None))
    gradient = lambda x, y: jax.lax.with_sharding_constraint(x.T @ y, place)
    shapes = ((4096, 1024), ("batch", None)), ((4096, 512), ("batch", None))
    program = compiled(mesh, gradient, *shapes, dtype=jnp.float32)
    quarter = 1024 * 512 * 4 / 4
    assert hlo.sent_between(program, slices) == {"all-reduce": pytest.approx(2 * (slices - 1) / slices * quarter, rel=0.01)}
    assert sum(c.sent for c in hlo.collectives(program)) == pytest.approx(3 * quarter, rel=0.01)


@pytest.mark.parametrize(
    ("line", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[4,4]<=[8,2]T(1,0), dimensions={2}", (0, 2, 4, 6)),
        ("replica_groups=[8,2]<=[16], use_global_device_ids=true", (0, 1)),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1), x", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2] {'axis_2'}, x", (0, 1)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2], device_ids=([2,4,2]T(2,1,0)) {'axis_0'}, x", (0, 1)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=1,'axis_3'=2] {'axis_0','axis_1'}, x", tuple(range(0, 16, 2))),
        ("source_target_pairs={{0,2},{2,4},{4,6}}, x", (0, 2)),
    ],
)
def test_groups_of_devices_in_every_spelling(line, group):
    assert hlo.group(f"%all-reduce.1 = f32[8]{{0}} all-reduce(%x), {line}") == group


@pytest.mark.parametrize(("size", "kernel", "pad"), [(1, 16, 15), (8, 3, 1), (7, 2, 0)])
def test_products_of_convolutions_leave_padding_out(size, kernel, pad):
    """As many products as numpy's convolution of ones has terms."""
    out = size + 2 * pad - kernel + 1
    terms = np.convolve(np.ones(size), np.ones(kernel))[kernel - 1 - pad : kernel - 1 - pad + out].sum()
    text = (
        "HloModule m\n\nENTRY %main (a: f32[4]) -> f32[4] {\n"
        f"  %a = f32[8,{size},32]{{2,1,0}} parameter(0)\n  %b = f32[{kernel},32,64]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = f32[8,{out},64]{{2,1,0}} convolution(%a, %b), window={{size={kernel} pad={pad}_{pad}}}, dim_labels=b0f_0io->b0f\n}}\n"
    )
    assert hlo.flops(hlo.read(text)) == 2 * 8 * 64 * 32 * terms


def test_a_product_with_batches_and_two_contracted_dimensions():
    text = (
        "HloModule m\n\nENTRY %main (a: f32[4]) -> f32[4] {\n  %a = f32[3,8,5,7]{3,2,1,0} parameter(0)\n"
        "  %b = f32[3,5,7,2]{3,2,1,0} parameter(1)\n  ROOT %c = f32[3,8,2]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, "
        "lhs_contracting_dims={2,3}, rhs_batch_dims={0}, rhs_contracting_dims={1,2}\n}\n"
    )
    assert hlo.flops(hlo.read(text)) == 2 * 3 * 8 * 2 * 5 * 7
