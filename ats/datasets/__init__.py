"""Data sets, their transforms and samplers, and the loader that a config asks for."""

from ats.datasets.base import Sample
from ats.datasets.build import (
    DATASETS,
    Loader,
    build_dataset,
    build_loader,
    build_transform,
    input_shape,
    register_dataset,
)
from ats.datasets.imagenet import ImageNet
from ats.datasets.kinetics import ClipSampling, Kinetics
from ats.datasets.sampler import Draw, EvalSampler, TrainSampler
from ats.datasets.transforms import eval_transform, train_transform

__all__ = [
    "DATASETS",
    "ClipSampling",
    "Draw",
    "EvalSampler",
    "ImageNet",
    "Kinetics",
    "Loader",
    "Sample",
    "TrainSampler",
    "build_dataset",
    "build_loader",
    "build_transform",
    "eval_transform",
    "input_shape",
    "register_dataset",
    "train_transform",
]
