"""Build the function "product" of a backend from one function for each kind of weight and of mask."""

from collections.abc import Callable

from torch import Tensor

from ..codes import Codes
from ..operands import Experts, Keep, KeepByTask, Weight


def product_by_kind(matrix: Callable, experts: Callable, codes: Callable, by_task: Callable) -> Callable[..., Tensor]:
    """Return "product" from functions for a matrix, for experts, for codes (keep may be None) and for masks by task.

    Each takes (a, weight, keep, bias, transposed).
    """

    def product(
        a: Tensor, weight: Weight, keep: Keep | KeepByTask | None, bias: Tensor | None, *, transposed: bool = False
    ) -> Tensor:
        """Compute a @ where(keep, weight, 0).T + bias, without the .T if transposed; see the reference."""
        if isinstance(keep, KeepByTask):
            assert isinstance(weight, Tensor), "a mask per row needs a dense matrix"
            return by_task(a, weight, keep, bias, transposed)
        if isinstance(weight, Codes):
            return codes(a, weight, keep, bias, transposed)
        assert keep is not None, "only quantised weights are multiplied without a mask"
        return (experts if isinstance(weight, Experts) else matrix)(a, weight, keep, bias, transposed)

    return product
