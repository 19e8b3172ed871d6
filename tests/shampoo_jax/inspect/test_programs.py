"""Programs read from their text: loops counted as often as they run, branches, arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

HIGHEST = jax.lax.Precision.HIGHEST


def program(function, *shapes):
    args = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    return sj.read_program(jax.jit(function).lower(*args).compile().as_text())


def test_products_of_a_loop_count_as_often_as_it_runs():
    def f(x, y):
        x = jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ x), x)
        return jnp.einsum("nij,njk->nik", x, y)

    found = program(f, (3, 8, 8), (3, 8, 16))
    assert sum(found.flops.values()) == 5 * 2 * 3 * 8**3 + 2 * 3 * 8 * 8 * 16


def test_the_dearest_branch_counts():
    def f(x, due):
        return jax.lax.cond(due > 0, lambda x: jnp.tanh(x @ x) @ x, lambda x: x * 2, x @ x)

    found = program(f, (16, 16), ())
    assert sum(found.flops.values()) == 3 * 2 * 16**3


def test_exchanges_in_a_loop_count_as_often_as_it_runs():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))

    def summed(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.psum(jnp.sin(x), "data"), x)

    spread = jax.shard_map(
        summed, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(spread).lower(x).compile().as_text()
    assert sj.read_program(text).exchanges == {"all-reduce": (3, 3 * 2 * 4 * 4)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[8]{0} all-gather(%x)", {"all-gather": (1, 32)}),
        ("%a = ((f32[1]{0}, f32[2]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%x, %y)",
         {"all-gather": (1, 96)}),
        ("%a = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)",
         {"collective-permute": (1, 32)}),
        ("%a = (bf16[8]{0}, f32[1]{0}) all-reduce-start(%x, %y)", {"all-reduce": (1, 20)}),
        ("%a = f32[8]{0} all-gather-done(%x)", {}),
        # As newer compilers write starts of all kinds.
        ("%a = ((f32[8]{0}, f32[16]{0}), (f32[1]{0}, f32[2]{0})) reduce-scatter-start(%x, %y)",
         {"reduce-scatter": (1, 12)}),
        ("%a = ((f32[8,2]{1,0:T(8,128)S(1)}), f32[8,2]{1,0}) all-to-all-start(%x)",
         {"all-to-all": (1, 64)}),
        ("%a = ((bf16[8]{0}), bf16[8]{0}) all-reduce-start(%x)", {"all-reduce": (1, 16)}),
        ("%a = ((f32[8]{0}), f32[8]{0}) collective-permute-start(%x)",
         {"collective-permute": (1, 32)}),
    ],
)  # fmt: skip
def test_bytes_of_exchanges_are_those_that_come(line, expected):
    assert sj.exchanges("  " + line) == expected


# As the compilers of other hardware write them, shortened.
GPU = """HloModule jit_f, is_scheduled=true

%nested (p0: f32[4,32,64], p1: f32[4,64,16]) -> f32[4,32,16] {
  %p0 = f32[4,32,64]{2,1,0} parameter(0)
  %p1 = f32[4,64,16]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,32,16]{2,1,0} dot(%p0, %p1), lhs_batch_dims={0}, \
lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, \
algorithm=dot_tf32_tf32_f32
}

%body (t: (s32[], f32[4,32,64])) -> (s32[], f32[4,32,64]) {
  %t = (s32[], f32[4,32,64]{2,1,0}) parameter(0)
  %x = f32[4,32,64]{2,1,0} get-tuple-element(%t), index=1
  %gemm = f32[4,32,16]{2,1,0} fusion(%x, %x), kind=kCustom, calls=%nested
  %all = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x), dimensions={0}
}

ENTRY %main (x: f32[4,32,64]) -> f32[4,32,64] {
  %x = f32[4,32,64]{2,1,0} parameter(0)
  %w = (s32[], f32[4,32,64]) while(%x), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %e = (f32[4,4]) custom-call(%x), custom_call_target="cusolver_syevd_ffi"
}
"""
TPU = """HloModule jit_f

%fused (p0: f32[4,32,64], p1: f32[4,64,16]) -> f32[4,32,16] {
  %p0 = f32[4,32,64]{2,1,0:T(8,128)S(1)} parameter(0)
  %p1 = f32[4,64,16]{2,1,0:T(8,128)} parameter(1)
  ROOT %c = f32[4,32,16]{2,1,0:T(8,128)} convolution(%p0, %p1), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf, operand_precision={highest,highest}
}

