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

    def compiled(self, platform: str) -> Any:
        """The program compiled for a platform, with `memory_analysis()` and `as_text()`. No array is made.

        Do not use its FLOP count: it counts the body of a loop only once.

        Raises:
          jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, if the program does not fit into the memory of a TPU.
        """
        return self.call.trace(*self.arguments).lower(lowering_platforms=(platform,)).compile()
