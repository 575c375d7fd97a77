"""A jitted function with the shapes that it is called with: it can be checked and compiled before there is an array."""

from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments."""

    call: Any
    arguments: tuple[Any, ...]  # shapes, types and shardings

    def shapes(self) -> Any:
        """Shapes of what the function returns. The function is traced; nothing is compiled."""
        return jax.eval_shape(self.call, *self.arguments)

    def compiled(self, platform: str) -> Any:
        """The program compiled for a platform, with `memory_analysis()` and `as_text()`. No array is made.

        Its FLOP count is of no use: a loop's body is counted once.

        Raises:
          jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, where the memory of a TPU does not hold the program.
        """
        return self.call.trace(*self.arguments).lower(lowering_platforms=(platform,)).compile()
