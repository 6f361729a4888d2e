"""The mean output error in closed form: what the bias has to take up.

    delta = E[W x] - E[V q(x)] = W E[x] - V E[q(x)]

(DFQ: Nagel et al., arXiv 1906.04721, section 4.2; here with the means of sampled inputs.)
"""

from __future__ import annotations

import numpy as np

from onnx_lwdf.solvers.problem import F64


def mean_correction(weight: F64, stored: F64, mean: F64, stored_mean: F64) -> F64:
    """What to add to the bias, [groups, out]. weight, stored [groups, out, in]; the means [groups, in]."""
    return np.asarray(np.einsum("goi,gi->go", weight, mean) - np.einsum("goi,gi->go", stored, stored_mean))
