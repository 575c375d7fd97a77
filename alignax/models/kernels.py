"""Attention kernels of TPUs and GPUs, and the choice among them. Without one, `alignax.models.attention` computes.

For padded rows `splash` is JAX's Pallas kernel for TPUs, and `cudnn` is NVIDIA's kernel for GPUs. Both compute what `attention` computes,
but never write its scores [t, s] to the main memory. For packed rows the kernel of TPUs is `alignax.models.packed_kernel`. It is called
"splash" too, since both visit only the blocks that are seen. On a mesh every device runs the kernel on its own rows and heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from alignax import mesh as meshes
from alignax.models.attention import KEPT, attention

KERNELS = ("auto", "xla", "splash", "cudnn")
OWN = {"tpu": "splash", "gpu": "cudnn"}  # the kernel of a platform
LEAST = 128  # fewest tokens of a row for which "auto" takes a kernel: in shorter rows most of a tile is padding
# How many queries, and how many keys, a block may have. Larger blocks read the keys fewer times, and have fewer grid steps with their
# overhead. Beyond 512, causal attention computes more scores that it then masks, and with large heads the float32 scores of a block no
# longer fit into a TPU's vector memory.
BLOCKS = (512, 384, 256, 128)
# How much of the vector memory of the smallest TPUs, which is 16 MiB, the kernel of packed rows may take for queries, gradients and sums.
VECTOR_MEMORY = 15 << 20
# A policy of `jax.checkpoint` that keeps the outputs and softmax normalisers of kernels, so that no forward pass of one runs twice. It
# finds them by their name, and those of cuDNN by the name of its primitive.
attention_saveable = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(KEPT), lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd")
)


def platform(mesh: Mesh | None) -> str:
    """The platform of a mesh's devices, which need not be at hand: "cpu", "tpu" or "gpu"; without a mesh, of JAX's default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def chosen(name: str, config: Any, dtype: Any, tokens: int, platform: str, block: int = 0) -> tuple[str, str]:
    """The kernel for the rows of a model, "xla", "splash" or "cudnn"; and why "auto" did not take the platform's own, else "".

    Args:
      name: one of `KERNELS`; "auto" is the platform's own kernel if its conditions hold.
      config: the `ModelConfig`.
      dtype: the dtype of activations.
      tokens: T, the length of padded rows.
      platform: where they are computed, see `platform`.
      block: of packed rows the tokens of a block; 0: rows are padded.

    Raises:
      ValueError: for an unknown name, and for a named kernel whose conditions do not hold.
    """
    if name not in KERNELS:
        raise ValueError(f"model.attention {name!r} is unknown; use {', '.join(KERNELS)}")
    if name == "auto":
        if platform not in OWN:
            return "xla", f"there is no other kernel for {platform}"
        if tokens < LEAST and not block:
            return "xla", f"rows of {tokens} tokens are below {LEAST}"
        why = unmet(OWN[platform], config, dtype, platform, block)
        return ("xla", why) if why else (OWN[platform], "")
    if name != "xla" and (why := unmet(name, config, dtype, platform, block)):
        raise ValueError(f"model.attention is {name!r}, and {why}; or set model.attention=auto")
    return name, ""


