"""The arithmetic of the workbench: MXFP4, expert matmul, attention with sinks. It knows no model."""
