"""Denoising U-Nets of SD 1.x, SD 2.x and SDXL, and the students that were compressed from them."""
