from vmamba_mm.ops.points.augment import AUGMENTS
from vmamba_mm.ops.points.hilbert import CURVES, Curve, curve_order, hilbert_code
from vmamba_mm.ops.points.sampling import (
    chamfer_distance,
    farthest_points,
    group_points,
    interpolate_points,
    nearest_points,
    take_points,
)

__all__ = ['AUGMENTS', 'CURVES', 'Curve', 'chamfer_distance', 'curve_order',
           'farthest_points', 'group_points', 'hilbert_code',
           'interpolate_points', 'nearest_points', 'take_points']