%body (t: (s32[], f32[4,32,64])) -> (s32[], f32[4,32,64]) {
  %t = (s32[]{:T(128)}, f32[4,32,64]{2,1,0}) parameter(0)
  %f = f32[4,32,16]{2,1,0:T(8,128)} fusion(%t, %t), kind=kOutput, calls=%fused
}

%cond (t: (s32[], f32[4,32,64])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(7)
  %t = (s32[]{:T(128)}, f32[4,32,64]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

ENTRY %main (x: f32[4,32,64]) -> f32[4,32,64] {
  %x = f32[4,32,64]{2,1,0} parameter(0)
  %w = (s32[], f32[4,32,64]) while(%x), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(("text", "kind"), [(GPU, "tf32_tf32_f32"), (TPU, "f32 highest")])
def test_programs_of_other_hardware(text, kind):
    found = sj.read_program(text)
    assert found.flops == {kind: 7 * 2 * 4 * 32 * 64 * 16}
    if text is GPU:
        # The start of an exchange names what is sent before what comes.
        assert found.exchanges == {"all-gather": (7, 7 * 16 * 8 * 4)}
        assert found.calls == {"cusolver_syevd_ffi": 1}


# The schedule of a step on GPUs, shortened; `{between}` stands between the start of an exchange and
# its end.
SCHEDULE = """HloModule jit_step, is_scheduled=true

%gemm (p0: f32[8,8]) -> f32[8,8] {
  %p0 = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p0, %p0), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%wrapped (q0: f32[8,8]) -> f32[1,8] {
  %q0 = f32[8,8]{1,0} parameter(0)
  ROOT %rs = f32[1,8]{1,0} reduce-scatter(%q0), dimensions={0}, to_apply=%sum
}

%body (t: (s32[], f32[1,8])) -> (s32[], f32[1,8]) {
  %t = (s32[], f32[1,8]{1,0}) parameter(0)
  %x = f32[1,8]{1,0} get-tuple-element(%t), index=1
  %y = f32[8,8]{1,0} fusion(%t), kind=kLoop, calls=%elementwise
  %s1 = ((f32[1,8]{1,0}), f32[8,8]{1,0}) all-gather-start(%x), dimensions={0}
  %between = {between}
  %d1 = f32[8,8]{1,0} all-gather-done(%s1)
  %s2 = ((f32[8,8]{1,0}), f32[1,8]{1,0}) async-start(%y), calls=%wrapped
  %u2 = ((f32[8,8]{1,0}), f32[1,8]{1,0}) async-update(%s2)
  %copy = f32[8,8]{1,0} copy(%y)
  %d2 = f32[1,8]{1,0} async-done(((f32[8,8]{1,0}), f32[1,8]{1,0}) %u2)
  %after = f32[8,8]{1,0} fusion(%y), kind=kCustom, calls=%gemm
  %waits = f32[8,8]{1,0} all-gather(%x), dimensions={0}
}

ENTRY %main (x: f32[1,8]) -> f32[1,8] {
  %x = f32[1,8]{1,0} parameter(0)
  %w = (s32[], f32[1,8]) while(%x), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""
GEMM = "f32[8,8]{1,0} fusion(%y), kind=kCustom, calls=%gemm"
ATTENTION = '(bf16[8], u8[16]) custom-call(%y), custom_call_target="__cudnn$fmhaSoftmax"'
BUFFER = 'f32[8] custom-call(), custom_call_target="AllocateBuffer"'


@pytest.mark.parametrize(
    ("between", "overlapped"),
    [
        (GEMM, {"all-gather": (3, 3 * 256)}),
        (ATTENTION, {"all-gather": (3, 3 * 256)}),
        (BUFFER, {}),
        ("f32[8,8]{1,0} fusion(%y), kind=kLoop, calls=%elementwise", {}),
    ],
)
def test_exchanges_overlap_with_what_is_computed_between_start_and_end(between, overlapped):
    found = sj.read_program(SCHEDULE.replace("{between}", between))
    assert found.overlapped == overlapped
    assert found.exchanges == {"all-gather": (6, 6 * 256), "reduce-scatter": (3, 3 * 32)}


def test_what_is_started_inside_of_a_wrapper_overlaps_as_well():
    found = sj.read_program(SCHEDULE.replace("%copy = f32[8,8]{1,0} copy(%y)", f"%copy = {GEMM}"))
    assert found.overlapped == {"reduce-scatter": (3, 3 * 32)}
