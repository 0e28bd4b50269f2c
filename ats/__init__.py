"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022) for vision transformers."""

__version__ = "0.1.0"
