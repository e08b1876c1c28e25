"""The equations of a traced program."""

from collections.abc import Iterator

import jax
import jax.extend


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All equations, those of loops, branches and functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def precisions(function, *args) -> set:
    """Precisions of all matrix products of a function."""
    products = [e for e in equations(jax.make_jaxpr(function)(*args).jaxpr) if e.primitive.name == "dot_general"]
    assert products
    return {precision for product in products for precision in product.params["precision"] or (None,)}
