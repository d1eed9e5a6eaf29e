// Written by `python -m optimizer.custom_ops`; do not edit.
#pragma once
#define OPTIMIZE_SPARSE_MATMUL_DECLARATION 7335198711654338036
