"""FLOPs of convolutions, as instructions and as calls of cuDNN."""

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax as sj
from shampoo_jax.inspect.convolutions import convolution_flops

# Of 32 images of 14 x 14, 3 x 3 with stride 2, 256 channels to 512.
FORWARD = 2 * 32 * 7 * 7 * 512 * 9 * 256
LINES = {
    "x": "bf16[32,14,14,256]{3,2,1,0} fusion(%a)",
    "y": "bf16[32,7,7,512]{3,2,1,0} fusion(%a)",
    "w": "bf16[512,3,3,256]{3,2,1,0} bitcast(%a)",
    "b": "f32[512]{0} fusion(%a)",
}
CALL = (
    "({result}{{3,2,1,0}}, u8[0]{{0}}) custom-call({operands}), window={{size=3x3 stride=2x2 "
    'pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{kind}"'
)


@pytest.mark.parametrize(
    ("kind", "operands", "result"),
    [
        ("Forward", "%x, %w", "bf16[32,7,7,512]"),
        ("BiasActivationForward", "%x, %w, %b", "bf16[32,7,7,512]"),
        ("BackwardInput", "%y, %w", "bf16[32,14,14,256]"),
        ("BackwardFilter", "%x, %y", "bf16[512,3,3,256]"),
    ],
)
def test_calls_of_cudnn(kind, operands, result):
    line = CALL.format(kind=kind, operands=operands, result=result)
    assert convolution_flops(line, LINES) == (FORWARD, operands[1])


def test_other_lines_are_none():
    dot = "f32[4,4] dot(%x, %w), lhs_contracting_dims={1}"
    call = 'f32[4,4] custom-call(%x, %w), custom_call_target="cusolver_syevd_ffi"'
    assert convolution_flops(dot, LINES) is None
    assert convolution_flops(call, LINES) is None
    assert convolution_flops(call + ", dim_labels=b01f_o01i->b01f", LINES) is None
    unknown = CALL.format(kind="Forward", operands="%a, %c", result="bf16[32,7,7,512]")
    assert convolution_flops(unknown, LINES) == (0, "a")


def test_a_program_with_its_gradient_counts_three_times_the_forward_pass():
    def loss(x, w):
        y = jax.lax.conv_general_dilated(
            x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y**2)

    x, w = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 16, 32))
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().as_text()
    assert sj.read_program(text).flops == {"f32": 3.0 * 2 * 4 * 4 * 4 * 32 * 9 * 16}