def unmet(kernel: str, config: Any, dtype: Any, platform: str, block: int = 0) -> str:
    """The condition of "splash" or "cudnn" that a model does not meet, with the value and the remedy; "" if it meets all."""
    c = config
    if OWN.get(platform) != kernel:
        return f"{kernel} is for {'TPUs' if kernel == 'splash' else 'NVIDIA GPUs'}, not for {platform}; use model.attention=xla"
    if c.head_dim % 8:
        return f"{kernel} needs heads whose size is a multiple of 8, and the model's head_dim is {c.head_dim}; use model.attention=xla"
    if kernel == "splash":
        group, most = c.num_attention_heads // c.num_key_value_heads, VECTOR_MEMORY
        if block and (held := group * block * c.head_dim * (6 * jnp.dtype(dtype).itemsize + 4)) > most:
            return (
                f"splash holds {held >> 20} MiB for the {group} query heads of a key-value head in packed rows, more than {most >> 20}; "
                "use model.attention=xla or model.packing=-1"
            )
        return ""
    if block:
        return "cudnn is for padded rows, and rows are packed here; set model.packing=-1"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cudnn computes in bfloat16 or float16, and the model in {jnp.dtype(dtype).name}; set model.dtype=bfloat16"
    if c.attn_logit_softcapping is not None:
        return f"cudnn cannot cap attention scores, and the model caps them at {c.attn_logit_softcapping}; use model.attention=xla"
    if c.head_dim > 256:
        return f"cudnn needs heads of size 256 or less, and the model's head_dim is {c.head_dim}; use model.attention=xla"
    fault = _fault(c.head_dim, c.num_attention_heads // c.num_key_value_heads, jnp.dtype(dtype), any(c.sliding_windows))
    return f"JAX refuses cudnn on this machine: {fault}; use model.attention=xla" if fault else ""


@functools.cache
def _fault(head: int, group: int, dtype: Any, windows: bool) -> str:
    """The error of JAX for cuDNN attention with these heads on the GPU of this machine, found by tracing on shapes; "" if there is none."""
    shape = lambda heads: jax.ShapeDtypeStruct((1, LEAST, heads, head), dtype)
    mask = jax.ShapeDtypeStruct((1, LEAST), bool)
    run = lambda q, k, v, mask: cudnn(q, k, v, mask, windows=(LEAST // 2,) if windows else ()).astype(jnp.float32).sum()
    try:
        jax.eval_shape(jax.grad(run, (0, 1, 2)), shape(group), shape(1), shape(1), mask)
    except (RuntimeError, NotImplementedError, ValueError) as e:
        return str(e).removesuffix(".")
    return ""


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None = None,
    *,
    windows: tuple[int, ...] = (),
    window: jax.Array | None = None,
    scalar: float | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention as `alignax.models.attention.attention` computes it, by the splash kernel of TPUs; padding may stand anywhere in a row.

    Real tokens are one segment and padding is another; a token sees the earlier tokens of its own segment. Rows are padded to whole blocks.

    Args:
      q: [R, T, H, h] queries.
      k: [R, T, KV, h] keys.
      v: [R, T, KV, h] values.
      mask: [R, T] bool, True for real tokens.
      mesh: the mesh that the arrays are sharded over; None for one device.
      windows: the sliding windows of the model's layers, which the kernel needs at compile time for its masks; (): no layer has one.
      window: [] int, the window of this layer, one of `windows`; None if all layers have the same.
      scalar: as in `attention`.
      cap: as in `attention`.
      interpret: whether to interpret the kernel, which is slow but works on any platform; for tests.

    Returns:
      [R, T, H, h]; at padding, the attention of padding to padding.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # imported here, since it takes 0.1 s

    T, h, block = q.shape[1], q.shape[3], block_size(q.shape[1])
    behind = -T % block
    tiles: Any = (block,) * 8  # one size for the forward pass and both kernels of the backward pass

    def rows(window: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        shape, heads = (T + behind, T + behind), q.shape[2]  # of this device
        one = pallas.LocalMask(shape, (window - 1, 0), 0) if window else pallas.CausalMask(shape)
        options: Any = {"block_sizes": pallas.BlockSizes(*tiles), "attn_logits_soft_cap": cap, "interpret": interpret}
        options["residual_checkpoint_name"] = KEPT
        kernel: Any = pallas.make_splash_mha(pallas.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, **options)
        whole = lambda x: jnp.pad(x, ((0, 0), (0, behind), (0, 0), (0, 0))).swapaxes(1, 2)  # [R, heads, T', h]
        segment = jnp.pad(mask, ((0, 0), (0, behind))).astype(jnp.int32)
        scaled = (q.astype(jnp.float32) / math.sqrt(scalar or h)).astype(q.dtype)  # the kernel does not scale
        out: Any = jax.vmap(kernel)(whole(scaled), whole(k), whole(v), pallas.SegmentIds(segment, segment))
        return out.swapaxes(1, 2)[:, :T]

    return _on_mesh(rows, mesh, windows, window, q, k, v, mask)


def block_size(T: int) -> int:
    """The largest of `BLOCKS` that pads rows of T tokens by at most a quarter more than whole tiles of 128 do."""
    padded = lambda block: -(-T // block) * block
    return next(block for block in BLOCKS if padded(block) <= 1.25 * padded(128))


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None = None,
    *,
    windows: tuple[int, ...] = (),
    window: jax.Array | None = None,
    scalar: float | None = None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Attention as `alignax.models.attention.attention` computes it, by the cuDNN kernel of NVIDIA GPUs; padding stands at the end of rows.

    The kernel gets the lengths of the rows, and no mask in memory; `right_padded` moves the tokens of a row to its front. It does not
    work under a `vmap`, which trains the members of an ensemble together (jax 0.10.2).

    Args:
      q: [R, T, H, h] queries, bfloat16 or float16.
      k: [R, T, KV, h] keys.
      v: [R, T, KV, h] values.
      mask: [R, T] bool, True for real tokens, which come first.
      mesh: as in `splash`.
      windows: as in `splash`.
      window: as in `splash`.
      scalar: as in `attention`.
      implementation: that of `jax.nn.dot_product_attention`; "xla" computes the same on any platform, for tests.

    Returns:
      [R, T, H, h]; 0 for padding.
    """
    scale = 1 / math.sqrt(scalar or q.shape[3])

    def rows(window: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        # The kernel may leave anything at padding, in values and gradients: `real` makes it 0. A row without a token gets one of zeros.
        real = lambda x: jnp.where(mask[:, :, None, None], x, jnp.zeros((), x.dtype))
        lengths = jnp.maximum(mask.sum(axis=1, dtype=jnp.int32), 1)
        options: Any = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "implementation": implementation}
        around = (window - 1, 0) if window else None
        out = jax.nn.dot_product_attention(real(q), real(k), real(v), scale=scale, is_causal=True, local_window_size=around, **options)
        return real(out)

    return _on_mesh(rows, mesh, windows, window, q, k, v, mask)


def right_padded(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order [R, T] that moves the real tokens of each row to its front, without changing their sequence; and the inverse order."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def attend(
    kernel: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None = None,
    *,
    windows: tuple[int, ...] = (),
    window: jax.Array | None = None,
    scalar: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention of padded rows by a kernel that `chosen` gave: "xla", "splash" or "cudnn"; for the arguments see `splash`."""
    if kernel == "splash":
        return splash(q, k, v, mask, mesh, windows=windows, window=window, scalar=scalar, cap=cap)
    if kernel == "cudnn":
        return cudnn(q, k, v, mask, mesh, windows=windows, window=window, scalar=scalar)
    return attention(q, k, v, mask, window=window, scalar=scalar, cap=cap)


def _on_mesh(rows: Callable, mesh: Mesh | None, windows: tuple[int, ...], window: jax.Array | None, *x: jax.Array) -> jax.Array:
    """`rows(window, q, k, v, mask)` with a static window, on each device's own rows and heads.

    If layers have different windows, the program holds a kernel for each window, and a layer runs the kernel of its own window.
    """
    T, KV = x[1].shape[1:3]
    every = sorted({0 if w >= T else w for w in windows}) or [0]  # a window as long as the row hides nothing

    def run(window: jax.Array, *x: jax.Array) -> jax.Array:
        if len(every) == 1:
            return rows(every[0], *x)
        at = jnp.searchsorted(jnp.asarray(every), jnp.where(window >= T, 0, window))
        return jax.lax.switch(at, [functools.partial(rows, w) for w in every], *x)

    layer = jnp.zeros((), jnp.int32) if window is None else window
    if mesh is None or mesh.size == 1:
        return run(layer, *x)
    heads = "heads" if KV % mesh.shape["tensor"] == 0 else None  # None: every device has all heads, if they cannot be divided
    split = lambda x: meshes.sharding(mesh, ("batch", None, heads, None)[: x.ndim], x.shape).spec
    specs: Any = tuple(map(split, x))
    return jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), *specs), out_specs=specs[0], check_vma=False)(layer, *x)
