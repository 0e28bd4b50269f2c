"""Data sets, transforms, batch samplers, and the loader of a config."""

from ats.datasets.base import Draw, Sample
from ats.datasets.build import build_dataset, build_loader, build_transform, input_shape, register_dataset
from ats.datasets.imagenet import ImageNet
from ats.datasets.kinetics import Kinetics
from ats.datasets.loader import EvalBatchSampler, Loader, TrainBatchSampler
from ats.datasets.transforms import eval_transform

__all__ = ["Draw", "EvalBatchSampler", "ImageNet", "Kinetics", "Loader", "Sample", "TrainBatchSampler"]
__all__ += ["build_dataset", "build_loader", "build_transform", "eval_transform", "input_shape", "register_dataset"]
