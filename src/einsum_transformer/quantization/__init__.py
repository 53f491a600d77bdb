"""Quantization with a calibration text: GPTQ and AWQ."""
