"""Number formats, quantized tensors and the kernels that compute with them. Needs torch and triton only."""
