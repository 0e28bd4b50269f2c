"""timm's vision transformers with adaptive token sampling."""
