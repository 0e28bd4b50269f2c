"""Entry points of torch.hub:

    model = torch.hub.load("<a clone>", "deit_small", source="local", checkpoint="deit_small_patch16_224-cd65a155.pth")
    model = torch.hub.load("<a clone>", "deit_small", source="local", pretrained=True, num_tokens=108)
    model = torch.hub.load("<a clone>", "timm_model", "deit3_small_patch16_224", source="local", blocks=range(3, 12))
    model = torch.hub.load("<a clone>", "config", "Kinetics/XViT_B16_16x16_K600_ATS.yaml", source="local")

With the repository on GitHub, `torch.hub.list` and `torch.hub.help` show them. The entry points of networks take

* `pretrained`: download the released dense weights, if they can be downloaded (DeiT). Default: False.
* `checkpoint`: load this file of weights instead; the original releases load as they are.
* `dense`: build the network without ATS.
* `blocks`, `num_tokens`: ATS.BLOCKS and ATS.NUM_TOKENS. Default: the config's; `timm_model`: as `ats.patch`.
* `overrides`: any other config keys, [KEY, VALUE, ...].

They return a network on the CPU in evaluation mode, with random weights unless they are given some.
"""

import re as _re
import urllib.error as _urllib_error
from collections.abc import Callable as _Callable
from collections.abc import Iterable as _Iterable
from functools import partial as _partial
from pathlib import Path as _Path

import torch as _torch
from torch import nn as _nn

from ats.errors import UserError as _UserError

dependencies = ["torch", "torchvision", "timm", "fvcore", "safetensors", "yaml"]

_DEIT = "https://dl.fbaipublicfiles.com/deit/"
_CONFIGS = _Path(__file__).resolve().parent / "configs"


def config(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str = "",
    dense: bool = False,
    blocks: _Iterable[int] | None = None,
    num_tokens: float | list | None = None,
    overrides: _Iterable = (),
    _url: str = "",
) -> _nn.Module:
    """The network of a YAML file: a path, or a name in configs/."""
    from ats.checkpoint import load_weights
    from ats.config import load_config
    from ats.models import build_model

    pairs = list(overrides)
    if dense:
        pairs += ["ATS.ENABLE", False]
    if blocks is not None:
        pairs += ["ATS.ENABLE", True, "ATS.BLOCKS", list(blocks)]
    if num_tokens is not None:
        pairs += ["ATS.NUM_TOKENS", num_tokens]
    if pretrained and checkpoint:
        raise _UserError("Give pretrained=True or checkpoint=FILE, not both.")
    if pretrained and not _url:
        raise _UserError(f"{name} has no weights that can be downloaded. Give checkpoint=FILE.")
    model = build_model(load_config(_CONFIGS / name if (_CONFIGS / name).is_file() else name, pairs))
    if pretrained:
        checkpoint = _download(_url)
    if checkpoint:
        load_weights(model, checkpoint)
    return model.eval()


def timm_model(
    name: str,
    *,
    blocks: _Iterable[int] | None = None,
    num_tokens: float | list = 1.0,
    pretrained: bool = False,
    checkpoint: str = "",
    **kwargs: object,
) -> _nn.Module:
    """timm's model `name` with ATS (`ats.patch`). `pretrained` loads timm's weights; `kwargs` go to timm."""
    import timm

    from ats.checkpoint import load_weights
    from ats.plugin.patch import patch

    model = patch(timm.create_model(name, pretrained=pretrained, **kwargs), blocks=blocks, num_tokens=num_tokens)
    if checkpoint:
        load_weights(model, checkpoint)
    return model.eval()


def _download(url: str) -> str:
    """Download `url` to torch.hub's folder, unless it is there, and check the SHA-256 prefix in the file's name."""
    path = _Path(_torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _torch.hub.download_url_to_file(url, str(path), hash_prefix=_re.search(r"-([0-9a-f]{8,})\.", path.name)[1])
        except _urllib_error.URLError as error:
            raise _UserError(f"{url} cannot be downloaded: {error.reason}. Give checkpoint=FILE.") from error
    return str(path)


def _entry_point(name: str, what: str, url: str = "") -> _Callable[..., _nn.Module]:
    entry_point = _partial(config, name, _url=url)
    entry_point.__doc__ = f"{what}, configs/{name}. hubconf.py describes the arguments."
    return entry_point


deit_tiny = _entry_point(
    "ImageNet/DeiT_Ti.yaml", "DeiT-Ti with ATS in blocks 3 to 11", _DEIT + "deit_tiny_patch16_224-a1311bcf.pth"
)
deit_small = _entry_point(
    "ImageNet/DeiT_S.yaml", "DeiT-S with ATS in blocks 3 to 11", _DEIT + "deit_small_patch16_224-cd65a155.pth"
)
deit_base = _entry_point(
    "ImageNet/DeiT_B.yaml", "DeiT-B with ATS in blocks 3 to 11", _DEIT + "deit_base_patch16_224-b5f2ef4d.pth"
)
cvt_13 = _entry_point("ImageNet/CvT_13_ATS.yaml", "CvT-13 with ATS in its last stage")
cvt_21_384 = _entry_point("ImageNet/CvT_21_384_ATS.yaml", "CvT-21 at 384 pixels with ATS in its last stage")
psvit_b18 = _entry_point("ImageNet/PSViT_B_18_ATS.yaml", "PS-ViT-B/18 with ATS")
mvitv2_small = _entry_point("ImageNet/MViTv2_S_ATS.yaml", "MViTv2-S on images with ATS")
xvit_b16 = _entry_point("Kinetics/XViT_B16_16x16_K600_ATS.yaml", "X-ViT-B/16 of 16 frames, Kinetics-600, with ATS")
timesformer = _entry_point(
    "Kinetics/TimeSformer_divST_8x32_224_ATS.yaml", "TimeSformer, divided attention, 8 frames, with ATS"
)
mvit_base_16x4 = _entry_point("Kinetics/MViTv1_B_16x4_ATS.yaml", "MViT-B 16x4, Kinetics-400, with ATS")
