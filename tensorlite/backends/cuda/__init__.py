"""The GPU's side of the CuPy backend: CUDA kernels (*.cu), and what compiles, launches, captures and replays them.

Nothing here imports CuPy: `cupy_backend.py` hands its modules in.
"""
