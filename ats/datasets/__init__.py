"""Data sets, their transforms and samplers, and the loader that a config asks for."""

from ats.datasets.base import Sample
from ats.datasets.build import DATASETS, Loader, build_dataset, build_loader, build_transform, register_dataset
from ats.datasets.imagenet import ImageNet
from ats.datasets.sampler import Draw, EvalSampler, TrainSampler
from ats.datasets.transforms import eval_transform, train_transform

__all__ = [
    "DATASETS",
    "Draw",
    "EvalSampler",
    "ImageNet",
    "Loader",
    "Sample",
    "TrainSampler",
    "build_dataset",
    "build_loader",
    "build_transform",
    "eval_transform",
    "register_dataset",
    "train_transform",
]
