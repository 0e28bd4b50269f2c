"""MViT v1 and v2 with adaptive token sampling."""
