// Written from optimizer/custom_ops/declaration.py by
// python -c "from optimizer.custom_ops.header import header; print(header(), end='')"
#pragma once
#define OPTIMIZE_SPARSE_MATMUL_DECLARATION 5367202040804221558
