"""How alike two pictures are to an eye, without packages that numpy does not bring."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

# Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural similarity, IEEE
# Transactions on Image Processing 13 (2004), section III-C: a Gaussian window of 11 pixels and a standard deviation of
# 1.5, K1 = 0.01, K2 = 0.03, L = 255.
WINDOW = 11
DEVIATION = 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(found: Image.Image, expected: Image.Image) -> float:
    """Return the mean structural similarity of two pictures of one size, averaged over red, green and blue.

    Only windows that lie inside the pictures count, as in the authors' program.

    Args:
        found: A picture, at least 11 pixels wide and high.
        expected: The other.

    Returns:
        At most 1, which identical pictures have.
    """
    x, y = (np.asarray(image.convert("RGB"), np.float64) for image in (found, expected))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variances = _blurred(x * x) - mean_x**2 + _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return float((luminance * (2 * covariance + C2) / (variances + C2)).mean())


def _blurred(x: np.ndarray) -> np.ndarray:
    """[height, width, 3] -> weighted means of all windows, [height - 10, width - 10, 3]."""
    distance = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(distance**2) / (2 * DEVIATION**2))
    weights /= weights.sum()
    rows = sliding_window_view(x, WINDOW, axis=0) @ weights
    return sliding_window_view(rows, WINDOW, axis=1) @ weights
