"""Batch methods, each a small file; `base` says what one is."""

from dbjax.sandblaster.methods.base import Method as Method
from dbjax.sandblaster.methods.conjugate_gradient import (
    ConjugateGradient as ConjugateGradient,
)
from dbjax.sandblaster.methods.gradient_descent import (
    GradientDescent as GradientDescent,
)
from dbjax.sandblaster.methods.lbfgs import LBFGS as LBFGS
from dbjax.sandblaster.methods.projected import OWLQN as OWLQN
from dbjax.sandblaster.methods.projected import BoxLBFGS as BoxLBFGS
