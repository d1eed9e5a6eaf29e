"""Parts of an attention spelled out, as ONNX text."""

from __future__ import annotations

# Two heads of size 4; B = S = T = 3 when executed.
CONSTANTS = (
    "int64[4] heads = {0, 0, 2, 4}, int64[4] group = {0, 0, 1, 4}, int64[3] flat = {0, 0, 8}, "
    "int64[1] two = {2}, int64[5] wide = {1, 1, 2, 1, 1}, int64[4] many = {0, 2, -1, 4}, "
    "float half = {0.5}, float four = {4.0}, float zero = {0.0}, float cap = {3.0}, "
    "float low = {-3.4028235e38}, float some = {-10000.0}, "
    "bool[3,3] diagonal = {1, 0, 0, 0, 1, 0, 0, 0, 1}, bool[1,1,1,3] first = {1, 0, 0}"
)
INPUTS = "float[B,S,8] x, float[B,S,8] u, float[B,S,8] v"
HEADS = (
    "xr = Reshape(x, heads)  q = Transpose<perm = [0, 2, 1, 3]>(xr)  "
    "ur = Reshape(u, heads)  k = Transpose<perm = [0, 2, 1, 3]>(ur)  "
    "vr = Reshape(v, heads)  w = Transpose<perm = [0, 2, 1, 3]>(vr)"
)
TURNED = "kt = Transpose<perm = [0, 1, 3, 2]>(k)"
SCORES = "s = MatMul(q, kt)"
BACK = "ot = Transpose<perm = [0, 2, 1, 3]>(o)  y = Reshape(ot, flat)"
END = f"p = Softmax<axis = -1>(s2)  o = MatMul(p, w)  {BACK}"
GUARDED = (
    "p0 = Softmax<axis = -1>(s2)  bad = IsNaN(p0)  p = Where(bad, zero, p0)  "
    f"o = MatMul(p, w)  {BACK}"
)
CACHE = "ka = Concat<axis = -2>(pk, k)  wa = Concat<axis = 2>(pv, w)"
CACHE_INPUTS = f"{INPUTS}, float[B,2,P,4] pk, float[B,2,P,4] pv"
CACHE_OUTPUTS = "float[B,S,8] y, float[B,2,T,4] ka, float[B,2,T,4] wa"
