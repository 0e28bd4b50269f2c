"""ATS in a timm model you already have, with one line:

    model = timm.create_model("deit_small_patch16_224", pretrained=True)
    ats.patch(model, blocks=range(3, 12), num_tokens=197)

The model keeps its class, weights and state-dict keys; its blocks compute on ragged tokens (`models/ats_block.py`).
Only what is
understood exactly is accepted: timm's `VisionTransformer` with plain pre-norm blocks and a CLS read-out (ViT, DeiT,
    DeiT-III, DINO,
DINOv2 with and without registers, CLIP's and MAE's encoders). Everything else is refused by name rather than computed
differently.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.ats_block import ATSBlock, insert_ats, run_blocks
from ats.sampling import plan_samplers
from ats.tokens import KeptTokens


class RaggedBlocks(nn.Sequential):
    """A model's blocks in a row, from the first ATS block on over ragged tokens.

    Attributes:
        last: the tokens each ATS block kept in the last forward pass.
    """

    def __init__(self, blocks: nn.Sequential, num_prefix_tokens: int) -> None:
        super().__init__(*blocks)
        self.num_prefix_tokens = num_prefix_tokens
        self.last: list[KeptTokens] = []

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C] with zeros where a token was dropped."""
        tokens, self.last = run_blocks(self, x, num_prefix_tokens=self.num_prefix_tokens)
        return tokens.to_grid()


def patch(
    model: nn.Module,
    *,
    blocks: Sequence[int],
    num_tokens: int | float | Sequence[int | float] = 1.0,
    sampler: str = "inverse_transform",
    score: str = "cls_attention_value_norm",
    rule: str = "official",
    min_tokens: int = 8,
    seed: int = 0,
) -> nn.Module:
    """Put ATS into `blocks` of a timm VisionTransformer, in place; `model.blocks.last` tells what the last batch kept.

    Args:
        blocks, num_tokens, sampler, score, rule, min_tokens, seed: as the config keys ATS.*.

    Returns:
        The same model object.

    Raises:
        UserError: the model is not understood (class and reason), or a setting is out of range.
    """
    reason = refusal(model)
    if reason:
        raise UserError(f"ats.patch cannot take {type(model).__name__}: {reason}.")
    samplers = plan_samplers(
        depth=len(model.blocks),
        blocks=blocks,
        num_tokens=num_tokens,
        num_prefix_tokens=model.num_prefix_tokens,
        min_tokens=min_tokens,
        sampler=sampler,
        score=score,
        rule=rule,
        seed=seed,
    )
    insert_ats(model.blocks, samplers)
    model.blocks = RaggedBlocks(model.blocks, model.num_prefix_tokens)
    return model


def refusal(model: nn.Module) -> str:
    """Why `patch` does not take this model; "" if it does."""
    if type(model) is not VisionTransformer:
        return "only timm.models.vision_transformer.VisionTransformer is understood"
    if any(isinstance(block, ATSBlock) for block in model.blocks):
        return "it is patched already"
    if model.cls_token is None or model.global_pool != "token":
        return f"it reads out by global_pool={model.global_pool!r}, not by a CLS token"
    if not isinstance(model.patch_drop, nn.Identity):
        return "patch_drop removes tokens of its own"
    for index, block in enumerate(model.blocks):
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention:
            return f"block {index} is a {type(block).__name__} with {type(attn).__name__}"
        if attn.gate is not None or not isinstance(attn.norm, nn.Identity):
            return f"the attention of block {index} is gated or normalised after A v"
        if type(attn.qkv) is not nn.Linear:
            return f"blocks.{index}.attn.qkv is a {type(attn.qkv).__name__}, not a Linear"
    return ""
