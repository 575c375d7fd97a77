"""A jitted function together with the shapes of its arguments: it can be checked and compiled before any array exists."""

from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments."""

    call: Any
    arguments: tuple[Any, ...]  # shapes, types and shardings

    def shapes(self) -> Any:
        """The shapes of the function's results. The function is traced; nothing is compiled."""
        return jax.eval_shape(self.call, *self.arguments)

    def traced(self) -> Any:
        """The function traced on its arguments, with its `jaxpr`; nothing is compiled."""
        return self.call.trace(*self.arguments)

    def compiled(self, platform: str) -> Any:
        """The program compiled for a platform, with `memory_analysis()` and `as_text()`. No array is made.

        Do not use its FLOP count, which counts the body of a loop only once, but `alignax.hlo`.

        Raises:
          jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the program does not fit into the memory of a TPU.
        """
        return self.traced().lower(lowering_platforms=(platform,)).compile()
