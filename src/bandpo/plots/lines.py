"""Lines with as few points as the eye needs: a drawing in the docs stays small."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]


def thin(x: Any, y: Any, width: float, height: float, tolerance: float = 5e-4) -> Points:
    """Return the points of a line that are not within a tolerance of the line through the others (Douglas-Peucker).

    Args:
        x: abscissae, (n,).
        y: ordinates, (n,).
        width: of the axes.
        height: of the axes.
        tolerance: as a share of the axes.

    Returns:
        Points, (m, 2), the first and the last among them.
    """
    points = np.stack([np.asarray(x, float) / width, np.asarray(y, float) / height], -1)
    kept, open_ = {0, len(points) - 1}, [(0, len(points) - 1)]
    while open_:
        first, last = open_.pop()
        if last - first < 2:
            continue
        along, each = points[last] - points[first], points[first + 1 : last] - points[first]
        length = float(np.hypot(*along))
        away = np.abs(along[0] * each[:, 1] - along[1] * each[:, 0]) / length if length else np.hypot(*each.T)
        if away.max() > tolerance:
            middle = first + 1 + int(away.argmax())
            kept.add(middle)
            open_ += [(first, middle), (middle, last)]
    return points[sorted(kept)] * (width, height)


def crossings(x: Any, y: Any, z: Any, width: float, height: float) -> list[Points]:
    """Return the lines along which an array crosses 0.

    Args:
        x: abscissae, (columns,).
        y: ordinates, (rows,).
        z: (rows, columns); NaN where there is nothing.
        width: of the axes.
        height: of the axes.

    Returns:
        Lines as points, (m, 2) each.
    """
    from contourpy import contour_generator

    z = np.ma.masked_invalid(np.asarray(z))
    lines: Any = contour_generator(np.asarray(x), np.asarray(y), z).lines(0.0)  # of the default line type
    return [thin(line[:, 0], line[:, 1], width, height) for line in lines]
