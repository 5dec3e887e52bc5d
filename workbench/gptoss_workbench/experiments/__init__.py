"""Experiments: functions from a model and values to labelled arrays (xarray). They hold no HTML and draw nothing."""
