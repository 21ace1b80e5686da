"""What is learnt from data: calibration text, block-by-block capture, observers, and the use made of them."""
