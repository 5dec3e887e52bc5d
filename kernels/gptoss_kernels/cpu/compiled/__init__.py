"""What becomes machine code: the files that import numba, and whose text names the folder where the code is kept."""
